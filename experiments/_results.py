"""The results of a run as one labelled dataset: how it is put together from flat members, saved and loaded.

Variables and their dimensions (`step` counts updates from 0; `evaluation_step` is the number of updates made before):

| variable | dimensions | unit |
|---|---|---|
| `accuracy`, `loss` | amplitude, period, seed, split, evaluation_step | 1, nats (plain cross-entropy) |
| `minibatch_loss`, `minibatch_accuracy` | amplitude, period, seed, step | nats (the loss that was minimised), 1 |
| `class_weights` | amplitude, period, step, class | 1, sums to the number of classes |
| `diverged_at` | amplitude, period, seed | update, -1 for never |
| what was observed, such as `hessian_max` | amplitude, period, seed, observation_step | |

A phase diagram has no numbers of single updates, and no dimension `step`.

Where more than the loss is varied, as in the spiral experiment, all variables have leading dimensions `init`, `width`
and `learning_rate`. The first amplitude is 1, the static loss. It has no period: its members are trained once and
repeated along `period`.
"""

import itertools
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike

PACKAGES = ("jax", "jaxlib", "equinox", "optax", "numpy", "eqx-dynloss")
SPLITS = ("train", "validation")

SETTINGS = ("init", "width", "learning_rate")  # what can be varied besides the loss
STAND_INS = ("digits",)

_TITLES = {
    "cifar10": "CIFAR-10",
    "digits": "scikit-learn digits (stand-in, not CIFAR-10)",
    "spiral": "the spiral",
}
_UNITS = {
    "accuracy": ("1", "fraction of the split classified correctly"),
    "loss": ("nats", "plain cross-entropy, mean over the split, without class weights"),
    "minibatch_loss": ("nats", "loss minimised by the update, with its class weights"),
    "minibatch_accuracy": ("1", "fraction of the update's minibatch classified correctly"),
    "class_weights": ("1", "class weight Γ, sums to the number of classes"),
    "diverged_at": ("update", "update at which the member became non-finite and was frozen, -1 for never"),
    "amplitude": ("1", "amplitude A of the dynamical loss; 1 is the static loss"),
    "period": ("update", "period T of one class"),
    "observation_step": ("update", "updates made before the observation"),
    "hessian_max": ("1", "largest eigenvalue of the Hessian of the loss with the step's class weights"),
    "hessian_max_error": ("1", "error bound of hessian_max, the Ritz residual"),
    "hessian_min": ("1", "smallest Ritz value of the same Hessian, an upper bound of its smallest eigenvalue"),
    "hessian_min_error": (
        "1",
        "the Ritz residual: an eigenvalue is that near, but a smaller one can exist",
    ),
    "ntk_max": ("1", "largest eigenvalue of the empirical neural tangent kernel"),
    "ntk_max_error": ("1", "error bound of ntk_max, the Ritz residual"),
    "init": ("1", "initialisation"),
    "width": ("1", "units in the hidden layer"),
    "learning_rate": ("1", "learning rate η"),
    "evaluation_step": ("update", "updates made before the evaluation"),
    "step": ("update", "index of the update"),
}


def dataset_title(name: str) -> str:
    """The name to print for a data set: a stand-in for CIFAR-10 always says that it is one."""
    return _TITLES.get(name, name)


def file_name(dataset: str, name: str) -> str:
    """What a file of a run is called: one about a stand-in says so in its name."""
    return f"{dataset}_{name}" if dataset in STAND_INS else name


def conditions(amplitudes: Sequence[float], periods: Sequence[float]) -> list[tuple[float, float | None]]:
    """The (amplitude, period) pairs of a run: static, (1, None), then each amplitude but 1, period by period."""
    if not periods or len(set(periods)) < len(periods) or len(set(amplitudes)) < len(amplitudes):
        given = " and ".join(", ".join(f"{value:g}" for value in values) or "none" for values in (amplitudes, periods))
        raise ValueError(f"amplitudes and periods must be distinct, with at least one period, got {given}.")
    return [(1.0, None), *((A, T) for A in amplitudes if A != 1 for T in periods)]


