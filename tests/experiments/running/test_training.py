"""The training loop: chunks, evaluations, signals, waves and checkpoints, on an ensemble of tiny networks."""

import concurrent.futures
import dataclasses
import gc
import signal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import xarray as xr

from eqx_dynloss import ensemble
from eqx_dynloss.loss import DynamicalLoss
from eqx_dynloss.models import MLP
from eqx_dynloss.schedule import OscillatingWeights
from eqx_dynloss.train import Dataset
from experiments.running import memory, signals, training
from experiments.running.errors import UsageError
from experiments.running.members import Members
from experiments.running.task import Plan, Task

from ..synthetic import interrupt_after

MEMBERS = 3
OPTIMISER = optax.inject_hyperparams(optax.sgd)(
    0.1
)  # one object, so that all tests share one compilation per chunk length


def make_model(key):
    return MLP(2, 3, 2, key=key)


def members(count=MEMBERS, **coordinates) -> Members:
    schedules = OscillatingWeights(2, np.linspace(1, 9, count), np.full(count, 3.0))
    own = {"seed": np.arange(count)} | coordinates
    return Members(make_model, OPTIMISER, DynamicalLoss(schedules), own, hyperparams=coordinates)


def task(num_steps, chunk, num_evaluations, who=None, name="", **plan) -> Task:
    """Three members on twelve points."""
    points = jr.normal(jr.key(1), (12, 2))
    data = Dataset(points, (points[:, 0] > 0).astype(int))
    splits = {"train": data, "validation": Dataset(data.inputs[:5], data.labels[:5])}
    return Task(name, who or members(), data, splits, Plan(num_steps, chunk, num_evaluations, batch_size=4, **plan))


def train(num_steps, chunk, num_evaluations, who=None, *, plan=None, **options) -> xr.Dataset:
    """Trains three members on twelve points and returns what they have measured."""
    return training.train([task(num_steps, chunk, num_evaluations, who, **(plan or {}))], **options)


# The loop


@pytest.mark.parametrize(
    "num_evaluations, steps",
    [(1, [7]), (2, [4, 7]), (3, [3, 5, 7]), (5, [2, 3, 5, 6, 7]), (7, [*range(1, 8)]), (50, [*range(1, 8)])],
)
def test_evaluations_are_evenly_spread_and_the_last_is_at_the_end(num_evaluations, steps):
    measured = train(7, 1, num_evaluations)
    assert measured.evaluation_step.values.tolist() == steps
    validation, training = measured.sel(split="validation"), measured.sel(split="train")
    assert validation.accuracy.shape == training.loss.shape == (MEMBERS, len(steps))
    assert np.isfinite(validation.accuracy).all() and np.isfinite(validation.loss).all()
    assert np.isnan(training.accuracy[:, :-1]).all() and np.isfinite(training.accuracy[:, -1]).all()


def test_what_a_finished_run_measures_is_complete(capsys):
    measured = train(7, 1, 3)
    assert measured.finished and measured.diverged_at.values.tolist() == [-1] * MEMBERS
    assert measured.minibatch_loss.shape == measured.minibatch_accuracy.shape == (MEMBERS, 7)
    assert np.isfinite(measured.minibatch_loss).all() and measured.step.values.tolist() == list(range(7))
    assert 0 < measured.member_updates_per_second < np.inf
    lines = capsys.readouterr().out.splitlines()  # no terminal: a line per evaluation instead of a bar
    assert [line.split(" (")[0] for line in lines] == [f"update {n} of 7" for n in (3, 5, 7)]


def test_observing_the_end_is_announced(capsys):
    """It can take minutes, with nothing left to train."""
    train(7, 1, 3, plan=AT_THE_END)
    *_, told, last = capsys.readouterr().out.splitlines()
    assert told == "trained, now observing every member" and last.startswith("update 7 of 7")


def test_chunks_do_not_change_the_run():
    by_one, at_once = train(6, 1, 2), train(6, 6, 2)
    np.testing.assert_allclose(by_one.minibatch_loss, at_once.minibatch_loss, rtol=1e-5)
    np.testing.assert_allclose(by_one.loss[..., -1], at_once.loss[..., -1], rtol=1e-5)
    assert at_once.evaluation_step.values.tolist() == [6]


