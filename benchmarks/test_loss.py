"""Weighted softmax cross-entropy against what else its user could write: value and gradient in the logits.

The scalar is the mean over examples of w[y]·nll, as in the paper; with members, every member has a mean and class
weights of its own, and JAX contestants are vmapped over them. All contestants get the same arrays and return the same
numbers, which are checked against float64 NumPy.

On a CPU, results of some 32 MiB and more are fresh memory at every call, and touching it first takes longer
than the arithmetic. Ratios of the largest problems compare how much of it each contestant asks for.
"""

import functools as ft
import importlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from eqx_dynloss_kernels.api import Implementation
from jax import Array

from eqx_dynloss.loss import softmax_cross_entropy

from .comparison import Compare, Work
from .contestant import Absent, Contestant, jitted
from .workloads import VOCAB_128K, VOCAB_256K, VOCAB_GPT2, WORKLOADS, Workload

SUBJECT = "Weighted softmax cross-entropy: value, and gradient in the logits, of the weighted mean"
COUNTED = "every logit read once and its gradient written once, i.e. 2 x itemsize bytes a logit, whatever really moves"
FUSION = "xla_gpu_experimental_enable_triton_heroless_priority_fusion"
CHECKED_ROWS = 64
SHORT = {"float32": "f32", "bfloat16": "bf16"}

Mean = Callable[[Array, Array, Array], Array]
Problem = tuple[Array, Array, Array]  # logits [*batch, classes], labels [*batch], weights [*members, classes]
CASES = [pytest.param(load, dtype, id=f"{load}-{dtype}") for load in WORKLOADS for dtype in load.dtypes]


@pytest.mark.parametrize("workload, dtype", CASES)
def test_loss(compare: Compare, workload: Workload, dtype: str):
    platform = jax.default_backend()
    if compare.full and platform == "cpu" and workload in (VOCAB_GPT2, VOCAB_128K, VOCAB_256K):
        pytest.skip("a CPU's ratios are those of the 32,768 classes, and there are minutes to save")
    workload = workload.on(platform) if compare.full else workload.small
    logits, labels, weights = make_problem(workload, dtype)
    checked = np.unique(np.linspace(0, workload.rows - 1, CHECKED_ROWS).astype(int))
    compare(
        SUBJECT,
        f"{workload} {SHORT[dtype]} {'x'.join(map(str, workload.shape))}",
        entrants(platform, (jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(weights))),
        expected=reference(logits, labels, weights, checked),
        view=lambda result: (result[0], result[1][..., checked, :]),
        work=Work(2 * logits.nbytes / 1e9, "GB", COUNTED),
        budget_s=2.0,
        min_rounds=7,
    )


def test_who_takes_part_on_a_gpu():
    """The contestants of a GPU compile elsewhere too, but for the kernel and the compiler option."""
    logits, labels, weights = map(jnp.asarray, make_problem(WORKLOADS[0].small, "float32"))
    names = ["ours", "plain", "pallas", "optax", "optax+fusion", "torch"]
    assert [entrant.name for entrant in entrants("gpu", (logits, labels, weights))] == names


