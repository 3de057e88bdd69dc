"""The six-row figures, from results that were made up: what is drawn is what was measured."""

import numpy as np
import pytest

from experiments.spiral import dynamics

from ...helpers import slow
from ..cifar.test_figures import title
from ..synthetic import assemble, class_weights

STEPS, PERIOD = 400, 100


def run(seeds=3, observed=True, rate=0.5, **attrs):
    """A static and a dynamical loss; curvature every 10 updates, different for every seed."""
    rng = np.random.default_rng(0)
    members, every = 2 * seeds, np.arange(0, STEPS, 10)
    return assemble(
        amplitudes=(5.0,),
        periods=(PERIOD,),
        seeds=range(seeds),
        classes=("a", "b", "c"),
        evaluation_steps=[STEPS],
        accuracy=rng.uniform(0.4, 1, (members, 2, 1)),
        loss=rng.uniform(0, 1, (members, 2, 1)),
        minibatch_loss=rng.lognormal(0, 1, (members, STEPS)),
        minibatch_accuracy=rng.uniform(0, 1, (members, STEPS)),
        class_weights=np.stack([class_weights(A, T, STEPS, 3) for A, T in ((1, None), (5, PERIOD))]),
        diverged_at=np.full(members, -1),
        attrs={"dataset": "spiral", "finished": True, **attrs},
        observation_steps=every,
        observations={n: rng.lognormal(0, 1, (members, len(every))) for n in ("hessian_max", "ntk_max")}
        if observed
        else {},
    ).assign_coords(init="glorot", width=7, learning_rate=rate)


def drawn(axes) -> list[np.ndarray]:
    return [np.asarray(line.get_ydata(), float) for line in axes.lines]


@pytest.mark.parametrize("seed", [0, 2])
def test_the_chosen_seed_is_drawn(seed, tmp_path):
    results = run()
    figure = dynamics.one_seed(results.isel(amplitude=1, period=0), seed, tmp_path / "a.png")
    member = results.isel(amplitude=1, period=0).sel(seed=seed)
    weights, loss, difference, accuracy, hessian, ntk = figure.axes[::2]
    np.testing.assert_array_equal(np.stack(drawn(weights)[:3], 1), member.class_weights)
    np.testing.assert_array_equal(drawn(loss)[0], member.minibatch_loss)
    np.testing.assert_allclose(drawn(difference)[0], -np.diff(member.minibatch_loss))  # F(t) − F(t + 1), as the paper
    np.testing.assert_array_equal(drawn(accuracy)[0], member.minibatch_accuracy)
    np.testing.assert_array_equal(drawn(hessian)[0], member.hessian_max)
    np.testing.assert_array_equal(drawn(ntk)[0], member.ntk_max)
    assert np.all(drawn(hessian)[1] == 4)  # 2/η
    assert title(tmp_path / "a.png").startswith(
        f"A = 5, T = 100, seed {seed}: the spiral (Glorot init, width 7, learning rate 0.5)"
    )


def test_the_zoom_is_the_papers_part_of_the_second_period(tmp_path):
    figure = dynamics.one_seed(run().isel(amplitude=1, period=0), 0, tmp_path / "a.png")
    assert {axes.get_xlim() for axes in figure.axes[::2]} == {(0, STEPS)}
    assert {axes.get_xlim() for axes in figure.axes[1::2]} == {(1.6 * PERIOD, 2.1 * PERIOD)}


def test_seeds_are_summarised_by_their_median_of_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamics, "_WINDOWS", 4)
    results = run()
    static, members = (results.isel(amplitude=a, period=0) for a in (0, 1))
    figure = dynamics.over_seeds(static, members, tmp_path / "a.png")
    for line, side in zip(figure.axes[2].lines, (static, members), strict=True):
        windows = side.minibatch_loss.values.reshape(3, 4, STEPS // 4).mean(2)
        np.testing.assert_allclose(np.asarray(line.get_ydata(), float), np.median(windows, 0))
        np.testing.assert_allclose(np.asarray(line.get_xdata(), float), STEPS / 4 * (np.arange(4) + 0.5) - 0.5)
    assert len(figure.axes[2].collections) == 2  # a band for each
    assert "median of 3 seeds" in title(tmp_path / "a.png")


@pytest.mark.parametrize("kwargs", [{"seeds": 1}, {"observed": False}, slow({"finished": False, "steps_done": STEPS})])
def test_everything_is_drawn_for(kwargs, tmp_path):
    written = dynamics.write(run(**kwargs).expand_dims(["init", "width", "learning_rate"]), tmp_path, 0)
    assert len(written) == (4 if kwargs.get("observed", True) else 3)
    for path in written:
        assert ("INTERRUPTED" in title(path)) == ("finished" in kwargs)
