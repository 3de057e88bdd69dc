"""The presets of CIFAR-10: a value for every flag that is not given."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax

from .images import ImageData

ComputeDtype = Literal["float32", "bfloat16"]
PresetName = Literal["short", "quick", "paper"]


@dataclasses.dataclass(frozen=True)
class Preset:
    """A protocol of training. In all of them the learning rate has its peak after 3/7 of the epochs, and the
    oscillation stops after 6/7, unless told otherwise."""

    amplitude: tuple[float, ...]
    period: tuple[str, ...]  # in steps, or "1ep"
    width: int
    epochs: int
    batch_size: int
    learning_rate: float  # at its peak
    train_examples: int | None  # the first so many; None: all
    validation_examples: int | None
    evaluations: int
    compute_dtype: ComputeDtype = "float32"
    curvature: int = 0  # training images on which the largest Hessian eigenvalue is observed


PRESETS: dict[PresetName, Preset] = {
    # Ours: a seventh of the paper's epochs at a rate at which they suffice to overfit; minutes on a GPU.
    "short": Preset((20.0,), ("1ep",), 64, 100, 512, 0.05, None, None, 20, "bfloat16", curvature=200),
    # Ours: few images, on which a narrow network overfits, in two to four minutes for eight seeds on two CPU cores. (At
    # a rate of 0.05 one of 40 static members fell to chance, at 0.03 none.)
    "quick": Preset((10.0,), ("4ep",), 16, 100, 32, 0.03, 500, 2_000, 10),
    # Ruiz-Garcia et al. 2021 (CIFAR-10). Their unit of T is not known: amplitude and period are choices of ours.
    "paper": Preset((10.0,), ("100",), 64, 700, 512, 0.02, None, None, 700),
}


def default_name() -> PresetName:
    """The preset for the devices that there are."""
    return "quick" if jax.devices()[0].platform == "cpu" else "short"


def chosen(name: PresetName, images: ImageData, given: Mapping[str, Any]) -> Preset:
    """A preset with those of its values replaced that are `given`, and not None.

    If it is made for few images of CIFAR-10, it takes all of those that stand in for them, in as many updates.
    """
    preset = PRESETS[name]
    if images.name != "cifar10" and preset.train_examples:
        epochs = round(preset.epochs * preset.train_examples / len(images.train_labels))
        preset = dataclasses.replace(preset, epochs=epochs, train_examples=None, validation_examples=None)
    own = {field.name: given.get(field.name) for field in dataclasses.fields(Preset)}
    return dataclasses.replace(preset, **{name: value for name, value in own.items() if value is not None})


def in_words(name: PresetName) -> str:
    """A preset as flags of the command line."""
    values = {k: " ".join(map(str, v)) if isinstance(v, tuple) else v for k, v in vars(PRESETS[name]).items()}
    flags = (f"--{k.replace('_', '-')} {'all' if v is None else v}" for k, v in values.items())
    return f"Preset {name}: {' '.join(flags)}."
