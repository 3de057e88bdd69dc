"""Runs that differ only in their seeds, or only in their amplitudes and periods, as if they had been one run."""

import functools as ft
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from ..compare.reading import find, read, read_config
from ..results.files import PACKAGES
from ..running.errors import UsageError
from ..running.flags import words

_JOINED = ("seed", "amplitude", "period")
_CELLS = ("amplitude", "period", "amplitudes", "periods")  # as the commands call them
# Settings that may differ.
_FREE = ("seeds", *_CELLS, "run", "made_by", "data_dir", "show_seed", "shown", "animation", "wave")
_SAME = ("dataset", "loss_function", "compute_dtype", "momentum", "steps_planned", "steps_per_epoch")
_VERSIONS = ("git_commit", *PACKAGES, *(f"resumed_with_{name}" for name in ("git_commit", *PACKAGES)))
_OF_EACH = ("device", "platform", "python", "source")  # that may differ, and are all named


@dataclass(frozen=True)
class Part:
    """A run that is to be joined with others."""

    path: Path
    dataset: xr.Dataset
    config: dict[str, Any]

    @property
    def experiment(self) -> str:
        """The command that made it."""
        command = str(self.dataset.attrs.get("merged", self.dataset.attrs.get("command", "")))
        found = re.search(r"experiments\.(\w+)", command)
        return found[1] if found else ""

    @property
    def first_seed(self) -> int:
        """Whose class weights the run has recorded, where they depend on the seed."""
        return int(self.dataset.seed[0])

    @classmethod
    def of(cls, path: Path) -> "Part":
        """Raises a `UsageError` for what is not a finished run with its configuration."""
        file = find(path)
        dataset, summary = read(file)
        config = read_config(file, dataset.attrs["dataset"])
        if config is None:
            raise UsageError(f"there is no readable config.json beside {file}, which says how it was made.")
        if not summary.finished:
            raise UsageError(f"the run in {path} is not finished: go on with it first, with --resume {path}.")
        return cls(path, dataset, config)


def join(parts: Sequence[Part]) -> tuple[xr.Dataset, dict[str, Any]]:
    """The results and the configuration that one run of all seeds, amplitudes and periods would have left.

    What several runs have trained, such as the static loss on the same seeds, has to be equal to the last bit. Raises a
    `UsageError` that names whatever else differs, or what is missing for a whole grid.
    """
    for one, other in itertools.combinations(parts, 2):
        if one.path.resolve() == other.path.resolve():
            raise UsageError(f"{other.path} is given twice: pass every run once.")
        _refuse_others(one, other)
        _refuse_conflicts(one, other)
    datasets = [part.dataset.drop_attrs(deep=False) for part in sorted(parts, key=lambda part: part.first_seed)]
    joined = ft.reduce(xr.Dataset.combine_first, datasets).sortby(list(_JOINED))
    missing = joined.diverged_at.isnull()
    if missing.any():
        first = dict(zip(missing.dims, np.argwhere(missing.values)[0], strict=True))
        where = ", ".join(f"{name} {joined[name].values[first[name]]:g}" for name in _JOINED)
        raise UsageError(f"no run has {where}: every amplitude needs every period and seed.")
    for name, variable in parts[0].dataset.variables.items():  # a join makes whole numbers floating-point ones
        joined[name] = joined[name].astype(variable.dtype).assign_attrs(variable.attrs)
    joined = joined.transpose(*parts[0].dataset.dims)
    return joined.assign_attrs(_attributes(parts)), _configuration(parts, joined)


