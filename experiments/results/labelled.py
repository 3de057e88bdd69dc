"""The results of a run as one labelled dataset, and how it is put together.

Variables and their dimensions (`step` counts updates from 0; `evaluation_step` is the number of updates made before):

| variable | dimensions | unit |
|---|---|---|
| `accuracy`, `loss` | amplitude, period, seed, split, evaluation_step | 1, nats (plain cross-entropy) |
| `minibatch_loss`, `minibatch_accuracy` | amplitude, period, seed, step | nats (the loss that was minimised), 1 |
| `class_weights` | amplitude, period, step, class | 1, sums to the number of classes |
| `diverged_at` | amplitude, period, seed | update, -1 for never |
| what was observed, such as `hessian_max` | amplitude, period, seed, observation_step | |
| decision regions, `decision` and `confidence` | the same, y, x | 1 |
| cuts through the landscape, such as `loss_along` | the same, distance | nats |
| `step_size`, where the learning rate changes | observation_step | 1 |

Most commands leave no numbers of single updates, and no dimension `step`. A bifurcation diagram is another dataset,
which `experiments.bifurcation.frozen` describes.

Where more than the loss is varied, as in the spiral experiment, all variables have leading dimensions `init`, `width`
and `learning_rate`, and `oscillation` where another than the paper's is among them. (In a random order, `class_weights`
are those of the first seed.) Where there are several loss functions, `loss_function` is the first
dimension. The first amplitude is 1, the static loss. It has no period: its members are trained once and repeated along
`period`.
"""

import itertools
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
import xarray as xr

from . import words

SPLITS = ("train", "validation")

SETTINGS = ("loss_function", "init", "width", "learning_rate", "oscillation")  # what can be varied besides the loss
DIMENSIONS = (*SETTINGS, "amplitude", "period", "seed")  # those that members differ in

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
    "peak_hessian_max": ("1", "largest eigenvalue of the Hessian of the loss with one class at its peak"),
    "peak_hessian_max_error": ("1", "error bound of peak_hessian_max, the Ritz residual"),
    "static_hessian_max": ("1", "largest eigenvalue of the Hessian of the static loss at the same parameters"),
    "static_hessian_max_error": ("1", "error bound of static_hessian_max, the Ritz residual"),
    "hessian_min": ("1", "smallest Ritz value of the same Hessian, an upper bound of its smallest eigenvalue"),
    "hessian_min_error": (
        "1",
        "the Ritz residual: an eigenvalue is that near, but a smaller one can exist",
    ),
    "ntk_max": ("1", "largest eigenvalue of the empirical neural tangent kernel"),
    "ntk_max_error": ("1", "error bound of ntk_max, the Ritz residual"),
    "decision": ("1", "class of the largest output at a point of the square"),
    "confidence": ("1", "its softmax probability"),
    "x": ("1", "first coordinate of the points"),
    "y": ("1", "second coordinate of the points"),
    "parameters": ("1", "trained parameters, flat"),
    "norm": ("1", "norm ‖θ‖ of the parameters"),
    "distance": ("norm of the parameters", "distance along the leading eigenvector v₁"),
    "distance_in_plane": ("norm of the parameters", "distance along v₁, in the plane"),
    "second": ("norm of the parameters", "distance along the second eigenvector v₂, in the plane"),
    "direction": ("1", "1 for the leading eigenvector of the Hessian, 2 for the second"),
    "update": ("update", "updates made since the landscape was taken"),
    "eigenvalue": ("1", "the two largest eigenvalues of the Hessian of the loss with the step's class weights"),
    "eigenvalue_error": ("1", "error bound of eigenvalue, the Ritz residual"),
    "slope": ("nats per norm of the parameters", "slope of the loss along the eigenvectors"),
    "loss_here": ("nats", "loss with the step's class weights"),
    "loss_along": ("nats", "the same loss along v₁"),
    "loss_in_plane": ("nats", "the same loss in the plane of v₁ and v₂"),
    "trajectory": ("norm of the parameters", "where the updates that follow are, in the plane of v₁ and v₂"),
    "moved": ("norm of the parameters", "how far the updates that follow have moved, in all directions"),
    "share_in_plane": ("1", "share of the squared lengths of these updates that lies in the plane"),
    "loss_function": ("1", "loss function that is minimised, with class weights if they oscillate"),
    "init": ("1", "initialisation"),
    "width": ("1", "units in the hidden layer"),
    "learning_rate": ("1", "learning rate η"),
    "oscillation": ("1", "what oscillates: the paper's triangle, or a control"),
    "evaluation_step": ("update", "updates made before the evaluation"),
    "step": ("update", "index of the update"),
}


def dataset_title(name: str) -> str:
    """The name to print for a data set: a stand-in for CIFAR-10 always says that it is one."""
    return _TITLES.get(name, name)


