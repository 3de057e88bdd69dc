"""The Pallas kernel against plain JAX, interpreted on a CPU; and what is asked of a GPU's compiler."""

import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from eqx_dynloss_kernels import launch, plain, triton, weighted_xent
from jax.flatten_util import ravel_pytree
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from eqx_dynloss.landscape import hessian_spectrum

from ..helpers import tree_allclose, undecorated
from .test_weighted_xent import by_formula, problem

OPTIONS = {  # each with the dtypes that it is tried with
    "plain": ({}, ["float16"]),
    "everything": ({"label_smoothing": 0.2, "z_loss": 0.01, "where": True}, ["float32", "bfloat16"]),
}


def inputs(num_rows, num_classes, groups, dtype, where, seed=0):
    logits, labels, _, _ = problem((num_rows,), num_classes, seed)
    rng = np.random.RandomState(seed + 1)
    weights = rng.uniform(0, 2, (groups, num_classes))
    mask = jnp.asarray(rng.rand(num_rows) < 0.7) if where else None
    return jnp.asarray(logits, dtype), jnp.asarray(labels), mask, jnp.asarray(weights, jnp.float32)


def check_against_plain(args, options):
    """Rows in groups, as the kernel takes them, against one group at a time."""
    logits, labels, mask, weights = args
    groups = len(weights)
    split: Any = lambda x: None if x is None else x.reshape(groups, -1, *x.shape[1:])
    by_group = [0 if x is not None and x.ndim else None for x in options]
    one_group = jax.vmap(plain.forward, (0, 0, None if mask is None else 0, 0, *by_group))

    @jax.jit
    def of_both(logits, labels, mask, weights, *options):
        ours = triton.forward(logits, labels, mask, weights, *(x if x is None else x.reshape(-1) for x in options))
        return ours, one_group(split(logits), split(labels), split(mask), weights, *options)

    for x, y in zip(*of_both(*args, *options), strict=True):
        assert tree_allclose(x, y.reshape(-1), rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("option, dtype", [(name, dtype) for name, (_, dtypes) in OPTIONS.items() for dtype in dtypes])
@pytest.mark.parametrize(
    "num_rows, num_classes, groups",
    [
        (1, 2, 1),
        (24, 3, 8),
        (65, 10, 1),  # a block of 64 rows and one row
        (66, 10, 3),  # a block across two groups
        (3, 1001, 3),
        (2, 8192, 2),  # the longest row that is held at once
        (2, 8193, 1),  # and the shortest that is not
        (3, 12289, 3),  # the fourth block has one column
    ],
)
def test_the_kernel_computes_what_plain_jax_computes(interpreted, num_rows, num_classes, groups, dtype, option):
    options = OPTIONS[option][0]
    args = inputs(num_rows, num_classes, groups, dtype, options.get("where", False))
    given = (options.get("label_smoothing"), options.get("z_loss"))
    check_against_plain(args, [None if value is None else jnp.asarray(value, jnp.float32) for value in given])


@pytest.mark.parametrize("offset", [0.0, -1e6, 1e4])
@pytest.mark.parametrize("order", ["ascending", "descending", "one at the end", "nothing until the end"])
def test_the_running_maximum_may_come_anywhere_in_a_long_row(interpreted, order, offset):
    ramp = np.linspace(-100, 100, 20000)
    row = {
        "ascending": ramp,
        "descending": ramp[::-1],
        "one at the end": np.where(np.arange(20000) == 19999, 300.0, ramp),
        "nothing until the end": np.where(np.arange(20000) < 19990, -np.inf, 1.0),
    }[order]
    logits = np.stack([row, row, row]).astype(np.float32) + np.float32(offset)
    labels, w = np.array([0, 19999, 9999], np.int32), np.ones(20000)
    loss, total, shift = triton.forward(
        jnp.asarray(logits), jnp.asarray(labels), None, jnp.ones((1, 20000)), None, None
    )
    expected, lse, _, _ = by_formula(logits, labels, w, 0, np.ones(3))
    assert tree_allclose(loss, expected, rtol=3e-6, same_dtype=False)
    assert tree_allclose(jnp.log(total) + shift, lse, rtol=3e-6, same_dtype=False)


@pytest.mark.parametrize("filling", [np.nan, np.inf, -np.inf])
def test_what_lies_under_the_mask_does_not_matter(interpreted, filling):
    logits, labels, _, w = inputs(8, 100, 1, "float32", False)
    mask = jnp.arange(8) % 2 == 0
    spoilt = jnp.where(mask[:, None], logits, filling)
    labels = jnp.where(mask, labels, -7)

    def run(x, w):
        loss, lse = weighted_xent(x, labels, w, where=mask, label_smoothing=0.1, z_loss=0.1, implementation="pallas")
        return jnp.sum(loss) + jnp.sum(lse), (loss, lse)

    (_, (loss, lse)), gradients = jax.value_and_grad(run, (0, 1), has_aux=True)(spoilt, w[0])
    (_, expected), expected_gradients = jax.value_and_grad(run, (0, 1), has_aux=True)(
        jnp.where(mask[:, None], logits, 0), w[0]
    )
    assert tree_allclose((loss, lse), expected) and not loss[1::2].any() and not lse[1::2].any()
    assert tree_allclose(gradients, expected_gradients) and not gradients[0][1::2].any()


@pytest.mark.parametrize(
    "num_rows, num_classes, expected",
    [
        (4096, 1, (512, 1, 1)),
        (4096, 10, (32, 16, 1)),
        (3, 10, (4, 16, 1)),
        (4096, 513, (1, 1024, 1)),
        (4096, 1025, (1, 2048, 2)),
        (4096, 8192, (1, 8192, 8)),
        (4096, 8193, (1, 4096, 4)),
        (64, 262144, (1, 4096, 4)),
    ],
)
def test_launch(num_rows, num_classes, expected):
    assert launch.launch(num_rows, num_classes) == expected


# What is asked of a GPU's compiler, seen without one.


def struct(shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def lowered_for_cuda(function, *args):
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def launches(text):
    """Of every kernel call: its number of programs, and the shape and dtype of its logits."""
    calls = [line for line in text.splitlines() if "custom_call @__gpu$xla.gpu.triton" in line]
    assert all('name = "weighted_xent"' in line for line in calls)
    grids = [int(re.search(r"grid_x = (\d+)", line)[1]) for line in calls]  # pyright: ignore[reportOptionalSubscript]
    logits = [max(re.findall(r"tensor<(\d+x\d+x\w+)>", line), key=len) for line in calls]
    return list(zip(grids, logits, strict=True))


def xent(implementation=None, **options):
    def loss(x, y, w):
        return weighted_xent(x, y, w, implementation=implementation, **options)[0]

    return loss


X, Y, W = struct((512, 1000)), struct((512,), "int32"), struct((1000,))
SEVERAL = struct((8, 512, 1000)), struct((8, 512), "int32"), struct((8, 1000))


@pytest.mark.parametrize("implementation", [None, "pallas"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1}])
def test_the_whole_forward_pass_is_one_launch(implementation, options):
    text = lowered_for_cuda(xent(implementation, **options), X, Y, W)
    assert launches(text) == [(512, "512x1000xf32")]
    assert "stablehlo.exponential" not in text  # nor is the plain path anywhere


@pytest.mark.parametrize(
    "transform, args, expected",
    [
        (lambda f: jax.value_and_grad(lambda *args: jnp.mean(f(*args))), (X, Y, W), "512x1000xf32"),
        (jax.vmap, SEVERAL, "4096x1000xf32"),
        (lambda f: jax.vmap(f, (0, 0, None)), (*SEVERAL[:2], W), "4096x1000xf32"),
        (
            lambda f: jax.vmap(jax.vmap(f, (0, 0, None)), (0, 0, 0)),
            (struct((2, 4, 512, 1000)), struct((2, 4, 512), "int32"), struct((2, 1000))),
            "4096x1000xf32",
        ),
        (
            lambda f: jax.vmap(jax.vmap(f), (0, 0, None)),
            (struct((2, 8, 512, 1000)), struct((2, 8, 512), "int32"), SEVERAL[2]),
            "8192x1000xf32",
        ),
        (lambda f: jax.vmap(jax.grad(lambda *args: jnp.mean(f(*args)))), SEVERAL, "4096x1000xf32"),
    ],
    ids=["grad", "vmap", "shared weights", "nested", "nested, shared weights", "vmap of grad"],
)
def test_mapped_axes_become_rows_of_one_launch(transform, args, expected):
    text = lowered_for_cuda(transform(xent()), *args)
    assert [logits for _, logits in launches(text)] == [expected]


def test_a_scan_launches_once_a_step():
    def losses(x, y, w):
        return jax.lax.scan(lambda c, x: (c + jnp.sum(jax.checkpoint(xent())(x, y, w)), None), jnp.zeros(()), x)[0]

    text = lowered_for_cuda(jax.grad(losses), struct((5, 512, 1000)), Y, W)
    assert {logits for _, logits in launches(text)} == {"512x1000xf32"}


@pytest.mark.parametrize(
    "num_rows, num_classes, fused",
    [
        (4096, 10, False),
        (65536, 10, True),
        (512, 64, True),
        (63, 16384, True),
        (95, 16385, False),
        (96, 16385, True),
        (1, 262144, False),
    ],
)
def test_none_takes_the_kernel_where_it_is_worth_it(num_rows, num_classes, fused):
    args = struct((num_rows, num_classes)), struct((num_rows,), "int32"), struct((num_classes,))
    assert bool(launches(lowered_for_cuda(xent(), *args))) == fused
    assert launches(lowered_for_cuda(xent("pallas"), *args))
    assert not launches(lowered_for_cuda(xent("xla"), *args))


def test_what_the_kernel_would_need_copies_for_is_left_to_xla():
    transposed = struct((512, 8, 1000)), struct((512, 8), "int32"), SEVERAL[2]
    for axes, args in [((None, None, 0), (X, Y, SEVERAL[2])), ((1, 1, 0), transposed)]:
        assert not launches(lowered_for_cuda(jax.vmap(xent(), axes), *args))
        assert launches(lowered_for_cuda(jax.vmap(xent("pallas"), axes), *args))


def test_float64_and_jax_without_triton_take_the_plain_path(x64, monkeypatch):
    double = struct(X.shape, "float64")
    assert not launches(lowered_for_cuda(xent(), double, Y, W))
    with pytest.raises(ValueError, match="float64"):
        jax.eval_shape(xent("pallas"), double, Y, W)
    monkeypatch.setattr(launch, "_has_triton", lambda: False)
    assert not launches(lowered_for_cuda(xent(), X, Y, W))
    with pytest.raises(ValueError, match="Triton"):
        jax.eval_shape(xent("pallas"), X, Y, W)


@pytest.mark.parametrize("jit", [False, True])
def test_on_a_cpu_the_kernel_is_refused_by_name_and_none_works(jit):
    args = jnp.zeros((64, 100)), jnp.zeros(64, int), jnp.ones(100)
    run = jax.jit if jit else lambda f: f
    with pytest.raises(ValueError, match="NVIDIA GPUs"):
        run(xent("pallas"))(*args)
    assert tree_allclose(run(xent())(*args), jnp.full(64, np.log(100.0), jnp.float32))
    compiled = jax.jit(xent()).lower(*args).compile().as_text()
    assert compiled and "gpu" not in compiled and " conditional(" not in compiled


def test_inside_shard_map_and_on_explicit_meshes():
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    rows = PartitionSpec("data")
    args = jnp.zeros((64, 100)), jnp.zeros(64, int), jnp.ones(100)
    for check_vma in (True, False):
        f = jax.shard_map(
            xent(), mesh=mesh, in_specs=(rows, rows, PartitionSpec()), out_specs=rows, check_vma=check_vma
        )
        gradient = jax.jit(jax.grad(lambda *args, f=f: jnp.mean(f(*args)), (0, 2)))(*args)
        assert tree_allclose(gradient, jax.grad(lambda *args: jnp.mean(xent("xla")(*args)), (0, 2))(*args))
    explicit = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(explicit):
        x, y = (jax.device_put(a, NamedSharding(explicit, rows)) for a in args[:2])
        gradient = jax.jit(jax.grad(lambda *args: jnp.mean(xent()(*args)), (0, 2)))(x, y, args[2])
        assert jax.typeof(gradient[0]).sharding.spec == PartitionSpec("data", None)
        with pytest.raises(ValueError, match="shard_map"):
            jax.eval_shape(xent("pallas"), x, y, args[2])


@pytest.mark.parametrize("axes", [(0, 0, 0), (0, 0, None), (None, None, 0), (None, 0, None), (0, None, 0), (1, 0, 0)])
def test_on_a_cpu_none_costs_what_plain_jax_costs(axes):
    size = lambda shape, axis: shape if axis is None else (*shape[:axis], 8, *shape[axis:])
    x, y, w = (struct(size(shape, axis)) for shape, axis in zip([(64, 100), (64,), (100,)], axes, strict=True))
    y = struct(y.shape, "int32")
    costs = []
    for implementation in (None, "xla"):
        losses = jax.vmap(xent(implementation), axes)
        total = jax.value_and_grad(lambda *args, f=losses: jnp.sum(f(*args)))
        costs.append(jax.jit(total).lower(x, y, w).compile().cost_analysis())
    ours, plain_jax = costs
    assert ours["transcendentals"] == plain_jax["transcendentals"]
    assert ours["bytes accessed"] <= 1.01 * plain_jax["bytes accessed"]


@pytest.mark.parametrize("platforms", [("cpu",), ("cpu", "cuda")])
@pytest.mark.parametrize("mapped", [False, True])
def test_export_with_symbolic_shapes(platforms, mapped):
    b = jax.export.symbolic_shape("b")[0]
    f = jax.vmap(lambda x, y: xent()(x, y, jnp.ones(100))) if mapped else lambda x, y: xent()(x, y, jnp.ones(100))
    shape = (b, 3) if mapped else (b,)
    exported = jax.export.export(jax.jit(f), platforms=platforms)(struct((*shape, 100)), struct(shape, "int32"))
    x, y = jnp.ones((5, *shape[1:], 100)), jnp.zeros((5, *shape[1:]), jnp.int32)
    assert tree_allclose(exported.call(x, y), jnp.full(y.shape, np.log(100.0), jnp.float32))


def test_export_for_several_platforms():
    allowed = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        exported = jax.export.export(jax.jit(xent()), platforms=("cpu", "cuda"), disabled_checks=allowed)(X, Y, W)
    loss = exported.call(jnp.ones((512, 1000)), jnp.zeros(512, jnp.int32), jnp.ones(1000))
    assert tree_allclose(loss, jnp.full(512, np.log(1000.0), jnp.float32))


def test_none_falls_back_where_the_kernel_cannot_be_lowered(monkeypatch):
    def broken(*_):
        raise NotImplementedError("the Triton backend is gone")

    monkeypatch.setattr(triton, "forward", broken)
    assert "stablehlo.exponential" in lowered_for_cuda(xent(), X, Y, W)
    with pytest.raises(NotImplementedError, match="gone"):
        lowered_for_cuda(xent("pallas"), X, Y, W)


def test_a_gpu_before_ampere_gets_plain_jax(monkeypatch):
    class T4:
        compute_capability = "7.5"

    monkeypatch.setattr(jax, "local_devices", lambda backend: [T4()])
    assert not launches(lowered_for_cuda(xent(), X, Y, W))


@pytest.mark.parametrize(
    "shapes, sentence",
    [
        (((64, 100), (64,), (200,)), "class_weights must hold one weight for each of the 100 classes, got shape"),
        (((64, 100), (63,), (100,)), "logits must have the batch shape of the labels plus one axis of classes, got"),
        (((64, 100), (64, 1), (100,)), "logits must have the batch shape of the labels plus one axis of classes, got"),
    ],
)
@pytest.mark.parametrize("implementation", [None, "xla", "pallas"])
def test_shapes_that_do_not_fit_are_refused_without_jaxtyping_too(shapes, sentence, implementation):
    x, y, w = shapes
    with pytest.raises(ValueError, match=sentence):
        undecorated(weighted_xent)(jnp.ones(x), jnp.zeros(y, int), jnp.ones(w), implementation=implementation)
    with pytest.raises(ValueError, match="where must have the batch shape"):
        undecorated(weighted_xent)(
            jnp.ones((64, 100)),
            jnp.zeros(64, int),
            jnp.ones(100),
            where=jnp.ones(1, bool),
            implementation=implementation,
        )


def test_numpy_arguments():
    x, y, w = np.ones((64, 100), np.float32), np.zeros(64, np.int32), np.ones(100, np.float32)
    for implementation in (None, "xla"):
        loss, _ = undecorated(weighted_xent)(x, y, w, implementation=implementation)
        assert tree_allclose(loss, jnp.full(64, np.log(100.0), jnp.float32))


def test_infinities_in_long_rows(interpreted):
    x = np.zeros((3, 9000), np.float32)
    x[0, 3], x[0, 5000] = np.inf, 200.0
    x[1, 3], x[1, 5000] = -3e38, 3e38
    x[2, :5000] = -np.inf
    w = np.ones((1, 9000), np.float32)
    w[0, :4096] = 0.0
    args, smoothing = (jnp.asarray(x), jnp.array([5000, 5000, 8999]), None), jnp.array([0.1])
    actual = triton.forward(*args, jnp.asarray(w), smoothing, None)
    expected = plain.forward(*args, jnp.asarray(w[0]), smoothing[0], None)
    # Of 4,904 equal terms, which a CPU adds up in lanes, eight or sixteen at a time, every sum rounds the same way.
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-4)
    logsumexps = (jnp.log(total) + shift for _, total, shift in (actual, expected))
    np.testing.assert_allclose(*logsumexps, rtol=1e-5)


