"""What the commands share: exit codes, devices, directories, chunks, and the loop, on an ensemble of tiny networks."""

import concurrent.futures
import functools as ft
import json
import os
import signal
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from eqx_dynloss import ensemble
from eqx_dynloss.loss import DynamicalLoss
from eqx_dynloss.models import MLP
from eqx_dynloss.schedule import OscillatingWeights
from eqx_dynloss.train import Dataset
from experiments import _run
from experiments._data import DataError
from experiments._run import UsageError

from .synthetic import interrupt_after

MEMBERS = 3
OPTIMISER = optax.sgd(0.1)  # one object, so that all tests share one compilation per chunk length


@ft.cache
def compiled_states():
    return ensemble.init(lambda key: MLP(2, 3, 2, key=key), OPTIMISER, jr.split(jr.key(0), MEMBERS))


def initial_states():
    """A fresh copy every time, since training takes the memory of its states."""
    states = compiled_states()
    return jax.tree.map(lambda leaf: leaf.copy() if eqx.is_array(leaf) else leaf, states)


def train(num_steps, chunk, num_evaluations, **replaced):
    """Trains three members on twelve points and returns the history."""
    states = initial_states()
    schedules = OscillatingWeights(2, np.full(MEMBERS, 5.0), np.full(MEMBERS, 3.0))
    points = jr.normal(jr.key(1), (12, 2))
    data = Dataset(points, (points[:, 0] > 0).astype(int))
    train_data, validation_data = ensemble.replicate((data, Dataset(data.inputs[:5], data.labels[:5])), states)
    _, history = _run.train(
        replaced.get("states", states),
        DynamicalLoss(schedules),
        OPTIMISER,
        train_data,
        {"train": train_data, "validation": validation_data},
        num_steps=num_steps,
        chunk=chunk,
        batch_size=4,
        microbatch_size=None,
        num_evaluations=num_evaluations,
    )
    return history


# The loop


@pytest.mark.parametrize(
    "num_evaluations, steps",
    [(1, [7]), (2, [4, 7]), (3, [3, 5, 7]), (5, [2, 3, 5, 6, 7]), (7, [*range(1, 8)]), (50, [*range(1, 8)])],
)
def test_evaluations_are_evenly_spread_and_the_last_is_at_the_end(num_evaluations, steps):
    history = train(7, 1, num_evaluations)
    assert history.evaluation_steps == steps
    validation, training = history.evaluations["validation"], history.evaluations["train"]
    assert validation.accuracy.shape == training.loss.shape == (MEMBERS, len(steps))
    assert np.isfinite(validation.accuracy).all() and np.isfinite(validation.loss).all()
    assert np.isnan(training.accuracy[:, :-1]).all() and np.isfinite(training.accuracy[:, -1]).all()


def test_a_finished_history_is_complete(capsys):
    history = train(7, 1, 3)
    assert history.finished and history.diverged_at.tolist() == [-1] * MEMBERS
    assert history.minibatch.loss.shape == history.minibatch.accuracy.shape == (MEMBERS, 7)
    assert np.isfinite(history.minibatch.loss).all()
    assert 0 < history.steps_per_second < np.inf
    lines = capsys.readouterr().out.splitlines()  # no terminal: a line per evaluation instead of a bar
    assert [line.split(" (")[0] for line in lines] == [f"update {n} of 7" for n in (3, 5, 7)]


def test_chunks_do_not_change_the_run():
    by_one, at_once = train(6, 1, 2), train(6, 6, 2)
    np.testing.assert_allclose(by_one.minibatch.loss, at_once.minibatch.loss, rtol=1e-5)
    for split in ("train", "validation"):
        np.testing.assert_allclose(
            by_one.evaluations[split].loss[:, -1], at_once.evaluations[split].loss[:, -1], rtol=1e-5
        )
    assert at_once.evaluation_steps == [6]


def test_a_run_of_one_chunk_has_no_speed(capsys):
    assert np.isnan(train(6, 6, 1).steps_per_second)
    assert "nan" not in capsys.readouterr().out


@pytest.mark.parametrize("chunks, evaluated", [(1, []), (3, [3]), (5, [3, 5]), (6, [3, 5])])
def test_an_interrupted_run_keeps_the_chunks_that_were_done(chunks, evaluated, monkeypatch):
    whole = train(7, 1, 3)
    interrupt_after(chunks, monkeypatch)
    history = train(7, 1, 3)
    assert not history.finished
    assert history.evaluation_steps == evaluated
    np.testing.assert_array_equal(history.minibatch.loss, whole.minibatch.loss[:, :chunks])
    np.testing.assert_array_equal(history.minibatch.accuracy, whole.minibatch.accuracy[:, :chunks])
    for split in ("train", "validation"):
        assert history.evaluations[split].accuracy.shape == (MEMBERS, len(evaluated))
    kept = whole.evaluations["validation"].loss[:, : len(evaluated)]
    np.testing.assert_array_equal(history.evaluations["validation"].loss, kept)
    assert history.diverged_at.shape == (MEMBERS,)
    assert np.isnan(history.steps_per_second) if chunks == 1 else history.steps_per_second > 0


@pytest.mark.parametrize("presses, kept", [(1, 3), (2, 2)])
def test_ctrl_c_stops_after_the_running_chunk_and_twice_at_once(presses, kept, monkeypatch):
    """As often as wanted while the third chunk is running."""
    real, calls = ensemble.train_chunk, []

    def train_chunk(*args, **kwargs):
        calls.append(None)
        for _ in range(presses if len(calls) == 3 else 0):
            signal.raise_signal(signal.SIGINT)
        return real(*args, **kwargs)

    monkeypatch.setattr(ensemble, "train_chunk", train_chunk)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        history = train(7, 1, 7)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert history.minibatch.loss.shape == (MEMBERS, kept) and not history.finished
    assert history.evaluation_steps == list(range(1, kept + 1))


