"""The CIFAR-10 problem: the paper's protocol, the data and the networks, for every command on it."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, Float, UInt8

from eqx_dynloss.loss import DynamicalLoss
from eqx_dynloss.models import Myrtle
from eqx_dynloss.schedule import OscillatingWeights
from eqx_dynloss.train import Dataset

from ..results.labelled import combinations, dataset_title, unfold
from ..running.devices import devices
from ..running.errors import UsageError
from ..running.members import Members
from ..running.task import Plan, Task, chunk_length
from .images import ImageData
from .optimiser import nesterov, oscillating_nesterov, rise_and_fall
from .oscillation import OscillatingRate, Oscillation, oscillating
from .presets import Preset

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is trained by a preset on some images: Myrtle5 with every loss and seed."""

    images: ImageData
    preset: Preset
    steps_per_epoch: int
    periods: list[float]  # in steps
    momentum: float
    oscillation: Oscillation
    task: Task

    @classmethod
    def of(
        cls,
        preset: Preset,
        images: ImageData,
        seeds: Sequence[int],
        momentum: float = 0.9,
        stop_epoch: float | None = None,
        oscillation: Oscillation = "triangle",
        **plan: Any,
    ) -> "Problem":
        """**Arguments:**

        - `preset`: the protocol.
        - `seeds`: of the members of every loss. Those of one seed have the same initial weights and order of examples.
        - `stop_epoch`: the epoch at which the oscillation stops; by default 6/7 of them.
        - `oscillation`: the paper's, or a control.
        - `plan`: what the plan has besides the protocol, such as observations.
        """
        train_data, validation_data = datasets(images, preset)
        steps_per_epoch = len(train_data) // preset.batch_size
        if steps_per_epoch == 0:
            raise UsageError(
                f"a batch of {preset.batch_size} is larger than the training set of {len(train_data)} examples: "
                "take a smaller batch, or more examples."
            )
        num_steps = preset.epochs * steps_per_epoch
        stop = round((6 / 7 * preset.epochs if stop_epoch is None else stop_epoch) * steps_per_epoch)
        periods = [parse_period(text, steps_per_epoch) for text in preset.period]
        if min(periods, default=2) < 2:
            raise UsageError(f"a period must be at least 2 steps, shorter ones have no peak, got {min(periods):g}.")
        try:
            coordinates = combinations(preset.amplitude, periods, seeds)
        except ValueError as error:
            raise UsageError(str(error)) from error
        turns = np.nan_to_num(coordinates["period"], nan=1.0)  # the static loss has none
        if oscillation == "learning-rate" and any(T % 1 for T in periods):
            raise UsageError("--oscillation learning-rate takes periods of whole steps, such as 1ep.")
        if oscillation == "learning-rate" and plan.get("observe"):
            raise UsageError("--oscillation learning-rate has no single edge of stability: pass --curvature 0.")
        stops = np.full(len(turns), stop)
        schedule = oscillating(
            oscillation,
            len(CLASSES),
            coordinates["amplitude"],
            turns,
            stops,
            coordinates["seed"],
            inclusive_period=False,
        )
        optimiser, hyperparams = nesterov(preset.learning_rate, momentum, num_steps), {}
        if isinstance(schedule, OscillatingRate):
            optimiser, hyperparams = oscillating_nesterov(preset.learning_rate, momentum, num_steps, schedule)
            schedule = OscillatingWeights(len(CLASSES), np.ones(len(turns)), turns, stop=stops)
        members = Members(
            make_model=lambda key: Myrtle(preset.width, compute_dtype=preset.compute_dtype, key=key),
            optimiser=optimiser,
            losses=DynamicalLoss(schedule),
            coordinates=coordinates,
            hyperparams=hyperparams,
        )
        on_cpu = jax.devices()[0].platform == "cpu"
        images_per_step = preset.batch_size * len(members)
        pixels = math.prod(images.train_images.shape[1:3])
        per_image = cpu_seconds_per_image(preset.width, pixels)
        chunk_target = 2 / (per_image * images_per_step) if on_cpu else steps_per_epoch
        each, rest = divmod(num_steps, preset.evaluations)  # steps from one evaluation to the next
        chunk = chunk_length(num_steps if rest else each, min(chunk_target, num_steps / preset.evaluations))
        if not rest and each % chunk:
            chunk = 1  # evaluations come at the same steps for any number of members
        microbatch_size = cpu_microbatch_size(preset.batch_size, pixels) if on_cpu else None
        task = Task(
            name="",
            members=members,
            data=train_data,
            splits={"train": train_data, "validation": validation_data},
            plan=Plan(num_steps, chunk, preset.evaluations, preset.batch_size, microbatch_size, **plan),
        )
        return cls(images, preset, steps_per_epoch, periods, momentum, oscillation, task)

    @property
    def sizes(self) -> dict[str, int]:
        """The flags that say how much of the data set is used, with what there is."""
        return {f"{split}_examples": len(data) for split, data in self.task.splits.items()}

    @property
    def work(self) -> str:
        """What a member is trained on, in words."""
        sizes = " + ".join(f"{size:,}" for size in self.sizes.values())
        steps = f"{self.task.plan.num_steps:,} steps of {self.preset.batch_size} images"
        no_faster = " (no faster than float32 on a CPU)" if jax.devices()[0].platform == "cpu" else ""
        dtype = self.preset.compute_dtype
        rounded = f" | {dtype}{no_faster}" if dtype != "float32" else ""
        return f"{steps} | {dataset_title(self.images.name)}, {sizes} images{rounded}"

    def results(self, measured: xr.Dataset) -> xr.Dataset:
        """What `train` gave, with named dimensions and what it says of the run."""
        plan = self.task.plan
        unfolded = unfold(
            measured,
            *([self.task.members.class_weights(plan.num_steps)] if plan.keep_steps else []),
            periods=self.periods,
            classes=CLASSES if self.images.name == "cifar10" else [str(digit) for digit in range(10)],
            dataset=self.images.name,
            source=self.images.source,
            device=devices(),
            compute_dtype=self.preset.compute_dtype,
            momentum=self.momentum,
            finished=measured.finished,
            steps_done=round(measured.steps_done),
            steps_planned=plan.num_steps,
            steps_per_epoch=self.steps_per_epoch,
            images_per_second=measured.member_updates_per_second * self.preset.batch_size,
        )
        if self.oscillation != "triangle":
            unfolded = unfolded.assign_coords(oscillation=self.oscillation)
        if plan.observe_evaluated:
            rates = self.preset.learning_rate * rise_and_fall(plan.num_steps)(unfolded.observation_step.values)
            about = {"units": "1", "long_name": "learning rate η at the observation"}
            unfolded["step_size"] = ("observation_step", np.asarray(rates, float), about)
        return unfolded


