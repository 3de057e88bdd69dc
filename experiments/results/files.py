"""The files of a run: what they are called, how results are saved and loaded, and what computed them."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import xarray as xr

PACKAGES = ("jax", "jaxlib", "equinox", "optax", "numpy", "eqx-dynloss")
STAND_INS = ("digits",)


def file_name(dataset: str, name: str) -> str:
    """What a file of a run is called: one about a stand-in says so in its name."""
    return f"{dataset}_{name}" if dataset in STAND_INS else name


def save(dataset: xr.Dataset, path: str | os.PathLike[str]) -> None:
    """Writes the dataset as compressed netCDF. Whenever it is stopped, `path` holds the whole old or whole new file."""
    # An interrupted run can have empty variables, which cannot be compressed.
    encoding = {name: {"zlib": True, "complevel": 1} for name, v in dataset.data_vars.items() if v.size}
    # In memory first: HDF5 itself may crash the process where a disk is full.
    content = bytes(dataset.to_netcdf(engine="h5netcdf", encoding=encoding))
    write_whole(Path(path), content)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file. Whenever it is stopped, `path` holds the whole old or whole new content."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> xr.Dataset:
    """Reads what `save` wrote into memory and closes the file."""
    with xr.open_dataset(path, engine="h5netcdf") as dataset:
        return dataset.load()


def write_texts(directory: Path, name: str, lines: Sequence[str], document: Mapping[str, Any]) -> None:
    """Writes `name.md`, to be read, and `name.json`, the same for programs, with null for what there is not."""
    (directory / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    (directory / f"{name}.json").write_text(text + "\n", encoding="utf-8")


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
