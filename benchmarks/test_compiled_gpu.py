"""What the compiler for NVIDIA GPUs makes of the loss and of an ensemble's training step. Nothing runs or is timed.

Launches, traffic and memory are facts about a program that can be read without a GPU. They need XLA's compiler for CUDA
(`pip install -e ".[test,aot]"`, `JAX_PLATFORMS=cpu`).
"""

import collections
import dataclasses
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest
from eqx_dynloss_kernels.api import Implementation

from eqx_dynloss import train
from eqx_dynloss.loss import DynamicalLoss
from eqx_dynloss.models import Myrtle
from eqx_dynloss.schedule import OscillatingWeights
from tests.kernels import deviceless, hlo

from .convolution_forms import FORMS, with_gradients
from .report import Row
from .test_loss import SHORT, optax_mean, weighted_mean
from .workloads import CIFAR_ENSEMBLE, IMAGENET, ODD_1001, VOCAB_32K, VOCAB_GPT2, Workload

pytestmark = pytest.mark.skipif(deviceless.obstacle() is not None, reason=deviceless.obstacle() or "")

GPU = "h100"
LOSS = "Compiled for an H100: weighted softmax cross-entropy, value and gradient in the logits, of the weighted mean"
STEP = "Compiled for an H100: one training step of 8 members of Myrtle5-64, minibatch 512, float32, Nesterov momentum"
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


def test_ensemble_step(record):
    """One member after another, as in `eqx_dynloss.ensemble`. Of the loop over members the body is listed once."""
    case = "one member after another"
    (row,) = record(lambda: [compiled_row(STEP, case, "ours", *ensemble_step())])
    assert 0 < row.temp_bytes < 80 * 2**30
    if record.full:
        print(f"{STEP}, {case}: {row.kernels}")


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


def ensemble_step():
    """The step as a function of arrays alone, and the shapes of its arguments."""
    optimiser = optax.sgd(0.02, 0.9, nesterov=True)
    make = lambda key: train.init(lambda key: Myrtle(WIDTH, key=key), optimiser, key)
    states = eqx.filter_eval_shape(eqx.filter_vmap(make), jr.split(jr.key(0), MEMBERS))
    schedule = eqx.filter_vmap(lambda A: OscillatingWeights(CLASSES, A, 50.0))(jnp.linspace(1.0, 70.0, MEMBERS))
    members = states, DynamicalLoss(schedule)
    arrays, static = eqx.partition(members, lambda x: eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct))

    def step(arrays, images, labels):
        def one(arrays):
            state, loss = eqx.combine(arrays, static)
            return eqx.filter(train.train_step(state, loss, optimiser, images, labels), eqx.is_array)

        return jax.lax.map(one, arrays)

    images = jax.ShapeDtypeStruct((BATCH, 32, 32, 3), jnp.float32)
    return step, (arrays, images, jax.ShapeDtypeStruct((BATCH,), jnp.int32))


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
