"""`--benchmark`, the fixture `compare`, and what a run leaves behind: a table and a JSON file.

pytest-benchmark does the timing and owns the fixture `benchmark` and the options `--benchmark-…`.
"""

import json
import warnings
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import jax
import pytest

from experiments.running.devices import use_all_cores

from .comparison import INTERLEAVED, Compare, Record
from .environment import copy_gigabytes_per_second, environment
from .report import Row, summary

ROWS = pytest.StashKey[list[Row]]()
COPY_RATE = pytest.StashKey[float]()


def pytest_addoption(parser):
    group = parser.getgroup("benchmark")
    # The defaults are explicit: they are what getoption gives where this file is found after the command line was read.
    group.addoption(
        "--benchmark",
        action="store_true",
        default=False,
        help="Time the benchmarks, print a table, write a JSON file. Without it each runs once on a small problem.",
    )
    group.addoption(
        "--rehearse", action="store_true", default=False, help="With --benchmark: time small problems all the same."
    )
    group.addoption(
        "--rows",
        type=Path,
        default=None,
        metavar="PATH",
        help="With --benchmark: add each row of the table to a file of JSON lines, as soon as it is known.",
    )


def pytest_configure(config):
    config.stash[ROWS] = []
    # What makes a test fail before it compares anything is enough of an error.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used at all in this test")
    if not config.getoption("--benchmark"):
        return
    if config.getoption("benchmark_disable") or config.getoption("numprocesses", None):
        raise pytest.UsageError("--benchmark times one thing after another: not with --benchmark-disable or -n.")
    use_all_cores()  # as the experiments do; who is timed on one device asks for it
    if config.option.benchmark_json is None:
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        config.option.benchmark_json = config.rootpath / "results" / f"benchmark-{now}.json"


@pytest.fixture(scope="session")
def copy_rate(request):
    """GB/s of a large copy on the device; `None` if nothing is timed."""
    if not request.config.getoption("--benchmark"):
        return None
    request.config.stash[COPY_RATE] = copy_gigabytes_per_second()
    return request.config.stash[COPY_RATE]


@pytest.fixture
def quick_compilation(request):
    """Has LLVM optimise little where nothing is timed: most of the time that a small problem takes is compilation."""
    if request.config.getoption("--benchmark"):
        yield
        return
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def compare(request, benchmark, copy_rate, new_rows):
    """Runs one comparison: see `Compare`."""
    return Compare(benchmark, new_rows, *_extent(request.config), copy_rate)


@pytest.fixture
def record(request, benchmark, new_rows):
    """Adds rows that are not of a race to the table: see `Record`."""
    return Record(benchmark, new_rows, *_extent(request.config))


@pytest.fixture
def new_rows(request):
    """The rows of one test, which become part of those of the run."""
    rows: list[Row] = []
    yield rows
    request.config.stash[ROWS] += rows
    if path := request.config.getoption("--rows"):
        lines = [{key: value for key, value in asdict(row).items() if value is not None} for row in rows]
        if not path.exists() or "machine_info" not in path.read_text(encoding="utf-8"):
            lines = [{"machine_info": environment()}, *lines]
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


def _extent(config) -> tuple[bool, bool]:
    """Whether anything is timed, and whether problems have their full size."""
    timed = config.getoption("--benchmark")
    return timed, timed and not config.getoption("--rehearse")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish():
    """Saving is our wish, not the user's: no warning (an error, in this project) if no benchmark was selected."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Not saving anything, no benchmarks have been run")
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_benchmark_group_stats(config, benchmarks, group_by):
    """Takes comparisons out of pytest-benchmark's own table, which would mix their contestants."""
    groups = yield
    kept = [(name, [bench for bench in group if INTERLEAVED not in bench["extra_info"]]) for name, group in groups]
    return [(name, group) for name, group in kept if group]


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info |= environment()


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["rows"] = [asdict(row) for row in config.stash[ROWS]]
    output_json["copy_gigabytes_per_second"] = config.stash.get(COPY_RATE, None)
    if config.option.benchmark_json is not None:
        config.option.benchmark_json.parent.mkdir(parents=True, exist_ok=True)


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if not rows:
        return
    terminalreporter.section("benchmarks")
    for line in summary(rows, config.stash.get(COPY_RATE, None)):
        terminalreporter.write_line(line)
    terminalreporter.write_line("")
    terminalreporter.write_line(f"All numbers: {config.option.benchmark_json}")