def test_the_loop_runs_outside_the_main_thread(monkeypatch):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(train, 7, 1, 1).result().finished


def test_an_interruption_before_the_first_chunk_is_passed_on(monkeypatch):
    interrupt_after(0, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(7, 1, 3)


def test_a_diverged_member_is_recorded_and_left_out_of_the_progress(capsys):
    states = initial_states()
    bias = lambda states: states.model.layers[0].bias
    states = eqx.tree_at(bias, states, bias(states).at[1].set(jnp.inf))
    states = jax.device_put(states, states.step.sharding)
    history = train(7, 1, 1, states=states)
    assert history.diverged_at.tolist() == [-1, 0, -1]
    assert np.isnan(history.minibatch.loss[1, 1:]).all() and np.isfinite(history.minibatch.loss[[0, 2]]).all()
    assert "nan" not in capsys.readouterr().out


# Chunks


@pytest.mark.parametrize(
    "num_steps, target, length",
    [
        (312, 39, 39),
        (312, 6, 6),
        (312, 5.4, 6),  # 6/5.4 is less than 5.4/4
        (100, 14, 10),  # 14/10 = 1.40 is less than 20/14 = 1.43
        (97, 9, 9),  # a prime number
        (97, 12, 12),
        (1, 1000, 1),
        (36, 6, 6),  # a square
        (24, 0.001, 1),
        (24, 1e9, 24),
    ],
)
def test_a_chunk_is_the_divisor_nearest_in_ratio(num_steps, target, length):
    assert _run.chunk_length(num_steps, target) == length


def test_a_chunk_divides_the_steps_or_is_as_long_as_it_should_be():
    for num_steps in range(1, 2000):
        chunk = _run.chunk_length(num_steps, 7)
        assert chunk == min(7, num_steps) or (num_steps % chunk == 0 and 7 / 4 <= chunk <= 28)
    assert _run.chunk_length(100_003, 1000) == 1000  # a prime


def test_very_long_runs_are_cut_at_once():
    started = time.perf_counter()
    assert _run.chunk_length(10**12, 1000) == 1000
    assert time.perf_counter() - started < 5


# Exit codes


def code(command):
    with pytest.raises(SystemExit) as caught:
        _run.run(command)
    return caught.value.code


def raises(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize("finished, expected", [(True, 0), (False, 130)])
def test_a_command_that_returns_exits_with_0_or_130(finished, expected, capsys):
    assert code(lambda: finished) == expected
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [UsageError("this is wrong."), DataError("this is wrong.")])
def test_wrong_use_is_one_sentence_and_2(error, capsys):
    assert code(raises(error)) == 2
    assert capsys.readouterr() == ("", "error: this is wrong.\n")


def test_an_interruption_is_a_sentence_and_130(capsys):
    assert code(raises(KeyboardInterrupt())) == 130
    assert "Interrupted" in capsys.readouterr().err


def test_a_defect_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        _run.run(raises(ZeroDivisionError()))


# Devices


def test_all_cores_are_left_alone_once_jax_runs(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    devices = jax.devices()
    _run.use_all_cores()
    assert jax.devices() == devices


def test_xla_flags_of_the_user_win(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    monkeypatch.setattr(jax.config, "update", raises(AssertionError("JAX was configured all the same")))
    _run.use_all_cores()


# Directories


def test_a_directory_is_made_with_its_configuration(tmp_path):
    path = _run.new_directory(tmp_path / "a" / "b", "cifar", "cifar10", {"width": 2, "out": tmp_path})
    assert path == tmp_path / "a" / "b"
    assert json.loads((path / "config.json").read_text()) == {"width": 2, "out": str(tmp_path)}


def test_the_default_directory_names_the_command_and_the_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = _run.new_directory(None, "cifar-digits", "digits", {})
    assert path.parent.name == "results" and path.name.startswith("cifar-digits-20")
    assert [file.name for file in path.iterdir()] == ["digits_config.json"]


def test_an_empty_directory_is_taken_and_a_full_one_refused(tmp_path):
    _run.new_directory(tmp_path, "cifar", "digits", {})
    _run.new_directory(tmp_path, "cifar", "digits", {})  # the first run never started: there is nothing to lose
    (tmp_path / "digits_results.nc").touch()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(UsageError, match="is not empty.*--out"):
        _run.new_directory(tmp_path, "cifar", "digits", {})
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("where", ["a file", "below a file", "/proc/x"])
def test_a_directory_that_cannot_be_made_is_one_sentence(where, tmp_path):
    file = tmp_path / "file"
    file.write_text("precious")
    out = {"a file": file, "below a file": file / "x"}.get(where, tmp_path.__class__(where))
    with pytest.raises(UsageError, match="--out") as caught:
        _run.new_directory(out, "cifar", "digits", {})
    assert "\n" not in str(caught.value) and str(out) in str(caught.value)
    assert file.read_text() == "precious"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_one_sentence(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="Permission denied.*--out"):
        _run.new_directory(tmp_path / "x", "cifar", "digits", {})


def test_paths_are_printed_as_they_are(capsys):
    _run.console.print("results/[red]x[/y] :smile: " + "long/" * 60)
    assert capsys.readouterr().out == "results/[red]x[/y] :smile: " + "long/" * 60 + "\n"