class Standardise(eqx.Module):
    """uint8 images to floats of mean 0 and standard deviation 1 in every channel."""

    mean: Float[Array, " channels"]
    std: Float[Array, " channels"]

    def __call__(
        self, images: UInt8[Array, "*batch height width channels"]
    ) -> Float[Array, "*batch height width channels"]:
        shape = images.shape
        return (images.astype(self.mean.dtype) - jnp.broadcast_to(self.mean, shape)) / jnp.broadcast_to(self.std, shape)


def parse_period(text: str, steps_per_epoch: int) -> float:
    """A period in optimiser steps, from `"250"` (steps) or `"0.5ep"` (epochs)."""
    match = re.fullmatch(r"([0-9.eE+-]+?)\s*(ep|epochs?)?", text.strip())
    try:
        number = float(match[1] if match else text)
    except ValueError:
        raise UsageError(f"{text!r} is not a period: give optimiser steps (250) or epochs (0.5ep).") from None
    if not 0 < number < math.inf:
        raise UsageError(f"a period must be a positive number of steps or epochs, got {text}.")
    return number * steps_per_epoch if match and match[2] else number


def flops_per_image(width: int) -> float:
    """Floating-point operations of a forward and backward pass of Myrtle on one image of 32×32, by definition.

    Three times the forward pass, but for the first convolution, whose input needs no gradient.
    """
    return 2 * 9 * (2 * 1024 * 3 * width + 3 * (1024 + 256 + 64) * width**2)


def cpu_microbatch_size(batch_size: int, pixels: int) -> int:
    """How many images' gradient a CPU computes at a time, a divisor of the batch: what it is fastest with.

    Two of CIFAR-10's: with one an update of Myrtle5 takes 1.2 to 1.1 times as long at widths 8 to 32, 0.98 times at 64;
    with eight 0.94 times at width 8, and 1.3 and 1.1 times at 32 and 64. As many smaller ones as have their pixels.
    """
    return math.gcd(batch_size, max(1, 2048 // pixels))


def cpu_seconds_per_image(width: int, pixels: int) -> float:
    """About how long an image takes in training on this CPU's cores; for the length of chunks.

    Arithmetic at 200 GFLOP/s a core, and the rest: at widths 16 and 64 1.4 times as long as two fast cores take.
    """
    return pixels / 1024 * (flops_per_image(width) / 200e9 + 1.4e-4) / jax.device_count()


def datasets(images: ImageData, preset: Preset) -> tuple[Dataset, Dataset]:
    """The training and validation sets, as uint8; their transform standardises with the training set's statistics."""
    train, validation = slice(preset.train_examples), slice(preset.validation_examples)
    pixels = images.train_images[train]
    mean = pixels.mean((0, 1, 2))
    squares = np.einsum("nhwc,nhwc->c", pixels, pixels, dtype=np.int64)  # exact, and no copy of the images in float64
    std = np.sqrt(squares / pixels[..., 0].size - mean**2)
    standardise = Standardise(jnp.asarray(mean, float), jnp.asarray(std, float))
    return (
        Dataset(jnp.asarray(pixels), jnp.asarray(images.train_labels[train]), standardise),
        Dataset(
            jnp.asarray(images.validation_images[validation]),
            jnp.asarray(images.validation_labels[validation]),
            standardise,
        ),
    )
