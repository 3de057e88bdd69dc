"""Training Myrtle5 on images of CIFAR-10's size: the ensemble against what else its user could write.

All make the same updates (weighted cross-entropy, Nesterov momentum) of the same members on the same minibatch, in
float32 or, on a GPU, in bfloat16, and return every loss. Each opponent is written as its users would: a jitted step in
a Python loop over members and updates, the same step under `vmap`, PyTorch with one network after another (channels
last; eager and by `torch.compile`), and PyTorch's stacked parameters under `torch.func.vmap`.
"""

import dataclasses
import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from eqx_dynloss import ensemble
from eqx_dynloss.loss import DynamicalLoss
from eqx_dynloss.models import Myrtle
from eqx_dynloss.schedule import OscillatingWeights
from eqx_dynloss.train import Dataset
from experiments.problems.cifar import cpu_microbatch_size

from . import torch_training
from .comparison import Compare, Work
from .contestant import Contestant

pytestmark = pytest.mark.usefixtures("quick_compilation")

AMPLITUDE, PERIOD, RATE, MOMENTUM = 10.0, 10, 0.01, 0.9
TOLERANCE = {"cpu": 1e-4, "gpu": 1e-2}  # of losses after a few updates in float32; on a GPU products are in TF32
ROUNDED_TOLERANCE = 5e-2  # the same in bfloat16
SIDE_BY_SIDE, COMPILED, ROUNDED = "ours, side by side", "torch.compile", ", bfloat16"


@dataclass(frozen=True)
class Case:
    """An ensemble, where it is timed, and against whom: the slower ones where a call takes not too long.

    **Fields:**

    - `platform`: a call is `steps` updates, which take the better part of a second or longer on a CPU, as a chunk of
        training does, and a fraction of one on a GPU.
    - `rounds`: the least number of them. With 512 images a call of the jitted step takes as long as 20 seconds.
    """

    platform: str
    members: int
    batch: int
    width: int
    steps: int
    rounds: int
    opponents: tuple[str, ...]


JAX, TORCH = ("jitted step", "vmapped step"), ("torch", "torch.func.vmap")
CASES = [
    Case("cpu", 8, 32, 16, 16, 3, ("jitted step", "torch", COMPILED)),  # the size of the quick preset
    *(
        Case("cpu", members, batch, width, max(1, 512 // batch * 16 // width), 3, ("jitted step", "torch", COMPILED))
        for width in (16, 8, 32, 64)
        for batch in (64, 512)
        for members in (4, 8)
    ),
    Case("cpu", 4, 128, 64, 1, 2, ("torch", "torch.func.vmap")),
    Case("cpu", 4, 16, 64, 1, 2, ("vmapped step",)),
    Case("gpu", 4, 512, 64, 20, 5, (f"ours{ROUNDED}", "torch", COMPILED, f"torch{ROUNDED}", COMPILED + ROUNDED)),
    Case("gpu", 16, 512, 16, 20, 5, (f"ours{ROUNDED}", f"torch{ROUNDED}")),
    Case("gpu", 16, 64, 16, 20, 5, (f"ours{ROUNDED}", SIDE_BY_SIDE, *JAX, *TORCH)),
    Case("gpu", 8, 512, 64, 20, 5, (SIDE_BY_SIDE, *JAX, "torch.func.vmap")),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.platform}-{case.members}x{case.batch}-{case.width}")
def test_training_on_images(compare: Compare, case: Case):
    if case.platform != jax.default_backend() and compare.full:
        pytest.skip(f"a size for a {case.platform.upper()}")
    again = case is not next(c for c in CASES if there(c) == there(case))
    if not compare.full and (again or any(there(case) < there(c) for c in CASES)):
        pytest.skip("the same small problem as in another case")
    width, size, steps = (case.width, 32, case.steps) if compare.full else (4, 8, 2)
    images, members = (case.batch, case.members) if compare.full else (8, 2)
    data, keys = minibatch(images, size), jax.random.split(jax.random.key(0), members)
    models = [Myrtle(width, key=jax.random.split(key)[0]) for key in keys]  # the same as `ensemble.init` makes
    task = torch_training.Task(data, models, OscillatingWeights(10, AMPLITUDE, PERIOD), steps, RATE, MOMENTUM)
    entrants = {
        "ours": lambda name: ours(name, data, keys, width, steps),
        f"ours{ROUNDED}": lambda name: ours(name, data, keys, width, steps, compute_dtype="bfloat16"),
        SIDE_BY_SIDE: lambda name: ours(name, data, keys, width, steps, block_size=members),
        "jitted step": lambda name: python_loop(name, data, models, steps),
        "vmapped step": lambda name: naive_vmap(name, data, models, steps),
        "torch": lambda name: torch_training.sequential(task, name),
        f"torch{ROUNDED}": lambda name: torch_training.sequential(task, name, rounded=True),
        COMPILED: lambda name: torch_training.sequential(task, name, compiled=True),
        COMPILED + ROUNDED: lambda name: torch_training.sequential(task, name, compiled=True, rounded=True),
        "torch.func.vmap": lambda name: torch_training.stacked(task, name),
    }
    if not compare.full:
        del entrants[COMPILED], entrants[COMPILED + ROUNDED]
    racing = [make(name) for name, make in entrants.items() if name in ("ours", *case.opponents)]
    compare(
        f"training Myrtle5, on {jax.device_count()} device(s), in float32 where nothing else is said",
        f"{members} x {images} images, width {width}",
        [
            dataclasses.replace(entrant, tolerance=ROUNDED_TOLERANCE)
            if isinstance(entrant, Contestant) and entrant.name.endswith(ROUNDED)
            else entrant
            for entrant in racing
        ],
        tolerance=TOLERANCE[jax.default_backend()],
        work=Work(members * images * steps, "images", "one update on one image of one member"),
        min_rounds=case.rounds,
    )


def there(case: Case) -> set[str]:
    """The opponents of a small problem: `torch.compile` takes half a minute, and PyTorch need not be installed."""
    torch = importlib.util.find_spec("torch") is not None
    return {name for name in case.opponents if COMPILED not in name and (torch or "torch" not in name)}


def minibatch(batch: int, size: int) -> Dataset:
    rng = np.random.default_rng(0)
    return Dataset(
        jnp.asarray(rng.standard_normal((batch, size, size, 3), np.float32)),
        jnp.asarray(rng.integers(0, 10, batch, np.int32)),
    )


def ours(
    name: str,
    data: Dataset,
    keys: jax.Array,
    width: int,
    steps: int,
    devices: Any = None,
    block_size: int | None = None,
    compute_dtype: str = "float32",
) -> Contestant:
    """All members in one program, on all devices or on those given."""
    losses = DynamicalLoss(OscillatingWeights(10, np.full(len(keys), AMPLITUDE), PERIOD))
    optimiser = optax.sgd(RATE, MOMENTUM, nesterov=True)
    make_model = lambda key: Myrtle(width, compute_dtype=compute_dtype, key=key)
    start = ensemble.init(make_model, optimiser, keys, devices=devices)
    everywhere = ensemble.replicate(data, start)
    on_cpu = jax.default_backend() == "cpu"
    microbatch_size = cpu_microbatch_size(len(data), math.prod(data.inputs.shape[1:3])) if on_cpu else None

    def call():
        states = jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, jax.Array) else leaf, start)  # donated
        options = {"num_steps": steps, "microbatch_size": microbatch_size, "block_size": block_size}
        return ensemble.train_chunk(states, losses, optimiser, everywhere, **options)[1].loss

    return Contestant(name, call)


