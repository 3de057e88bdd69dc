"""The rows of a run, and the plain table that they are printed as."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """What is known of one contestant in one comparison; `None` is what was not or could not be measured.

    **Fields:**

    - `subject`: what is computed; the rows of a subject share a table.
    - `case`: the comparison within the subject, such as a problem size.
    - `contestant`: its name.
    - `absent`: why it did not take part.
    - `rounds`: how often each contestant of the comparison was timed.
    - `seconds`: median time of a call.
    - `ratio`: its time over that of the comparison's first contestant in the same round: lower quartile, median, upper
        quartile over the rounds.
    - `rate`, `rate_unit`: work done per second at the median time, in units such as `"GB"`.
    - `work`: what the work counts.
    - `copy_share`: the rate as a fraction of the bandwidth that a copy reached in the same run.
    - `device_seconds`: time that a GPU was busy with a call.
    - `kernel_seconds`: time of each of its kernels, by name.
    - `errors`: relative errors of its results, by name.
    - `lower_s`, `compile_s`, `temp_bytes`, `peak_bytes`: see `Contestant`.
    - `launches`, `kernels`: how many kernels a program for a GPU launches, and how many of each kind.
    - `moved_bytes`, `moved_per`: device memory that it reads and writes, and the number by which the table divides it.
    """

    subject: str
    case: str
    contestant: str
    absent: str | None = None
    rounds: int | None = None
    seconds: float | None = None
    ratio: tuple[float, float, float] | None = None
    rate: float | None = None
    rate_unit: str | None = None
    work: str | None = None
    copy_share: float | None = None
    device_seconds: float | None = None
    kernel_seconds: dict[str, float] | None = None
    errors: dict[str, float] | None = None
    lower_s: float | None = None
    compile_s: float | None = None
    temp_bytes: int | None = None
    peak_bytes: int | None = None
    launches: int | None = None
    kernels: dict[str, int] | None = None
    moved_bytes: int | None = None
    moved_per: int | None = None


WIDTH = 120  # characters; the reason of an absence is cut there, and whole in the JSON file

LEGEND = """\
ms: median over the rounds. In a round each contestant is timed once, in varying order, each right after an untimed
call of its own. ratio: its time / the first contestant's in the same round (above 1 the first is faster), median and
quartiles over the rounds. compile: XLA's part, tracing and lowering left out. temp, peak: memory by the compiler's
account. error: the largest of its relative errors."""


def summary(rows: Sequence[Row], copy_rate: float | None) -> list[str]:
    """Lines of the report: the legend, then for every subject its name, what its rates count, and a table.

    **Arguments:**

    - `rows`: in the order in which they are to be shown; those of a comparison together.
    - `copy_rate`: GB/s of a copy in the same run, read plus written, if it was measured.
    """
    lines: list[str] = [*LEGEND.splitlines()]
    if copy_rate is not None:
        lines[-1] += f" % copy: of the {copy_rate:.1f} GB/s, read plus written, that a large copy reached in this run."
    for subject in dict.fromkeys(row.subject for row in rows):
        mine = [row for row in rows if row.subject == subject]
        counted = dict.fromkeys(f"{row.rate_unit}: {row.work}." for row in mine if row.work)
        lines += ["", subject, *counted, *_table(mine)]
    return lines


def _table(rows: Sequence[Row]) -> list[str]:
    header = ["case", "contestant", "ms", "ratio", "quartiles", "rate", "% copy", "device ms", "error, %", "launches",
              "moved MiB", "B/logit", "temp MiB", "peak MiB", "compile s"]  # fmt: skip
    body, notes = [], {}
    for case, group in itertools.groupby(rows, lambda row: row.case):
        for index, row in enumerate(group):
            if row.absent is not None:
                notes[len(body)] = row.absent
            body.append([case if index == 0 else "", row.contestant, *_cells(row)])
    shown = [i for i in range(len(header)) if i < 2 or any(cells[i] for cells in body)]
    header, body = [header[i] for i in shown], [[cells[i] for i in shown] for cells in body]
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    lines = [_line(header, widths), _line(["-" * width for width in widths], widths)]
    for index, cells in enumerate(body):
        line = _line(cells, widths)
        if index in notes:
            line = f"{line}  absent: {notes[index]}"
            line = line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..."
        lines.append(line)
    return lines


def _cells(row: Row) -> list[str]:
    low, middle, high = row.ratio or (None, None, None)
    return [
        _digits(row.seconds, 1e3),
        _digits(middle),
        "" if low == high else f"{_digits(low)}..{_digits(high)}",  # the first contestant's own ratio is 1 throughout
        "" if row.rate is None else f"{_digits(row.rate)} {row.rate_unit}/s",
        "" if row.copy_share is None else f"{100 * row.copy_share:.0f}",
        _digits(row.device_seconds, 1e3),
        "" if row.errors is None else _digits(max(row.errors.values()), 100),
        "" if row.launches is None else str(row.launches),
        _digits(row.moved_bytes, 2**-20),
        "" if row.moved_bytes is None or row.moved_per is None else _digits(row.moved_bytes / row.moved_per),
        _digits(row.temp_bytes, 2**-20),
        _digits(row.peak_bytes, 2**-20),
        _digits(row.compile_s),
    ]


def _digits(value: float | None, scale: float = 1.0) -> str:
    """Three significant digits, never in exponent notation."""
    if value is None:
        return ""
    value *= scale
    if not (math.isfinite(value) and value):
        return f"{value:.0f}"
    return f"{value:.{min(4, max(0, 2 - math.floor(math.log10(abs(value)))))}f}"


def _line(cells: Iterable[str], widths: Iterable[int]) -> str:
    """Two columns of names to the left, numbers to the right."""
    pairs = enumerate(zip(cells, widths, strict=True))
    return "  ".join(cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in pairs).rstrip()
