"""Times contestants against each other: interleaved, checked for agreement first, paired by round."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from pytest_benchmark.fixture import BenchmarkFixture

from .agreement import require_agreement
from .contestant import Absent, Contestant
from .device_time import Profile, profile
from .report import Row

INTERLEAVED = "interleaved"  # where a benchmark's `extra_info` names its contestants in the order of the first round
MAX_ROUNDS = 200
REHEARSALS = 3
LONG_CALL_S = 0.5


@dataclass(frozen=True)
class Work:
    """What a call has to do, from which the table computes a rate.

    **Fields:**

    - `amount`: how much of it, such as the bytes of a model over 1e9, or images.
    - `unit`: of the amount. The rate of `"GB"` is compared with that of a copy.
    - `counts`: the model: what is counted, in words.
    """

    amount: float
    unit: str
    counts: str


class Compare:
    """What the fixture `compare` gives: a function that runs one comparison. See `__call__`.

    **Fields:**

    - `timed`: whether this run times anything (`--benchmark`), or only calls everything once.
    - `full`: whether problems have their full size. Where nothing is timed, or in a rehearsal, small ones are enough.
    """

    def __init__(self, benchmark: BenchmarkFixture, rows: list[Row], timed: bool, full: bool, copy_rate: float | None):
        self.timed = timed
        self.full = full
        self._benchmark = benchmark
        self._rows = rows
        self._copy_rate = copy_rate

    def __call__(
        self,
        subject: str,
        case: str,
        entrants: Sequence[Contestant | Absent],
        *,
        expected: Any = None,
        view: Callable[[Any], Any] = lambda result: result,
        tolerance: float | None = None,
        work: Work | None = None,
        budget_s: float = 4.0,
        min_rounds: int = 15,
    ) -> list[Row]:
        """Requires that all contestants agree, and with `--benchmark` times them. Once in a test.

        Contestants are called in rounds, each once a round, in varying order (see `rotated`). Before each timed call
        comes an untimed one of the same contestant, unless its calls are long (half a second): what another one left
        in the caches would otherwise decide about short calls. Compilation is over by then, and the first call, which
        is the one checked, is never timed. Where all calls are long, the rehearsal, which tells how many rounds there
        is time for, is itself the first round.

        **Arguments:**

        - `subject`, `case`: headings of the table.
        - `entrants`: who takes part. The first one present is what the others' ratios are relative to.
        - `expected`: the result, in float64; `None` is that of the first contestant.
        - `view`: what of a result to compare, such as a few rows of it.
        - `tolerance`: see `require_agreement`.
        - `work`: what a call does, for a rate.
        - `budget_s`: seconds that the rounds may take, hardly any in a rehearsal; `min_rounds` comes first.
        - `min_rounds`: the least number of rounds.

        **Returns:** the comparison's rows of the table; empty if nothing is timed.

        What another contestant than the first raises, or its disagreement, is raised when the rest have been timed.
        """
        contestants = [entrant for entrant in entrants if isinstance(entrant, Contestant)]
        if not contestants or len({entrant.name for entrant in entrants}) < len(entrants):
            raise ValueError(f"a comparison needs contestants of different names, got {entrants}.")

        failures: dict[str, Exception] = {}

        def agree():
            wanted = expected
            for contestant in contestants:
                try:
                    result = view(_run(contestant))
                    wanted = result if wanted is None else wanted
                    require_agreement(contestant.name, result, wanted, contestant.tolerance or tolerance)
                except Exception as error:
                    if not self.timed or contestant is contestants[0]:
                        raise
                    failures[contestant.name] = error

        if not self.timed:
            self._benchmark.disabled = True  # as with --benchmark-disable: it calls, and neither times nor records
            self._benchmark.pedantic(agree)
            return []
        agree()
        entrants = [Absent(e.name, str(failures[e.name])) if e.name in failures else e for e in entrants]
        contestants = [entrant for entrant in entrants if isinstance(entrant, Contestant)]
        rehearsal = [_seconds_of_a_call(contestant) for contestant in contestants]
        short = [c for c, seconds in zip(contestants, rehearsal, strict=True) if seconds < LONG_CALL_S]
        a_round = sum(seconds * (1 + (seconds < LONG_CALL_S)) for seconds in rehearsal)
        budget_s = budget_s if self.full else min(budget_s, 0.1)
        rounds = int(np.clip(budget_s / a_round, min_rounds, max(min_rounds, MAX_ROUNDS)))
        order = rotated(contestants, rounds)
        seconds = [] if short else rehearsal
        seconds = seconds + self._time(order[len(seconds) :], short)
        times = {c.name: np.array([t for who, t in zip(order, seconds, strict=True) if who is c]) for c in contestants}
        first = times[contestants[0].name]
        rows = [
            Row(subject, case, entrant.name, absent=entrant.reason)
            if isinstance(entrant, Absent)
            else self._row(subject, case, entrant, times[entrant.name], first, work)
            for entrant in entrants
        ]
        self._benchmark.extra_info[INTERLEAVED] = [contestant.name for contestant in contestants]
        self._rows += rows
        if failures:  # now that the others' times are kept
            raise next(iter(failures.values()))
        return rows

    def _time(self, order: Sequence[Contestant], short: Sequence[Contestant]) -> list[float]:
        """Seconds of every call, in their order; those of `short` each after an untimed one."""
        if not order:
            self._benchmark.disabled = True
            self._benchmark.pedantic(lambda: None)
            return []
        upcoming = itertools.cycle(order)
        kept = []

        def setup():
            kept.clear()  # here, so that giving memory back is not timed
            contestant = next(upcoming)
            if contestant in short:
                _run(contestant)
            return (contestant,), {}

        self._benchmark.pedantic(lambda contestant: kept.append(_run(contestant)), setup=setup, rounds=len(order))
        assert self._benchmark.stats is not None, "pytest-benchmark has timed nothing"
        return list(self._benchmark.stats.stats.data)

    def _row(self, subject, case, contestant, times, first, work: Work | None) -> Row:
        seconds = float(np.median(times))
        rate = copy_share = None
        if work is not None:
            rate = work.amount / seconds
            copy_share = rate / self._copy_rate if work.unit == "GB" and self._copy_rate else None
        low, middle, high = np.quantile(times / first, (0.25, 0.5, 0.75))
        profiled = _profile(contestant, seconds)
        return Row(
            subject,
            case,
            contestant.name,
            rounds=len(times),
            seconds=seconds,
            ratio=(float(low), float(middle), float(high)),
            rate=rate,
            rate_unit=work and work.unit,
            work=work and work.counts,
            copy_share=copy_share,
            device_seconds=profiled and profiled.busy_seconds,
            kernel_seconds=profiled and profiled.kernel_seconds,
            lower_s=contestant.lower_s,
            compile_s=contestant.compile_s,
            temp_bytes=contestant.temp_bytes,
            peak_bytes=contestant.peak_bytes,
        )


class Record:
    """What the fixture `record` gives: a function that adds to the table what another one finds out.

    **Fields:**

    - `timed`, `full`: as for `Compare`.
    """

    def __init__(self, benchmark: BenchmarkFixture, rows: list[Row], timed: bool, full: bool):
        self.timed = timed
        self.full = full
        self._benchmark = benchmark
        self._rows = rows

    def __call__(self, find_out: Callable[[], list[Row]]) -> list[Row]:
        """Calls the function once. Without `--benchmark` its rows are returned, and forgotten."""
        self._benchmark.disabled = not self.timed
        rows = self._benchmark.pedantic(find_out)
        if self.timed:
            self._benchmark.extra_info[INTERLEAVED] = []
            self._rows += rows
        return rows


def rotated(contestants: Sequence[Contestant], rounds: int) -> list[Contestant]:
    """Who is called when, round after round, each beginning with another; every second time through, backwards.

    So all have every place in a round equally often, and whose leavings they find varies as well: the memory that a
    contestant gave back decides whether the next one of tens of MiB gets fresh pages.
    """
    count = len(contestants)
    order = []
    for start in range(rounds):
        turn = [contestants[(start + i) % count] for i in range(count)]
        order += turn[::-1] if start // count % 2 else turn
    return order


def _profile(contestant: Contestant, seconds: float) -> Profile | None:
    """Of a tenth of a second or of one call: reading a profile takes long beside the calls that are in it.

    One that fails costs no times: they are known by then.
    """
    if jax.default_backend() != "gpu":
        return None
    try:
        return profile(contestant.call, repeats=max(1, min(10, int(0.1 / seconds))))
    except Exception as error:
        print(f"{contestant.name}: no profile ({error})")
        return None


def _run(contestant: Contestant) -> Any:
    return jax.block_until_ready(contestant.call())


def _seconds_of_a_call(contestant: Contestant) -> float:
    """About how long it takes: the longest of a few, so that rounds take no longer than planned; the first, if long."""
    longest = 0.0
    for _ in range(REHEARSALS):
        start = time.perf_counter()
        _run(contestant)
        longest = max(longest, time.perf_counter() - start)
        if longest > LONG_CALL_S:
            break
    return longest
