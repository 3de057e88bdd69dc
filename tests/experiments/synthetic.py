"""Results that look like those of a run, made without training anything; and runs of commands within a test."""

import numpy as np
import pytest
import xarray as xr

from eqx_dynloss import ensemble
from experiments.results.labelled import SPLITS, combinations, unfold
from experiments.running.terminal import execute

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def class_weights(amplitude: float, period: float | None, steps: int, classes: int = 10) -> np.ndarray:
    """The triangular waveform, in plain NumPy; it stops after 6/7 of the run. Returns `[steps, classes]`."""
    raw = np.ones((steps, classes))
    if period is not None:
        t = np.arange(6 * steps // 7)
        raw[t, (t // period).astype(int) % classes] += 2 * (amplitude - 1) * (0.5 - np.abs(t % period / period - 0.5))
    return classes * raw / raw.sum(1, keepdims=True)


def results(
    *,
    amplitudes: tuple[float, ...] = (1.0, 10.0),
    periods: tuple[float, ...] = (50.0,),
    seeds: int = 3,
    steps: int = 400,
    evaluations: int = 8,
    classes: tuple[str, ...] = CLASSES,
    diverged: dict[int, int] | None = None,
    **attrs: object,
) -> xr.Dataset:
    """A run whose dynamical losses are a little better; `diverged` maps members to the update of their divergence."""
    rng = np.random.default_rng(0)
    runs = conditions(amplitudes, periods)
    members = len(runs) * seeds
    evaluation_steps = np.linspace(0, steps, evaluations + 1).astype(int)[1:] if evaluations else np.zeros(0, int)
    gain = np.repeat([0.0 if T is None else 0.02 * np.log10(A) for A, T in runs], seeds) + rng.normal(0, 0.01, members)
    luck = np.tile(rng.normal(0, 0.01, seeds), len(runs))
    rise = 1 - np.exp(-4 * (evaluation_steps + 1) / 400)
    validation = 0.1 + rise * (0.65 + gain + luck)[:, None]
    accuracy = np.stack([np.minimum(validation + 0.05 * rise, 1), validation], axis=1)
    accuracy[:, 0, :-1] = np.nan
    weights = np.stack([class_weights(A, T, steps) for A, T in runs])[..., : len(classes)]
    heavy = np.repeat(weights.max(-1), seeds, axis=0)  # [members, steps]
    noise = rng.lognormal(0, 0.3, (members, steps))
    minibatch_loss = 2.3 * np.exp(-3 * np.arange(steps) / steps) * (0.7 + 0.3 * heavy) * noise
    minibatch_accuracy = np.clip(rng.normal(0.7, 0.05, (members, steps)), 0, 1)
    diverged_at = np.full(members, -1)
    for member, step in (diverged or {}).items():
        diverged_at[member] = step
        accuracy[member, :, evaluation_steps > step] = np.nan
        minibatch_loss[member, step:] = np.nan
    return assemble(
        amplitudes=amplitudes,
        periods=periods,
        seeds=range(seeds),
        classes=classes,
        evaluation_steps=evaluation_steps,
        accuracy=accuracy,
        loss=-np.log(accuracy),
        minibatch_loss=minibatch_loss,
        minibatch_accuracy=minibatch_accuracy,
        class_weights=weights,
        diverged_at=diverged_at,
        attrs={"dataset": "cifar10", "finished": True, "steps_done": steps, "steps_per_epoch": 40, **attrs},
    )


def assemble(
    *, amplitudes, periods, seeds, classes, evaluation_steps, attrs, observation_steps=(), observations=None, **values
) -> xr.Dataset:
    """The dataset of a run from arrays, `[members, …]` in the order of `combinations`."""
    dims = {"accuracy": ("split", "evaluation_step"), "loss": ("split", "evaluation_step"), "diverged_at": ()}
    dims |= {"minibatch_loss": ("step",), "minibatch_accuracy": ("step",)}
    observations = observations or {}
    weights = values.pop("class_weights", None)
    variables = {name: (("member", *dims.get(name, ("observation_step",))), np.asarray(array))
                 for name, array in (values | observations).items() if array is not None}  # fmt: skip
    coordinates = combinations(amplitudes, periods, seeds)
    own = {name: ("member", array) for name, array in coordinates.items()}
    axes = {"split": list(SPLITS), "evaluation_step": np.asarray(evaluation_steps)}
    if observations:
        axes["observation_step"] = np.asarray(observation_steps)
    if "minibatch_loss" in variables:
        axes["step"] = np.arange(variables["minibatch_loss"][1].shape[-1])
    parts = [xr.Dataset(variables, own | axes)]
    if weights is not None:
        of_losses = {name: ("member", coordinates[name][:: len(seeds)]) for name in ("amplitude", "period")}
        parts.append(xr.Dataset({"class_weights": (("member", "step", "class"), weights)}, of_losses))
    return unfold(*parts, periods=periods, classes=classes, **attrs)


def conditions(amplitudes, periods) -> list[tuple[float, float | None]]:
    """The losses in their order: the static one, (1, None), and then (amplitude, period)."""
    pairs = zip(*(combinations(amplitudes, periods, [0])[name] for name in ("amplitude", "period")), strict=True)
    return [(A, None if np.isnan(T) else T) for A, T in pairs]


def interrupt_after(chunks, monkeypatch):
    """Raises what Ctrl-C raises, instead of running one more chunk."""
    real, done = ensemble.train_chunk, []

    def train_chunk(*args, **kwargs):
        if len(done) == chunks:
            raise KeyboardInterrupt
        done.append(None)
        return real(*args, **kwargs)

    monkeypatch.setattr(ensemble, "train_chunk", train_chunk)


def run_command(main, *arguments) -> int:
    """Runs a command in this process; returns its exit code."""
    with pytest.raises(SystemExit) as caught:
        execute(lambda: main([str(argument) for argument in arguments]))
    assert isinstance(caught.value.code, int)
    return caught.value.code