def combinations(
    amplitudes: Sequence[float], periods: Sequence[float], seeds: Sequence[int], **settings: Sequence[Any]
) -> dict[str, np.ndarray]:
    """The coordinates of the members of a comparison, by name, `[members]`: every setting with every loss and seed.

    The losses are the static one, of amplitude 1 and without a period (NaN), and every amplitude but 1 with every
    period. **Raises:** `ValueError` if a value is given twice, or no period.
    """
    if not periods or len(set(periods)) < len(periods) or len(set(amplitudes)) < len(amplitudes):
        given = " and ".join(", ".join(f"{value:g}" for value in values) or "none" for values in (amplitudes, periods))
        raise ValueError(f"amplitudes and periods must be distinct, with at least one period, got {given}.")
    losses = [(1.0, np.nan), *((float(A), float(T)) for A in amplitudes if A != 1 for T in periods)]
    rows = [(*row, *loss, seed) for *row, loss, seed in itertools.product(*settings.values(), losses, seeds)]
    names = (*settings, "amplitude", "period", "seed")
    return {name: np.array(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}


def unfold(*parts: xr.Dataset, periods: Sequence[float], classes: Sequence[str], **attrs: object) -> xr.Dataset:
    """The dataset that the module describes, from datasets with a dimension `member`.

    **Arguments:**

    - `parts`: their members have the coordinates of `combinations`. Those of the first one decide what there is.
    - `periods`: also those of an amplitude that nobody was trained with.
    - `classes`: their names.
    - `attrs`: what else to record. Read elsewhere: `dataset`, `finished` (anything but true is an interrupted run),
        `steps_done`, `steps_planned`, `steps_per_epoch`, `command`, `device` and the keys of `provenance()`.
    """
    unfolded = xr.merge(
        [_unfold(part, periods) for part in parts], join="left", compat="override", combine_attrs="drop"
    )
    unfolded = unfolded.assign_coords({"class": list(classes)})
    for name in unfolded.variables:
        unfolded[name].attrs |= about(str(name))
    return unfolded.assign_attrs(
        comment="amplitude 1 is the static loss, which has no period: trained once, repeated along period",
        # netCDF attributes know neither None nor bool
        **{key: str(a).lower() if isinstance(a, bool) else a for key, a in attrs.items() if a is not None},
    )


def _unfold(flat: xr.Dataset, periods: Sequence[float]) -> xr.Dataset:
    """A dimension for every coordinate of the members, with values in the order in which they first appear."""
    missing = missing_values(flat)
    order = {name: list(dict.fromkeys(flat[name].values.tolist())) for name in DIMENSIONS if name in flat.coords}
    is_static = flat.amplitude.values == 1

    def spread_out(part: xr.Dataset, **own: list[float]) -> xr.Dataset:
        wanted = {name: own.get(name, values) for name, values in order.items() if name in part.coords}
        if len(wanted) == 1:
            return part.swap_dims(member=next(iter(wanted)))
        unfolded = part.set_index(member=list(wanted)).unstack("member", fill_value=missing)
        return unfolded.reindex(wanted, fill_value=missing)

    whole = [
        spread_out(flat.isel(member=is_static).drop_vars("period"), amplitude=[1.0]).expand_dims(period=list(periods))
    ]
    if not is_static.all():
        amplitudes = [A for A in order["amplitude"] if A != 1]
        whole.append(spread_out(flat.isel(member=~is_static), amplitude=amplitudes, period=list(periods)))
    joined = xr.concat(whole, "amplitude", data_vars="all", coords="minimal", compat="override", join="exact")
    return joined.transpose(*(name for name in DIMENSIONS if name in joined.dims), ...)


def missing_values(dataset: xr.Dataset) -> dict[Hashable, Any]:
    """What stands in the place of numbers that an interrupted run never came to: NaN, but -1 for whole numbers."""
    return {name: -1 for name, variable in dataset.data_vars.items() if variable.dtype.kind == "i"}


def by_setting(dataset: xr.Dataset) -> Iterator[tuple[str, xr.Dataset]]:
    """The parts of a dataset between which more than the loss differs, each with what it differs in, in words.

    Parts that an interrupted run never came to are left out. Without such dimensions: the whole, and "".
    """
    dims = [name for name in SETTINGS if name in dataset.dims]
    for values in itertools.product(*(dataset[name].values.tolist() for name in dims)):
        part = dataset.sel(dict(zip(dims, values, strict=True)))
        if not dims or np.isfinite(part.get("minibatch_loss", part.accuracy)).any():
            yield ", ".join(_words(part, name) for name in dims if dataset.sizes[name] > 1), part


def loss_unit(dataset: xr.Dataset) -> str:
    """The unit of a dataset's losses: nats, or none for a squared error, or for several loss functions."""
    name = dataset.attrs.get("loss_function", "cross-entropy")
    names = np.ravel(dataset["loss_function"]).tolist() if "loss_function" in dataset.coords else [name]
    return "nats" if set(names) == {"cross-entropy"} else ""


def with_loss_function(dataset: xr.Dataset, *names: str) -> xr.Dataset:
    """Says in a dataset which loss was minimised, or which ones, where `unfold` has taken it for the cross-entropy."""
    name = " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
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
    if name == "loss_function":
        return value
    if name == "oscillation":
        return {"random-order": "random order", "learning-rate": "oscillating learning rate"}.get(value, str(value))
    return f"{name.replace('_', ' ')} {value:g}"


def by_loss(part: xr.Dataset) -> list[xr.Dataset]:
    """The members of every loss of a part, the static one first; each has one amplitude and one period."""
    pairs = [(a, p) for a in range(1, part.sizes["amplitude"]) for p in range(part.sizes["period"])]
    return [part.isel(amplitude=a, period=p) for a, p in [(0, 0), *pairs]]


def loss_name(members: xr.Dataset) -> str:
    """The loss of a part of the dataset that has one amplitude and one period, in words."""
    return words.loss_name(float(members.amplitude), float(members.period), members.attrs.get("steps_per_epoch"))


def about(name: str) -> dict[str, str]:
    """The attributes of a variable: its unit, and what it is. Nothing of one that is not known."""
    return dict(zip(("units", "long_name"), _UNITS.get(name, ()), strict=False))
