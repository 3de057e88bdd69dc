import os
import subprocess

import numpy as np
import pytest
import xarray as xr

from experiments.results import files
from experiments.results.files import load, provenance, save
from experiments.results.labelled import combinations, unfold

from ..synthetic import CLASSES, assemble, conditions, results


def test_conditions_start_with_the_static_loss_and_hold_it_once():
    assert conditions([1, 10, 70], [50.0, 100.0]) == [(1, None), (10, 50), (10, 100), (70, 50), (70, 100)]
    assert conditions([10], [50.0]) == [(1, None), (10, 50)]


@pytest.mark.parametrize("amplitudes, periods", [([1, 10], []), ([10, 10], [50]), ([10], [50, 50])])
def test_ambiguous_grids_are_rejected(amplitudes, periods):
    with pytest.raises(ValueError, match="distinct"):
        conditions(amplitudes, periods)


def _numbered(**changes: object) -> xr.Dataset:
    """Members numbered 0, 1, …: their values say where they came from."""
    members = np.arange(10.0)  # 5 conditions x 2 seeds
    arguments = dict(
        amplitudes=[1, 10, 70],
        periods=[50, 100],
        seeds=[3, 4],
        classes=CLASSES,
        evaluation_steps=[5, 7],
        accuracy=np.broadcast_to(members[:, None, None], (10, 2, 2)),
        loss=np.zeros((10, 2, 2)),
        minibatch_loss=np.zeros((10, 7)),
        minibatch_accuracy=np.zeros((10, 7)),
        class_weights=np.broadcast_to(np.arange(5.0)[:, None, None], (5, 7, 10)),
        diverged_at=np.full(10, -1),
        attrs={"dataset": "digits", "finished": False, "git_commit": None},
    )
    return assemble(**(arguments | changes))  # pyright: ignore[reportArgumentType]


def test_assemble_puts_every_member_in_its_place():
    dataset = _numbered()
    for member, (A, T) in enumerate(conditions([1, 10, 70], [50, 100])):
        for T_stored in [50, 100] if T is None else [T]:
            where = {"amplitude": A, "period": T_stored}
            assert (dataset.class_weights.sel(where) == member).all()
            assert (dataset.accuracy.sel(where | {"seed": 3}) == 2 * member).all()
            assert (dataset.accuracy.sel(where | {"seed": 4}) == 2 * member + 1).all()
    assert dataset.attrs["finished"] == "false" and "git_commit" not in dataset.attrs
    assert "static loss" in dataset.attrs["comment"]
    assert all("units" in variable.attrs for variable in dataset.data_vars.values())


def test_the_order_of_the_members_does_not_matter():
    """They carry their coordinates; only values that are asked for in another order come in another order."""
    settings = {"width": [20, 10], "learning_rate": [0.1]}
    coordinates = combinations([70, 1, 10], [100.0, 50.0], [4, 3], **settings)
    flat = xr.Dataset({"diverged_at": ("member", np.arange(len(coordinates["seed"])))},
                      {name: ("member", values) for name, values in coordinates.items()})  # fmt: skip
    ordered = unfold(flat, periods=[100, 50], classes=CLASSES)
    assert ordered.amplitude.values.tolist() == [1, 70, 10] and ordered.period.values.tolist() == [100, 50]
    assert ordered.width.values.tolist() == [20, 10] and ordered.seed.values.tolist() == [4, 3]
    assert ordered.diverged_at.dims == ("width", "learning_rate", "amplitude", "period", "seed")
    shuffled = unfold(flat.isel(member=np.random.default_rng(0).permutation(flat.sizes["member"])),
                      periods=[50, 100], classes=CLASSES)  # fmt: skip
    xr.testing.assert_equal(shuffled.sel({name: ordered[name] for name in ordered.diverged_at.dims}), ordered)
    for width, amplitude, period, seed, number in zip(
        *(coordinates[name] for name in ("width", "amplitude", "period", "seed")), range(20), strict=True
    ):
        for at in [50, 100] if np.isnan(period) else [period]:
            assert ordered.diverged_at.sel(width=width, amplitude=amplitude, period=at, seed=seed) == number


def test_what_was_not_reached_is_missing():
    """As of a run that was interrupted in its second network: NaN, and -1 for a whole number."""
    flat = _flat()
    seen = unfold(flat.isel(member=flat.width.values + flat.amplitude.values < 90), periods=[50], classes=CLASSES)
    assert np.isnan(seen.loss.sel(width=20, amplitude=70)).all() and (seen.loss.sel(width=10) == 1).all()
    assert seen.diverged_at.dtype.kind == "i" and (seen.diverged_at.sel(width=20, amplitude=70) == -1).all()


def _flat() -> xr.Dataset:
    coordinates = combinations([10, 70], [50.0], [0, 1], width=[10, 20])
    size = len(coordinates["seed"])
    return xr.Dataset({"loss": ("member", np.ones(size)), "diverged_at": ("member", np.full(size, 7))},
                      {name: ("member", values) for name, values in coordinates.items()})  # fmt: skip


def test_a_static_loss_alone_has_the_periods_that_were_asked_for():
    flat = _flat()
    alone = unfold(flat.isel(member=flat.amplitude.values == 1), periods=[50, 9], classes=CLASSES)
    assert alone.amplitude.values.tolist() == [1] and alone.period.values.tolist() == [50, 9]
    assert (alone.loss == 1).all() and alone.loss.dims == ("width", "amplitude", "period", "seed")


@pytest.mark.parametrize("evaluations", [8, 0])
def test_load_gives_back_what_save_wrote(tmp_path, evaluations):
    dataset = results(evaluations=evaluations, diverged={4: 100}, dataset="digits")
    save(dataset, tmp_path / "results.nc")
    loaded = load(tmp_path / "results.nc")
    xr.testing.assert_equal(loaded, dataset)
    assert loaded.attrs == dataset.attrs
    assert loaded["class"].values.tolist() == list(CLASSES)
    assert loaded.accuracy.attrs == dataset.accuracy.attrs


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, full_disk):
    """HDF5 writing to it would bring the process down."""
    save(results(), tmp_path / "results.nc")
    before = (tmp_path / "results.nc").read_bytes()
    with full_disk(), pytest.raises(OSError, match="File too large"):
        save(results(seeds=5), tmp_path / "results.nc")
    assert (tmp_path / "results.nc").read_bytes() == before and len(before) > 2000
    assert os.listdir(tmp_path) == ["results.nc"]


@pytest.mark.parametrize("broken", ["to_netcdf", "replace"])
def test_a_failing_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, broken):
    path = tmp_path / "results.nc"
    save(results(), path)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(*((xr.Dataset, "to_netcdf", fail) if broken == "to_netcdf" else (os, "replace", fail)))
    with pytest.raises(OSError, match="disk full"):
        save(results(seeds=5), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["results.nc"]


def test_provenance_names_the_versions_and_the_commit(monkeypatch):
    found = provenance()
    assert {"python", "platform", "jax", "numpy", "equinox"} <= found.keys()

    git = {"rev-parse": "abc", "status": ""}
    monkeypatch.setattr(files, "_git", lambda command, *rest: git[command])
    assert provenance()["git_commit"] == "abc"
    git["status"] = " M file"
    assert provenance()["git_commit"] == "abc+dirty"


@pytest.mark.parametrize("error", [FileNotFoundError(), subprocess.TimeoutExpired("git", 5)])
def test_provenance_without_git_has_no_commit(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(subprocess, "run", fail)
    assert "git_commit" not in provenance()
