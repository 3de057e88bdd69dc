"""Runs that are to be compared, from the directories or the results files that they have left."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xarray as xr

from ..results import files, summary
from ..running.errors import UsageError
from .comparison import Run


def load(paths: Sequence[Path]) -> list[Run]:
    """Reads runs, given by their directories or results files. Raises a `UsageError` for what is not a run."""
    if not paths:
        raise UsageError("pass at least one RUN, a directory that an experiment has left.")
    found = [find(path) for path in paths]
    for i, file in enumerate(found):
        if file.resolve() in (other.resolve() for other in found[:i]):
            raise UsageError(f"{paths[i]} is given twice: pass every run once.")
    runs = []
    for name, file in zip(labels(found), found, strict=True):
        dataset, summary = read(file)
        runs.append(Run.of(name, file, dataset, summary, read_config(file, dataset.attrs["dataset"])))
    return runs


def find(path: Path) -> Path:
    """The results file of a run."""
    if path.is_dir():
        found = [file for name in ("", *files.STAND_INS) if (file := path / _file(name)).is_file()]
        if len(found) > 1:
            raise UsageError(f"{path} holds {' and '.join(file.name for file in found)}: pass one of these files.")
        if not found:
            raise UsageError(f"there is no {_file('')} in {path}: pass the directory of a run that has ended.")
        return found[0]
    if not path.exists():
        raise UsageError(f"{path} does not exist: pass the directory of a run, or its {_file('')}.")
    return path


def _file(dataset: str) -> str:
    return files.file_name(dataset, "results.nc")


def read(file: Path) -> tuple[xr.Dataset, summary.Summary]:
    """The dataset of a results file, and its summary."""
    try:
        dataset = files.load(file)
        if "final_loss" in dataset:
            raise UsageError(f"{file} is a bifurcation diagram, which has no accuracies to compare: leave it out.")
        return dataset, summary.summarise(dataset)
    except PermissionError as error:
        raise UsageError(f"cannot read {file} ({error.strerror}).") from error
    except (OSError, ValueError, KeyError, AttributeError, IndexError, TypeError, RuntimeError) as error:
        raise UsageError(
            f"{file} is not the results of an experiment, or is damaged ({type(error).__name__}): pass the directory "
            "of a run."
        ) from error


def read_config(file: Path, dataset: str) -> dict[str, Any] | None:
    """The `config.json` next to a results file, None if it is not there or cannot be read."""
    if file.name != _file(dataset):
        return None
    try:
        text = file.with_name(files.file_name(dataset, "config.json")).read_text(encoding="utf-8")
        config = json.loads(text, parse_constant=str)  # NaN and infinity are words
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def labels(paths: Sequence[Path]) -> list[str]:
    """The shortest names that tell runs apart: of their directories, with as many parents as it takes.

    The name of the file is part of it where it is not the usual one, or where two lie in one directory.
    """
    whole = [Path(os.path.abspath(path)) for path in paths]
    folders = [path.parent for path in whole]
    usual = {_file(name) for name in ("", *files.STAND_INS)}
    short = [path.name in usual and folders.count(path.parent) == 1 for path in whole]
    named = [path.parent.parts if only else path.parts for path, only in zip(whole, short, strict=True)]
    result = []
    for i, parts in enumerate(named):
        others = named[:i] + named[i + 1 :]
        lengths = range(1, len(parts) + 1)
        length = next((n for n in lengths if all(other[-n:] != parts[-n:] for other in others)), len(parts))
        result.append(str(Path(*parts[-length:])))
    return result
