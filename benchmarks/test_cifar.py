"""Training Myrtle5 on images of CIFAR-10's size: the ensemble against what else its user could write.

All make the same updates (weighted cross-entropy, Nesterov momentum) of the same members on the same minibatch, in
float32, and return every loss. Each opponent is written as its users would: a jitted step in a Python loop over members
and updates, the same step under `vmap`, PyTorch with one network after another (channels last), and PyTorch's stacked
parameters under `torch.func.vmap`.
"""

import importlib
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

from .comparison import Compare, Work
from .contestant import Absent, Contestant

AMPLITUDE, PERIOD, RATE, MOMENTUM = 10.0, 10, 0.01, 0.9
MICROBATCH = 8  # images, as in the experiments on a CPU
TOLERANCE = 1e-4  # of losses after a few updates in float32


@pytest.mark.parametrize("members, batch", [(4, 128), (2, 512)])
def test_training_on_images(compare: Compare, members: int, batch: int):
    width, size, steps = (64, 32, 1) if compare.timed else (4, 8, 2)
    slow = batch == 128  # the two that are slow are not waited for twice
    batch = batch if compare.timed else 8
    rng = np.random.default_rng(0)
    data = Dataset(
        jnp.asarray(rng.standard_normal((batch, size, size, 3), np.float32)),
        jnp.asarray(rng.integers(0, 10, batch, np.int32)),
    )
    keys = jax.random.split(jax.random.key(0), members)
    models = [Myrtle(width, key=jax.random.split(key)[0]) for key in keys]  # the same as `ensemble.init` makes
    entrants = [
        ours(data, keys, width, steps),
        python_loop(data, models, steps),
        *([naive_vmap(data, models, steps)] if slow else []),
        torch_sequential(data, models, steps),
        *([torch_vmap(data, models, steps)] if slow else []),
    ]
    compare(
        f"training Myrtle5-{width}, float32",
        f"{members} members x minibatch {batch} on {jax.device_count()} device(s)",
        entrants,
        tolerance=TOLERANCE,
        work=Work(members * batch * steps, "images", "one update on one image of one member"),
        min_rounds=3,
    )


def ours(data: Dataset, keys: jax.Array, width: int, steps: int) -> Contestant:
    """All members in one program, on all devices."""
    losses = DynamicalLoss(OscillatingWeights(10, np.full(len(keys), AMPLITUDE), PERIOD))
    optimiser = optax.sgd(RATE, MOMENTUM, nesterov=True)
    start = ensemble.init(lambda key: Myrtle(width, key=key), optimiser, keys)
    everywhere = ensemble.replicate(data, start)
    microbatch_size = MICROBATCH if jax.default_backend() == "cpu" else None

    def call():
        states = jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, jax.Array) else leaf, start)  # donated
        return ensemble.train_chunk(
            states, losses, optimiser, everywhere, num_steps=steps, microbatch_size=microbatch_size
        )[1].loss

    return Contestant("ours", call)


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


def python_loop(data: Dataset, models: list[Myrtle], steps: int) -> Contestant:
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

    return Contestant("jitted step", call)


def naive_vmap(data: Dataset, models: list[Myrtle], steps: int) -> Contestant:
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

    return Contestant("vmapped step", call)


def torch_networks(data: Dataset, models: list[Myrtle], torch: Any) -> list[Any]:
    """Myrtle5 in PyTorch with the parameters of each model."""
    nn, networks = torch.nn, []
    for model in models:
        layers = []
        for number, layer in enumerate(model.convolutions):
            kernel = np.asarray(layer.kernel).transpose(3, 2, 0, 1)
            convolution = nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, padding=1)
            convolution.weight.data = torch.tensor(kernel)
            convolution.bias.data = torch.tensor(np.asarray(layer.bias))
            layers += [convolution, nn.ReLU(), *([nn.AvgPool2d(2)] if number in (1, 2) else [])]
        head = nn.Linear(model.head.in_features, model.head.out_features)
        head.weight.data = torch.tensor(np.asarray(model.head.weight))
        head.bias.data = torch.tensor(np.asarray(model.head.bias))
        pooled = nn.AvgPool2d(data.inputs.shape[1] // 4)  # of all that is left; adaptive pooling is slow under vmap
        network = nn.Sequential(*layers, pooled, nn.Flatten(), head)
        networks.append(network.to(memory_format=torch.channels_last))
    return networks


def torch_problem(data: Dataset, torch: Any, steps: int) -> tuple[Any, Any, Any]:
    """Images `[batch, 3, height, width]`, channels last in memory, labels, and the class weights of every step."""
    images = torch.tensor(np.asarray(data.inputs).transpose(0, 3, 1, 2)).contiguous(memory_format=torch.channels_last)
    weights = jax.vmap(OscillatingWeights(10, AMPLITUDE, PERIOD))(jnp.arange(steps))
    return images, torch.tensor(np.asarray(data.labels)).long(), torch.tensor(np.asarray(weights))


def torch_module() -> Any | str:
    """PyTorch, or why it cannot take part: on a GPU these contestants are not written for it."""
    if jax.default_backend() != "cpu":
        return "compared on CPUs only"
    try:
        return importlib.import_module("torch")
    except ImportError:
        return "not installed"


def torch_sequential(data: Dataset, models: list[Myrtle], steps: int) -> Contestant | Absent:
    """One network after another, eager."""
    torch = torch_module()
    if isinstance(torch, str):
        return Absent("torch", torch)
    images, labels, weights = torch_problem(data, torch, steps)
    networks = torch_networks(data, models, torch)
    starts = [{name: value.clone() for name, value in network.state_dict().items()} for network in networks]

    def call():
        losses = np.zeros((len(networks), steps), np.float32)
        for member, (network, start) in enumerate(zip(networks, starts, strict=True)):
            network.load_state_dict(start)
            optimiser = torch.optim.SGD(network.parameters(), RATE, MOMENTUM, nesterov=True)
            for t in range(steps):
                optimiser.zero_grad()
                nll = torch.nn.functional.cross_entropy(network(images), labels, reduction="none")
                loss = (nll * weights[t][labels]).mean()
                loss.backward()
                optimiser.step()
                losses[member, t] = loss.item()
        return losses

    return Contestant("torch", call)


def torch_vmap(data: Dataset, models: list[Myrtle], steps: int) -> Contestant | Absent:
    """Stacked parameters, `torch.func.vmap` over members."""
    torch = torch_module()
    if isinstance(torch, str):
        return Absent("torch.func.vmap", torch)
    images, labels, weights = torch_problem(data, torch, steps)
    networks = torch_networks(data, models, torch)
    stacked, _ = torch.func.stack_module_state(networks)

    def loss_of(parameters, t):
        logits = torch.func.functional_call(networks[0], parameters, (images,))
        nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        return (nll * weights[t][labels]).mean()

    value_and_grad = torch.func.vmap(torch.func.grad_and_value(loss_of), in_dims=(0, None))

    def call():
        parameters = {name: value.detach().clone() for name, value in stacked.items()}
        optimiser = torch.optim.SGD(parameters.values(), RATE, MOMENTUM, nesterov=True)
        losses = []
        for t in range(steps):
            gradients, loss = value_and_grad(parameters, t)
            for name, value in parameters.items():
                value.grad = gradients[name]
            optimiser.step()
            losses.append(loss.detach())
        return torch.stack(losses, 1)

    return Contestant("torch.func.vmap", call)
