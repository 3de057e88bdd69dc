"""The harness itself: what it reads off programs whose launches and traffic are plain to see."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import NamedSharding, PartitionSpec

from . import deviceless, hlo
from .deviceless import NO_SPILLS, compile_for
from .hlo import memory_bytes

pytestmark = [
    pytest.mark.usefixtures("fully_optimised"),
    pytest.mark.skipif(deviceless.obstacle() is not None, reason=deviceless.obstacle() or ""),
]

GPUS = ["a100", "h100", "b200"]
N = 2**20


def floats(*shape, sharding=None):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def ints(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def shifted(x, block, num_warps, name="shifted"):
    """Every block minus its maximum: a kernel that has to hold a block as a whole."""

    def kernel(x_ref, y_ref):
        block = plgpu.load(x_ref)
        plgpu.store(y_ref, block - jnp.max(block))

    spec = pl.BlockSpec((block,), lambda i: (i,))
    params = plgpu.CompilerParams(num_warps=num_warps, num_stages=1)
    call = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(x.size, block),),
        in_specs=[spec],
        out_specs=spec,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=params,
        name=name,
    )
    return call(x)


@pytest.mark.parametrize("gpu", GPUS)
def test_a_kernel_within_its_registers_passes_and_one_that_spills_does_not(gpu):
    compile_for(gpu, lambda x: shifted(x, 1024, 4), floats(N), options=NO_SPILLS)
    compile_for(gpu, lambda x: shifted(x, 65536, 4), floats(N))
    with pytest.raises(jax.errors.JaxRuntimeError, match="register spilling"):
        compile_for(gpu, lambda x: shifted(x, 65536, 4), floats(N), options=NO_SPILLS)


def test_spills_of_kernels_that_xla_wrote_count_too():
    def there_and_back(x):
        # A thread computes four results, and holds all that goes into them: 320 numbers, 80 in the other case.
        total = sum(x[i] for i in range(len(x)))
        for i in [*range(len(x)), *reversed(range(len(x)))]:
            total = jnp.maximum(total * x[i], 1)
        return total

    compile_for("h100", there_and_back, floats(20, N), options=NO_SPILLS)
    listed = hlo.kernels(compile_for("h100", there_and_back, floats(80, N)))
    assert [kernel.kind for kernel in listed] == ["loop fusion"]
    with pytest.raises(jax.errors.JaxRuntimeError, match="register spilling"):
        compile_for("h100", there_and_back, floats(80, N), options=NO_SPILLS)


def updated(x, i):
    return jax.lax.dynamic_update_slice(x, jnp.ones((2, 8)), (i, jnp.zeros_like(i)))


def looped(x):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x) * 2, None), x, length=10)[0]


def stacked(x):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x) * 2, x), x, length=10)


def branched(p, x):
    once = lambda x: shifted(x, 1024, 4)
    return jax.lax.cond(p, once, lambda x: once(once(x)), x)


TRAFFIC = {
    "one in, one out": (lambda x: x + 1, (floats(N),), 8 * N),
    "two in, one out": (lambda x, y: x * y, (floats(N), floats(N)), 12 * N),
    "one in, two out": (lambda x: (x + 1, x * 2), (floats(N),), 12 * N),
    "half precision": (lambda x: x + 1, (jax.ShapeDtypeStruct((N,), jnp.bfloat16),), 4 * N),
    "wider out than in": (lambda x: x.astype(jnp.float32), (jax.ShapeDtypeStruct((N,), jnp.bfloat16),), 6 * N),
    "a sum": (jnp.sum, (floats(N),), 4 * N),
    "row sums": (lambda x: jnp.sum(x, 1), (floats(1024, 1024),), 4 * N),
    "a transposed copy": (lambda x: x.T + 1, (floats(1024, 1024),), 8 * N),
    "a scalar spread out": (lambda x, s: x * s, (floats(N), floats()), 8 * N),
    "a row spread out": (lambda x, s: x * s[None], (floats(1024, 1024), floats(1024)), 8 * N),
    "a slice": (lambda x: x[: N // 4] + 1, (floats(N),), 2 * N),
    "two halves": (lambda x: x[: N // 2] * x[N // 2 :], (floats(N),), 6 * N),
    "a matrix product with itself": (lambda x: x @ x, (floats(1024, 1024),), 8 * N),
    "two passes": (lambda x: x - jnp.sum(x), (floats(N),), 12 * N),
    "a loop": (looped, (floats(N),), (1 + 10) * 8 * N),  # XLA copies its argument first
    # On top of the steps: the stack starts as zeros, and every state is copied into it.
    "a loop that stacks": (stacked, (floats(N),), (1 + 10) * 8 * N + 10 * (4 + 8) * N),
    "a conditional, by its dearer branch": (branched, (jax.ShapeDtypeStruct((), jnp.bool_), floats(N)), 16 * N),
    "a Pallas kernel": (lambda x: shifted(x, 1024, 4), (floats(N),), 8 * N),
}


@pytest.mark.parametrize("case", TRAFFIC)
def test_every_input_of_a_kernel_is_read_once_and_every_output_written_once(case):
    function, args, expected = TRAFFIC[case]
    assert memory_bytes(compile_for("h100", function, *args)) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    "function, args, few",
    [
        (lambda x, i: x.at[i].get(mode="clip"), (floats(N, 8), ints(16)), 16 * (4 + 2 * 8 * 4)),
        (lambda x, i: jax.lax.dynamic_slice(x, (i, jnp.zeros_like(i)), (2, 8)), (floats(N, 8), ints()), 4 + 2 * 16 * 4),
        (jax.jit(updated, donate_argnums=0), (floats(N, 8), ints()), 4 + 16 * 4),
        (jax.jit(lambda x, i: x.at[i].add(1), donate_argnums=0), (floats(N, 8), ints(16)), 16 * (4 + 2 * 8 * 4)),
    ],
    ids=["gather", "slice", "update", "scatter"],
)
def test_only_the_rows_in_use_count(function, args, few):
    assert memory_bytes(compile_for("h100", function, *args)) <= few + 8


def test_an_update_of_an_argument_that_is_not_donated_copies_it():
    assert memory_bytes(compile_for("h100", updated, floats(N, 8), ints())) == pytest.approx(64 * N, rel=0.01)


def test_a_loop_of_unknown_length_has_no_traffic_to_report():
    halved = lambda x: jax.lax.while_loop(lambda x: x[0] > 1, lambda x: x / 2, x)
    compiled = compile_for("h100", halved, floats(N))
    assert len(hlo.kernels(compiled)) >= 2
    with pytest.raises(ValueError, match="how often the loop"):
        memory_bytes(compiled)


def test_kernels_are_listed_in_order_with_their_kinds():
    def function(x, y):
        return jnp.sum(shifted(jnp.tanh(x), 1024, 4, name="mine")), y @ y

    square = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)
    listed = hlo.kernels(compile_for("h100", function, floats(N), square))
    kinds = [kernel.kind for kernel in listed]
    assert sorted(kinds) == ["input fusion", "input fusion", "loop fusion", "pallas", "triton fusion"]
    assert kinds.index("loop fusion") < kinds.index("pallas") < kinds.index("input fusion")
    assert [kernel.name for kernel in listed if kernel.kind == "pallas"] == ["mine"]


def test_a_convolution_is_a_call_of_cudnn():
    layout = ("NHWC", "HWIO", "NHWC")
    conv = lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=layout)
    compiled = compile_for("h100", conv, floats(8, 32, 32, 64), floats(3, 3, 64, 64))
    assert "__cudnn$convForward" in [kernel.kind for kernel in hlo.kernels(compiled)]


def test_what_loops_and_conditionals_launch_is_listed_once():
    kinds = [kernel.kind for kernel in hlo.kernels(compile_for("h100", looped, floats(N)))]
    assert kinds.count("loop fusion") == 2  # the step and the loop's counter
    kinds = [kernel.kind for kernel in hlo.kernels(compile_for("h100", stacked, floats(N)))]
    assert set(kinds) <= {"copy", "loop fusion", "custom fusion"}
    predicate = jax.ShapeDtypeStruct((), jnp.bool_)
    kinds = [kernel.kind for kernel in hlo.kernels(compile_for("h100", branched, predicate, floats(N)))]
    assert kinds.count("pallas") == 1 + 2


def test_temporaries_are_what_lies_between_kernels():
    assert hlo.temporary_bytes(compile_for("h100", lambda x: x + 1, floats(N))) == 0
    twice = lambda x: shifted(shifted(x, 1024, 4), 2048, 4)
    assert hlo.temporary_bytes(compile_for("h100", twice, floats(N))) == pytest.approx(4 * N, rel=0.01)


def test_communication_is_found_where_there_is_some():
    mesh = deviceless.mesh("h100", data=8)
    sharded = NamedSharding(mesh, PartitionSpec("data"))
    x = floats(N, sharding=sharded)
    assert hlo.collectives(compile_for("h100", lambda x: x + 1, x)) == []
    assert hlo.collectives(compile_for("h100", jnp.sum, x)) == ["all-reduce"]
    # XLA cannot look into a Pallas kernel, and gives it all of the array on every GPU; a shard_map says not to.
    function = lambda x: shifted(x, 1024, 4)
    assert hlo.collectives(compile_for("h100", function, x)) == ["all-gather"]
    spec = sharded.spec
    local = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    assert hlo.collectives(compile_for("h100", local, x)) == []


def test_traffic_is_counted_on_one_gpu():
    sharded = NamedSharding(deviceless.mesh("h100", data=4, model=2), PartitionSpec("data"))
    assert memory_bytes(compile_for("h100", lambda x: x + 1, floats(N, sharding=sharded))) == 8 * N // 4


@pytest.mark.parametrize("gpu", GPUS)
def test_vector_loads_show_in_the_ptx_of_the_kernel(gpu):
    kernels = deviceless.ptx(gpu, lambda x: jnp.tanh(shifted(x, 1024, 4, name="mine")), floats(N))
    assert "mine" in kernels and len(kernels) == 2
    assert set(deviceless.load_widths(kernels["mine"])) == {16}

    def odd(x):
        rows = pl.BlockSpec((1, 1024), lambda i: (i, 0))
        return pl.pallas_call(
            lambda x_ref, y_ref: plgpu.store(y_ref, plgpu.load(x_ref)),
            grid=(len(x),),
            in_specs=[rows],
            out_specs=rows,
            out_shape=x,
            compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
            name="odd",
        )(x)

    kernels = deviceless.ptx(gpu, odd, floats(64, 1023))
    assert max(deviceless.load_widths(kernels["odd"])) < 16


@pytest.mark.parametrize("gpu", GPUS)
def test_the_gpu_is_the_one_that_was_asked_for(gpu):
    target = {"a100": "sm_80", "h100": "sm_90", "b200": "sm_100"}[gpu]
    assert deviceless.mesh(gpu, data=1).devices[0].device_kind.startswith(f"NVIDIA {gpu.upper()}")
    for text in deviceless.ptx(gpu, lambda x: shifted(x, 1024, 4) + 1, floats(N)).values():
        assert f".target {target}" in text