def test_a_run_of_one_chunk_has_no_speed(capsys):
    assert np.isnan(train(6, 6, 1).member_updates_per_second)
    assert "nan" not in capsys.readouterr().out


@pytest.mark.parametrize("chunks, evaluated", [(1, []), (3, [3]), (5, [3, 5]), (6, [3, 5])])
def test_an_interrupted_run_keeps_the_chunks_that_were_done(chunks, evaluated, monkeypatch):
    whole = train(7, 1, 3)
    interrupt_after(chunks, monkeypatch)
    measured = train(7, 1, 3)
    assert not measured.finished
    assert measured.evaluation_step.values.tolist() == evaluated
    np.testing.assert_array_equal(measured.minibatch_loss, whole.minibatch_loss[:, :chunks])
    np.testing.assert_array_equal(measured.minibatch_accuracy, whole.minibatch_accuracy[:, :chunks])
    assert measured.accuracy.shape == (MEMBERS, 2, len(evaluated))
    kept = whole.loss.sel(split="validation")[:, : len(evaluated)]
    np.testing.assert_array_equal(measured.loss.sel(split="validation"), kept)
    assert measured.diverged_at.shape == (MEMBERS,)
    speed = measured.member_updates_per_second
    assert np.isnan(speed) if chunks == 1 else speed > 0


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
        measured = train(7, 1, 7)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert measured.minibatch_loss.shape == (MEMBERS, kept) and not measured.finished
    assert measured.evaluation_step.values.tolist() == list(range(1, kept + 1))


def test_the_loop_runs_outside_the_main_thread(monkeypatch):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(train, 7, 1, 1).result().finished