def make_problem(workload: Workload, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits normal with standard deviation 3, any labels, weights between 0.5 and 2.

    Made by NumPy, which compiles nothing. Large logits repeat themselves, which takes less time to make.
    """
    rng = np.random.default_rng(0)
    some = 3 * rng.standard_normal(min(workload.num_logits, 2**24), np.float32)
    logits = np.resize(some.astype(jnp.dtype(dtype)), workload.shape)
    labels = rng.integers(0, workload.classes, workload.batch, np.int32)
    weights = rng.uniform(0.5, 2, (*workload.batch[:-1], workload.classes)).astype(np.float32)
    return logits, labels, weights


def entrants(platform: str, problem: Problem) -> list[Contestant | Absent]:
    """Ours first. On a CPU ours is the plain path, which would be there twice, and there is no kernel."""
    ours = compiled("ours", weighted_mean(None), problem)
    theirs = compiled("optax", optax_mean, problem)
    if platform == "cpu":
        return [ours, theirs, torch_contestant(problem)]
    return [
        ours,
        compiled("plain", weighted_mean("xla"), problem),
        unless(ValueError, "pallas", lambda name: compiled(name, weighted_mean("pallas"), problem)),
        theirs,
        unless(
            jax.errors.JaxRuntimeError,  # no such option in this XLA
            "optax+fusion",
            lambda name: compiled(name, optax_mean, problem, compiler_options={FUSION: True}),
        ),
        torch_contestant(problem),
    ]


def weighted_mean(implementation: Implementation | None) -> Mean:
    def mean(logits, labels, weights):
        return jnp.mean(softmax_cross_entropy(logits, labels, weights, implementation=implementation))

    return mean


def optax_mean(logits: Array, labels: Array, weights: Array) -> Array:
    nll = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    return jnp.mean(nll * weights[labels])


def compiled(name: str, mean: Mean, problem: Problem, **options: Any) -> Contestant:
    """Value and gradient of a mean, vmapped if there are members."""
    both = jax.value_and_grad(mean)
    return jitted(name, both if problem[0].ndim == 2 else jax.vmap(both), *problem, **options)


def unless(error: type[Exception], name: str, build: Callable[[str], Contestant]) -> Contestant | Absent:
    """What `build(name)` gives, or, if it raises that error, an absence with its first line as the reason."""
    try:
        return build(name)
    except error as reason:
        return Absent(name, str(reason).splitlines()[0])


def torch_contestant(problem: Problem) -> Contestant | Absent:
    """Forward and backward of `torch.nn.functional.cross_entropy`, eager, on the memory of the same arrays.

    With members there is one call on all their rows and a gather of the weights, which takes less time than
    `torch.func.vmap` or a loop over the members.
    """
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return Absent("torch", "not installed")
    gpu = jax.default_backend() == "gpu"
    if gpu and not torch.cuda.is_available():
        return Absent("torch", "installed without CUDA")
    logits, labels, weights = (torch.from_dlpack(array) for array in problem)
    logits.requires_grad_()
    labels = labels.long()
    cross_entropy = ft.partial(torch.nn.functional.cross_entropy, reduction="none")

    def call():
        wide = logits.float()
        if logits.ndim == 2:
            value = cross_entropy(wide, labels, weight=weights).mean()
        else:
            nll = cross_entropy(wide.flatten(0, 1), labels.flatten()).view(labels.shape)
            value = (nll * weights.gather(1, labels)).mean(1)
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        if gpu:
            torch.cuda.synchronize()
        return value.detach(), gradient

    # With 262,144 classes torch's float32 gradient was off by 1.4e-5, more than the others may be.
    return Contestant("torch", call, tolerance=3e-5 if problem[0].dtype == jnp.float32 else None)


def reference(
    logits: np.ndarray, labels: np.ndarray, weights: np.ndarray, checked: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The means over all rows, `[*members]`, and `checked` rows of their gradients, `[*members, checked, classes]`.

    In float64, by NumPy, a few rows at a time.
    """
    if logits.ndim == 3:
        members = [reference(*member, checked) for member in zip(logits, labels, weights, strict=True)]
        means, gradients = zip(*members, strict=True)
        return np.stack(means), np.stack(gradients)
    rows, classes = logits.shape

    def part(some: np.ndarray) -> np.ndarray:
        nll = -np.take_along_axis(log_softmax(logits[some]), labels[some, None], 1)[:, 0]
        return np.sum(weights[labels[some]] * nll) / rows

    with ThreadPoolExecutor() as pool:
        mean = np.sum(list(pool.map(part, np.array_split(np.arange(rows), -(-logits.size // 2**22)))))
    softmax = np.exp(log_softmax(logits[checked]))
    onehot = labels[checked, None] == np.arange(classes)
    return mean, weights[labels[checked], None] * (softmax - onehot) / rows


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.sum(np.exp(x), -1, keepdims=True))
