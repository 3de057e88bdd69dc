"""Puts CIFAR-10 on disk: finds or fetches its archive and writes it as a prepared TFDS dataset, without TensorFlow.

TFDS's own `download_and_prepare` needs TensorFlow to unpack and encode, and offline it hangs for minutes. Only the two
steps that do are replaced here; order, sharding, metadata and the atomic rename at the end stay TFDS's, so any other
program reads the result with `tfds.data_source("cifar10", data_dir=...)`.
"""

import concurrent.futures
import contextlib
import hashlib
import http.client
import io
import os
import tarfile
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..running.errors import DataError, brief

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
ARCHIVE = "cifar-10-binary.tar.gz"
VERSION = "3.0.2"  # of TFDS's cifar10
PROBE_SECONDS = 5.0  # until the first answer, DNS included
READ_SECONDS = 30.0  # of silence in the middle of the download


class Unreachable(DataError):
    """CIFAR-10 is neither on disk nor to be had from the network."""


def prepare(data_dir: Path, tell: Callable[[str], None]) -> None:
    """Writes `<data_dir>/cifar10/<version>` from the archive in `data_dir`, fetched first if it is not there.

    **Arguments:**

    - `data_dir`: TFDS's data directory; made if it does not exist.
    - `tell`: told about the steps that take a while.

    Raises `Unreachable` if there is no archive and no network, `DataError` if something is there but wrong.
    """
    archive = _find_archive(data_dir)
    if archive is None:
        with _open(data_dir) as response:
            _require_writable(data_dir)
            archive = _download(response, data_dir / "downloads" / ARCHIVE)
    else:
        _require_writable(data_dir)
    tell(f"Preparing CIFAR-10 in {data_dir} (some fifteen seconds, only this once).")
    try:
        with quiet():
            _write(archive, data_dir)
    except Exception as error:
        # Another process may have prepared the same directory meanwhile: TFDS's rename then fails, and all is well.
        if not os.path.isdir(data_dir / "cifar10" / VERSION):
            raise DataError(
                f"CIFAR-10 could not be prepared in {data_dir} ({brief(error)}): "
                "check the free disk space, or pass another --data-dir."
            ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps TFDS from printing, drawing progress bars and logging warnings (such as 'OpenCV is not installed')."""
    import tensorflow_datasets as tfds
    from absl import logging

    tfds.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


def _find_archive(data_dir: Path) -> Path | None:
    """Returns the archive from `downloads/` or `data_dir`; one that TFDS fetched has more before and after its name."""
    pattern = "*cifar-10-binary*.tar.gz"
    found = [path for place in (data_dir / "downloads", data_dir) for path in sorted(place.glob(pattern))]
    for path in found:
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"the archive {path} cannot be read ({brief(error)}): mend or remove it.") from error
        if digest == SHA256:
            return path
    if found:
        raise DataError(
            f"{found[0]} is not the CIFAR-10 archive, or is damaged (its sha256 is not {SHA256}): remove or replace it."
        )
    return None


def _require_writable(data_dir: Path) -> None:
    try:  # by trying: os.access is wrong for root and for read-only mounts
        (data_dir / "downloads").mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=data_dir).close()
    except OSError as error:
        raise DataError(
            f"{data_dir} holds no prepared CIFAR-10 and cannot be written to ({brief(error)}): "
            "pass a --data-dir that holds one or can be written to."
        ) from error


def _open(data_dir: Path) -> http.client.HTTPResponse:
    """Opens `URL` within `PROBE_SECONDS`, or raises `Unreachable`.

    A socket's timeout covers neither DNS nor a host with many addresses, so a thread asks and we stop waiting for it.
    """
    future: concurrent.futures.Future[http.client.HTTPResponse] = concurrent.futures.Future()

    def ask():
        try:
            future.set_result(urllib.request.urlopen(URL, timeout=READ_SECONDS))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return future.result(PROBE_SECONDS)
    except Exception as error:
        reason = brief(error) if future.done() else f"no answer within {PROBE_SECONDS:.0f} s"
        future.add_done_callback(_close)
        raise Unreachable(
            f"CIFAR-10 is not in {data_dir} and cannot be fetched from {URL} ({reason}): pass a --data-dir that holds "
            f"a prepared copy, put {ARCHIVE} into {data_dir / 'downloads'}, or go online."
        ) from error


def _close(future: concurrent.futures.Future[http.client.HTTPResponse]) -> None:
    answer = future.exception() or future.result()  # an HTTPError is a response, too, and holds a socket
    if isinstance(answer, http.client.HTTPResponse | urllib.error.HTTPError):
        answer.close()


def _download(response: http.client.HTTPResponse, target: Path) -> Path:
    """Saves the response as `target`, which appears only when it is complete and its checksum is right."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    total, digest, received = response.length, hashlib.sha256(), 0
    try:
        with part.open("wb") as file, Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            task = bar.add_task(target.name, total=total)
            while chunk := response.read(1 << 18):
                file.write(chunk)
                digest.update(chunk)
                received += len(chunk)
                bar.update(task, completed=received)
        if total is not None and received < total:
            raise ConnectionError(f"{received} of {total} bytes arrived")
        if digest.hexdigest() != SHA256:
            raise DataError(
                f"the file fetched from {URL} is damaged (its sha256 is not {SHA256}) and was removed: "
                f"run again, or put the right one at {target}."
            )
        part.replace(target)
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"the download of {URL} to {target} broke off ({brief(error)}): "
            "check the connection and the free disk space, and run again."
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return target


def _write(archive: Path, data_dir: Path) -> None:
    """Has TFDS's own builder write the archive's images, handed over as PIL images so that Pillow encodes them."""
    import tensorflow_datasets as tfds
    from PIL import Image

    with tarfile.open(archive) as tar:
        files = {Path(member.name).name: _content(tar, member) for member in tar if member.isfile()}

    def examples(prefix: str, *names: str) -> Iterator[tuple[int, dict[str, Any]]]:
        content = b"".join(files[name] for name in names)
        records = np.frombuffer(content, np.uint8).reshape(-1, 1 + 3 * 32 * 32)  # label, then red, green, blue plane
        images = np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        for i, (label, image) in enumerate(zip(records[:, 0], images, strict=True)):
            yield i, {"id": f"{prefix}{i:05d}", "image": Image.fromarray(image), "label": int(label)}

    builder: Any = tfds.builder_cls("cifar10")(data_dir=data_dir, version=VERSION)
    builder.info.features["label"].names = files["batches.meta.txt"].decode().split()
    builder._split_generators = lambda dl_manager: {  # instead of the one that unpacks and parses with TensorFlow
        "train": examples("train_", *(f"data_batch_{i}.bin" for i in range(1, 6))),
        "test": examples("test_", "test_batch.bin"),
    }
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    builder.download_and_prepare(download_config=config, file_format="array_record")


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()
