"""The images an experiment trains on: CIFAR-10 where it can be had, scikit-learn's digits as an open stand-in."""

import contextlib
import dataclasses
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..running.errors import DataError, brief
from .prepare import VERSION, Unreachable, prepare, quiet

DATASETS = ("auto", "cifar10", "digits")
_ARRAYS = ("train_images", "train_labels", "validation_images", "validation_labels")
_SHAPE = (32, 32, 3)


@dataclasses.dataclass(frozen=True)
class ImageData:
    """Labelled colour images in ten classes, split into a training and a validation set."""

    name: str  # "cifar10" or "digits": for file names, titles, tables
    source: str  # where the images came from, in words
    train_images: np.ndarray  # uint8 [N, height, width, 3]
    train_labels: np.ndarray  # int32 [N]
    validation_images: np.ndarray
    validation_labels: np.ndarray


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr)


def load(
    dataset: str = "auto",
    data_dir: Path | None = None,
    *,
    tell: Callable[[str], None] = _to_stderr,
) -> ImageData:
    """Returns the images of a dataset, as fast as this machine allows: decoded copy, prepared copy, archive, network.

    CIFAR-10 is looked for in one TFDS data directory and prepared there if it has to be. The decoded arrays are kept in
    the user's cache directory, since decoding takes several seconds. Its validation set is the official test set.

    **Arguments:**

    - `dataset`: `"cifar10"`, `"digits"`, or `"auto"`: CIFAR-10, but digits when it is neither on disk nor reachable.
      What is on disk but cannot be used is an error, not a reason to train on something else.
    - `data_dir`: the TFDS data directory; by default `$TFDS_DATA_DIR`, or else `~/tensorflow_datasets`.
    - `tell`: told what takes a while, and, in a message that starts with "WARNING", that digits stand in.

    **Returns:**

    An `ImageData`. Everything that can go wrong raises a `DataError`.
    """
    if dataset not in DATASETS:
        raise DataError(f"there is no dataset {dataset!r}: choose one of {', '.join(DATASETS)}.")
    if dataset == "digits":
        return _digits()
    place = _place(data_dir)
    prepared = place / "cifar10" / VERSION
    try:
        if not os.path.lexists(prepared):
            prepare(place, tell)
    except Unreachable as error:
        if dataset == "cifar10":
            raise
        tell(
            "WARNING: training on scikit-learn's 8×8 digits instead of CIFAR-10, about which the results say nothing; "
            f"the reason: {error}"
        )
        return _digits()
    return ImageData("cifar10", f"CIFAR-10 (TFDS cifar10/{VERSION} in {place})", **_cached(prepared, tell))


def _place(data_dir: Path | None) -> Path:
    """Returns the TFDS data directory; one that is merely the default need not exist yet."""
    chosen = str(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    place = Path(chosen).expanduser()
    if data_dir is not None and not os.path.lexists(place):
        raise DataError(f"the data directory {place} does not exist: make it first, or pass another --data-dir.")
    if "://" in chosen or (os.path.lexists(place) and not place.is_dir()):
        raise DataError(f"the data directory {chosen} is not a local directory: pass another --data-dir.")
    return place


def _cached(prepared: Path, tell: Callable[[str], None]) -> dict[str, np.ndarray]:
    """Returns the decoded images, from the cache if the prepared copy is still the one that was decoded.

    One file per prepared copy; a changed copy replaces it. A cache that cannot be read or written is no error.
    """
    files = sorted(path for path in prepared.glob("*") if path.is_file())
    state = repr([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files])
    cache = None
    with contextlib.suppress(Exception):  # a damaged .npz can raise almost anything
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eqx_dynloss"
        cache = home / f"cifar10-{hashlib.sha256(os.fsencode(prepared.resolve())).hexdigest()[:16]}.npz"
        with cache.open("rb") as file, np.load(file) as stored:
            if stored["state"] == state:
                return {name: stored[name] for name in _ARRAYS}
    arrays = _decode(prepared, tell)
    if cache is not None:
        with contextlib.suppress(OSError):
            cache.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache.parent) as scratch:  # beside it, so that the move is atomic
                contents: dict[str, Any] = {"state": state, **arrays}
                np.savez(Path(scratch) / "new.npz", **contents)
                os.replace(Path(scratch) / "new.npz", cache)
    return arrays


def _decode(prepared: Path, tell: Callable[[str], None]) -> dict[str, np.ndarray]:
    """Reads a prepared copy through TFDS, in TFDS's order."""
    if not list(prepared.glob("*.array_record-*")) and list(prepared.glob("*.tfrecord-*")):
        raise DataError(
            f"the copy of CIFAR-10 in {prepared} is in TFDS's tfrecord format, which needs TensorFlow to read: "
            "pass another --data-dir, where it will be prepared as array_record, or remove this copy."
        )
    tell(f"Decoding CIFAR-10 from {prepared} (some ten seconds, then cached).")
    try:
        with quiet():
            import tensorflow_datasets as tfds

            root = prepared.parent.parent
            builder = tfds.builder(f"cifar10:{VERSION}", data_dir=root, file_format="array_record")
            return dict(zip(_ARRAYS, _decode_split(builder, "train") + _decode_split(builder, "test"), strict=True))
    except Exception as error:
        raise DataError(
            f"the copy of CIFAR-10 in {prepared} is incomplete or damaged ({brief(error)}): "
            "remove it, so that it is prepared again, or pass another --data-dir."
        ) from error


def _decode_split(builder: Any, split: str) -> tuple[np.ndarray, np.ndarray]:
    source, count = builder.as_data_source(split), builder.info.splits[split].num_examples
    images, labels = np.empty((count, *_SHAPE), np.uint8), np.empty(count, np.int32)
    for start in range(0, count, 1000):  # in batches, which is faster and holds few records at a time
        for i, example in enumerate(source.__getitems__(list(range(start, min(start + 1000, count)))), start):
            if example["image"].shape != _SHAPE or not 0 <= example["label"] <= 9:
                raise ValueError(f"image {i} of {split} has shape {example['image'].shape}, label {example['label']}")
            images[i], labels[i] = example["image"], example["label"]
    return images, labels


def _digits() -> ImageData:
    """The digits that come with scikit-learn, 1,500 for training and 297 for validation, in three equal channels.

    They stay 8×8: enlarged to 32×32, half of the networks do not leave chance in a few hundred updates.
    """
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    labels = digits.target.astype(np.int32)
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(grey[..., None], 3, axis=-1)
    # Every sixth of the digits sorted by class: stratified, and the same with every version of every library.
    by_class = np.argsort(labels, kind="stable")
    held_out = np.zeros(len(labels), bool)
    held_out[by_class[np.linspace(0, len(labels) - 1, 297).round().astype(int)]] = True
    source = "scikit-learn's bundled digits (8×8)"
    return ImageData("digits", source, images[~held_out], labels[~held_out], images[held_out], labels[held_out])
