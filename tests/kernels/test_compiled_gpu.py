"""Facts about the loss as the real compiler for NVIDIA GPUs makes it, without a GPU. None of them is about speed."""

import functools as ft
import itertools

import jax
import jax.numpy as jnp
import pytest
from eqx_dynloss_kernels import weighted_xent
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.workloads import WORKLOADS

from ..helpers import slow
from . import deviceless, hlo
from .deviceless import NO_SPILLS, compile_for

pytestmark = [
    pytest.mark.usefixtures("fully_optimised"),
    pytest.mark.skipif(deviceless.obstacle() is not None, reason=deviceless.obstacle() or ""),
]

CLASSES = [3, 10, 1000, 1001, 32768, 50257, 262144]
DTYPES = ["float32", "bfloat16"]
GPUS = ["a100", "h100", "b200"]


def problem(shape, num_classes, dtype, *weights_shape):
    return (
        jax.ShapeDtypeStruct((*shape, num_classes), jnp.dtype(dtype)),
        jax.ShapeDtypeStruct(shape, jnp.int32),
        jax.ShapeDtypeStruct((*weights_shape, num_classes), jnp.float32),
    )


def loss(logits, labels, class_weights, **options):
    return weighted_xent(logits, labels, class_weights, **{"implementation": "pallas", **options})[0]


def value_and_grad(function):
    return jax.value_and_grad(lambda *args: jnp.mean(function(*args)))


def rows(num_classes):
    return 2**24 // num_classes


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_classes", CLASSES)
def test_the_forward_pass_is_one_kernel_that_reads_the_logits_once(num_classes, dtype, gpu):
    args = problem((rows(num_classes),), num_classes, dtype)
    compiled = compile_for(gpu, loss, *args, options=NO_SPILLS)
    assert [kernel.kind for kernel in hlo.kernels(compiled)] == ["pallas"]
    per_row = 4 * (1 + 3)  # a label, and three results; class weights are a rounding error from here on
    logits = args[0].size * args[0].dtype.itemsize
    assert hlo.memory_bytes(compiled) == pytest.approx(logits + per_row * rows(num_classes), rel=0.07)


@pytest.mark.parametrize(
    "gpu, dtype", [*itertools.product(["h100"], DTYPES), ("a100", "float32"), ("b200", "bfloat16")]
)
@pytest.mark.parametrize("num_classes", CLASSES)
def test_value_and_gradient_compile_without_spills_or_large_temporaries(num_classes, dtype, gpu):
    args = problem((rows(num_classes),), num_classes, dtype)
    compiled = compile_for(gpu, value_and_grad(loss), *args, options=NO_SPILLS)
    kinds = [kernel.kind for kernel in hlo.kernels(compiled)]
    assert kinds.count("pallas") == 1
    assert hlo.temporary_bytes(compiled) <= 40 * rows(num_classes) + 2**20  # numbers by row, never by logit
    if num_classes >= 1000:
        per_logit = hlo.memory_bytes(compiled) / args[0].size
        assert per_logit == pytest.approx(12 if dtype == "float32" else 6, rel=0.03)


@pytest.mark.parametrize("options", [["label_smoothing"], ["z_loss"], ["label_smoothing", "z_loss"]], ids=" ".join)
@pytest.mark.parametrize("dtype", [*DTYPES, slow("float16")])
@pytest.mark.parametrize("num_classes", [10, slow(1001), 8192, slow(50257)])
def test_every_option_compiles_into_the_same_one_kernel(num_classes, dtype, options):
    args = *problem((512,), num_classes, dtype), jax.ShapeDtypeStruct((512,), jnp.bool_)
    masked = lambda x, y, w, mask: loss(x, y, w, where=mask, **dict.fromkeys(options, 0.1))
    compiled = compile_for("h100", masked, *args, options=NO_SPILLS)
    assert [kernel.kind for kernel in hlo.kernels(compiled)] == ["pallas"]
    compile_for("h100", value_and_grad(masked), *args, options=NO_SPILLS)


