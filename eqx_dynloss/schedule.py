"""Class weights as a function of the optimiser step.

A schedule is a callable PyTree, `schedule(step) -> weights`: one non-negative weight per class, which sum to the number
of classes, so that weights of one mean plain, unweighted training. Hyperparameters are array leaves: schedules can be
batched with `jax.vmap` over amplitudes and periods, differentiated, jitted and carried through `jax.lax.scan`.
"""

import abc
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key, Real

Step = Real[ArrayLike, ""]
Position = Float[Array, ""]


class AbstractSchedule(eqx.Module):
    """Class weights as a function of the step, `schedule(step) -> Float[Array, " classes"]`."""

    num_classes: eqx.AbstractVar[int]

    @abc.abstractmethod
    def __call__(self, step: Step) -> Float[Array, " classes"]:
        """The weights of update number `step` (0 is the first). Non-negative, and their sum is `num_classes`."""


def triangle(position: Position) -> Position:
    """Rises linearly from 0 to 1 at half a period and falls back: the waveform of the paper."""
    return 1 - jnp.abs(2 * position - 1)


def cosine(position: Position) -> Position:
    """Rises and falls as a raised cosine: like the triangle, without its kinks."""
    return (1 - jnp.cos(2 * jnp.pi * position)) / 2


def square(position: Position) -> Position:
    """1 in the middle half of the period, 0 in its first and last quarter."""
    return jnp.where((position >= 0.25) & (position < 0.75), 1.0, 0.0).astype(position.dtype)


