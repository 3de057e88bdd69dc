"""Checkpoints: what comes back is what was written, or the one before, or a sentence."""

import gc
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.running import checkpoint
from experiments.running.checkpoint import Checkpoints

ARRAYS = {
    "float": np.random.default_rng(0).normal(size=(3, 400)),
    "single": np.array([np.nan, -0.0, np.inf], np.float32),
    "key": np.array([[1, 2], [2**32 - 1, 4]], np.uint32),
    "flag": np.array([True, False]),
    "number": np.array(7),
    "none": np.zeros((3, 0), np.float32),
}


def checkpoints(path, minutes=0.0):
    told = []
    return Checkpoints(path, minutes, told.append), told


def damage(directory, how):
    for file in [path for path in directory.rglob("*") if path.is_file()]:
        content = file.read_bytes()
        if how == "truncated":
            file.write_bytes(content[: len(content) // 2])
        elif how == "empty":
            file.write_bytes(b"")
        elif how == "removed":
            file.unlink()
        elif "/d/" in str(file):  # the arrays' own bytes: one bit of each file
            file.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])


def test_what_comes_back_is_what_was_written(tmp_path):
    saved, told = checkpoints(tmp_path / "c")
    assert saved.latest() is None
    for step in (3, 5, 8):
        saved.save(step, ARRAYS | {"number": np.array(step)})
    saved.close()
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["5", "8"]  # the newest and the one before
    found = checkpoints(tmp_path / "c")[0].latest()
    assert found is not None and found[0] == 8 and found[1]["number"] == 8
    assert found[1].keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        if name != "number":
            np.testing.assert_array_equal(found[1][name], array)
        assert found[1][name].dtype == array.dtype and found[1][name].shape == array.shape
    assert told == []


@pytest.mark.parametrize("how", ["truncated", "empty", "removed", "flipped"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(how, tmp_path):
    saved, _ = checkpoints(tmp_path)
    for step in (1, 2):
        saved.save(step, ARRAYS | {"number": np.array(step)})
    saved.close()
    damage(tmp_path / "2", how)
    again, told = checkpoints(tmp_path)
    found = again.latest()
    assert found is not None and found[0] == 1 and found[1]["number"] == 1
    assert how == "removed" or ("update 2" in told[0] and "damaged" in told[0] and "\n" not in told[0])
    again.save(2, ARRAYS)  # its place is free again
    again.close()
    damage(tmp_path / "2", how)
    damage(tmp_path / "1", how)
    assert checkpoints(tmp_path)[0].latest() is None


def test_what_hushes_orbax_stays_when_it_is_over(monkeypatch):
    """A thread that was about to call it may do so later: see `_without_closed_loops`."""
    told, hooks = [], []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    usual = sys.unraisablehook
    for _ in range(2):
        with checkpoint._hushed(), checkpoint._hushed():  # one in the other, as when two threads write
            hooks.append(weakref.ref(sys.unraisablehook))
        assert sys.unraisablehook is usual
    gc.collect()
    late, other = hooks[0](), SimpleNamespace(exc_value=ValueError("another"))
    assert late is not None and late is hooks[1]()
    late(SimpleNamespace(exc_value=RuntimeError("Event loop is closed")))
    late(other)
    assert told == [other]


def test_a_checkpoint_that_was_being_written_is_no_checkpoint(tmp_path):
    saved, _ = checkpoints(tmp_path)
    saved.save(1, ARRAYS)
    saved.close()
    (tmp_path / "2.orbax-checkpoint-tmp-0" / "arrays").mkdir(parents=True)
    (tmp_path / "2.orbax-checkpoint-tmp-0" / "arrays" / "manifest.ocdbt").write_bytes(b"half")
    found = checkpoints(tmp_path)[0].latest()
    assert found is not None and found[0] == 1


def test_a_full_disk_stops_nobody_and_loses_nothing(tmp_path, full_disk, caplog):
    saved, told = checkpoints(tmp_path)
    saved.save(1, ARRAYS)
    with full_disk():
        saved.save(2, ARRAYS | {"large": np.random.default_rng(0).normal(size=100_000)})
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(told) == 1 and "no checkpoint could be written at update 2" in told[0]
    assert "the last one is of update 1" in told[0] and "\n" not in told[0]
    found = checkpoints(tmp_path)[0].latest()
    assert found is not None and found[0] == 1
    saved.save(3, ARRAYS)
    saved.close()
    found = checkpoints(tmp_path)[0].latest()
    assert found is not None and found[0] == 3 and len(told) == 1


def test_checkpoints_are_due_after_some_minutes(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    saved, _ = checkpoints(tmp_path, minutes=2)
    due = []
    for seconds in (0, 119, 120):
        now[0] = seconds
        due.append(saved.due())
    saved.save(1, ARRAYS)
    due.append(saved.due())
    assert due == [False, False, True, False]
