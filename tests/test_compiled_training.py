"""What XLA makes of an update of Myrtle5 on an H100, which need not be there (`pip install -e ".[test,aot]"`)."""

import collections
import re

import jax
import jax.numpy as jnp
import pytest

from eqx_dynloss.models import MLP, Myrtle

from .kernels import deviceless, hlo
from .updates import update_of

pytestmark = pytest.mark.skipif(deviceless.obstacle() is not None, reason=deviceless.obstacle() or "")

BATCH = 512
# An activation is large, and so is its gradient; the smallest is that of the last convolution, 8 × 8 × 64 an image.
LARGE = BATCH * 8 * 8 * 64
CONVOLUTIONS = {
    "__cudnn$convBiasActivationForward": 4,
    "__cudnn$convBackwardInput": 3,
    "__cudnn$convBackwardFilter": 4,
}


def compile_update(*args, **kwargs):
    update, shapes = update_of(*args, **kwargs)
    return deviceless.compile_for("h100", update, *shapes)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def compiled(request):
    """The name of a dtype in XLA, and the program of an update of Myrtle5-64 on bytes."""
    make_model = lambda key: Myrtle(64, compute_dtype=request.param, key=key)
    images = jax.ShapeDtypeStruct((BATCH, 32, 32, 3), jnp.uint8)
    program = compile_update(make_model, images, jax.ShapeDtypeStruct((BATCH,), jnp.int32), 10)
    return {"float32": "f32", "bfloat16": "bf16"}[request.param], program


def written(program):
    """Of every launch its kind, and of each array that it writes the dtype, the shape and the layout."""
    for kernel, types in hlo.results(program):
        for dtype, shape, layout in re.findall(r"\b(\w+)\[([\d,]*)\]\{([\d,]*)", types):
            yield kernel.kind, dtype, tuple(map(int, shape.split(","))), layout


def test_every_convolution_has_the_compute_dtype_and_channels_last(compiled):
    dtype, program = compiled
    convolutions = [line for line in program.as_text().splitlines() if "__cudnn$conv" in line]
    assert len(convolutions) == 11 and all("dim_labels=b01f_o01i->b01f" in line for line in convolutions)
    results = [result for result in written(program) if "cudnn" in result[0] and result[2] != (0,)]
    assert {result[1::2] for result in results} == {(dtype, "3,2,1,0")}
    assert collections.Counter(kind for kind, *_ in results) == CONVOLUTIONS


def test_bias_and_relu_are_part_of_the_convolution(compiled):
    _, program = compiled
    forward = [line for line in program.as_text().splitlines() if "convBiasActivationForward" in line]
    assert len(forward) == 4 and all('"activation_mode":"kRelu"' in line for line in forward)


def test_no_activation_is_written_in_another_dtype(compiled):
    dtype, program = compiled
    large = [(kind, found) for kind, found, shape, _ in written(program) if jnp.prod(jnp.array(shape)) >= LARGE]
    assert large and all(found == dtype for _, found in large)


def test_an_update_moves_no_more_than_it_must(compiled):
    """Gigabytes; in float32 it was 2.6 when ReLU was differentiated by its input."""
    dtype, program = compiled
    assert hlo.memory_bytes(program) < {"f32": 2.4e9, "bf16": 1.25e9}[dtype]
    assert hlo.temporary_bytes(program) < {"f32": 0.56e9, "bf16": 0.3e9}[dtype]


@pytest.mark.parametrize("compute_dtype, most", [("float32", 54), ("bfloat16", 60)])
def test_a_narrow_network_is_few_launches(compute_dtype, most):
    """Which are most of its time; they were 59 and 63 when every leaf was looked through by itself."""
    make_model = lambda key: Myrtle(16, compute_dtype=compute_dtype, key=key)
    images = jax.ShapeDtypeStruct((64, 32, 32, 3), jnp.uint8)
    program = compile_update(make_model, images, jax.ShapeDtypeStruct((64,), jnp.int32), 10)
    assert len(hlo.kernels(program)) <= most


@pytest.mark.parametrize("dtype, most", [("float32", 0.12e9), ("float64", 0.24e9)])
def test_the_spirals_networks_write_their_hidden_layer_once(dtype, most):
    """344 of them; with matrix products it was 0.35 and 0.70 GB."""
    with jax.enable_x64(dtype == "float64"):
        points, labels = jax.ShapeDtypeStruct((300, 2), dtype), jax.ShapeDtypeStruct((300,), jnp.int32)
        program = compile_update(lambda key: MLP(2, 100, 3, key=key), points, labels, 3, members=344)
    hidden = [result for result in written(program) if sorted(result[2]) == [100, 300, 344]]
    assert len(hidden) == 1 and hlo.memory_bytes(program) < most
