"""The benchmark command: what `--benchmark` does, what happens without it, and whether its numbers can be trusted."""

import dataclasses
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu, scaling
from benchmarks.agreement import require_agreement
from benchmarks.comparison import rotated
from benchmarks.contestant import Contestant, jitted
from benchmarks.device_time import profile, summed
from benchmarks.environment import environment
from benchmarks.report import Row, summary
from benchmarks.workloads import ACCELERATOR_LOGITS, WORKLOADS
from experiments.problems.cifar import flops_per_image

from .helpers import slow

ROOT = Path(__file__).parents[1]
VARYING = "abc" + "bca" + "cab" + "cba" + "acb" + "bac"  # the order of calls of three contestants, over and over

# What the contestants of `test_sleepers` were called for goes into a file, in the order of the calls.
EXAMPLE = """
import time
from pathlib import Path

import pytest
from benchmarks.comparison import Work
from benchmarks.contestant import Absent, Contestant

def sleeper(name, seconds, result=1.0):
    def call():
        with Path("calls").open("a") as file:
            print(name, file=file)
        time.sleep(seconds)
        return result

    return Contestant(name, call)

def test_sleepers(compare):
    entrants = [sleeper("fast", 0.01), Absent("missing", "no such thing"), sleeper("slow", 0.03), sleeper("same", 0.01)]
    work = Work(amount=0.5, unit="GB", counts="nothing")
    rows = compare("sleep", "10 ms", entrants, expected=1.0, work=work, budget_s=0.2, min_rounds=15)
    assert len(rows) == (4 if compare.timed else 0)

def test_disagreement(compare):
    compare("sleep", "disagreement", [sleeper("one", 0), sleeper("two", 0, 1.1)])

def test_all_but_agreement(compare):
    compare("sleep", "tolerance", [sleeper("one", 0), sleeper("two", 0, 1.1)], tolerance=0.2, budget_s=0)

def test_without_comparison(benchmark):
    benchmark(sum, [1, 2])

@pytest.mark.parametrize("rounds", [1, 3])
def test_long_calls(compare, monkeypatch, rounds):
    monkeypatch.setattr("benchmarks.comparison.LONG_CALL_S", 0.0)
    compare("sleep", f"{rounds} long", [sleeper("l", 0.01), sleeper("m", 0.01)], budget_s=0, min_rounds=rounds)
"""


class Run(NamedTuple):
    folder: Path
    stdout: str


def run_pytest(*arguments, cwd):
    """Runs pytest in a process of its own, on a CPU; returns it when it is done."""
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    variables = outer | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PYTEST_ADDOPTS": "", "COLUMNS": "120"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)


def write_example(folder):
    folder.mkdir(exist_ok=True)
    (folder / "test_example.py").write_text(EXAMPLE, encoding="utf-8")
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\naddopts = --strict-markers\n", "utf-8")


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    """The example with the flag."""
    folder = tmp_path_factory.mktemp("timed")
    write_example(folder)
    done = run_pytest("-p", "benchmarks.conftest", "--benchmark", cwd=folder)
    assert "1 failed, 5 passed" in done.stdout, done.stdout + done.stderr
    return Run(folder, done.stdout)


@pytest.fixture(scope="module")
def untimed(tmp_path_factory):
    """The example without the flag, in a folder whose conftest is found when the command line has long been read."""
    folder = tmp_path_factory.mktemp("untimed")
    write_example(folder / "inner")
    (folder / "inner" / "pytest.ini").rename(folder / "pytest.ini")
    (folder / "inner" / "conftest.py").write_text("from benchmarks.conftest import *", encoding="utf-8")
    done = run_pytest(cwd=folder)
    assert "1 failed, 5 passed" in done.stdout, done.stdout + done.stderr
    return Run(folder, done.stdout)


@pytest.fixture(scope="module")
def report(timed):
    (path,) = (timed.folder / "results").glob("benchmark-*.json")
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_flag_is_off_unless_given(untimed):
    """Every contestant is called once, nothing is timed and nothing is written."""
    assert (untimed.folder / "calls").read_text().split() == [
        "fast",
        "slow",
        "same",
        "one",
        "two",
        "one",
        "two",
    ] + 2 * ["l", "m"]
    assert not (untimed.folder / "results").exists()
    assert "= benchmarks =" not in untimed.stdout
    assert "test_sleepers" not in untimed.stdout  # in pytest-benchmark's own table


def test_ratios_are_those_of_the_times(report):
    ratios = {row["contestant"]: row["ratio"] for row in report["rows"] if row["case"] == "10 ms"}
    assert ratios["fast"] == [1, 1, 1]
    assert 2 < ratios["slow"][1] < 4
    assert 0.6 < ratios["same"][1] < 1.7
    assert all(low <= middle <= high for low, middle, high in filter(None, ratios.values()))


