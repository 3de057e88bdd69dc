"""Phase diagrams: accuracy over the plane of amplitude and period, `python -m experiments.phase`.

Every (A, T, seed) is a member of one ensemble: the whole diagram is one compiled program, on all devices there are.
"""

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro
import xarray as xr

from eqx_dynloss import landscape

from . import _cifar, _data, _directory, _results, _run, _spiral, _training
from ._directory import Run
from ._plan import Plan
from ._record import History
from ._run import UsageError, console
from ._spiral import Init, LossName

_CURVATURE_IMAGES = 500  # of CIFAR-10's training set, for the Hessian
_PERIODS = {"spiral": "log:50:5000:7", "cifar": "5,10,20,40"}
_OF_ONE = {  # flags that mean something for one experiment only
    "spiral": ("loss", "init", "updates"),
    "cifar": ("epochs", "train_examples", "validation_examples", "dataset", "data_dir"),
}


def _default(metavar: str, default: str):
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


@dataclasses.dataclass(frozen=True)
class Config:
    """Train every combination of amplitude, period and seed, and draw accuracy over the (A, T) plane.

    The static loss, A = 1, is trained once for every seed, and what each (A, T) gains over it is paired by seed. Writes
    results.nc (dimensions amplitude, period, seed), summary.md, summary.json, config.json and heat maps. A grid is a
    list (1,2,5), or log:LOW:HIGH:COUNT or lin:LOW:HIGH:COUNT.
    """

    experiment: Literal["spiral", "cifar"] = "spiral"
    """The spiral in full-batch gradient descent, or Myrtle5 on CIFAR-10; the protocols are those of
    `python -m experiments.spiral` and `python -m experiments.cifar --preset quick`."""
    amplitudes: Annotated[str, tyro.conf.arg(metavar="GRID")] = "1,2,5,10,20,50,100"
    """Amplitudes A >= 1 of the dynamical loss."""
    periods: Annotated[str | None, _default("GRID", "log:50:5000:7, for CIFAR-10 5,10,20,40")] = None
    """Periods T of one class, in updates, rounded to whole ones; in a list for CIFAR-10 also in epochs (0.5ep)."""
    seeds: int = 8
    """Members of every cell of the diagram. Member s of every cell has the same initial weights."""
    widths: Annotated[str | None, _default("GRID", "100, for CIFAR-10 16")] = None
    """Units of the hidden layer, or channels. Several, for the spiral, are several diagrams, each a program."""
    learning_rates: Annotated[str | None, _default("GRID", "1, for CIFAR-10 0.05")] = None
    """Learning rates. Several, for the spiral, are several diagrams in one program."""
    loss: LossName = "cross-entropy"
    """What is weighted, for the spiral: the paper's cross-entropy, or a squared error whose weights belong to the
    examples (squared-sample) or to the output units (squared-unit). The two squared errors are choices of ours, and at
    rate 1 they are at the edge of what is stable: take 0.3 or less."""
    init: Init = "paper"
    """Initialisation of the spiral's network: see `python -m experiments.spiral --help`."""
    updates: Annotated[int | None, _default("INT", "70,000")] = None
    """Updates on the spiral. The oscillation stops after the last whole period."""
    epochs: Annotated[int | None, _default("INT", "4")] = None
    """Passes over CIFAR-10's training set. The oscillation stops after 6/7 of them."""
    train_examples: Annotated[int | None, _default("INT", "8000")] = None
    """Train on the first so many images of CIFAR-10."""
    validation_examples: Annotated[int | None, _default("INT", "2000")] = None
    """Validate on the first so many images of CIFAR-10."""
    dataset: Literal["auto", "cifar10", "digits"] = "auto"
    """For --experiment cifar: auto falls back to scikit-learn's digits, loudly, when CIFAR-10 cannot be had."""
    data_dir: Annotated[Path | None, _default("PATH", "$TFDS_DATA_DIR or ~/tensorflow_datasets")] = None
    """The tensorflow-datasets directory."""
    evaluations: int = 20
    """How often the validation set is evaluated during training."""
    wave: Annotated[int | None, _default("INT", "all members, or as many as fit into memory")] = None
    """Members that are trained at a time."""
    run: tyro.conf.OmitArgPrefixes[Run] = Run()


def main(arguments: list[str] | None = None) -> bool:
    """The command. Returns whether the training was finished."""
    arguments = sys.argv[1:] if arguments is None else arguments
    config = _directory.parse(Config, arguments, "phase")
    _check(config)
    _run.start_jax(config.run.distributed)
    make = spiral_diagrams if config.experiment == "spiral" else cifar_diagram
    directory, trained = make(config, arguments)
    return _directory.conclude("phase", arguments, directory, trained, report)