def test_an_interruption_before_the_first_chunk_is_passed_on(monkeypatch):
    interrupt_after(0, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(7, 1, 3)


def test_a_diverged_member_is_recorded_and_left_out_of_the_progress(capsys):
    measured = train(7, 1, 1, members(learning_rate=np.array([0.1, 1e38, 0.1])))
    assert measured.diverged_at.values.tolist() == [-1, 1, -1] and measured.learning_rate.values[1] == 1e38
    assert np.isnan(measured.minibatch_loss[1, 2:]).all() and np.isfinite(measured.minibatch_loss[[0, 2]]).all()
    assert "nan" not in capsys.readouterr().out


# Checkpoints


def assert_same(measured, expected):
    assert measured.finished
    xr.testing.assert_equal(measured, expected)
    for name, variable in expected.variables.items():
        assert measured[name].dtype == variable.dtype, name


def size_of_outputs(state, loss, data):
    weights = state.model.layers[0].weight
    return {"size": jnp.mean(abs(weights)), "at": state.step, "weights": weights}


AT_THE_END = {"observe": size_of_outputs, "observed_dims": {"weights": ("unit", "input")}}
OBSERVED = AT_THE_END | {"observe_every": 1}


@pytest.mark.parametrize(
    "plan", [OBSERVED, AT_THE_END, AT_THE_END | {"keep_steps": False}], ids=["", "end", "no steps"]
)
@pytest.mark.parametrize("chunks", [1, 3, 6])
def test_a_run_that_was_torn_off_goes_on_as_if_nothing_had_happened(chunks, plan, tmp_path, monkeypatch):
    """As by a second Ctrl-C: nothing is saved any more, and the last checkpoint is what there is."""
    whole = train(7, 1, 3, plan=plan)
    assert whole.weights.dims == ("member", "observation_step", "unit", "input")
    np.testing.assert_allclose(abs(whole.weights).mean(("unit", "input")), whole["size"], rtol=1e-6)
    with monkeypatch.context() as patch:
        interrupt_after(chunks, patch)
        assert not train(7, 1, 3, plan=plan, checkpoint=tmp_path / "c", checkpoint_minutes=0).finished
    assert_same(train(7, 1, 3, plan=plan, checkpoint=tmp_path / "c"), whole)


def test_a_checkpoint_of_other_arrays_is_refused_and_kept(tmp_path, monkeypatch):
    """As of another version of this library, or of an optimiser."""
    with monkeypatch.context() as patch:
        interrupt_after(3, patch)
        train(7, 1, 3, checkpoint=tmp_path, checkpoint_minutes=0)
    before = sorted(tmp_path.rglob("*"))
    other = Members(make_model, optax.adam(0.1), members().losses, members().coordinates)
    with pytest.raises(UsageError, match="another version of eqx_dynloss .*: go on with that version, or start"):
        train(7, 1, 3, other, checkpoint=tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
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
            measured = train(7, 1, 3, checkpoint=tmp_path)
            assert measured.steps_done == 3 and not measured.finished
            calls.clear()
            calls.extend([None] * 3)
            measured = train(7, 1, 3, checkpoint=tmp_path)
            assert len(calls) == 7  # four more
        assert signal.getsignal(name) is usual
    finally:
        signal.signal(name, before)
    assert_same(measured, whole)


def test_an_interruption_of_the_last_observation_is_one_of_the_last_chunk(tmp_path):
    """By a second Ctrl-C, while it compiles: the run is not finished, and goes on."""

    def interrupted(state, loss, data):
        raise KeyboardInterrupt

    whole = train(7, 1, 3, plan=AT_THE_END)
    left = train(7, 1, 3, plan={"observe": interrupted}, checkpoint=tmp_path, checkpoint_minutes=0)
    assert not left.finished and left.steps_done == 6 and "observation_step" not in left.dims
    assert left.minibatch_loss.shape == left.minibatch_accuracy.shape == (MEMBERS, 6)
    assert_same(train(7, 1, 3, plan=AT_THE_END, checkpoint=tmp_path), whole)


def test_a_signal_before_the_training_stops_it(tmp_path):
    """Inside a block that saves first, as between two networks."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt), signals.saving_first(lambda text: None):
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
    together = train(4, 2, 2, members(5), plan=AT_THE_END)
    sizes, real = [], ensemble.train_chunk

    def train_chunk(states, *args, **kwargs):
        sizes.append(len(states.step))
        return real(states, *args, **kwargs)

    monkeypatch.setattr(ensemble, "train_chunk", train_chunk)
    waves = train(4, 2, 2, members(5), plan=AT_THE_END, wave=2)
    assert sizes == [2] * 6  # three waves of two chunks; the last member fills up the third
    assert waves.finished and waves.minibatch_loss.shape == (5, 4) and waves["size"].shape == (5, 1)
    xr.testing.assert_allclose(waves, together, rtol=1e-5)


def test_a_wave_leaves_nothing_on_the_devices(monkeypatch):
    alive, real = [], ensemble.train_chunk

    def train_chunk(*args, **kwargs):
        gc.collect()
        alive.append(sum(array.nbytes for array in jax.live_arrays()))
        return real(*args, **kwargs)

    monkeypatch.setattr(ensemble, "train_chunk", train_chunk)
    train(4, 4, 2, members(8), wave=2)
    assert len(alive) == 4 and max(alive[1:]) <= alive[0], alive


@pytest.mark.parametrize("plan, observed", [(OBSERVED, [0, 1, 2, 3]), (AT_THE_END, None)], ids=["", "end"])
def test_an_interrupted_wave_goes_on(plan, observed, tmp_path, monkeypatch):
    whole = train(4, 2, 2, members(5), plan=plan, wave=2)
    with monkeypatch.context() as patch:
        interrupt_after(3, patch)
        measured = train(4, 2, 2, members(5), plan=plan, wave=2, checkpoint=tmp_path, checkpoint_minutes=0)
    assert not measured.finished and measured.evaluation_step.values.tolist() == [2, 4]
    assert measured.steps_done == pytest.approx((2 * 4 + 2 * 2) / 5)
    trained = np.isfinite(measured.minibatch_loss.values)
    assert trained[:2].all() and trained[2:4, :2].all() and not trained[2:4, 2:].any() and not trained[4].any()
    assert measured.diverged_at.values.tolist() == [-1] * 5 and measured.diverged_at.dtype == whole.diverged_at.dtype
    if observed is None:
        assert "size" not in measured
    else:
        assert measured.observation_step.values.tolist() == observed
        assert measured["at"].values.tolist() == [[0, 1, 2, 3]] * 2 + [[0, 1, -1, -1]] * 2 + [[-1] * 4]
    assert_same(train(4, 2, 2, members(5), plan=plan, checkpoint=tmp_path), whole)  # with the waves that it had
    with pytest.raises(UsageError, match="waves of 2 members, not 3"):
        train(4, 2, 2, members(5), plan=plan, wave=3, checkpoint=tmp_path)


def test_members_go_on_from_models_that_were_trained_before(tmp_path, monkeypatch):
    """Each from its own, in waves and when resumed too. Gradient descent has no other state than the model's."""
    first = train(4, 2, 2, plan=AT_THE_END)

    def rest(**options):
        weights = jnp.asarray(first.weights.values[:, 0])
        models = jax.vmap(make_model)(jr.split(jr.key(0), MEMBERS))
        models = eqx.tree_at(lambda m: m.layers[0].weight, models, weights)
        return train(3, 1, 3, dataclasses.replace(members(), models=models), plan=OBSERVED, **options)

    expected = rest()
    np.testing.assert_array_equal(expected.weights[:, 0], first.weights[:, 0])
    assert_same(rest(wave=2), expected)
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        rest(checkpoint=tmp_path, checkpoint_minutes=0)
    assert_same(rest(checkpoint=tmp_path), expected)


def test_tasks_are_trained_one_after_another_and_told_apart(tmp_path, monkeypatch, capsys):
    both = [task(4, 2, 2, members(width=np.full(MEMBERS, width)), str(width)) for width in (1, 2)]
    both = [dataclasses.replace(t, members=dataclasses.replace(t.members, hyperparams={})) for t in both]
    whole = training.train(both)
    assert whole.width.values.tolist() == [1] * MEMBERS + [2] * MEMBERS and whole.steps_done == 8
    xr.testing.assert_equal(whole.isel(member=slice(MEMBERS)).drop_vars("width"), train(4, 2, 2))
    assert "2, update 4 of 4" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        first = training.train(both, checkpoint=tmp_path, checkpoint_minutes=0)
    assert not first.finished and first.width.values.tolist() == [1] * MEMBERS
    assert_same(training.train(both, checkpoint=tmp_path), whole)


def test_a_wave_is_what_the_compiler_says_there_is_memory_for(monkeypatch):
    """On a device whose memory the program for six of 60 members nearly fills."""
    who, seen = members(60), []
    real = ensemble.peak_memory
    monkeypatch.setattr(
        ensemble, "peak_memory", lambda *a, **k: seen.append((len(a[0].step), real(*a, **k))) or seen[-1][1]
    )
    monkeypatch.setattr(ensemble, "default_block_size", lambda model, platform: 2)
    data = Dataset(jr.normal(jr.key(1), (12, 2)), jnp.arange(12) % 2)
    whole = Task("", who, data, {"validation": data}, Plan(8, 4, 2, batch_size=4))
    fitting = lambda: memory.fitting_wave(whole)
    monkeypatch.setattr(memory, "_free_memory", lambda: 1e12)
    assert fitting() == 60 and not seen  # the states alone are nothing beside that
    monkeypatch.setattr(memory, "_free_memory", lambda: 0.0)
    assert fitting() == 1
    (small, low), (large, high) = seen
    assert (small, large) == (2, 4) and high > low
    per_member = (high - low) / 2
    monkeypatch.setattr(memory, "_free_memory", lambda: low + 4.5 * per_member)  # six members and a half
    assert fitting() == 6
    states = who.take(np.arange(6)).init()
    placed = ensemble.replicate(data, states)
    needed = real(states, who.take(np.arange(6)).losses, OPTIMISER, placed, num_steps=4, batch_size=4,
                  evaluations={"validation": (placed, True)})  # fmt: skip
    assert needed == pytest.approx(low + 4 * per_member, rel=0.02)  # a straight line, indeed
