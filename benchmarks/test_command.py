"""`python -m experiments.cifar` beside its compiled program: how soon it trains, and how much of its time it does."""

import dataclasses
import os
import subprocess
import sys
import time
from unittest import mock

import jax
import pytest

from eqx_dynloss import ensemble
from experiments.problems import images
from experiments.problems.cifar import Problem
from experiments.problems.presets import PRESETS
from experiments.running import training

from .report import Row

pytestmark = pytest.mark.usefixtures("quick_compilation")

START = "From the command to the end of the first chunk of training: quick preset, 2 seeds, scikit-learn's digits"
SHARE = "Time of a chunk: the compiled program, and the training loop around it (quick preset, 1 seed, digits)"
FLAGS = "--dataset digits --seeds 2 --epochs 4 --evaluations 4".split()  # four chunks, each reported


def test_time_to_the_first_chunk(record, tmp_path):
    """The first start compiles; the second finds what the first has compiled."""
    if not record.full:
        pytest.skip("takes as long where nothing is timed; the command has tests of its own")

    def seconds(name: str) -> float:
        command = [sys.executable, "-u", "-m", "experiments.cifar", *FLAGS, "--out", str(tmp_path / name)]
        variables = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        variables.pop("JAX_COMPILATION_CACHE_DIR", None)
        start = time.perf_counter()
        with subprocess.Popen(
            command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as it:
            assert it.stdout is not None
            trained = any(line.startswith("update ") for line in it.stdout)
            end = time.perf_counter()
            it.kill()
        assert trained, "the command has not trained"
        return end - start

    def find_out() -> list[Row]:
        first, second = seconds("first"), seconds("second")
        return [
            Row(START, "a start", "nothing compiled yet", rounds=1, seconds=first, ratio=same(1.0)),
            Row(START, "a start", "all compiled before", rounds=1, seconds=second, ratio=same(second / first)),
        ]

    record(find_out)


def test_share_of_the_compiled_program(record):
    """What is around the program: dispatch, fetching of metrics, reports. Checkpoints, every few minutes, are not."""
    preset = dataclasses.replace(PRESETS["quick"], epochs=3, evaluations=3)
    if not record.full:
        preset = dataclasses.replace(preset, width=4, epochs=2)
    task = Problem.of(preset, images.load("digits"), seeds=[0]).task
    real, spans = ensemble.train_chunk, []

    def timed_chunk(*args, **options):
        start = time.perf_counter()
        results = jax.block_until_ready(real(*args, **options))
        spans.append((start, time.perf_counter()))
        return results

    def find_out() -> list[Row]:
        with mock.patch.object(ensemble, "train_chunk", timed_chunk):
            training.train([task])
        (_, begin), (_, end) = spans[0], spans[-1]  # from the end of the first chunk, which compiles
        chunks = len(spans) - 1
        program = sum(stop - start for start, stop in spans[1:]) / chunks
        whole = (end - begin) / chunks
        case = f"{chunks} chunks"
        return [
            Row(SHARE, case, "compiled program", rounds=chunks, seconds=program, ratio=same(1.0)),
            Row(SHARE, case, "loop around it", rounds=chunks, seconds=whole, ratio=same(whole / program)),
        ]

    program, loop = record(find_out)
    assert program.seconds <= loop.seconds


def same(ratio: float) -> tuple[float, float, float]:
    """The quartiles of a single round."""
    return ratio, ratio, ratio
