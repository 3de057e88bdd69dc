"""What the compiler for NVIDIA GPUs makes of the loss and of an update in training. Nothing runs or is timed.

Launches, traffic and memory are facts about a program that can be read without a GPU. They need XLA's compiler for CUDA
(`pip install -e ".[test,aot]"`, `JAX_PLATFORMS=cpu`).
"""

import collections
import dataclasses
import time

import jax
import jax.numpy as jnp
import pytest
from eqx_dynloss_kernels.api import Implementation

from eqx_dynloss.models import MLP, Myrtle
from tests.kernels import deviceless, hlo
from tests.updates import update_of

from .convolution_forms import FORMS, with_gradients
from .report import Row
from .test_loss import SHORT, optax_mean, weighted_mean
from .workloads import CIFAR_ENSEMBLE, IMAGENET, ODD_1001, VOCAB_32K, VOCAB_GPT2, Workload

pytestmark = pytest.mark.skipif(deviceless.obstacle() is not None, reason=deviceless.obstacle() or "")

GPU = "h100"
LOSS = "Compiled for an H100: weighted softmax cross-entropy, value and gradient in the logits, of the weighted mean"
UPDATE = "Compiled for an H100: one update with Nesterov momentum"
LAYER = "Compiled for an H100: a 3x3 convolution of 8 members and its two gradients, 512 x 32 x 32 x 64 -> 64, float32"
IMPLEMENTATIONS: dict[Implementation, str] = {"xla": "plain", "pallas": "kernel"}
MEMBERS, BATCH, WIDTH, CLASSES = 8, 512, 64, 10
WORKLOADS = (CIFAR_ENSEMBLE, IMAGENET, ODD_1001, VOCAB_32K, VOCAB_GPT2)
CASES = [pytest.param(load, dtype, id=f"{load}-{dtype}") for load in WORKLOADS for dtype in load.dtypes]


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """`implementation=None` as on a machine with one GPU, whatever number of CPU devices this process has."""
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)


@pytest.mark.parametrize("workload, dtype", CASES)
def test_loss(record, workload: Workload, dtype: str):
    if not record.full and dtype != workload.dtypes[0]:
        pytest.skip("one dtype is enough where nothing is timed")
    workload = workload.on("gpu") if record.full else workload.small
    args = (
        jax.ShapeDtypeStruct(workload.shape, jnp.dtype(dtype)),
        jax.ShapeDtypeStruct(workload.batch, jnp.int32),
        jax.ShapeDtypeStruct((*workload.batch[:-1], workload.classes), jnp.float32),
    )
    case = f"{workload} {SHORT[dtype]} {'x'.join(map(str, workload.shape))}"

    def row(name: str, mean) -> Row:
        both = jax.value_and_grad(mean)
        both = both if workload.members is None else jax.vmap(both)
        return compiled_row(LOSS, case, name, both, args, workload.num_logits)

    def find_out() -> list[Row]:
        ours = row("ours", weighted_mean(None))
        picked, other = ("pallas", "xla") if "pallas" in (ours.kernels or {}) else ("xla", "pallas")
        ours = dataclasses.replace(ours, contestant=f"ours: {IMPLEMENTATIONS[picked]}")
        if not record.full:
            return [ours]
        return [
            ours,
            row(IMPLEMENTATIONS[other], weighted_mean(other)),
            row("optax", optax_mean),
        ]

    record(find_out)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width, batch", [(64, 512), (16, 64)])
def test_update_on_images(record, width: int, batch: int, dtype: str):
    """Of one network: an ensemble's follow each other in a loop, with this body."""
    if not record.full and (width, dtype) != (16, "bfloat16"):
        pytest.skip("tests/test_compiled_training.py compiles the others")
    size = 32 if record.full else 8
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8)
    make_model = lambda key: Myrtle(width, compute_dtype=dtype, key=key)
    update = update_of(make_model, images, jax.ShapeDtypeStruct((batch,), jnp.int32), CLASSES)
    (row,) = record(lambda: [compiled_row(UPDATE, f"Myrtle5-{width}, {batch} images", f"ours, {dtype}", *update)])
    assert 0 < row.temp_bytes < 80 * 2**30


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_update_on_the_spiral(record, dtype: str):
    """Of all networks of a phase diagram at once."""
    members = 344 if record.full else 4
    with jax.enable_x64(dtype == "float64"):
        points, labels = jax.ShapeDtypeStruct((300, 2), dtype), jax.ShapeDtypeStruct((300,), jnp.int32)
        update = update_of(lambda key: MLP(2, 100, 3, key=key), points, labels, 3, members=members)
        record(lambda: [compiled_row(UPDATE, f"{members} networks on the spiral", f"ours, {dtype}", *update)])


def test_convolution_forms(record):
    """Of `conv3x3`, which maps over the members, each launch of the loop's body is listed once; the traffic counts as
    often as it runs. The arithmetic is the same in all forms, 889 to 932 GFLOP as XLA counts them before it optimises.
    """
    size = 32 if record.full else 8
    images = jax.ShapeDtypeStruct((MEMBERS, BATCH, size, size, WIDTH), jnp.float32)
    kernels = jax.ShapeDtypeStruct((MEMBERS, 3, 3, WIDTH, WIDTH), jnp.float32)
    forms = FORMS if record.full else {"ours, mapped": FORMS["ours, mapped"]}
    case = f"{MEMBERS} members"
    record(
        lambda: [
            compiled_row(LAYER, case, name, with_gradients(form), (images, kernels, images))
            for name, form in forms.items()
        ]
    )


def compiled_row(subject, case, name, function, args, per: int | None = None) -> Row:
    start = time.perf_counter()
    compiled = deviceless.compile_for(GPU, function, *args)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    kernels = hlo.kernels(compiled)
    return Row(
        subject,
        case,
        name,
        compile_s=seconds,
        temp_bytes=hlo.temporary_bytes(compiled),
        peak_bytes=getattr(memory, "peak_memory_in_bytes", None),
        launches=len(kernels),
        moved_bytes=hlo.memory_bytes(compiled),
        moved_per=per,
        kernels=dict(collections.Counter(kernel.kind for kernel in kernels)),
    )