@pytest.mark.parametrize("varying", ["logits", "labels", "weights"])
def test_inside_shard_map_any_argument_may_be_the_one_that_varies(varying):
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    specs = tuple(
        PartitionSpec("data") if varying == name else PartitionSpec() for name in ("logits", "labels", "weights")
    )
    args = jnp.ones((64, 100)), jnp.zeros(64, int), jnp.ones(100)
    out = PartitionSpec("data")
    f = jax.shard_map(xent(), mesh=mesh, in_specs=specs, out_specs=out)
    assert tree_allclose(jax.jit(f)(*args), jnp.full(64, np.log(100.0), jnp.float32))
    jax.eval_shape(jax.grad(lambda *args: jnp.sum(f(*args)), (0, 2)), *args)


def test_several_losses_of_the_same_logits_share_their_softmax():
    x, y, w = jnp.ones((64, 100)), jnp.zeros(64, int), jnp.ones((5, 100))
    losses = lambda x: jnp.sum(jax.vmap(xent(), (None, None, 0))(x, y, w))
    compiled = jax.jit(jax.grad(losses)).lower(x).compile().as_text() or ""
    assert "f32[5,64,100]" not in compiled.split("ENTRY")[1]
    text = jax.jit(jax.grad(losses)).lower(x).as_text()
    assert not [line for line in text.splitlines() if "stablehlo.exponential" in line and "5x64x100" in line]