def spiral_diagrams(config: Config, arguments: list[str]) -> tuple[Path, Callable[[], xr.Dataset]]:
    """The directory of the run, and what trains a diagram for every width and learning rate: a program for a width."""
    directory = _directory.directory_of(
        config.run, "phase", arguments, "phase-spiral", "spiral", dataclasses.asdict(config)
    )
    amplitudes = grid(config.amplitudes, "amplitudes")
    periods = whole(grid(config.periods or _PERIODS["spiral"], "periods"))
    widths = [int(width) for width in whole(grid(config.widths or "100", "widths"))]
    rates = grid(config.learning_rates or "1", "learning-rates")
    updates = config.updates or 70_000
    losses = len(_results.conditions(amplitudes, periods))
    members = config.seeds * losses * len(rates)
    pace = [_spiral.cpu_seconds_per_update(width, 0) * members for width in widths]
    _announce(
        config,
        losses,
        members * len(widths),
        f"{updates:,} updates | the spiral",
        sum(pace) * updates,
    )

    def train_network(init: Init, width: int) -> tuple[xr.Dataset, History]:
        target = 5 / (_spiral.cpu_seconds_per_update(width, 0) * members)
        history = _training.train(
            _spiral.make_members(
                init, width, _spiral.make_schedules(amplitudes, periods, updates), config.seeds, rates, config.loss
            ),
            _spiral.spiral(0),
            {"train": _spiral.spiral(0), "validation": _spiral.spiral(1)},
            Plan(
                num_steps=updates,
                chunk=_run.chunk_length(updates, min(target, updates / config.evaluations)),
                num_evaluations=config.evaluations,
                observe_end=_spiral.curvature,
                keep_steps=False,
            ),
            checkpoint=directory / "checkpoint" / f"width-{width}",
            checkpoint_minutes=config.run.checkpoint_every,
            wave=config.wave,
        )
        axes = {"amplitudes": amplitudes, "periods": periods, "seeds": range(config.seeds)}
        return _spiral.labelled(history, axes, rates, *_at_end(history, updates)), history

    def trained() -> xr.Dataset:
        with jax.enable_x64(True):
            results = _spiral.train_networks([(config.init, width) for width in widths], train_network)
        return _results.with_loss_function(results, config.loss).assign_attrs(steps_planned=updates * len(widths))

    return directory, trained


def cifar_diagram(config: Config, arguments: list[str]) -> tuple[Path, Callable[[], xr.Dataset]]:
    """The directory of the run, and what trains the diagram of Myrtle5 on CIFAR-10, or on what stands in for it."""
    text = config.periods or _PERIODS["cifar"]
    periods = [f"{T:g}" for T in whole(grid(text, "periods"))] if ":" in text else text.split(",")
    given = {name: getattr(config, name) for name in ("epochs", "train_examples", "validation_examples", "evaluations")}
    if config.widths:
        (given["width"],) = [int(width) for width in whole(grid(config.widths, "widths"))]
    if config.learning_rates:
        (given["learning_rate"],) = grid(config.learning_rates, "learning-rates")
    given |= {"amplitude": grid(config.amplitudes, "amplitudes"), "period": tuple(periods)}
    preset = dataclasses.replace(_cifar.PRESETS["quick"], **{k: v for k, v in given.items() if v is not None})
    images = _data.load(config.dataset, config.data_dir, report=lambda text: console.print(text, style="bold red"))
    if config.epochs is None:
        preset = _cifar.as_many_steps(preset, images)
    task = _cifar.Task.of(preset, images, config.seeds)
    settings = dataclasses.asdict(config) | task.sizes | {"dataset": images.name, "epochs": preset.epochs}
    directory = _directory.directory_of(config.run, "phase", arguments, f"phase-{images.name}", images.name, settings)
    _announce(config, len(task.schedules.amplitude), len(task.members), task.work, task.cpu_seconds)

    def trained() -> xr.Dataset:
        history = _training.train(
            task.members,
            task.train_data,
            task.splits,
            dataclasses.replace(task.plan, observe_end=largest_eigenvalue, keep_steps=False),
            checkpoint=directory / "checkpoint",
            checkpoint_minutes=config.run.checkpoint_every,
            wave=config.wave,
        )
        steps, seen = _at_end(history, task.plan.num_steps)
        return _results.assemble(
            **task.axes, **history.arrays(), observation_steps=steps, observations=seen, attrs=task.attrs(history)
        )

    return directory, trained


