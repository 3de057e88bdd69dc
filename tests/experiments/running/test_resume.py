"""Runs that are killed, preempted, moved to other devices or spread over hosts, as processes of their own."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from experiments.results import files

ROOT = Path(__file__).parents[3]
# 40 chunks of ten updates, a checkpoint after each
SPIRAL = "spiral --seeds 3 --width 4 --updates 400 --period 20 --curvature 10 --checkpoint-every 0".split()
PHASE = "phase --amplitudes 1,5 --periods 20,30 --widths 4 --seeds 3 --updates 400 --checkpoint-every 0".split()


def start(arguments, devices=2, **variables: str) -> Any:
    flags = f"--xla_force_host_platform_device_count={devices}"
    path = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    env = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | variables
    command = [sys.executable, "-m", f"experiments.{arguments[0]}", *map(str, arguments[1:])]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process, code=0) -> str:
    """Waits for a process, which has to end with a code; returns its stdout."""
    try:
        out, error = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == code, out + error
    assert "Traceback" not in error
    return out


def wait_for(process, text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"the process ended without {text!r}: {process.communicate()[1]}")


def hosts(arguments, count=2, devices=1) -> list[Any]:
    """Processes that train together, on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    together = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
    return [start([*arguments, "--distributed"], devices, JAX_PROCESS_ID=str(i), **together) for i in range(count)]


def results(directory) -> xr.Dataset:
    return files.load(directory / "results.nc")


def assert_same(found: xr.Dataset, expected: xr.Dataset, rtol=0.0) -> None:
    assert found.attrs["finished"] == expected.attrs["finished"] == "true"
    assert dict(found.sizes) == dict(expected.sizes) and set(found.variables) == set(expected.variables)
    for name in expected.variables:
        values, wanted = found[name].values, expected[name].values
        if wanted.dtype.kind == "f":
            # Absolutely too, as Ritz residuals are nearly 0.
            np.testing.assert_allclose(values, wanted, rtol=rtol, atol=rtol, err_msg=str(name))
        else:
            np.testing.assert_array_equal(values, wanted, err_msg=str(name))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a diagram is that nobody interrupted."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    finish(start([*PHASE, "--out", directory]))
    return results(directory)


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_a_run_ends_with_the_same_numbers(tmp_path):
    """SIGKILL, three times, a random time after the first chunk: while training, and while a checkpoint is written."""
    finish(start([*SPIRAL, "--out", tmp_path / "whole"]))
    arguments, delays = [*SPIRAL, "--out", tmp_path / "run"], random.Random(0)
    for _ in range(3):
        process = start(arguments)
        wait_for(process, "update ")
        time.sleep(delays.uniform(0, 0.8))
        process.kill()
        process.communicate()
        arguments = ["spiral", "--resume", tmp_path / "run"]
    finish(start(arguments))
    assert_same(results(tmp_path / "run"), results(tmp_path / "whole"))


@pytest.mark.slow
def test_two_hosts_leave_the_results_of_one(tmp_path, whole):
    first, second = hosts([*PHASE, "--out", tmp_path / "run"])
    assert "2 x cpu on 2 hosts" in finish(first)
    said = [line for line in finish(second).splitlines() if not line.startswith("[Gloo]")]
    assert said == []  # one speaks for all
    assert_same(results(tmp_path / "run"), whole)


@pytest.mark.slow
def test_landscapes_of_members_that_the_hosts_do_not_divide(tmp_path):
    tiny = "landscape --seeds 2 --amplitude 10 --period 12 --cycle 2 --cuts 4 --following 3 --width 6".split()
    finish(start([*tiny, "--out", tmp_path / "one"]))
    for process in hosts([*tiny, "--out", tmp_path / "three"], 3):
        finish(process)
    assert_same(results(tmp_path / "three"), results(tmp_path / "one"), rtol=1e-7)


@pytest.mark.slow
def test_preempted_hosts_save_and_another_number_of_devices_goes_on(tmp_path, whole):
    """SIGTERM for one of the hosts stops both. Four devices, which do not divide 15 members, go on."""
    first, second = hosts([*PHASE, "--out", tmp_path / "run"])
    wait_for(first, "update ")
    second.send_signal(signal.SIGTERM)
    out = finish(first, 130)
    finish(second, 130)
    assert f"python -m experiments.phase --resume {tmp_path / 'run'}" in out
    assert results(tmp_path / "run").attrs["finished"] == "false"
    finish(start(["phase", "--resume", tmp_path / "run"], devices=4))
    assert_same(results(tmp_path / "run"), whole, rtol=1e-7)


def test_hosts_without_a_cluster_are_one_sentence(tmp_path):
    process = start([*PHASE, "--distributed", "--out", tmp_path / "run"])
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2 and error.startswith("error: --distributed found no cluster")
    assert "JAX_COORDINATOR_ADDRESS" in error and error.count("\n") == 1