def test_rates_are_work_over_time(report):
    row = next(row for row in report["rows"] if row["contestant"] == "slow")
    assert 0.03 <= row["seconds"] < 0.06
    assert row["rate"] == pytest.approx(0.5 / row["seconds"])
    assert row["copy_share"] == pytest.approx(row["rate"] / report["copy_gigabytes_per_second"])
    assert (row["rate_unit"], row["work"]) == ("GB", "nothing")


def test_rounds_are_interleaved(timed, report):
    """Before the rounds, each is called for the check and for rehearsals; in them, each time first untimed."""
    calls = (timed.folder / "calls").read_text().split()
    calls = calls[: calls.index("one")]
    names, rounds = ["fast", "slow", "same"], report["rows"][0]["rounds"]
    assert rounds >= 15
    order = [names["abc".index(name)] for name in itertools.islice(itertools.cycle(VARYING), 3 * rounds)]
    expected = [name for name in order for _ in range(2)]
    assert calls[-len(expected) :] == expected
    data = report["benchmarks"][0]["stats"]["data"]
    assert len(data) == 3 * rounds
    first = [seconds for name, seconds in zip(order, data, strict=True) if name == names[0]]
    assert np.median(first) == report["rows"][0]["seconds"]


def test_the_rehearsal_of_long_calls_is_the_first_round(timed, report):
    calls = (timed.folder / "calls").read_text().split()
    assert "".join(calls[calls.index("l") :]) == "lm" + "lm" + "lm" + "lm" + "ml" + "ml"  # each: checked, then timed
    assert {row["case"]: row["rounds"] for row in report["rows"] if "long" in row["case"]} == {"1 long": 1, "3 long": 3}


def test_contestants_that_disagree_fail(timed, untimed, report):
    for run in (timed, untimed):
        assert re.search(r"^FAILED .*::test_disagreement - AssertionError: ", run.stdout, re.MULTILINE)
        assert "two: leaf 0 is off by 1.00e-01, allowed" in run.stdout
        assert "ERROR" not in run.stdout
    rows = {row["contestant"]: row for row in report["rows"] if row["case"] == "disagreement"}
    assert rows["one"]["rounds"] and "leaf 0 is off by 1.00e-01" in rows["two"]["absent"]  # the others' times are kept


def test_the_table_is_printed_instead_of_the_mixed_one(timed):
    table = timed.stdout[timed.stdout.index("= benchmarks =") :]
    assert re.search(r"^10 ms +fast .*^ +missing +absent: no such thing$.*^ +slow ", table, re.DOTALL | re.MULTILINE)
    assert "GB: nothing." in table
    assert re.search(r"All numbers: .*results.benchmark-\d{8}T\d{6}Z\.json", table)
    assert "test_without_comparison" in timed.stdout and "test_sleepers" not in timed.stdout


def test_the_file_names_machine_and_versions(report):
    info = report["machine_info"]
    assert info["python_version"] == ".".join(map(str, sys.version_info[:3]))
    assert info["jax"] == jax.__version__ and info["numpy"] == np.__version__
    assert {"jaxlib", "optax", "torch", "device_kind", "devices", "cpu_count"} <= info.keys()
    assert info["platform"] == "cpu"