def _refuse_others(one: Part, other: Part) -> None:
    """Raises a `UsageError` that names what differs besides seeds, amplitudes and periods."""
    if one.experiment != other.experiment:
        raise UsageError(
            f"{one.path} is a run of experiments.{one.experiment}, and {other.path} of experiments.{other.experiment}: "
            "only runs of one command are one run."
        )
    ours, theirs = one.config.keys() - {*_FREE}, other.config.keys() - {*_FREE}
    pairs = [(name, one.config.get(name), other.config.get(name)) for name in sorted(ours | theirs)]
    pairs += [(name, one.dataset.attrs.get(name), other.dataset.attrs.get(name)) for name in (*_SAME, *_VERSIONS)]
    different = [
        f"{name.replace('_', ' ')} {_words(a)} and {_words(b)}"
        for name, a, b in pairs
        if not np.array_equal(np.asarray(a), np.asarray(b))
    ]
    different = list(dict.fromkeys(different))  # the results repeat some of the settings
    if not different:
        ours, theirs = one.dataset, other.dataset
        if set(ours.variables) != set(theirs.variables):
            different.append(
                f"what was measured, {', '.join(sorted(map(str, set(ours.variables) ^ set(theirs.variables))))}"
            )
        coordinates = [name for name in ours.coords if name not in _JOINED and name in theirs.coords]
        same = lambda name: np.array_equal(ours[name].values, theirs[name].values)
        different += [f"the coordinate {name}" for name in coordinates if not same(name)]
    if different:
        raise UsageError(
            f"{one.path} and {other.path} differ in {'; '.join(different)}: only runs that differ in their seeds, or "
            "in amplitudes and periods, are one run."
        )


def _refuse_conflicts(one: Part, other: Part) -> None:
    """Raises a `UsageError` if what both runs have trained is not the same."""
    ours, theirs = xr.align(one.dataset, other.dataset, join="inner")
    if one.first_seed != other.first_seed and "random-order" in one.dataset.get("oscillation", ()):
        ours = ours.drop_vars("class_weights", errors="ignore")
    for name, variable in ours.data_vars.items():
        same = (variable == theirs[name]) | (variable.isnull() & theirs[name].isnull())
        if not same.all():
            where = same.where(~same, drop=True)
            at = ", ".join(f"{dim} {where[dim].values[0]:g}" for dim in _JOINED if dim in where.dims)
            raise UsageError(
                f"{one.path} and {other.path} both have {at}, with a different {name}: they overlap, but are not parts "
                "of one run."
            )


def _attributes(parts: Sequence[Part]) -> dict[str, Any]:
    """What the joined dataset says of itself: the same as its parts, and what they were made by."""
    attrs = [part.dataset.attrs for part in parts]
    joined = {name: value for name, value in attrs[0].items() if name != "resumed_with_command"}
    for name in _OF_EACH:
        values = dict.fromkeys(value for a in attrs if name in a for value in str(a[name]).split("; "))
        joined |= {name: "; ".join(values)} if values else {}
    joined |= {name: np.nan for name in ("images_per_second", "member_updates_per_second") if name in joined}
    return joined | {"merged": "; ".join(str(a.get("merged", a.get("command", ""))) for a in attrs)}


def _configuration(parts: Sequence[Part], joined: xr.Dataset) -> dict[str, Any]:
    """The settings of the parts with the seeds, amplitudes and periods of all of them. Without those of a run in time,
    such as where it is, by which it could be resumed: there is nothing to go on with."""
    config = {name: value for name, value in parts[0].config.items() if name not in ("run", "made_by")}
    seeds = joined.seed.values.tolist()
    whole = seeds == list(range(seeds[0], seeds[-1] + 1))
    config["seeds"] = f"{seeds[0]}:{seeds[-1] + 1}" if whole else seeds
    for name in _CELLS:
        values = [part.config[name] for part in parts if name in config]
        if any(value != values[0] for value in values):
            coordinate = joined[name.removesuffix("s")].values.tolist()
            config[name] = coordinate if isinstance(values[0], list) else ",".join(f"{v:g}" for v in coordinate)
    return config


def _words(value: Any) -> str:
    return "none" if value is None else words(tuple(value) if isinstance(value, list) else value)
