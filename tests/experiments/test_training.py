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
from experiments import _signals, _training, _waves
from experiments._plan import Members, Plan
from experiments._run import UsageError

from .synthetic import interrupt_after

MEMBERS = 3
OPTIMISER = optax.inject_hyperparams(optax.sgd)(
    0.1
)  # one object, so that all tests share one compilation per chunk length


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


# Checkpoints


def numbers(history) -> dict[str, np.ndarray]:
    """Everything that a history holds, by name."""
    arrays = {"minibatch loss": history.minibatch.loss, "minibatch accuracy": history.minibatch.accuracy}
    for split, found in history.evaluations.items():
        arrays |= {f"{split} loss": found.loss, f"{split} accuracy": found.accuracy}
    return arrays | history.observations | history.end | {"diverged at": history.diverged_at}


def assert_same(history, expected):
    assert history.finished and history.evaluation_steps == expected.evaluation_steps
    assert numbers(history).keys() == numbers(expected).keys()
    for name, array in numbers(expected).items():
        np.testing.assert_array_equal(numbers(history)[name], array, err_msg=name)
        assert numbers(history)[name].dtype == array.dtype, name


def size_of_outputs(state, loss, data):
    return {"size": jnp.mean(abs(state.model.layers[0].weight)), "step": state.step}


OBSERVED = {"observe": size_of_outputs, "observe_end": size_of_outputs}


@pytest.mark.parametrize("chunks", [1, 3, 6])
def test_a_run_that_was_torn_off_goes_on_as_if_nothing_had_happened(chunks, tmp_path, monkeypatch):
    """As by a second Ctrl-C: nothing is saved any more, and the last checkpoint is what there is."""
    whole = train(7, 1, 3, plan=OBSERVED)
    with monkeypatch.context() as patch:
        interrupt_after(chunks, patch)
        assert not train(7, 1, 3, plan=OBSERVED, checkpoint=tmp_path / "c", checkpoint_minutes=0).finished
    assert_same(train(7, 1, 3, plan=OBSERVED, checkpoint=tmp_path / "c"), whole)


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_was_asked_to_stop_saves_where_it_is(name, tmp_path, monkeypatch):
    whole = train(7, 1, 3)
    real, calls = ensemble.train_chunk, []

    def train_chunk(*args, **kwargs):
        calls.append(None)
        if len(calls) == 3:
            signal.raise_signal(name)
        return real(*args, **kwargs)

    usual = signal.default_int_handler if name == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(name, usual)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(ensemble, "train_chunk", train_chunk)
            history = train(7, 1, 3, checkpoint=tmp_path)
            assert history.steps_done == 3 and history.interrupted and not history.finished
            calls.clear()
            calls.extend([None] * 3)
            history = train(7, 1, 3, checkpoint=tmp_path)
            assert len(calls) == 7  # four more
        assert signal.getsignal(name) is usual
    finally:
        signal.signal(name, before)
    assert_same(history, whole)


def test_an_interruption_of_the_last_observation_is_one_of_the_last_chunk(tmp_path):
    """By a second Ctrl-C, while it compiles: the run is not finished, and goes on."""

    def interrupted(state, loss, data):
        raise KeyboardInterrupt

    whole = train(7, 1, 3, plan=OBSERVED)
    left = train(7, 1, 3, plan=OBSERVED | {"observe_end": interrupted}, checkpoint=tmp_path, checkpoint_minutes=0)
    assert not left.finished and left.steps_done == 6 and not left.end
    assert {array.shape[-1] for name, array in numbers(left).items() if name.startswith("minibatch")} == {6}
    assert_same(train(7, 1, 3, plan=OBSERVED, checkpoint=tmp_path), whole)