class OscillatingWeights(AbstractSchedule):
    r"""The paper's dynamical class weights: the classes take turns at being emphasised.

    One class is active at a time, for `period` steps, in the order 0, 1, …, C−1, 0, …. With the position
    $s\in[0, 1]$ inside the period and a waveform $w$ that goes from 0 to 1 and back, the raw weights are
    $g_\text{active} = 1 + (A-1)\,w(s)$ and $g_i = 1$ for the others, and the weights are
    $\Gamma_i = C\,g_i/\sum_k g_k$. Every period starts and ends with all weights equal to 1. At the peak the active
    class has $CA/(A+C-1)$ and the others $C/(A+C-1)$. `amplitude=1` is static training.

    Up to step $2^{24}$, in float32, the oscillation is where it should be to $2^{-22}$ of a turn; later steps are
    rounded themselves, and want float64. Values do not depend on how the schedule reaches a program, but for the last
    digit of a cosine, or of what is all constants. A period of 1 has no step inside: it is static.
    Like every module that holds arrays, it is compiled with `eqx.filter_jit(schedule)` or inside a jitted function.

    ??? cite

        Ruiz-Garcia, Zhang, Schoenholz, Liu: *Tilting the playing field: Dynamical loss functions for machine learning*,
        ICML 2021, arXiv:2102.03793 (the triangle). Phase, cosine and square are additions of this library.
    """

    num_classes: int = eqx.field(static=True)
    amplitude: Float[Array, "..."]
    period: Float[Array, "..."]
    stop: Float[Array, "..."]
    phase: Float[Array, "..."]
    waveform: Callable[[Position], Position] = eqx.field(static=True)
    inclusive_period: bool = eqx.field(static=True)

    def __init__(
        self,
        num_classes: int,
        amplitude: ArrayLike,
        period: ArrayLike,
        *,
        stop: ArrayLike | None = None,
        phase: ArrayLike = 0.0,
        waveform: Callable[[Position], Position] = triangle,
        inclusive_period: bool = False,
    ):
        """**Arguments:**

        - `num_classes`: the number of classes C, at least 2.
        - `amplitude`: A ≥ 1, the raw weight of the active class at its peak.
        - `period`: T > 0, the duration of one class's turn in optimiser steps. A pass over all classes takes C·T steps.
        - `stop`: the first step at which all weights are 1 for good. `None` never stops.
        - `phase`: where the oscillation begins, in class periods: 0.5 begins at the peak of class 0, 1 with class 1.
        - `waveform`: `triangle`, `cosine`, `square`, or any function from [0, 1] to [0, 1] that is 0 at both ends.
        - `inclusive_period`: count as the authors' code does, t = 0, …, T inclusive: a class's turn takes T + 1 steps.

        **Raises:** `ValueError` if a value is out of range. Values that are being traced cannot be looked at while
        Python runs; for those the compiled program raises the same sentence (`equinox.error_if`).
        """
        if num_classes < 2:
            raise ValueError(
                f"num_classes must be at least 2 (one class has nothing to alternate with), got {num_classes}."
            )
        amplitude, period, phase = (jnp.asarray(x, float) for x in (amplitude, period, phase))
        stop = jnp.asarray(jnp.inf if stop is None else stop, float)
        amplitude = _check(
            amplitude,
            (amplitude >= 1) & jnp.isfinite(amplitude),
            "amplitude must be a finite number of at least 1 (1 is static training)",
        )
        period = _check(
            period, (period > 0) & jnp.isfinite(period), "period must be a finite, positive number of optimiser steps"
        )
        stop = _check(stop, stop >= 0, "stop must be a step, 0 or later, or None for never")
        phase = _check(phase, jnp.isfinite(phase), "phase must be a finite number of class periods")
        self.num_classes = num_classes
        self.amplitude, self.period, self.stop, self.phase = jnp.broadcast_arrays(amplitude, period, stop, phase)
        self.waveform = waveform
        self.inclusive_period = inclusive_period

    def __call__(self, step: Step) -> Float[Array, " classes"]:
        if self.amplitude.ndim:
            raise ValueError(
                "This schedule holds a batch of hyperparameters: call it under jax.vmap or eqx.filter_vmap."
            )
        step = jnp.asarray(step).astype(self.amplitude.dtype)
        number, position = self._turn(step)
        active = jnp.mod(number, self.num_classes)
        peak = 1 + _rounded((self.amplitude - 1) * self.waveform(position))
        total = peak + (self.num_classes - 1)
        top, rest = self.num_classes * peak / total, self.num_classes / total
        weights = jnp.where(jnp.arange(self.num_classes) == active, top, rest)
        return jnp.where(step < self.stop, weights, 1.0)

    def _turn(self, step: Float[Array, ""]) -> tuple[Int[Array, ""], Position]:
        """How many turns there have been since one of class 0 began, and the position in this one's period.

        Remainders of floating-point numbers are exact. Quotients are whole numbers, and below 2²² since the step is
        divided by 4096 turns first. What is rounded is the share of a turn that is the phase, and the position.
        """
        period = self.period + 0 * step  # not a constant, by whose reciprocal a compiler would multiply
        length = _rounded(period + 1) if self.inclusive_period else period
        many = jnp.mod(step, 4096 * length)
        within = jnp.mod(many, length)
        blocks, turns = jnp.round((step - many) / (4096 * length)), jnp.round((many - within) / length)
        number = blocks.astype(int) * 4096 + turns.astype(int)
        if self.inclusive_period:  # what the sum T + 1 has lost, for every turn so far: products of few digits
            lost = jnp.where(period < 1, period - (length - 1), 1 - (length - period))
            within, carry = _wrapped(within - blocks * (4096 * lost) - turns * lost, length)
            number += carry
        whole = jnp.floor(self.phase)
        within, carry = _wrapped(within + _rounded((self.phase - whole) * length), length)
        number += carry + jnp.mod(whole, self.num_classes).astype(int)
        return number, _divided(jnp.minimum(within, period), period)