def largest_eigenvalue(state, loss, data) -> dict[str, jax.Array]:
    """The largest eigenvalue of the Hessian of the loss at the state's step, on the first 500 training images."""
    count = min(_CURVATURE_IMAGES, len(data)) // 50 * 50 or len(data)
    batches = jax.tree.map(lambda a: a[:count].reshape(-1, min(50, count), *a.shape[1:]), (data.inputs, data.labels))

    def objective(model, batch):
        inputs, labels = batch
        return loss(jax.vmap(model)(data.transform(inputs)), labels, state.step)

    key = jax.random.fold_in(state.key, state.step)
    spectrum = landscape.hessian_spectrum(objective, state.model, batches, order=10, key=key)
    return {"hessian_max": spectrum.eigenvalues[-1], "hessian_max_error": spectrum.errors[-1]}


def _at_end(history: History, step: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What was observed after the last update, as a series of one observation; of none, if that was not reached."""
    return np.array([step])[: len(history.end)], {name: values[:, None] for name, values in history.end.items()}


def grid(text: str, flag: str) -> tuple[float, ...]:
    """The numbers of a list, `1,2,5`, or of a range, `log:LOW:HIGH:COUNT` or `lin:LOW:HIGH:COUNT`."""
    kind, *rest = text.split(":")
    try:
        if kind in ("log", "lin"):
            low, high, count = float(rest[0]), float(rest[1]), int(rest[2])
            if len(rest) > 3 or count < 1 or not 0 < low <= high < math.inf:
                raise ValueError
            values = np.geomspace(low, high, count) if kind == "log" else np.linspace(low, high, count)
        else:
            values = [float(number) for number in text.split(",")]
    except (ValueError, IndexError):
        raise UsageError(
            f"--{flag} takes a list such as 1,2,5 or a range such as log:50:5000:7 (or lin:), got {text!r}."
        ) from None
    # Rounded as it is printed, so that a file name, a table and the schedule have the same number.
    return tuple(float(f"{value:.6g}") for value in values)


def whole(values: tuple[float, ...]) -> tuple[float, ...]:
    """The values rounded to whole numbers, each once."""
    return tuple(float(value) for value in dict.fromkeys(round(value) for value in values))


def _announce(config: Config, losses: int, members: int, work: str, cpu_seconds: float) -> None:
    """Prints the line that says what is going to happen."""
    hosts = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    settings = members // (config.seeds * losses)
    console.print(
        f"{_run.devices()}{hosts} | {members} members = {config.seeds} seeds x {losses} losses"
        f"{f' x {settings} settings' if settings > 1 else ''} | {work} | {_run.announced(cpu_seconds)}"
    )


def report(results: xr.Dataset, directory: Path) -> None:
    """Writes what is to be read and looked at, and prints what it says."""
    # Here: what only the end needs takes seconds to import.
    from . import _phase_plots, _phase_statistics, _summary

    summary = _summary.summarise(results)
    statistics = _phase_statistics.report(results)
    _summary.write_summary(summary, results, directory, statistics)
    figures = _phase_plots.write(results, directory)
    for notice in summary.notices:
        console.print(notice, style="bold red")
    for line in statistics:
        console.print(line)
    speed = float(results.attrs.get("member_updates_per_second", math.nan))
    console.print(
        (f"{speed:,.0f} member-updates/s. " if math.isfinite(speed) else "")
        + f"Results, summary and {len(figures)} figures: {directory}"
    )


def _check(config: Config) -> None:
    for name in ("seeds", "evaluations", "updates", "epochs", "train_examples", "validation_examples", "wave"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
    grids = {"amplitudes": config.amplitudes, "widths": config.widths, "learning-rates": config.learning_rates}
    if config.experiment == "spiral" or ":" in (config.periods or ""):
        grids["periods"] = config.periods
    least = {"periods": "at least 2 updates", "learning-rates": "positive"}
    for flag, text in grids.items():
        if text is None:
            continue
        values = grid(text, flag)
        if len(set(values)) < len(values):
            raise UsageError(f"--{flag} takes different values, got {text}.")
        low = {"periods": 2, "learning-rates": 1e-300}.get(flag, 1)
        if not all(low <= value < math.inf for value in values):
            raise UsageError(f"--{flag} must be {least.get(flag, 'at least 1')}, got {text}.")
        if config.experiment == "cifar" and flag in ("widths", "learning-rates") and len(values) > 1:
            raise UsageError(f"--experiment cifar takes one width and one learning rate, got --{flag} {text}.")
    other = _OF_ONE["cifar" if config.experiment == "spiral" else "spiral"]
    usual = {field.name: field.default for field in dataclasses.fields(Config)}
    for name in other:
        if getattr(config, name) != usual[name]:
            raise UsageError(
                f"--{name.replace('_', '-')} has no meaning for --experiment {config.experiment}: leave it out."
            )


if __name__ == "__main__":
    _run.run(main)
