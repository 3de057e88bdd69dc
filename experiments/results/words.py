"""Numbers, losses and tables in words, the same in every table, sentence and figure. None and NaN are missing: –."""

import math
from collections.abc import Sequence

MISSING = "–"


def number(value: float | None, scale: float = 1, digits: int = 2, sign: bool = False) -> str:
    """A number with a proper minus; what is 0 but for rounding has no sign."""
    if value is None or math.isnan(value):
        return MISSING
    rounded = round(value * scale, digits) + 0.0
    return f"{rounded:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def spread(mean: float | None, std: float | None, scale: float = 1, digits: int = 2) -> str:
    """Mean ± std, or as much of it as there is."""
    return number(mean, scale, digits) + (f" ± {number(std, scale, digits)}" if _there(std) else "")


def interval(low: float | None, high: float | None, scale: float = 1, digits: int = 2) -> str:
    """The ends of an interval."""
    return " to ".join(number(end, scale, digits) for end in (low, high))


def difference(
    mean: float | None, low: float | None, high: float | None, scale: float = 1, digits: int = 2, lead: str = ""
) -> str:
    """A mean difference and its interval, or as much of it as there is; `lead` comes before the interval."""
    return number(mean, scale, digits, sign=True) + _brackets(low, high, scale, digits, lead)


def p_value(p: float | None) -> str:
    """A p-value, to two digits."""
    return MISSING if p is None else f"{p:.2g}"


def correlation(r: float, low: float, high: float) -> str:
    """Pearson's r and its interval, or as much of it as there is."""
    return number(r, digits=3) + _brackets(low, high, digits=3)


def _brackets(low: float | None, high: float | None, scale: float = 1, digits: int = 2, lead: str = "") -> str:
    return f" [{lead}{interval(low, high, scale, digits)}]" if _there(low) else ""


def loss_name(amplitude: float, period: float | None, steps_per_epoch: int | None = None) -> str:
    """A loss, its period in steps and, if their number is given, in epochs; an amplitude of 1 is the static one, which
    has no period."""
    if amplitude == 1 or period is None:
        return "static"
    epochs = f" ({period / steps_per_epoch:.3g} ep)" if steps_per_epoch else ""
    return f"A = {amplitude:g}, T = {period:g}{epochs}"


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table whose columns but the first are numbers."""
    lines = [headers, ["---", *["--:"] * (len(headers) - 1)], *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def _there(value: float | None) -> bool:
    return value is not None and not math.isnan(value)
