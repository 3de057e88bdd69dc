"""The contestants of `test_cifar` that are written in PyTorch: the same network, members, minibatch and updates."""

import importlib
import warnings
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eqx_dynloss.models import Myrtle
from eqx_dynloss.schedule import OscillatingWeights
from eqx_dynloss.train import Dataset
from experiments.problems.prepare import brief

from .contestant import Absent, Contestant


@dataclass(frozen=True)
class Task:
    """What to train, in JAX's terms.

    **Fields:**

    - `data`: the minibatch, which every update is made on.
    - `models`: the members before the first update.
    - `schedule`: the class weights of every update.
    - `steps`: how many updates.
    - `rate`, `momentum`: of stochastic gradient descent with Nesterov momentum.
    """

    data: Dataset
    models: list[Myrtle]
    schedule: OscillatingWeights
    steps: int
    rate: float
    momentum: float


def sequential(task: Task, name: str, compiled: bool = False, rounded: bool = False) -> Contestant | Absent:
    """One network after another, channels last, eager or by `torch.compile`, and `rounded` to bfloat16 by autocast."""
    torch = _torch()
    if isinstance(torch, str):
        return Absent(name, torch)
    problem = _Problem(task, torch)
    network = problem.networks[0]
    starts = [{key: value.clone() for key, value in other.state_dict().items()} for other in problem.networks]
    run = network

    def call():
        losses = []
        for start in starts:
            network.load_state_dict(start)
            optimiser = problem.optimiser(network.parameters())
            for t in range(task.steps):
                optimiser.zero_grad()
                with torch.autocast(problem.device, torch.bfloat16, enabled=rounded):
                    logits = run(problem.images)
                loss = problem.loss(logits.float(), t)
                loss.backward()
                optimiser.step()
                losses.append(loss.detach())
        return torch.stack(losses).reshape(len(starts), task.steps).cpu()  # and waits, on a GPU

    if compiled:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # such as that guards are slower with Python 3.13.0
                run = torch.compile(network, mode="reduce-overhead" if problem.device == "cuda" else "default")
                call()
        except Exception as error:  # no C++ compiler is one of many ways in which it does not work
            return Absent(name, f"does not work here: {brief(error)}")
    return Contestant(name, call)


def stacked(task: Task, name: str) -> Contestant | Absent:
    """Stacked parameters, `torch.func.vmap` over members."""
    torch = _torch()
    if isinstance(torch, str):
        return Absent(name, torch)
    problem = _Problem(task, torch)
    start, _ = torch.func.stack_module_state(problem.networks)

    def loss_of(parameters, t):
        return problem.loss(torch.func.functional_call(problem.networks[0], parameters, (problem.images,)), t)

    value_and_grad = torch.func.vmap(torch.func.grad_and_value(loss_of), in_dims=(0, None))

    def call():
        parameters = {key: value.detach().clone() for key, value in start.items()}
        optimiser = problem.optimiser(parameters.values())
        losses = []
        for t in range(task.steps):
            gradients, loss = value_and_grad(parameters, t)
            for key, value in parameters.items():
                value.grad = gradients[key]
            optimiser.step()
            losses.append(loss.detach())
        return torch.stack(losses, 1).cpu()  # and waits, on a GPU

    return Contestant(name, call)


def _torch() -> Any | str:
    """PyTorch, or why it cannot take part."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return "not installed"
    if jax.default_backend() == "gpu":
        if not torch.cuda.is_available():
            return "installed without CUDA"
        torch.backends.cudnn.benchmark = True  # tries its algorithms out, as XLA does
    return torch


class _Problem:
    """The task in PyTorch's terms: networks, and images `[batch, 3, height, width]`, channels last in memory."""

    def __init__(self, task: Task, torch: Any):
        self._torch, self._task = torch, task
        self.device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        images = torch.tensor(np.asarray(task.data.inputs).transpose(0, 3, 1, 2), device=self.device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self._labels = torch.tensor(np.asarray(task.data.labels), device=self.device).long()
        weights = np.asarray(jax.vmap(task.schedule)(jnp.arange(task.steps)))
        self._weights = torch.tensor(weights, device=self.device)
        self.networks = [self._network(model) for model in task.models]

    def loss(self, logits: Any, t: int) -> Any:
        nll = self._torch.nn.functional.cross_entropy(logits, self._labels, reduction="none")
        return (nll * self._weights[t][self._labels]).mean()

    def optimiser(self, parameters: Any) -> Any:
        return self._torch.optim.SGD(parameters, self._task.rate, self._task.momentum, nesterov=True)

    def _network(self, model: Myrtle) -> Any:
        """Myrtle5 with the parameters of a model."""
        torch, nn = self._torch, self._torch.nn
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
        # All that is left; of adaptive pooling torch warns that it is slow under vmap.
        pooled = nn.AvgPool2d(self.images.shape[2] // 4)
        return nn.Sequential(*layers, pooled, nn.Flatten(), head).to(self.device, memory_format=torch.channels_last)
