"""Blocks and warps of the fused loss's kernel, beside those that `launch` picks: time of the forward pass on a GPU."""

import functools as ft
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from eqx_dynloss_kernels import launch, triton, weighted_xent
from eqx_dynloss_kernels.launch import Launch
from jax import Array

from tests.kernels import deviceless

from .comparison import Compare, Work
from .contestant import jitted
from .test_loss import SHORT, make_problem
from .workloads import ACCELERATOR_LOGITS, Workload

SUBJECT = "Weighted softmax cross-entropy on a GPU, the kernel alone, by rows x columns a program, and its warps"
CLASSES = (10, 100, 1000, 8192, 32768, 50257)


def others(rows: int, classes: int) -> list[Launch]:
    """Half and twice the warps, and half and twice the logits of a program with as many a warp."""
    picked = launch.launch(rows, classes)
    height, width, warps = picked
    if classes <= 8192:  # whole rows
        sizes = [(height * 2, width), (height * 4, width), (max(1, height // 2), width)]
    else:
        sizes = [(1, width * 2), (1, width // 2)]
    found = [Launch(height, width, warps * 2), Launch(height, width, warps * 4), Launch(height, width, warps // 2)]
    found += [Launch(*size, warps * size[0] * size[1] // (height * width)) for size in sizes]
    return [other for other in dict.fromkeys(found) if other != picked and 1 <= other.num_warps <= 16]


def kernel(chosen: Launch, monkeypatch) -> Callable[[Array, Array, Array], Array]:
    """The loss by the kernel, which is to be traced before the next call of this function."""
    monkeypatch.setattr(triton, "launch", lambda *_: chosen)
    xent = ft.partial(weighted_xent, implementation="pallas")
    return lambda logits, labels, weights: xent(logits, labels, weights)[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("classes", CLASSES)
def test_launch(compare: Compare, monkeypatch, classes: int, dtype: str):
    if not compare.full or jax.default_backend() != "gpu":
        pytest.skip("times a kernel on a GPU")
    workload = Workload("launch", ACCELERATOR_LOGITS // classes, classes)
    problem = [jnp.asarray(array) for array in make_problem(workload, dtype)]
    launches = [launch.launch(workload.rows, classes), *others(workload.rows, classes)]
    compare(
        SUBJECT,
        f"{workload.rows} x {classes} {SHORT[dtype]}",
        [jitted("{} x {}, {}".format(*chosen), kernel(chosen, monkeypatch), *problem) for chosen in launches],
        work=Work(problem[0].nbytes / 1e9, "GB", "every logit read once"),
        budget_s=1.0,
    )


@pytest.mark.skipif(deviceless.obstacle() is not None, reason=deviceless.obstacle() or "")
@pytest.mark.parametrize("classes", [10, 50257])
def test_others_compile(monkeypatch, classes: int):
    rows = 64
    args = [((rows, classes), "float32"), ((rows,), "int32"), ((classes,), "float32")]
    for chosen in others(rows, classes):
        struct = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in args]
        text = deviceless.compile_for("h100", kernel(chosen, monkeypatch), *struct).as_text()
        assert f"num_warps = {chosen.num_warps} " in (text or "")