def test_the_path_can_be_chosen(tmp_path):
    """Also for a benchmark that only uses pytest-benchmark's own fixture."""
    write_example(tmp_path)
    path = tmp_path / "a" / "b.json"
    arguments = ["--benchmark", f"--benchmark-json={path}", "-k", "without_comparison"]
    done = run_pytest("-p", "benchmarks.conftest", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(path.read_text())
    assert len(report["benchmarks"]) == 1 and report["rows"] == []
    assert not (tmp_path / "results").exists()


def test_a_run_that_selects_nothing_is_no_error(tmp_path):
    write_example(tmp_path)
    done = run_pytest("-p", "benchmarks.conftest", "--benchmark", "--collect-only", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("arguments, code", [
    (["--benchmark", "benchmarks", "tests/test_readme.py"], 0),
    slow(["-o", "testpaths=benchmarks", "--benchmark"], 0),
    (["benchmarks", "--benchmark", "--benchmark-disable"], 4),
])  # fmt: skip
def test_the_flag_is_found_however_the_benchmarks_are(arguments, code):
    done = run_pytest("--collect-only", "--quiet", *arguments, cwd=ROOT)
    assert done.returncode == code, done.stdout + done.stderr
    assert ("benchmarks/test_loss.py::test_loss[imagenet-float32]" in done.stdout) == (code == 0)


def test_every_place_in_a_round_is_had_equally_often_and_every_predecessor():
    contestants = [Contestant(name, lambda: None) for name in "abc"]
    order = "".join(contestant.name for contestant in rotated(contestants, 7))
    assert order == VARYING + "abc"


@pytest.mark.parametrize("actual, expected", [
    (jnp.ones(3) + 1e-6, np.ones(3)),
    (jnp.ones(3, jnp.bfloat16), np.array([1.001, 1.0, 0.999])),
    ((jnp.zeros(2), 1.0), (np.zeros(2), 1.0)),
])  # fmt: skip
def test_what_agrees(actual, expected):
    require_agreement("it", actual, expected)


@pytest.mark.parametrize("actual, expected", [
    (jnp.ones(3) + 1e-4, np.ones(3)),
    (jnp.array([1.0, 1.01e-3]), np.array([1.0, 1.1e-3])),
    (jnp.array([1.0, jnp.nan]), np.ones(2)),
    (jnp.ones((3, 1)), np.ones(3)),
    ((jnp.ones(1),), jnp.ones(1)),
    (jnp.full(2, 1e-30), np.zeros(2)),
])  # fmt: skip
def test_what_does_not_agree(actual, expected):
    with pytest.raises(AssertionError, match="it"):
        require_agreement("it", actual, expected)


def test_a_jitted_contestant_knows_what_its_compilation_cost():
    contestant = jitted("sum", lambda x, y: jnp.sum(x) + y, jnp.ones(1000), jnp.ones(()))
    assert contestant.call() == 1001
    assert contestant.lower_s and contestant.compile_s
    assert contestant.temp_bytes is not None and contestant.peak_bytes is not None
    assert contestant.peak_bytes >= 4000


def test_device_time_is_the_union_of_a_gpus_streams():
    """A synthetic profile: two streams that overlap, a line that repeats them, and the host."""
    data = jax.profiler.ProfileData.from_text_proto("""
        planes { name: "/device:GPU:0" event_metadata { key: 1 value { id: 1 name: "one" } }
          event_metadata { key: 2 value { id: 2 name: "other" } }
          lines { name: "Stream #7" timestamp_ns: 100
            events { metadata_id: 1 offset_ps: 0 duration_ps: 5000000 }
            events { metadata_id: 1 offset_ps: 20000000 duration_ps: 1000000 } }
          lines { name: "Stream #8" timestamp_ns: 100
            events { metadata_id: 2 offset_ps: 3000000 duration_ps: 4000000 } }
          lines { name: "XLA Ops" timestamp_ns: 100
            events { metadata_id: 1 offset_ps: 0 duration_ps: 90000000 } } }
        planes { name: "/host:CPU" lines { name: "python"
            events { metadata_id: 1 offset_ps: 0 duration_ps: 90000000 } } }
    """)
    busy, kernels = summed(data.planes)
    assert busy == pytest.approx(8e-6)
    assert list(kernels) == ["one", "other"] and list(kernels.values()) == pytest.approx([6e-6, 4e-6])


def test_no_device_time_without_a_gpu():
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    contestant = jitted("double", lambda x: 2 * x, jnp.ones(10))
    assert profile(contestant.call, repeats=2) is None


def test_the_table_fits_and_leaves_out_what_nobody_measured():
    timed = Row(
        "s", "c", "first", seconds=1.5e-6, ratio=(1, 1, 1), rate=12345.0, rate_unit="GB", work="x", temp_bytes=0
    )
    lines = summary([timed, Row("s", "c", "second", absent="because " * 40)], copy_rate=None)
    assert max(map(len, lines)) <= 120
    assert "device ms" not in "".join(lines) and "peak MiB" not in "".join(lines)
    assert lines[-2].split() == ["c", "first", "0.0015", "1.00", "12345", "GB/s", "0"]
    assert lines[-1].split()[:2] == ["second", "absent:"]


def test_the_environment_is_serialisable():
    assert json.loads(json.dumps(environment())) == environment()


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_workloads(workload):
    assert workload.shape == (*workload.batch, workload.classes)
    assert workload.num_logits == math.prod(workload.shape)
    assert workload.on("cpu") == workload
    assert workload.num_logits < ACCELERATOR_LOGITS / 8
    assert workload.small.classes == workload.classes and workload.small.num_logits < 2**20
    large = workload.on("gpu")
    assert large.classes == workload.classes and large.rows % workload.rows == 0 and large.rows // workload.rows % 2
    assert large == workload or 0.7 * ACCELERATOR_LOGITS < large.num_logits <= ACCELERATOR_LOGITS


def test_names_of_workloads_are_unique():
    assert len({workload.name for workload in WORKLOADS}) == len(WORKLOADS)


@pytest.fixture
def plain_pytest(monkeypatch):
    """Processes of pytest do not take themselves for workers of xdist, even if this one is."""
    for variable in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(variable)


@pytest.mark.slow
def test_the_script_for_a_gpu_keeps_what_was_found_when_its_time_is_up(tmp_path, capsys, plain_pytest):
    write_example(tmp_path)
    file = tmp_path / "test_example.py"  # called from the project's root, where it must leave nothing
    file.write_text(EXAMPLE.replace('Path("calls")', 'Path(__file__).with_name("calls")'), encoding="utf-8")
    (tmp_path / "test_endless.py").write_text(
        "import subprocess, sys, time\n"
        "def test_endless():\n"
        f"    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"    open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n"
        "    time.sleep(600)\n"
    )
    example = f"{tmp_path}/test_example.py -p benchmarks.conftest --rootdir {tmp_path} --benchmark"
    parts = [
        gpu.Part("rows", f"{example} -k sleepers", 60),
        gpu.Part("endless", f"{tmp_path}/test_endless.py --rootdir {tmp_path}", 8),
        gpu.Part("wrong", f"{example} -k disagreement", 60),
    ]
    ended = gpu.run(parts, tmp_path / "new" / "out.jsonl", 5, rehearse=True)
    assert [one.status for one in ended] == ["done", "out of time", "failed"]
    first, *rows, rows_end, endless_end, one, two, wrong_end = map(
        json.loads, (tmp_path / "new" / "out.jsonl").read_text().splitlines()
    )
    assert one["rounds"] and "off by" in two["absent"]
    assert first["machine_info"]["jax"] == jax.__version__
    assert [row["contestant"] for row in rows] == ["fast", "missing", "slow", "same"]
    assert rows[0]["rounds"] >= 15 and rows[2]["ratio"][1] > 1.5 and rows[1]["absent"] == "no such thing"
    assert (rows_end["part"], endless_end["part"]) == ("rows", "endless") and "1 passed" in rows_end["said"][-1]
    assert "FAILED" in wrong_end["said"][0] and "wrong: failed" in capsys.readouterr().out
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "child").read_text()), 0)
    assert gpu.run(parts[:1], tmp_path / "late.jsonl", 0.1, rehearse=True)[0].status == "no time left"
    assert (tmp_path / "calls").exists() and not (ROOT / "calls").exists()