@pytest.mark.parametrize("num_classes", [10, 1001, 50257])
def test_options_of_every_member_are_operands_of_the_one_kernel(num_classes):
    each = jax.ShapeDtypeStruct((8,), jnp.float32)
    args = *problem((8, 64), num_classes, "float32", 8), each, each
    members = jax.vmap(lambda x, y, w, smoothing, z: loss(x, y, w, label_smoothing=smoothing, z_loss=z))
    compiled = compile_for("h100", members, *args, options=NO_SPILLS)
    assert [kernel.kind for kernel in hlo.kernels(compiled)] == ["pallas"]
    compile_for("h100", jax.grad(lambda *args: members(*args).sum(), (0, 2, 3, 4)), *args, options=NO_SPILLS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_classes", [*CLASSES, 16, 1024])
def test_logits_are_loaded_16_bytes_at_a_time_where_every_row_starts_on_such_a_boundary(num_classes, dtype):
    args = problem((4096,), num_classes, dtype)
    kernels = deviceless.ptx("h100", loss, *args)
    widths = deviceless.load_widths(kernels["weighted_xent"])
    aligned = num_classes * jnp.dtype(dtype).itemsize % 16 == 0
    assert not aligned or widths[16] > 0
    assert aligned or max(widths) < 16 or num_classes <= 3  # the labels of a block of rows are vectors, too


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_classes", [3, 10, 100, 1001, 8193])
def test_members_with_every_option_do_not_spill(num_classes, dtype):
    args = *problem((8, 512), num_classes, dtype, 8), jax.ShapeDtypeStruct((8, 512), jnp.bool_)
    every = jax.vmap(lambda x, y, w, mask: loss(x, y, w, where=mask, label_smoothing=0.1, z_loss=0.1))
    compiled = compile_for("h100", every, *args, options=NO_SPILLS)
    assert [kernel.kind for kernel in hlo.kernels(compiled)] == ["pallas"]


@pytest.mark.parametrize("implementation", ["pallas", None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mapped_members_are_rows_of_one_launch(dtype, implementation):
    args = problem((8, 512), 1000, dtype, 8)
    compiled = compile_for("h100", jax.vmap(ft.partial(loss, implementation=implementation)), *args, options=NO_SPILLS)
    assert hlo.kernels(compiled) == [hlo.Kernel("weighted_xent", "pallas")]
    assert f"[{8 * 512},1000]" in (compiled.as_text() or "")


@pytest.mark.parametrize("implementation", ["pallas", None])
def test_inside_shard_map_the_logits_stay_where_they_are(implementation):
    mesh = deviceless.mesh("h100", data=8)
    sharded, whole = PartitionSpec("data"), PartitionSpec()
    args = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
        for x, spec in zip(problem((4096,), 1000, "float32"), (sharded, sharded, whole), strict=True)
    ]
    local = jax.shard_map(
        ft.partial(loss, implementation=implementation),
        mesh=mesh,
        in_specs=(sharded, sharded, whole),
        out_specs=sharded,
    )
    compiled = compile_for("h100", local, *args, options=NO_SPILLS)
    assert hlo.collectives(compiled) == []
    assert [kernel.kind for kernel in hlo.kernels(compiled)] == ["pallas"]
    compiled = compile_for("h100", value_and_grad(local), *args, options=NO_SPILLS)
    assert set(hlo.collectives(compiled)) <= {"all-reduce"}  # of the mean


@pytest.mark.parametrize("num_classes", [10, 1000, 32768])
def test_plain_jax_makes_no_float32_copy_of_bfloat16_logits(num_classes):
    args = problem((rows(num_classes),), num_classes, "bfloat16")
    compiled = compile_for("h100", value_and_grad(ft.partial(loss, implementation="xla")), *args)
    assert hlo.temporary_bytes(compiled) <= 40 * rows(num_classes) + 2**21
    if num_classes >= 1000:
        assert hlo.memory_bytes(compiled) / args[0].size == pytest.approx(8, rel=0.05)


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_hessian_vector_products_compile(implementation):
    args = problem((512,), 1000, "float32")

    def product(x, y, w):
        gradient = jax.grad(lambda x: jnp.mean(loss(x, y, w, implementation=implementation)))
        return jax.jvp(gradient, (x,), (x,))

    compiled = compile_for("h100", product, *args, options=NO_SPILLS)
    kinds = [kernel.kind for kernel in hlo.kernels(compiled)]
    assert kinds.count("pallas") == (implementation == "pallas")


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_what_none_chooses_compiles_for_every_workload(workload):
    members = () if workload.members is None else (workload.members,)
    for dtype in workload.dtypes:
        mean = lambda *args: jnp.mean(loss(*args, implementation=None))
        step = jax.value_and_grad(mean) if not members else jax.vmap(jax.value_and_grad(mean))
        args = problem(workload.on("gpu").batch, workload.classes, dtype, *members)
        compiled = compile_for("h100", step, *args, options=NO_SPILLS)
        assert hlo.temporary_bytes(compiled) <= 40 * args[1].size + 2**20