def test_a_signal_before_the_training_stops_it(tmp_path):
    """Inside a block that saves first, as between two networks."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt), _signals.saving_first(lambda text: None):
            signal.raise_signal(signal.SIGTERM)
            train(7, 1, 3)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_finished_run_is_not_trained_again(tmp_path, monkeypatch):
    whole = train(7, 1, 3, plan=OBSERVED, checkpoint=tmp_path)
    interrupt_after(0, monkeypatch)
    assert_same(train(7, 1, 3, plan=OBSERVED, checkpoint=tmp_path), whole)


def test_the_length_of_chunks_is_that_of_the_run_that_is_resumed(tmp_path, monkeypatch):
    """Else evaluations would be at other updates, as where the estimate depends on the number of devices."""
    whole = train(8, 2, 4)
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        train(8, 2, 4, checkpoint=tmp_path, checkpoint_minutes=0)
    assert_same(train(8, 4, 4, checkpoint=tmp_path), whole)


def test_a_damaged_checkpoint_costs_only_the_way_to_the_one_before(tmp_path, monkeypatch, capsys):
    whole = train(7, 1, 3)
    with monkeypatch.context() as patch:
        interrupt_after(5, patch)
        train(7, 1, 3, checkpoint=tmp_path, checkpoint_minutes=0)
    (newest,) = (tmp_path / "wave-0").glob("5")
    for file in newest.rglob("d/*"):
        file.write_bytes(file.read_bytes()[:-9])
    assert_same(train(7, 1, 3, checkpoint=tmp_path), whole)
    out = capsys.readouterr().out
    assert "checkpoint of update 5" in out and "is damaged" in out and "going back to the one before" in out


# Waves


def test_waves_train_the_same_members_with_one_compilation(monkeypatch):
    together = train(4, 2, 2, members(5), plan=OBSERVED)
    sizes, real = [], ensemble.train_chunk

    def train_chunk(states, *args, **kwargs):
        sizes.append(len(states.step))
        return real(states, *args, **kwargs)

    monkeypatch.setattr(ensemble, "train_chunk", train_chunk)
    waves = train(4, 2, 2, members(5), plan=OBSERVED, wave=2)
    assert sizes == [2] * 6  # three waves of two chunks; the last member fills up the third
    assert waves.finished and waves.minibatch.loss.shape == (5, 4) and waves.end["size"].shape == (5,)
    for name, array in numbers(together).items():
        np.testing.assert_allclose(numbers(waves)[name], array, rtol=1e-5, err_msg=name)


def test_an_interrupted_wave_goes_on(tmp_path, monkeypatch):
    whole = train(4, 2, 2, members(5), plan=OBSERVED, wave=2)
    with monkeypatch.context() as patch:
        interrupt_after(3, patch)
        history = train(4, 2, 2, members(5), plan=OBSERVED, wave=2, checkpoint=tmp_path, checkpoint_minutes=0)
    assert not history.finished and history.evaluation_steps == [2, 4] and history.end == {}
    trained = np.isfinite(history.minibatch.loss)
    assert trained[:2].all() and trained[2:4, :2].all() and not trained[2:4, 2:].any() and not trained[4].any()
    assert history.diverged_at.tolist() == [-1] * 5
    assert_same(train(4, 2, 2, members(5), plan=OBSERVED, checkpoint=tmp_path), whole)  # with the waves that it had
    with pytest.raises(UsageError, match="waves of 2 members, not 3"):
        train(4, 2, 2, members(5), plan=OBSERVED, wave=3, checkpoint=tmp_path)


def test_a_wave_is_what_the_compiler_says_there_is_memory_for(monkeypatch):
    """On a device whose memory the program for six of 60 members nearly fills."""
    who, seen = members(60), []
    real = ensemble.peak_memory
    monkeypatch.setattr(
        ensemble, "peak_memory", lambda *a, **k: seen.append((len(a[0].step), real(*a, **k))) or seen[-1][1]
    )
    monkeypatch.setattr(ensemble, "default_block_size", lambda model, platform: 2)
    data = Dataset(jr.normal(jr.key(1), (12, 2)), jnp.arange(12) % 2)
    plan = Plan(8, 4, 2, batch_size=4)
    fitting = lambda: _waves.fitting_wave(who, data, {"validation": data}, plan)
    monkeypatch.setattr(_waves, "_free_memory", lambda: 1e12)
    assert fitting() == 60 and not seen  # the states alone are nothing beside that
    monkeypatch.setattr(_waves, "_free_memory", lambda: 0.0)
    assert fitting() == 1
    (small, low), (large, high) = seen
    assert (small, large) == (2, 4) and high > low
    per_member = (high - low) / 2
    monkeypatch.setattr(_waves, "_free_memory", lambda: low + 4.5 * per_member)  # six members and a half
    assert fitting() == 6
    states = who.take(np.arange(6)).init()
    placed = ensemble.replicate(data, states)
    needed = real(states, who.take(np.arange(6)).losses, OPTIMISER, placed, num_steps=4, batch_size=4,
                  evaluations={"validation": (placed, True)})  # fmt: skip
    assert needed == pytest.approx(low + 4 * per_member, rel=0.02)  # a straight line, indeed
