"""Training Myrtle5 on images of CIFAR-10's size: the ensemble against what else its user could write.

All make the same updates (weighted cross-entropy, Nesterov momentum) of the same members on the same minibatch, in
float32, and return every loss. Each opponent is written as its users would: a jitted step in a Python loop over members
and updates, the same step under `vmap`, PyTorch with one network after another (channels last; eager and by
`torch.compile`), and PyTorch's stacked parameters under `torch.func.vmap`.
"""

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

from . import torch_training
from .comparison import Compare, Work
from .contestant import Contestant

pytestmark = pytest.mark.usefixtures("quick_compilation")

AMPLITUDE, PERIOD, RATE, MOMENTUM = 10.0, 10, 0.01, 0.9
MICROBATCH = 8  # images, as in the experiments on a CPU
ROUNDS = {16: 2, 128: 2, 512: 1}  # with 512 images a call of the jitted step takes as long as 20 seconds
TOLERANCE = 1e-4  # of losses after a few updates in float32
OPPONENTS = {  # the slower ones where a call takes not too long
    (4, 128): ("jitted step", "torch", "torch.compile", "torch.func.vmap"),
    (2, 512): ("jitted step", "torch"),
    (4, 16): ("vmapped step",),
}


@pytest.mark.parametrize("members, batch", OPPONENTS)
def test_training_on_images(compare: Compare, members: int, batch: int):
    opponents = OPPONENTS[members, batch]
    width, size, steps = (64, 32, 1) if compare.timed else (4, 8, 2)
    images = batch if compare.timed else 8
    data, keys = minibatch(images, size), jax.random.split(jax.random.key(0), members)
    models = [Myrtle(width, key=jax.random.split(key)[0]) for key in keys]  # the same as `ensemble.init` makes
    task = torch_training.Task(data, models, OscillatingWeights(10, AMPLITUDE, PERIOD), steps, RATE, MOMENTUM)
    entrants = {
        "jitted step": lambda name: python_loop(name, data, models, steps),
        "vmapped step": lambda name: naive_vmap(name, data, models, steps),
        "torch": lambda name: torch_training.sequential(task, name),
        "torch.compile": lambda name: torch_training.sequential(task, name, compiled=True),
        "torch.func.vmap": lambda name: torch_training.stacked(task, name),
    }
    if not compare.timed:
        del entrants["torch.compile"]  # compiles for half a minute
    compare(
        f"training Myrtle5-{width}, float32, on {jax.device_count()} device(s)",
        f"{members} members x minibatch {images}",
        [ours("ours", data, keys, width, steps), *(make(name) for name, make in entrants.items() if name in opponents)],
        tolerance=TOLERANCE,
        work=Work(members * images * steps, "images", "one update on one image of one member"),
        min_rounds=ROUNDS[batch],
    )


def minibatch(batch: int, size: int) -> Dataset:
    rng = np.random.default_rng(0)
    return Dataset(
        jnp.asarray(rng.standard_normal((batch, size, size, 3), np.float32)),
        jnp.asarray(rng.integers(0, 10, batch, np.int32)),
    )


def ours(name: str, data: Dataset, keys: jax.Array, width: int, steps: int, devices: Any = None) -> Contestant:
    """All members in one program, on all devices or on those given."""
    losses = DynamicalLoss(OscillatingWeights(10, np.full(len(keys), AMPLITUDE), PERIOD))
    optimiser = optax.sgd(RATE, MOMENTUM, nesterov=True)
    start = ensemble.init(lambda key: Myrtle(width, key=key), optimiser, keys, devices=devices)
    everywhere = ensemble.replicate(data, start)
    microbatch_size = MICROBATCH if jax.default_backend() == "cpu" else None

    def call():
        states = jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, jax.Array) else leaf, start)  # donated
        return ensemble.train_chunk(
            states, losses, optimiser, everywhere, num_steps=steps, microbatch_size=microbatch_size
        )[1].loss

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
        losses = np.zeros((len(starts), steps), np.float32)
        for member, parameters in enumerate(starts):
            opt_state = optimiser.init(parameters)
            for t in range(steps):
                parameters, opt_state, losses[member, t] = jitted(parameters, opt_state, t)
        return losses

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