def parameters_of(model: Myrtle) -> dict[str, Any]:
    layers = [(layer.kernel, layer.bias) for layer in model.convolutions]
    return {"convolutions": layers, "head": (model.head.weight, model.head.bias)}


def forward(parameters, images):
    def convolution(x, layer):
        kernel, bias = layer
        out = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jax.nn.relu(out + bias[None, None, None])

    def pool(x):
        return lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4

    first, second, third, fourth = parameters["convolutions"]
    x = pool(convolution(convolution(images, first), second))
    x = convolution(pool(convolution(x, third)), fourth)
    weight, bias = parameters["head"]
    return jnp.mean(x, (1, 2)) @ weight.T + bias[None]


def naive_step(data: Dataset):
    schedule = OscillatingWeights(10, AMPLITUDE, PERIOD)
    optimiser = optax.sgd(RATE, MOMENTUM, nesterov=True)

    def step(parameters, opt_state, t):
        def objective(parameters):
            logits = forward(parameters, data.inputs)
            nll = optax.softmax_cross_entropy_with_integer_labels(logits, data.labels)
            return jnp.mean(nll * schedule(t)[data.labels])

        loss, gradient = jax.value_and_grad(objective)(parameters)
        updates, opt_state = optimiser.update(gradient, opt_state, parameters)
        return optax.apply_updates(parameters, updates), opt_state, loss

    return step, optimiser


def python_loop(name: str, data: Dataset, models: list[Myrtle], steps: int) -> Contestant:
    """One jitted step, one member after another."""
    step, optimiser = naive_step(data)
    jitted: Any = jax.jit(step)
    starts = [parameters_of(model) for model in models]

    def call():
        losses = []
        for parameters in starts:
            opt_state = optimiser.init(parameters)
            for t in range(steps):
                parameters, opt_state, loss = jitted(parameters, opt_state, t)
                losses.append(loss)
        return jnp.stack(losses).reshape(len(starts), steps)

    return Contestant(name, call)


def naive_vmap(name: str, data: Dataset, models: list[Myrtle], steps: int) -> Contestant:
    """The same step mapped over members."""
    step, optimiser = naive_step(data)
    jitted: Any = jax.jit(jax.vmap(step, in_axes=(0, 0, None)))
    start = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(parameters_of, models))

    def call():
        parameters, opt_state, losses = start, jax.vmap(optimiser.init)(start), []
        for t in range(steps):
            parameters, opt_state, loss = jitted(parameters, opt_state, t)
            losses.append(loss)
        return jnp.stack(losses, 1)

    return Contestant(name, call)
