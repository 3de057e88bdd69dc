"""The training loop: chunks, evaluations, signals, waves and checkpoints, on an ensemble of tiny networks."""

import concurrent.futures
import dataclasses
import signal

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
from experiments import _training
from experiments._training import Members, Plan

from .synthetic import interrupt_after

MEMBERS = 3
OPTIMISER = optax.inject_hyperparams(optax.sgd)(0.1)  # one object, so that all tests share one compilation per chunk length


def make_model(key):
    return MLP(2, 3, 2, key=key)


def members(count=MEMBERS, **replaced) -> Members:
    schedules = OscillatingWeights(2, np.linspace(1, 9, count), np.full(count, 3.0))
    return dataclasses.replace(Members(make_model, OPTIMISER, DynamicalLoss(schedules), np.arange(count)), **replaced)


def train(num_steps, chunk, num_evaluations, who=None, *, plan=None, **options):
    """Trains three members on twelve points and returns the history."""
    points = jr.normal(jr.key(1), (12, 2))
    data = Dataset(points, (points[:, 0] > 0).astype(int))
    splits = {"train": data, "validation": Dataset(data.inputs[:5], data.labels[:5])}
    plan = Plan(num_steps, chunk, num_evaluations, batch_size=4, **(plan or {}))
    return _training.train(who or members(), data, splits, plan, **options)


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
    rates = {"learning_rate": np.array([0.1, 1e38, 0.1])}
    history = train(7, 1, 1, members(hyperparams=rates))
    assert history.diverged_at.tolist() == [-1, 1, -1]
    assert np.isnan(history.minibatch.loss[1, 2:]).all() and np.isfinite(history.minibatch.loss[[0, 2]]).all()
    assert "nan" not in capsys.readouterr().out
