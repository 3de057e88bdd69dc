"""The data module, on small synthetic archives in CIFAR-10's binary format and a server on the loopback interface."""

import contextlib
import hashlib
import http.server
import io
import os
import subprocess
import sys
import tarfile
import threading
import time
import types
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments.problems import images, prepare
from experiments.problems.images import DataError, load

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BATCHES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def batches():
    """Twenty labelled images a batch, as rows of bytes: label, red plane, green plane, blue plane."""
    records = np.random.default_rng(0).integers(0, 256, (6, 20, 3073), dtype=np.uint8)
    records[..., 0] %= 10
    return records


@pytest.fixture(scope="session")
def archive(batches):
    """The bytes of a small cifar-10-binary.tar.gz."""
    files = {"batches.meta.txt": "\n".join(NAMES).encode() + b"\n\n"}
    files |= {name: batch.tobytes() for name, batch in zip(BATCHES, batches, strict=True)}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def sandbox(tmp_path, monkeypatch, archive):
    """Keeps every test away from the user's directories and from the network."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # a TFDS builder leaves an empty directory there
    for variable in ("XDG_CACHE_HOME", "TFDS_DATA_DIR", "http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("urllib.request._opener", None)  # where urllib keeps the proxies it saw first
    monkeypatch.setattr(prepare, "SHA256", hashlib.sha256(archive).hexdigest())
    monkeypatch.setattr(prepare, "URL", "http://127.0.0.1:9/cifar-10-binary.tar.gz")  # nothing listens there


@pytest.fixture
def data_dir(tmp_path):
    (tmp_path / "data" / "downloads").mkdir(parents=True)
    return tmp_path / "data"


@pytest.fixture
def prepared(data_dir, archive):
    """A data directory with a prepared copy and no archive; returns the copy's own directory."""
    (data_dir / prepare.ARCHIVE).write_bytes(archive)
    prepare.prepare(data_dir, print)
    (data_dir / prepare.ARCHIVE).unlink()
    return data_dir / "cifar10" / prepare.VERSION


def shard(prepared, split="train"):
    return prepared / f"cifar10-{split}.array_record-00000-of-00001"