def test_without_a_gpu_nothing_is_called(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "out.jsonl")]) == 2
    assert "finds no GPU here but cpu" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("names", [("convolutions",), slow(None)], ids=["one", "all"])
def test_the_script_for_a_gpu_is_rehearsed(tmp_path, plain_pytest, names):
    """Its parts on small problems, with time enough for a busy machine; alone they fit into eight minutes."""
    assert sum(part.seconds for part in gpu.PARTS) <= 8 * 60
    parts = [dataclasses.replace(part, seconds=600) for part in gpu.PARTS if part.name in (names or part.name)]
    ended = gpu.run(parts, tmp_path / "out.jsonl", 60, rehearse=True)
    assert [one.status for one in ended] == ["done"] * len(parts), ended
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    rows = [line for line in lines if "contestant" in line]
    timed = {row["contestant"] for row in rows if row.get("rounds")}
    assert names or {"ours", "ours, bfloat16", "ours, side by side", "scan per member", "optax"} <= timed
    assert names or {name for row in rows for name in row.get("errors", {})} >= {
        ".convolutions[0].bias",
        ".head.weight",
    }


@pytest.mark.slow
def test_scaling_is_measured_and_drawn(tmp_path):
    """On small problems: every number of members on one device and on all, and a figure with a curve for each width."""
    points = scaling.measure([4], [1, 2], seconds=0.0, size=8)
    several = [(4, 2, jax.device_count())] if jax.device_count() == 2 else []
    assert [(point.width, point.members, point.devices) for point in points] == [(4, 1, 1), (4, 2, 1), *several]
    assert all(len(point.images_per_second) == scaling.ROUNDS and min(point.images_per_second) > 0 for point in points)
    points = [*points[:2], scaling.Point(4, 2, 2, [30.0, 10.0, 20.0]), scaling.Point(8, 1, 1, [3.0, 2.0, 4.0])]
    figure: Any = scaling.draw(points, tmp_path / "scaling.png", "a machine")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    images, operations = figure.axes
    curves = {container.get_label(): container.lines[0].get_ydata() for container in images.containers}
    assert list(curves) == ["width 4, 2 devices", "width 4, 1 device", "width 8, 1 device"]
    assert curves["width 4, 2 devices"] == [20.0]
    assert operations.containers[0].lines[0].get_ydata() == pytest.approx([20.0 * flops_per_image(4) / 1e9])