class RandomOrder(AbstractSchedule):
    """Class weights that oscillate, in an order of the classes that is drawn anew for every pass through them.

    What tells whether the order matters, or would do whatever it is: an addition of this library.
    """

    num_classes: int = eqx.field(static=True)
    schedule: OscillatingWeights
    key: Key[Array, "..."]

    def __init__(self, schedule: OscillatingWeights, key: Key[Array, "..."]):
        """**Arguments:**

        - `schedule`: whose classes take turns in the order of their numbers.
        - `key`: decides all orders. A batch of keys goes with a batch of hyperparameters.
        """
        self.num_classes = schedule.num_classes
        self.schedule = schedule
        self.key = key

    def __call__(self, step: Step) -> Float[Array, " classes"]:
        in_order = self.schedule(step)
        number, _ = self.schedule._turn(jnp.asarray(step).astype(self.schedule.period.dtype))
        order = jr.permutation(jr.fold_in(self.key, number // self.num_classes), self.num_classes)
        return in_order[order]


class StaticWeights(AbstractSchedule):
    """The same class weights at every step, scaled so that they sum to the number of classes."""

    num_classes: int = eqx.field(static=True)
    weights: Float[Array, "... classes"]

    def __init__(self, weights: ArrayLike):
        """**Arguments:**

        - `weights`: one finite, non-negative number per class, of any scale, not all zero. All ones is plain training.

        **Raises:** `ValueError` as `OscillatingWeights` does.
        """
        weights = jnp.asarray(weights, float)
        if weights.ndim == 0 or weights.shape[-1] < 2:
            raise ValueError(
                f"weights must hold one number per class, for at least 2 classes, got shape {weights.shape}."
            )
        valid = jnp.all((weights >= 0) & jnp.isfinite(weights), -1) & jnp.any(weights > 0, -1)
        weights = _check(weights, valid, "weights must be finite, non-negative and not all zero")
        self.num_classes = weights.shape[-1]
        self.weights = weights

    def __call__(self, step: Step) -> Float[Array, " classes"]:
        del step
        if self.weights.ndim != 1:
            if self.weights.ndim == 0:
                raise ValueError(
                    "This schedule was mapped over its classes: it holds one row of weights for everything."
                )
            raise ValueError("This schedule holds a batch of weights: call it under jax.vmap or eqx.filter_vmap.")
        return _normalise(self.weights)


class UntilStep(AbstractSchedule):
    """Another schedule until step `stop`; all weights are 1 from that step on."""

    num_classes: int = eqx.field(static=True)
    schedule: AbstractSchedule
    stop: Float[Array, "..."]

    def __init__(self, schedule: AbstractSchedule, stop: ArrayLike):
        stop = jnp.asarray(stop, float)
        self.num_classes = schedule.num_classes
        self.schedule = schedule
        self.stop = _check(stop, stop >= 0, "stop must be a step, 0 or later")

    def __call__(self, step: Step) -> Float[Array, " classes"]:
        if self.stop.ndim:
            raise ValueError("This schedule holds a batch of stop steps: call it under jax.vmap or eqx.filter_vmap.")
        return jnp.where(jnp.asarray(step).astype(self.stop.dtype) < self.stop, self.schedule(step), 1.0)


def _wrapped(value: Float[Array, ""], end: Float[Array, ""]) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """A value from −`end` to twice `end` in [0, `end`], and how many times `end` has been taken off."""
    carry = (value >= end).astype(int) - (value < 0).astype(int)
    return value - carry.astype(end.dtype) * end, carry


def _divided(value: Float[Array, ""], divisor: Float[Array, ""]) -> Float[Array, ""]:
    """A quotient of at most 1, which is right where it is a multiple of 2⁻²⁰, even if a compiler that knows everything
    multiplies by the reciprocal: a waveform may jump there."""
    scaled = 2**20 * value
    rest = jnp.mod(scaled, divisor)
    return (jnp.round((scaled - rest) / divisor) + _rounded(rest / divisor)) / 2**20


def _rounded(value: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """A product or a sum as it is, which compilers would else merge with a sum that follows, and round only once."""
    return jnp.maximum(value, jnp.finfo(value.dtype).min)


def _normalise(raw: Float[Array, " classes"]) -> Float[Array, " classes"]:
    return raw.size * raw / jnp.sum(raw)


def _check(value: Float[Array, "..."], valid: Bool[Array, "..."], requirement: str) -> Float[Array, "..."]:
    """`value`, after a check that raises at once if it is known, or when the compiled program runs if it is traced."""
    if isinstance(valid, Tracer):
        return eqx.error_if(value, ~valid, f"{requirement}.")
    if not valid.all():
        raise ValueError(f"{requirement}, got {value}.")
    return value