def failure(*args, **kwargs) -> str:
    """Returns the message of the DataError that `load` raises, and checks that it is one sentence."""
    with pytest.raises(DataError) as caught:
        load(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


def decoded(cache_home) -> list[Path]:
    return list((cache_home / ".cache" / "eqx_dynloss").glob("*.npz"))


# From the archive to arrays


@pytest.mark.parametrize("place", [".", "downloads"])
@pytest.mark.parametrize("name", ["cifar-10-binary.tar.gz", "cs.toronto.edu_kriz_cifar-10-binaryODHP.tar.gz"])
def test_an_archive_is_prepared_and_read(data_dir, archive, batches, place, name):
    (data_dir / place / name).write_bytes(archive)
    data = load("cifar10", data_dir)
    assert data.name == "cifar10" and str(data_dir) in data.source
    assert data.train_images.shape == (100, 32, 32, 3) and data.train_images.dtype == np.uint8
    assert data.validation_images.shape == (20, 32, 32, 3) and data.validation_images.dtype == np.uint8
    assert data.train_labels.shape == (100,) and data.train_labels.dtype == np.int32
    assert data.validation_labels.shape == (20,) and data.validation_labels.dtype == np.int32
    source: Any = tfds.data_source("cifar10", data_dir=data_dir, download=False)
    read = {"train": (data.train_images, data.train_labels), "test": (data.validation_images, data.validation_labels)}
    for split, records in {"train": batches[:5].reshape(-1, 3073), "test": batches[5]}.items():
        images, labels = read[split]
        order = [int(example["id"].decode().removeprefix(f"{split}_")) for example in source[split]]
        assert sorted(order) == list(range(len(records))) and order != sorted(order)  # TFDS shuffles by a hash
        np.testing.assert_array_equal(labels, records[order, 0])
        for channel in range(3):
            planes = records[order, 1 + 1024 * channel : 1 + 1024 * (channel + 1)]
            np.testing.assert_array_equal(images[..., channel], planes.reshape(-1, 32, 32))


def test_the_prepared_copy_is_what_other_programs_expect(prepared, data_dir):
    source: Any = tfds.data_source("cifar10", data_dir=data_dir, download=False)
    example = source["train"][0]
    assert len(source["train"]) == 100 and len(source["test"]) == 20
    assert set(example) == {"id", "image", "label"} and len(example["id"]) == len(b"train_16399")
    builder = tfds.builder("cifar10", data_dir=data_dir)
    assert builder.is_prepared() and builder.version == prepare.VERSION
    features: Any = builder.info.features
    assert features["label"].names == NAMES
    assert features["image"].shape == (32, 32, 3) and features["image"].np_dtype == np.uint8
    assert builder.info.as_proto.module_name == "tensorflow_datasets.image_classification.cifar"
    official = tfds.builder_cls("cifar10")(data_dir=data_dir / "elsewhere")
    assert repr(features) == repr(official.info.features)


def test_nothing_imports_tensorflow_or_prints(data_dir, archive, tmp_path):
    (data_dir / "downloads" / prepare.ARCHIVE).write_bytes(archive)
    program = f"""
import sys
from experiments.problems import images
from experiments.problems import prepare
assert not {{"tensorflow_datasets", "sklearn", "jax", "rich"}} & set(sys.modules), "the import must be quick"
prepare.SHA256 = {prepare.SHA256!r}
from pathlib import Path
images.load("cifar10", Path({str(data_dir)!r}), tell=lambda message: None)
assert "tensorflow_datasets" in sys.modules and "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_killed_preparation_leaves_nothing_that_looks_prepared(data_dir, archive):
    (data_dir / prepare.ARCHIVE).write_bytes(archive)
    program = f"""
import os
from array_record.python import array_record_module
from experiments.problems import prepare
from pathlib import Path
array_record_module.ArrayRecordWriter.close = lambda self: os._exit(9)
prepare.SHA256 = {prepare.SHA256!r}
prepare.prepare(Path({str(data_dir)!r}), print)
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 9
    assert [path.name.split(".")[0] for path in (data_dir / "cifar10").iterdir()] == ["incomplete"]
    assert len(load("cifar10", data_dir).train_images) == 100


def test_an_interrupted_preparation_cleans_up(data_dir, archive, monkeypatch):
    (data_dir / prepare.ARCHIVE).write_bytes(archive)

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("PIL.Image.fromarray", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load("cifar10", data_dir)
    assert list((data_dir / "cifar10").iterdir()) == []


def test_two_processes_may_prepare_the_same_directory(data_dir, archive, monkeypatch):
    (data_dir / prepare.ARCHIVE).write_bytes(archive)
    write = prepare._write

    def beaten(archive, data_dir):
        write(archive, data_dir)  # by the other one
        raise OSError(39, "Directory not empty")  # what TFDS's rename raises in ours

    monkeypatch.setattr(prepare, "_write", beaten)
    assert len(load("cifar10", data_dir).train_images) == 100


def test_a_full_disk_is_one_sentence(data_dir, archive, monkeypatch):
    (data_dir / prepare.ARCHIVE).write_bytes(archive)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare, "_write", full)
    assert "No space left on device" in failure("cifar10", data_dir)


# The place


def test_the_place_is_the_argument_then_the_environment_then_home(prepared, data_dir, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    assert load("cifar10").name == "cifar10"
    assert str(tmp_path / "empty") in failure("cifar10", tmp_path / "empty")  # the argument only, then
    monkeypatch.setenv("TFDS_DATA_DIR", "")
    assert str(tmp_path / "home" / "tensorflow_datasets") in failure("cifar10")
    (tmp_path / "home").mkdir(exist_ok=True)
    data_dir.rename(tmp_path / "home" / "tensorflow_datasets")
    assert load("cifar10").name == "cifar10"


def test_the_default_place_is_made_when_there_is_something_to_put_there(tmp_path, serve):
    serve()
    assert load("cifar10").name == "cifar10"
    assert (tmp_path / "home" / "tensorflow_datasets" / "cifar10").is_dir()


@pytest.mark.parametrize("dataset", ["auto", "cifar10"])
def test_a_data_dir_that_is_missing_or_a_file_is_a_mistake(dataset, tmp_path, monkeypatch):
    assert "does not exist" in failure(dataset, tmp_path / "typo")
    (tmp_path / "file").write_text("")
    assert "not a local directory" in failure(dataset, tmp_path / "file")
    monkeypatch.setenv("TFDS_DATA_DIR", "gs://bucket/datasets")
    assert "not a local directory" in failure(dataset)


def test_an_unknown_dataset_is_answered_with_the_choices():
    assert "auto, cifar10, digits" in failure("mnist")


@pytest.mark.parametrize("found", [True, False])
def test_a_read_only_place_is_noticed_before_the_download(data_dir, archive, serve, monkeypatch, found):
    asked = serve()
    if found:
        (data_dir / prepare.ARCHIVE).write_bytes(archive)
    monkeypatch.setattr("tempfile.TemporaryFile", fail_read_only)  # root may write anywhere
    assert "cannot be written to ([Errno 30] Read-only file system)" in failure("auto", data_dir)
    assert list((data_dir / "downloads").iterdir()) == [] and len(asked) == (not found)


def test_a_place_that_cannot_be_made_is_one_sentence(serve, monkeypatch):
    serve()
    monkeypatch.setenv("TFDS_DATA_DIR", "/proc/nowhere")
    assert "/proc/nowhere holds no prepared CIFAR-10 and cannot be written to" in failure("cifar10")


def fail_read_only(*args, **kwargs):
    raise OSError(30, "Read-only file system")


# What is on disk but unusable is never replaced by something else


@pytest.mark.parametrize("dataset", ["auto", "cifar10"])
class TestUnusable:
    def test_archive(self, dataset, data_dir, archive):
        path = data_dir / "downloads" / prepare.ARCHIVE
        path.write_bytes(archive[:-1])
        message = failure(dataset, data_dir)
        assert str(path) in message and "damaged" in message and path.exists()

    @pytest.mark.parametrize("damage", ["missing", "empty", "half", "tail", "flipped", "info", "features", "all"])
    def test_prepared_copy(self, dataset, prepared, data_dir, damage):
        content = shard(prepared).read_bytes()
        middle = len(content) // 2
        match damage:
            case "missing":
                shard(prepared).unlink()
            case "empty":
                shard(prepared).write_bytes(b"")
            case "half":
                shard(prepared).write_bytes(content[:middle])
            case "tail":
                shard(prepared).write_bytes(content[:-100])
            case "flipped":
                at = content.index(b"PNG", 1000) + 500
                shard(prepared).write_bytes(content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :])
            case "info":
                (prepared / "dataset_info.json").unlink()
            case "features":
                (prepared / "features.json").write_text("{")
            case "all":
                for path in prepared.iterdir():
                    path.unlink()
        message = failure(dataset, data_dir)
        assert str(prepared) in message and "incomplete or damaged" in message

    def test_fewer_images_than_the_info_promises(self, dataset, prepared, data_dir):
        info = prepared / "dataset_info.json"
        info.write_text(info.read_text().replace('"100"', '"101"'))
        assert "incomplete or damaged" in failure(dataset, data_dir)

    def test_tfrecord_copy(self, dataset, prepared, data_dir):
        for path in list(prepared.glob("*.array_record-*")):
            path.rename(str(path).replace("array_record", "tfrecord"))
        info = prepared / "dataset_info.json"
        info.write_text(info.read_text().replace("array_record", "tfrecord"))
        message = failure(dataset, data_dir)
        assert "tfrecord" in message and "TensorFlow" in message and "--data-dir" in message


def test_wrong_labels_and_shapes_are_refused():
    def builder(shape, label):
        example = {"image": np.zeros(shape, np.uint8), "label": label}
        splits = {"train": types.SimpleNamespace(num_examples=1)}
        source = types.SimpleNamespace(__getitems__=lambda indices: [example for _ in indices])
        return types.SimpleNamespace(as_data_source=lambda _: source, info=types.SimpleNamespace(splits=splits))

    assert images._decode_split(builder((32, 32, 3), 9), "train")[1].tolist() == [9]
    for shape, label in (((32, 32, 3), 10), ((32, 32, 3), -1), ((32, 32, 1), 0), ((28, 28, 3), 0)):
        with pytest.raises(ValueError, match="shape"):
            images._decode_split(builder(shape, label), "train")


# The cache


def test_a_second_load_comes_from_the_cache(prepared, data_dir, tmp_path, monkeypatch):
    first = load("cifar10", data_dir)
    assert len(decoded(tmp_path / "home")) == 1
    monkeypatch.setattr(images, "_decode", lambda *args: pytest.fail("decoded again"))
    second = load("cifar10", data_dir, tell=pytest.fail)
    for name in images._ARRAYS:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
        assert getattr(first, name).dtype == getattr(second, name).dtype


def test_the_cache_honours_xdg_cache_home(prepared, data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load("cifar10", data_dir)
    assert len(list((tmp_path / "xdg" / "eqx_dynloss").glob("*"))) == 1 and not decoded(tmp_path / "home")


def test_a_changed_copy_is_decoded_again_and_replaces_its_cache(prepared, data_dir, tmp_path):
    load("cifar10", data_dir)
    os.utime(shard(prepared), ns=(0, 0))
    told = []
    load("cifar10", data_dir, tell=told.append)
    assert len(told) == 1 and "Decoding" in told[0] and len(decoded(tmp_path / "home")) == 1
    shard(prepared).write_bytes(shard(prepared).read_bytes()[:1000])
    assert "damaged" in failure("cifar10", data_dir)  # not served stale


@pytest.mark.parametrize("damage", ["empty", "half", "flipped", "text", "other", "directory"])
def test_a_damaged_cache_is_decoded_again(prepared, data_dir, tmp_path, damage):
    expected = load("cifar10", data_dir)
    (cache,) = decoded(tmp_path / "home")
    content = cache.read_bytes()
    match damage:
        case "empty":
            cache.write_bytes(b"")
        case "half":
            cache.write_bytes(content[: len(content) // 2])
        case "flipped":
            at = len(content) // 2
            cache.write_bytes(content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :])
        case "text":
            cache.write_text("not an archive")
        case "other":
            np.savez(cache, other=np.zeros(3))
        case "directory":
            cache.unlink()
            cache.mkdir()
    told = []
    data = load("cifar10", data_dir, tell=told.append)
    assert len(told) == 1
    np.testing.assert_array_equal(data.train_images, expected.train_images)
    assert damage == "directory" or cache.stat().st_size == len(content)


def test_a_cache_that_cannot_be_written_is_no_error(prepared, data_dir, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load("cifar10", data_dir).name == "cifar10"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(images.np, "savez", fail_read_only)
    assert load("cifar10", data_dir).name == "cifar10"
    assert list((tmp_path / "home" / ".cache" / "eqx_dynloss").iterdir()) == []


def test_reading_a_prepared_copy_asks_no_network(prepared, data_dir, monkeypatch):
    for name in ("getaddrinfo", "create_connection", "socket"):
        monkeypatch.setattr(f"socket.{name}", lambda *args, **kwargs: pytest.fail("network"))
    assert load("cifar10", data_dir).name == "cifar10"


# The download


@pytest.fixture
def serve(archive, monkeypatch):
    """Starts a server that answers with the archive, or as told; the call returns the list of the paths asked for."""
    release, servers = threading.Event(), []

    def start(content=archive, *, status=200, length=None, stall=None):
        """`stall`: send that many bytes, then nothing more (0: not even an answer)."""
        asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path)
                if stall == 0:
                    release.wait(20)
                    return
                self.send_response(status)
                self.send_header("Content-Length", str(len(content) if length is None else length))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(content[:stall])
                if stall:
                    release.wait(20)

            def log_message(self, format, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        monkeypatch.setattr(prepare, "URL", f"http://127.0.0.1:{server.server_port}/{prepare.ARCHIVE}")
        return asked

    yield start
    release.set()
    for server in servers:
        server.shutdown()
        server.server_close()


def left(data_dir) -> list[str]:
    return sorted(path.name for path in (data_dir / "downloads").iterdir() if path.is_file())


@pytest.mark.parametrize("dataset", ["auto", "cifar10"])
def test_what_is_not_on_disk_is_downloaded_once(dataset, data_dir, archive, serve):
    asked = serve()
    told = []
    assert load(dataset, data_dir, tell=told.append).name == "cifar10"
    assert (data_dir / "downloads" / prepare.ARCHIVE).read_bytes() == archive and left(data_dir) == [prepare.ARCHIVE]
    assert not any("WARNING" in message for message in told)
    load(dataset, data_dir)
    assert asked == [f"/{prepare.ARCHIVE}"]


def test_the_download_shows_its_progress_on_stderr(data_dir, serve, capsys):
    serve()
    load("cifar10", data_dir, tell=lambda message: None)
    out, err = capsys.readouterr()
    assert out == "" and prepare.ARCHIVE in err and "kB" in err


@pytest.mark.parametrize("dataset", ["auto", "cifar10"])
def test_a_corrupted_download_is_removed(dataset, data_dir, archive, serve):
    serve(archive[:-9] + b"corrupted")
    message = failure(dataset, data_dir)
    assert prepare.URL in message and str(data_dir / "downloads" / prepare.ARCHIVE) in message
    assert "damaged" in message and left(data_dir) == []


def test_a_truncated_download_is_removed(data_dir, archive, serve):
    serve(archive[:-9], length=len(archive))
    message = failure("auto", data_dir)
    assert "broke off" in message and f"{len(archive) - 9} of {len(archive)} bytes" in message and left(data_dir) == []


def test_a_stalled_download_ends(data_dir, serve, monkeypatch):
    monkeypatch.setattr(prepare, "READ_SECONDS", 0.3)
    serve(stall=1000)
    message = failure("auto", data_dir)
    assert "broke off (timed out)" in message and left(data_dir) == []


def test_an_interrupted_download_leaves_nothing(data_dir, serve, monkeypatch):
    serve()

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("rich.progress.Progress.update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load("cifar10", data_dir)
    assert left(data_dir) == []


# Unreachable


def test_a_server_that_answers_with_an_error_counts_as_unreachable(data_dir, serve):
    serve(b"no such thing", status=404)
    assert "HTTP Error 404" in failure("cifar10", data_dir)
    assert load("auto", data_dir, tell=print).name == "digits"


def test_a_server_that_says_nothing_is_given_up_in_time(data_dir, serve, monkeypatch):
    monkeypatch.setattr(prepare, "PROBE_SECONDS", 0.3)
    serve(stall=0)
    start = time.monotonic()
    assert "no answer within" in failure("cifar10", data_dir)
    assert time.monotonic() - start < 2


def test_dns_that_hangs_is_given_up_in_time(data_dir, monkeypatch):
    monkeypatch.setattr(prepare, "PROBE_SECONDS", 0.3)
    release = threading.Event()

    def hang(*args, **kwargs):
        release.wait(20)
        raise OSError("too late")

    monkeypatch.setattr("socket.getaddrinfo", hang)
    start = time.monotonic()
    assert "no answer within" in failure("cifar10", data_dir)
    assert time.monotonic() - start < 2
    release.set()


def test_an_answer_that_comes_too_late_is_closed(data_dir, monkeypatch):
    monkeypatch.setattr(prepare, "PROBE_SECONDS", 0.1)
    release, closed = threading.Event(), threading.Event()

    class Response(prepare.http.client.HTTPResponse):
        def __init__(self):
            pass

        def close(self):
            closed.set()

    def answer(*args, **kwargs):
        release.wait(20)
        return Response()

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    failure("cifar10", data_dir)
    release.set()
    assert closed.wait(5)


def test_a_proxy_is_respected(data_dir, serve, monkeypatch):
    asked = serve()
    monkeypatch.setenv("http_proxy", prepare.URL.rpartition("/")[0])
    monkeypatch.setattr(prepare, "URL", f"http://cifar.invalid/{prepare.ARCHIVE}")
    assert load("cifar10", data_dir).name == "cifar10"
    assert asked == [prepare.URL]


def test_cifar10_never_falls_back_and_names_the_ways_out(data_dir):
    message = failure("cifar10", data_dir)
    for way in ("--data-dir", prepare.ARCHIVE, str(data_dir / "downloads"), "go online", "Connection refused"):
        assert way in message
    assert not (data_dir / "cifar10").exists()


# Digits


def test_auto_falls_back_to_digits_with_a_warning(data_dir):
    told = []
    data = load("auto", data_dir, tell=told.append)
    assert data.name == "digits" and "digits" in data.source and "CIFAR" not in data.source
    (message,) = told
    assert message.startswith("WARNING") and "digits" in message and str(data_dir) in message and "refused" in message


def test_by_default_the_warning_goes_to_stderr(capsys):
    assert load().name == "digits"
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("WARNING")


def test_digits_are_split_by_class():
    data = load("digits", tell=pytest.fail)
    assert data.train_images.shape == (1500, 8, 8, 3) and data.validation_images.shape == (297, 8, 8, 3)
    assert data.train_images.dtype == np.uint8 and data.train_labels.dtype == np.int32
    assert data.train_images.max() == 255 and data.train_images.min() == 0
    assert (data.train_images[..., 0] == data.train_images[..., 2]).all()
    counts = [np.bincount(labels, minlength=10) for labels in (data.train_labels, data.validation_labels)]
    np.testing.assert_allclose(counts[1], (counts[0] + counts[1]) * 297 / 1797, atol=1)
    again = load("digits")
    np.testing.assert_array_equal(again.validation_images, data.validation_images)


def test_the_digits_split_is_a_partition():
    from sklearn.datasets import load_digits

    data = load("digits")
    original: Any = load_digits()
    together = np.concatenate([data.train_labels, data.validation_labels])
    np.testing.assert_array_equal(np.bincount(together), np.bincount(original.target))
    images = np.concatenate([data.train_images, data.validation_images])[..., 0]
    assert len(np.unique(images.reshape(1797, -1), axis=0)) == len(np.unique(original.data, axis=0))


# The real thing

REAL = os.environ.get("TFDS_DATA_DIR")  # read before the sandbox hides it


@pytest.mark.slow
def test_the_real_copy_at_full_size(monkeypatch):
    if not REAL or not (Path(REAL) / "cifar10" / prepare.VERSION).is_dir():
        pytest.skip("TFDS_DATA_DIR holds no prepared CIFAR-10")
    monkeypatch.setenv("TFDS_DATA_DIR", REAL)
    data, again = load("cifar10"), load("cifar10", tell=pytest.fail)
    assert data.train_images.shape == (50_000, 32, 32, 3) and data.validation_images.shape == (10_000, 32, 32, 3)
    assert np.bincount(data.train_labels).tolist() == [5000] * 10
    assert np.bincount(data.validation_labels).tolist() == [1000] * 10
    np.testing.assert_allclose(data.train_images.mean((0, 1, 2)) / 255, [0.4914, 0.4822, 0.4465], atol=1e-3)
    np.testing.assert_array_equal(data.train_images, again.train_images)