def assemble(
    *,
    amplitudes: Sequence[float],
    periods: Sequence[float],
    seeds: Sequence[int],
    classes: Sequence[str],
    evaluation_steps: ArrayLike,
    accuracy: ArrayLike,
    loss: ArrayLike,
    diverged_at: ArrayLike,
    attrs: Mapping[str, object],
    minibatch_loss: ArrayLike | None = None,
    minibatch_accuracy: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    observation_steps: ArrayLike = (),
    observations: Mapping[str, ArrayLike] | None = None,
) -> xr.Dataset:
    """Gives flat members their named dimensions.

    The members' order is: for every condition of `conditions(amplitudes, periods)`, for every seed.

    **Arguments:**

    - `amplitudes`, `periods`, `seeds`, `classes`: what was compared; the amplitude 1 is implied.
    - `evaluation_steps`: updates made before each evaluation, `[evaluations]`.
    - `accuracy`, `loss`: `[members, splits, evaluations]`, splits being train, validation; NaN where not evaluated.
    - `diverged_at`: `[members]`, -1 for never.
    - `attrs`: what else to record. Read elsewhere: `dataset`, `finished` (anything but true is an interrupted run),
        `steps_done`, `steps_planned`, `steps_per_epoch`, `command`, `device` and the keys of `provenance()`.
    - `minibatch_loss`, `minibatch_accuracy`: `[members, steps]`; without them the dataset has no `step`.
    - `class_weights`: `[conditions, steps, classes]`; they do not depend on the seed.
    - `observation_steps`, `observations`: updates made before each observation; and by name, `[members, observations]`.

    **Returns:**

    The dataset that the module describes.
    """
    grid = [float(A) for A in amplitudes if A != 1]
    n_conditions = len(conditions(amplitudes, periods))

    def unfold(name: str, values: ArrayLike, *dims: str) -> tuple[tuple[str, ...], np.ndarray, dict[str, str]]:
        values = np.asarray(values)
        lead = (n_conditions,) if name == "class_weights" else (n_conditions, len(seeds))
        if values.ndim != len(dims) + 1 or values.shape[0] != np.prod(lead):
            raise ValueError(f"{name} has shape {values.shape}: expected {np.prod(lead)} along the first of {dims}.")
        values = values.reshape(*lead, *values.shape[1:])
        static = np.broadcast_to(values[0], (1, len(periods), *values.shape[1:]))
        dynamical = values[1:].reshape(len(grid), len(periods), *values.shape[1:])
        lead_dims = ("amplitude", "period", "seed")[: len(lead) + 1]
        return (*lead_dims, *dims), np.concatenate([static, dynamical]), _attributes(name)

    observed = {name: unfold(name, values, "observation_step") for name, values in (observations or {}).items()}
    axes = {"observation_step": np.asarray(observation_steps)} if observed else {}
    by_step = {"minibatch_loss": minibatch_loss, "minibatch_accuracy": minibatch_accuracy}
    by_step = {name: unfold(name, values, "step") for name, values in by_step.items() if values is not None}
    if class_weights is not None:
        by_step["class_weights"] = unfold("class_weights", class_weights, "step", "class")
    if minibatch_loss is not None:
        axes["step"] = np.arange(np.shape(minibatch_loss)[-1])
    return xr.Dataset(
        {
            "accuracy": unfold("accuracy", accuracy, "split", "evaluation_step"),
            "loss": unfold("loss", loss, "split", "evaluation_step"),
            **by_step,
            "diverged_at": unfold("diverged_at", diverged_at),
            **observed,
        },
        {
            "amplitude": ("amplitude", [1.0, *grid], _attributes("amplitude")),
            "period": ("period", [float(T) for T in periods], _attributes("period")),
            "seed": ("seed", np.asarray(seeds)),
            "split": ("split", list(SPLITS)),
            "evaluation_step": ("evaluation_step", np.asarray(evaluation_steps), _attributes("evaluation_step")),
            "class": ("class", list(classes)),
            **{name: (name, values, _attributes(name)) for name, values in axes.items()},
        },
        {
            "comment": "amplitude 1 is the static loss, which has no period: trained once, repeated along period",
            # netCDF attributes know neither None nor bool
            **{key: str(a).lower() if isinstance(a, bool) else a for key, a in attrs.items() if a is not None},
        },
    )