@pytest.mark.parametrize("number", [np.float32, np.float64, np.asarray, jnp.asarray])
def test_options_may_be_numbers_of_any_kind(number):
    args = jnp.ones((4, 3)), jnp.zeros(4, int), jnp.ones(3)
    loss, _ = undecorated(weighted_xent)(*args, label_smoothing=number(0.25), z_loss=number(0.5))
    expected, _ = weighted_xent(*args, label_smoothing=0.25, z_loss=0.5)
    assert tree_allclose(loss, expected)


def test_with_several_devices_the_kernel_is_for_shard_map(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert not launches(lowered_for_cuda(xent(), X, Y, W))


def test_nothing_to_do():
    loss, lse = weighted_xent(jnp.zeros((0, 1000)), jnp.zeros(0, int), jnp.ones(1000), implementation="pallas")
    assert loss.shape == lse.shape == (0,)


def test_the_curvature_of_a_model_goes_through_the_kernel(interpreted):
    """Hessian-vector products by Lanczos, against the dense Hessian of the loss written out."""
    inputs, labels = jr.normal(jr.key(0), (12, 2)), jnp.arange(12) % 3
    model = eqx.nn.Linear(2, 3, key=jr.key(1))
    weights = jnp.array([0.5, 1.5, 1.0])

    def objective(model):
        return jnp.mean(weighted_xent(jax.vmap(model)(inputs), labels, weights, implementation="pallas")[0])

    def written_out(flat):
        logits = inputs @ flat[:6].reshape(3, 2).T + flat[None, 6:]
        return -jnp.mean(weights[labels] * jax.nn.log_softmax(logits)[jnp.arange(12), labels])

    spectrum = hessian_spectrum(objective, model, order=9, key=jr.key(2))
    dense = jnp.linalg.eigvalsh(jax.hessian(written_out)(ravel_pytree(model)[0]))
    assert tree_allclose(spectrum.eigenvalues[-1], dense[-1], rtol=1e-4)