def settings(dataset: xr.Dataset) -> Iterator[tuple[str, xr.Dataset]]:
    """The parts of a dataset between which more than the loss differs, each with what it differs in, in words.

    Parts that an interrupted run never came to are left out. Without such dimensions: the whole, and "".
    """
    dims = [name for name in SETTINGS if name in dataset.dims]
    for values in itertools.product(*(dataset[name].values.tolist() for name in dims)):
        part = dataset.sel(dict(zip(dims, values, strict=True)))
        if not dims or np.isfinite(part.get("minibatch_loss", part.accuracy)).any():
            yield ", ".join(_words(part, name) for name in dims if dataset.sizes[name] > 1), part


def loss_unit(dataset: xr.Dataset) -> str:
    """The unit of a dataset's losses: nats, or none for a squared error."""
    return "nats" if dataset.attrs.get("loss_function", "cross-entropy") == "cross-entropy" else ""


def with_loss_function(dataset: xr.Dataset, name: str) -> xr.Dataset:
    """Says in a dataset which loss was minimised, where `assemble` has taken it for the cross-entropy."""
    dataset = dataset.assign_attrs(loss_function=name)
    if not loss_unit(dataset):
        dataset.loss.attrs |= {"units": "1", "long_name": f"plain {name} loss, mean over the split, no class weights"}
        if "minibatch_loss" in dataset:
            dataset.minibatch_loss.attrs["units"] = "1"
    return dataset


def subject(dataset: xr.Dataset) -> str:
    """The data set of a dataset or of a part of it, and the setting as far as it is the same throughout."""
    fixed = [_words(dataset, name) for name in SETTINGS if name in dataset.coords and dataset[name].size == 1]
    return dataset_title(dataset.attrs["dataset"]) + (f" ({', '.join(fixed)})" if fixed else "")


def _words(part: xr.Dataset, name: str) -> str:
    value = part[name].item()
    if name == "init":
        return {"paper": "paper init", "glorot": "Glorot init", "none": "no biases"}[value]
    return f"{name.replace('_', ' ')} {value:g}"


def losses(part: xr.Dataset) -> list[xr.Dataset]:
    """The members of every loss of a part, the static one first; each has one amplitude and one period."""
    grid = [(a, p) for a in range(1, part.sizes["amplitude"]) for p in range(part.sizes["period"])]
    return [part.isel(amplitude=a, period=p) for a, p in [(0, 0), *grid]]


def loss_name(members: xr.Dataset) -> str:
    """The loss of a part of the dataset that has one amplitude and one period, in words."""
    amplitude = float(members.amplitude)
    return "static" if amplitude == 1 else f"A = {amplitude:g}, T = {float(members.period):g}"


def _attributes(name: str) -> dict[str, str]:
    unit, description = _UNITS[name]
    return {"units": unit, "long_name": description}


def save(dataset: xr.Dataset, path: str | os.PathLike[str]) -> None:
    """Writes the dataset as compressed netCDF. Whenever it is stopped, `path` holds the whole old or whole new file."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    # An interrupted run can have empty variables, which cannot be compressed.
    encoding = {name: {"zlib": True, "complevel": 1} for name, v in dataset.data_vars.items() if v.size}
    # In memory first: HDF5 itself may crash the process where a disk is full.
    content = bytes(dataset.to_netcdf(engine="h5netcdf", encoding=encoding))
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> xr.Dataset:
    """Reads what `save` wrote into memory and closes the file."""
    with xr.open_dataset(path, engine="h5netcdf") as dataset:
        return dataset.load()


def provenance() -> dict[str, str]:
    """What computed a result: versions of Python and the packages that matter, platform, and the project's git commit.

    Whatever is not installed is left out, and so is the commit without git; "+dirty" marks uncommitted changes.
    """
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    try:
        commit = _git("rev-parse", "HEAD")
        found["git_commit"] = commit + ("+dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        pass
    return found


def _git(*arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
