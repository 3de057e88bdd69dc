import doctest
import functools as ft
import importlib
import itertools
import pkgutil
import warnings
from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_dynloss
from eqx_dynloss.schedule import OscillatingWeights, RandomOrder, StaticWeights, UntilStep, cosine, square, triangle

from .helpers import slow, tree_allclose


def formula(num_classes, amplitude, period, steps, *, turn=None, wave="triangle", phase=0):
    """The weights written anew, class by class, with exact arithmetic for the position inside the period."""
    period, turn = Fraction(period), Fraction(period if turn is None else turn)
    rows = []
    for step in steps:
        elapsed = Fraction(step) + Fraction(phase) * turn
        active = int(elapsed // turn) % num_classes
        t = elapsed - (elapsed // turn) * turn
        match wave:
            case "triangle" if t > period:
                top = 1.0
            case "triangle" if t < period / 2:
                top = 1 + 2 * (amplitude - 1) * float(t / period)
            case "triangle":
                top = 2 * amplitude - 1 - 2 * (amplitude - 1) * float(t / period)
            case "cosine":
                top = 1 + (amplitude - 1) * np.sin(np.pi * float(min(t / period, 1))) ** 2
            case _:
                top = amplitude if period / 4 <= t < 3 * period / 4 else 1.0
        raw = np.ones(num_classes)
        raw[active] = top
        rows.append(num_classes * raw / raw.sum())
    return np.array(rows)


def authors_loop(num_classes, amplitude, period, num_steps):
    """The published notebook's nested loop: every class's turn visits t = 0, 1, ..., T, both ends included."""
    rows = []
    while True:
        for active in range(num_classes):
            for t in range(period + 1):
                raw = np.ones(num_classes)
                if t < period / 2:
                    raw[active] = 1 + 2 * (amplitude - 1) * t / period
                else:
                    raw[active] = 2 * amplitude - 1 - 2 * (amplitude - 1) * t / period
                rows.append(num_classes * raw / raw.sum())
                if len(rows) == num_steps:
                    return np.array(rows)


@jax.jit
def of_all(schedule, steps):
    return jax.vmap(schedule)(steps)


def over(schedule, steps):
    return of_all(schedule, jnp.asarray(steps))


close = ft.partial(tree_allclose, same_dtype=False, rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize(
    "num_classes, amplitude, period",
    [
        (3, 70, 5000),
        (3, 70, 501),  # odd: the peak lies between two steps
        (2, 1.5, 7),
        (10, 70, 100),
        (10, 2, 12.5),
        (5, 1000, 1),  # every step is a boundary
        (4, 3, 0.75),  # several classes per step
        (3, 10, 2),
        (1001, 9, 4),
    ],
)
@pytest.mark.parametrize("wave", [triangle, cosine, square], ids=["triangle", "cosine", "square"])
def test_formula_is_followed_over_thousands_of_steps(num_classes, amplitude, period, wave):
    steps = range(0, 40_000, 7) if period > 1000 else range(4000 if num_classes < 100 else 1200)
    weights = over(OscillatingWeights(num_classes, amplitude, period, waveform=wave), steps)
    expected = formula(num_classes, amplitude, period, steps, wave=wave.__name__)
    assert weights.dtype == jnp.float32
    # A large amplitude over C classes: one rounding of the position moves the weight by C·A·eps.
    assert close(weights, expected, atol=5e-6 + 2.4e-7 * min(amplitude, num_classes) * num_classes / 3)
    assert np.all(np.asarray(weights) >= 0)
    np.testing.assert_allclose(np.asarray(weights, np.float64).sum(-1), num_classes, rtol=1e-6)


@pytest.mark.parametrize(
    "num_classes, amplitude, period", [(3, 70, 5000), (3, 70, 501), (10, 5, 16), (2, 1.5, 1), (2, 9, 2)]
)
def test_inclusive_period_is_the_authors_loop_step_for_step(num_classes, amplitude, period):
    num_steps = 31_000 if period > 1000 else 3000
    weights = over(OscillatingWeights(num_classes, amplitude, period, inclusive_period=True), range(num_steps))
    assert close(weights, authors_loop(num_classes, amplitude, period, num_steps))


def test_formula_in_float64(x64):
    steps = np.arange(20_000)
    for inclusive, turn in ((False, 17.25), (True, 18.25)):
        weights = over(OscillatingWeights(3, 70.0, 17.25, inclusive_period=inclusive), steps)
        expected = formula(3, 70.0, 17.25, steps.tolist(), turn=turn)
        assert weights.dtype == jnp.float64
        assert tree_allclose(weights, expected, rtol=1e-12, atol=1e-12)


def test_values_of_the_paper():
    schedule = OscillatingWeights(3, 70.0, 5000)
    peak, rest = 70 * 3 / 72, 3 / 72
    np.testing.assert_allclose(schedule(2500), [peak, rest, rest], rtol=1e-6)
    np.testing.assert_allclose(schedule(7500), [rest, peak, rest], rtol=1e-6)
    np.testing.assert_allclose(schedule(12500), [rest, rest, peak], rtol=1e-6)
    np.testing.assert_allclose(schedule(17500), [peak, rest, rest], rtol=1e-6)
    ten = OscillatingWeights(10, 70.0, 5000)(2500)
    np.testing.assert_allclose(ten[:2], [8.861, 0.1266], rtol=1e-3)


@pytest.mark.parametrize("transform", [lambda f: f, eqx.filter_jit], ids=["eager", "jit"])
def test_class_changes_are_exactly_unweighted(transform):
    schedule = OscillatingWeights(3, 70.0, 5000)
    for step in (0, 5000, 10_000, 15_000, 15_000 * 100):
        np.testing.assert_array_equal(transform(schedule)(jnp.asarray(step)), np.ones(3))
    inclusive = OscillatingWeights(3, 70.0, 5000, inclusive_period=True)
    for step in (0, 5000, 5001, 10_001, 10_002):
        np.testing.assert_array_equal(transform(inclusive)(jnp.asarray(step)), np.ones(3))
    assert transform(inclusive)(jnp.asarray(5002))[1] > 1


@pytest.mark.parametrize("num_classes", [2, 3, 7, 10, 49, 1001])
def test_amplitude_one_is_exactly_plain(num_classes):
    weights = over(OscillatingWeights(num_classes, 1.0, 12.3), range(500))
    np.testing.assert_array_equal(weights, np.ones((500, num_classes)))


def test_weights_are_exactly_one_from_the_stop_on():
    schedule = OscillatingWeights(3, 70.0, 5000, stop=13 * 5001, inclusive_period=True)
    before, after = over(schedule, range(62_000, 65_013)), over(schedule, range(65_013, 70_000))
    assert close(before, authors_loop(3, 70, 5000, 65_013)[62_000:])
    np.testing.assert_array_equal(after, np.ones_like(after))
    np.testing.assert_array_equal(OscillatingWeights(3, 70.0, 10, stop=0)(5), np.ones(3))
    assert OscillatingWeights(3, 70.0, 10, stop=6)(5)[0] > 2.9
    np.testing.assert_array_equal(OscillatingWeights(3, 70.0, 10, stop=5)(5), np.ones(3))


@pytest.mark.parametrize("phase", [0.5, 1, 2.25, 3, -0.5, -7.75, 1000])
@pytest.mark.parametrize("inclusive", [False, True])
def test_phase_is_counted_in_class_periods(phase, inclusive):
    steps = range(300)
    weights = over(OscillatingWeights(3, 70.0, 16, phase=phase, inclusive_period=inclusive), steps)
    assert close(weights, formula(3, 70.0, 16, steps, turn=16 + inclusive, phase=phase), atol=2e-4)


@pytest.mark.parametrize("wave", [triangle, cosine, square], ids=["triangle", "cosine", "square"])
def test_waveforms_go_from_zero_to_one_and_back(wave):
    position = jnp.linspace(0, 1, 1001)
    values = np.asarray(jax.vmap(wave)(position))
    assert values[0] == 0 and abs(values[-1]) < 1e-6 and values[500] == 1
    assert values.min() >= 0 and values.max() <= 1
    if wave is not square:
        np.testing.assert_allclose(values, values[::-1], atol=1e-6)
        assert np.all(np.diff(values[:501]) >= 0)


@pytest.mark.parametrize("wave", [triangle, cosine, square], ids=["triangle", "cosine", "square"])
@pytest.mark.parametrize("period, phase", [(1.5, 0.0), (2.0, 0.5), (5.0, 0.95), (5000.5, 0.0), (0.25, 0.0)])
def test_weights_never_become_negative_between_the_counts_of_an_inclusive_period(wave, period, phase):
    schedule = OscillatingWeights(3, 70.0, period, phase=phase, waveform=wave, inclusive_period=True)
    weights = over(schedule, jnp.arange(20_010.0) / 2)
    assert np.all(np.asarray(weights) >= 0)
    # Between the count T and the next class's 0 there is nothing to emphasise: the raw weight stays 1.
    expected = formula(
        3, 70.0, period, (np.arange(2000) / 2).tolist(), turn=period + 1, wave=wave.__name__, phase=phase
    )
    assert close(weights[:2000], expected, atol=1e-4) or wave is square


def test_custom_waveforms():
    schedule = OscillatingWeights(2, 5.0, 4, waveform=lambda s: 4 * s * (1 - s))
    np.testing.assert_allclose(schedule(1), 2 * np.array([4.0, 1.0]) / 5, rtol=1e-6)


@pytest.mark.parametrize("step", [10_000_000, 9_999_999, 15_002_500, 2**24 - 1])
@pytest.mark.parametrize("period, inclusive", [(5000, False), (5000, True), (4999, False), (12.5, False), (3, True)])
def test_ten_million_steps_are_exact_in_float32(step, period, inclusive):
    schedule = OscillatingWeights(3, 70.0, period, inclusive_period=inclusive)
    steps = range(step - 50, step + 1)
    assert close(over(schedule, steps), formula(3, 70.0, period, steps, turn=period + inclusive), atol=2e-5)


WAVES = {"triangle": triangle, "cosine": cosine, "square": square}
# C, A, T, phase. Numbers that float32 rounds are taken as rounded, here and by the schedule.
HYPERPARAMETERS = [
    (10, 70.0, 7.0, 0.1),
    (3, 70.0, 5000.0, 0.0),
    (3, 1.5, 164.0, -7.75),
    (3, 1000.3, 12.3, 0.0),
    (3, 70.0, 0.1, 1000.3),
    (10, 5.0, 1.1358617, 1.71945),
    (3, 70.0, 5000.5, -0.3),
    (5000, 3.0, 3.0, 0.6),
]


def exactly(num_classes, amplitude, period, phase, inclusive, wave, steps):
    """In rational numbers: the classes, the positions in the period, and the weights in float64."""
    amplitude, period, phase = (Fraction(float(np.float32(value))) for value in (amplitude, period, phase))
    length = period + 1 if inclusive else period
    turns, positions, weights = [], [], np.ones((len(steps), num_classes))
    for row, step in zip(weights, steps, strict=True):
        turn, within = divmod(int(step) + phase * length, length)
        position = min(within / period, Fraction(1))
        shape = {
            "triangle": 1 - abs(2 * position - 1),
            "cosine": (1 - np.cos(2 * np.pi * float(position))) / 2,
            "square": Fraction(1, 4) <= position < Fraction(3, 4),
        }[wave]
        turns.append(turn)
        positions.append(position)
        row[turn % num_classes] = 1 + (float(amplitude) - 1) * float(shape)
    return turns, positions, num_classes * weights / weights.sum(1, keepdims=True)


@jax.jit
def active_classes(schedule, steps):
    return jax.vmap(lambda step: schedule._turn(step.astype(float))[0] % schedule.num_classes)(steps)


@pytest.mark.parametrize("wave", WAVES)
@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize("num_classes, amplitude, period, phase", HYPERPARAMETERS)
def test_every_step_up_to_two_to_the_24_is_as_good_as_the_first(num_classes, amplitude, period, phase, inclusive, wave):
    steps = np.concatenate([np.arange(30), 10**6 + np.arange(30), 2**24 - np.arange(30)])
    steps = np.unique(np.concatenate([steps, np.random.RandomState(0).randint(2**24, size=60)]))
    schedule = OscillatingWeights(
        num_classes, amplitude, period, phase=phase, waveform=WAVES[wave], inclusive_period=inclusive
    )
    turns, positions, expected = exactly(num_classes, amplitude, period, phase, inclusive, wave, steps)
    turn = (float(np.float32(period)) + inclusive) / float(np.float32(period))
    off = 2.0**-22 * turn  # of the position, as the docstring says
    ends = [min(float(p), turn - float(p)) <= off for p in positions]  # where the neighbour has the turn, with weight 1
    active = active_classes(schedule, jnp.asarray(steps))
    assert all(ends | (np.asarray(active) == np.array([int(turn % num_classes) for turn in turns])))
    jumps = [min(abs(p - Fraction(1, 4)), abs(p - Fraction(3, 4))) <= off for p in positions]
    kept = ~np.array(jumps) if wave == "square" else np.ones(len(steps), bool)
    error = np.abs(np.asarray(over(schedule, steps.tolist())) - expected).max(1)[kept]
    assert error.max() <= 2 * (amplitude - 1) * off + 2.0**-22 * num_classes


def test_the_peak_of_a_late_period():
    schedule = OscillatingWeights(10, 70.0, 7, phase=0.1)
    _, _, expected = exactly(10, 70.0, 7, 0.1, False, "triangle", np.arange(10**6, 10**6 + 7))
    weights = np.asarray(over(schedule, range(10**6, 10**6 + 7)))
    assert weights.max() == pytest.approx(expected.max(), rel=1e-6)
    np.testing.assert_allclose(weights, expected, rtol=2e-5)


@pytest.mark.parametrize("inclusive", [False, True])
def test_a_square_jumps_at_exact_quarters(inclusive):
    for period in (164.0, 4.0, 5000.0, 0.5, 13.0):
        schedule = OscillatingWeights(3, 5.0, period, waveform=square, inclusive_period=inclusive)
        steps = np.arange(0, 3000) if period > 1 else np.arange(0, 20, 0.125)
        length = Fraction(period) + inclusive
        positions = [Fraction(float(step)) % length / Fraction(period) for step in steps]
        high = [Fraction(1, 4) <= position < Fraction(3, 4) for position in positions]
        assert np.array_equal(np.asarray(over(schedule, steps)).max(1) > 1, high)


@pytest.mark.parametrize("wave", WAVES)
@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize(
    "num_classes, amplitude, period, phase",
    [
        (3, 5.0, 164.0, 0.1),
        *(slow(*values) for values in HYPERPARAMETERS[:7]),
    ],
)
def test_values_do_not_depend_on_how_a_schedule_reaches_the_program(
    num_classes, amplitude, period, phase, inclusive, wave
):
    schedule = OscillatingWeights(
        num_classes, amplitude, period, phase=phase, stop=9e6, waveform=WAVES[wave], inclusive_period=inclusive
    )
    steps = jnp.concatenate([jnp.arange(70), 10**6 + jnp.arange(50), jnp.array([2**24 - 1, 41, 123])])
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), schedule)
    constant = eqx.filter_jit(lambda step: schedule(step))
    argument = jax.jit(lambda schedule, step: schedule(step))
    ways = {
        "a constant": [constant(step) for step in steps],
        "a constant, and so are the steps": jax.jit(lambda: jax.vmap(schedule)(steps))(),
        "an argument": [argument(schedule, step) for step in steps],
        "mapped over": jax.jit(lambda batch: jax.vmap(lambda s: jax.vmap(s)(steps))(batch))(batch)[1],
        "mapped steps": jax.jit(jax.vmap(schedule))(steps),
        "a scan": jax.jit(lambda s: jax.lax.scan(lambda _, step: (None, s(step)), None, steps)[1])(schedule),
        "a scan over a constant": jax.lax.scan(lambda _, step: (None, schedule(step)), None, steps)[1],
        "without jit": jnp.stack([schedule(step) for step in steps[::10]]),
    }
    expected = np.asarray(ways["an argument"])
    for way, weights in ways.items():
        same = expected[::10] if way == "without jit" else expected
        # A cosine is another function in a vector of numbers; and what is known as a whole is computed when compiling.
        tolerance = 3e-6 if wave == "cosine" else 3e-7 if way.startswith("a constant, and") else 0.0
        np.testing.assert_allclose(np.asarray(weights), same, rtol=tolerance, atol=0, err_msg=way)
    with jax.disable_jit():
        np.testing.assert_allclose(schedule(steps[41]), expected[41], rtol=3e-6 if wave == "cosine" else 0)


@pytest.mark.parametrize("make", [lambda w: StaticWeights(w), lambda w: UntilStep(StaticWeights(w), 50)])
def test_static_weights_do_not_depend_on_it_either(make):
    w = jnp.asarray(np.random.RandomState(0).uniform(0.1, 5, 100), float)
    schedule, step = make(w), jnp.array(3)
    expected = np.asarray(jax.jit(lambda schedule, step: schedule(step))(schedule, step))
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), schedule)
    for weights in (
        schedule(step),
        jax.jit(schedule.__call__)(step),
        jax.jit(lambda: schedule(3))(),
        jax.jit(jax.vmap(lambda s: s(step)))(batch)[1],
    ):
        np.testing.assert_allclose(np.asarray(weights), expected, rtol=2e-7, atol=0)  # the order of a sum


@pytest.mark.parametrize("number", [int, float, np.int64, np.int32, np.float64, np.uint8, np.asarray, jnp.asarray])
def test_steps_and_hyperparameters_may_be_numbers_of_any_kind(number):
    with warnings.catch_warnings(action="error"):
        schedule = OscillatingWeights(3, number(70), number(16), stop=number(100), phase=number(1))
        assert tree_allclose(schedule(number(8)), OscillatingWeights(3, 70.0, 16.0, stop=100.0, phase=1.0)(8))
        assert tree_allclose(UntilStep(schedule, number(9))(number(9)), jnp.ones(3))
        assert tree_allclose(StaticWeights(np.array([number(1), number(2)]))(number(0)), jnp.array([2 / 3, 4 / 3]))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32", "float32", "float16", "bfloat16"])
def test_steps_of_every_dtype(dtype):
    for schedule in (
        OscillatingWeights(3, 70.0, 16, stop=100),
        UntilStep(OscillatingWeights(3, 70.0, 16), 100),
        StaticWeights(jnp.array([1.0, 2.0, 3.0])),
    ):
        for step in (0, 8, 104):
            weights = schedule(jnp.asarray(step, dtype))
            assert weights.dtype == jnp.float32
            assert tree_allclose(weights, schedule(step), rtol=0, atol=0)


def test_jit_scan_and_vmap_over_steps_agree():
    schedule = OscillatingWeights(3, 70.0, 17, stop=80)
    expected = jnp.stack([schedule(i) for i in range(100)])

    def body(count, _):
        return count + 1, schedule(count)

    _, scanned = jax.jit(lambda: jax.lax.scan(body, jnp.array(0), length=100))()
    assert tree_allclose(scanned, expected)
    assert tree_allclose(over(schedule, range(100)), expected)


def test_grid_of_hyperparameters_by_vmap_and_from_batched_arrays():
    amplitudes, periods = (grid.ravel() for grid in jnp.meshgrid(jnp.array([1.0, 2.0, 70.0]), jnp.array([3.0, 12.5])))
    batched = OscillatingWeights(3, amplitudes, periods, stop=jnp.full(6, 90.0), phase=jnp.zeros(6))
    built = eqx.filter_vmap(lambda a, t: OscillatingWeights(3, a, t, stop=90.0))(amplitudes, periods)
    assert tree_allclose(built, batched)
    inside = jax.vmap(lambda a, t: OscillatingWeights(3, a, t, stop=90.0)(7))(amplitudes, periods)
    for step in (0, 1, 7, 89, 90):
        alone = jnp.stack([OscillatingWeights(3, *p, stop=90.0)(step) for p in zip(amplitudes, periods, strict=True)])
        assert tree_allclose(eqx.filter_vmap(lambda s, step=step: s(step))(batched), alone)
        assert tree_allclose(jax.vmap(lambda s, step=step: s(step))(built), alone)
        if step == 7:
            assert tree_allclose(inside, alone)


def test_only_some_hyperparameters_batched():
    amplitudes = jnp.array([1.0, 70.0])
    schedule = OscillatingWeights(3, amplitudes, 10.0)
    axes = jax.tree.map(lambda leaf: 0 if leaf.ndim else None, schedule)
    weights = jax.vmap(lambda s: s(5), in_axes=(axes,))(schedule)
    assert tree_allclose(weights, jnp.stack([OscillatingWeights(3, a, 10.0)(5) for a in amplitudes]))


@pytest.mark.parametrize("wave", [triangle, cosine, square], ids=["triangle", "cosine", "square"])
def test_gradient_in_the_amplitude(wave, x64):
    direction = jnp.array([1.0, -2.0, 0.5])

    @jax.jit
    def value(amplitude, step):
        schedule = OscillatingWeights(3, amplitude, 20.0, waveform=wave, stop=50.0)
        return direction @ schedule(step)

    h = 1e-5
    derivatives = jax.jit(jax.grad(value)), jax.jit(jax.jacfwd(value))
    for amplitude, step in itertools.product((1.5, 70.0), (0, 3, 31, 60)):
        difference = (value(amplitude + h, step) - value(amplitude - h, step)) / (2 * h)
        for derivative in derivatives:
            np.testing.assert_allclose(derivative(amplitude, step), difference, rtol=1e-6, atol=1e-9)


def test_gradient_in_a_schedule_is_a_schedule_of_gradients(x64):
    schedule = OscillatingWeights(3, 70.0, 20.0)
    gradient = jax.grad(lambda s: s(3)[0])(schedule)
    h = 1e-6
    for name in ("amplitude", "period", "phase"):
        where = lambda s, name=name: getattr(s, name)
        up, down = (eqx.tree_at(where, schedule, where(schedule) + d)(3)[0] for d in (h, -h))
        np.testing.assert_allclose(getattr(gradient, name), (up - down) / (2 * h), rtol=1e-6)
    assert gradient.stop == 0


def test_leaves_are_exactly_the_hyperparameters():
    schedule = OscillatingWeights(3, 70.0, 20.0, stop=100, phase=0.5)
    assert tree_allclose(jax.tree.leaves(schedule), [jnp.array(v) for v in (70.0, 20.0, 100.0, 0.5)])
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(schedule)]
    assert names == [".amplitude", ".period", ".stop", ".phase"]
    again = OscillatingWeights(3, 2.0, 1.0, stop=3, phase=0.0)
    assert jax.tree.structure(schedule) == jax.tree.structure(again)
    assert len(jax.tree.leaves(StaticWeights(jnp.array([1.0, 2.0])))) == 1
    assert len(jax.tree.leaves(UntilStep(schedule, 7))) == 5


def test_new_hyperparameters_do_not_recompile():
    traced = []
    compiled = jax.jit(lambda s, step: traced.append(s) or s(step))
    for amplitude in (1.0, 2.0, 3.0):
        compiled(OscillatingWeights(3, amplitude, 10.0, stop=amplitude), jnp.array(1))
    assert len(traced) == 1


def test_static_weights_are_scaled_to_the_number_of_classes():
    for scale in (1e-30, 1.0, 1e30):
        schedule = StaticWeights(np.array([1.0, 2.0, 5.0]) * scale)
        assert schedule.num_classes == 3
        for step in (0, 10**6):
            np.testing.assert_allclose(schedule(step), [0.375, 0.75, 1.875], rtol=1e-6)
    np.testing.assert_array_equal(StaticWeights(jnp.ones(49))(0), np.ones(49))
    np.testing.assert_array_equal(StaticWeights(jnp.array([0, 4]))(0), [0.0, 2.0])


def test_static_weights_in_a_batch():
    rows = jnp.array([[1.0, 3.0], [1.0, 1.0]])
    schedule = StaticWeights(rows)
    assert tree_allclose(jax.vmap(lambda s: s(0))(schedule), jnp.array([[0.5, 1.5], [1.0, 1.0]]))


def test_until_step_ends_another_schedule():
    inner = StaticWeights(jnp.array([1.0, 3.0]))
    schedule = UntilStep(inner, 5)
    assert schedule.num_classes == 2
    np.testing.assert_array_equal(schedule(4), inner(4))
    np.testing.assert_array_equal(schedule(5), np.ones(2))
    oscillating = OscillatingWeights(3, 70.0, 10.0)
    stopped = OscillatingWeights(3, 70.0, 10.0, stop=33)
    assert tree_allclose(over(UntilStep(oscillating, 33), range(50)), over(stopped, range(50)))
    stops = UntilStep(inner, jnp.array([0.0, 1.0, 2.0]))
    axes = jax.tree.map(lambda leaf: None, stops), 0
    axes = eqx.tree_at(lambda s: s.stop, axes[0], 0, is_leaf=lambda leaf: leaf is None)
    assert tree_allclose(jax.vmap(lambda s: s(1)[0], in_axes=(axes,))(stops), jnp.array([1.0, 1.0, 0.5]))


BAD = [
    ({"amplitude": 0.99}, "amplitude must be a finite number of at least 1"),
    ({"amplitude": -70.0}, "amplitude must be"),
    ({"amplitude": jnp.nan}, "amplitude must be"),
    ({"amplitude": jnp.inf}, "amplitude must be"),
    ({"period": 0.0}, "period must be a finite, positive number of optimiser steps"),
    ({"period": -5.0}, "period must be"),
    ({"period": jnp.nan}, "period must be"),
    ({"period": jnp.inf}, "period must be"),
    ({"stop": -1.0}, "stop must be a step, 0 or later"),
    ({"stop": jnp.nan}, "stop must be"),
    ({"phase": jnp.nan}, "phase must be a finite number of class periods"),
    ({"phase": -jnp.inf}, "phase must be"),
]
GOOD = {"amplitude": 70.0, "period": 10.0, "stop": 100.0, "phase": 0.0}


@pytest.mark.parametrize("bad, sentence", BAD, ids=str)
def test_bad_values_are_refused_in_plain_english(bad, sentence):
    with pytest.raises(ValueError, match=sentence):
        OscillatingWeights(3, **(GOOD | bad))
    (name,) = bad
    with pytest.raises(ValueError, match=sentence):  # one bad entry of a batch is enough
        OscillatingWeights(3, **(GOOD | {name: jnp.array([GOOD[name], bad[name]])}))  # pyright: ignore


@pytest.mark.parametrize("bad, sentence", BAD, ids=str)
def test_bad_traced_values_raise_when_the_program_runs(bad, sentence):
    build = eqx.filter_jit(lambda values: OscillatingWeights(3, **values)(5))
    good, bad = ({k: jnp.asarray(v) for k, v in values.items()} for values in (GOOD, GOOD | bad))
    with pytest.raises(eqx.EquinoxRuntimeError, match=sentence):
        build(bad)
    assert build(good)[0] > 2.9


def test_bad_values_under_vmap_and_grad_are_refused():
    with pytest.raises((eqx.EquinoxRuntimeError, ValueError), match="amplitude must be"):
        eqx.filter_jit(jax.vmap(lambda a: OscillatingWeights(3, a, 10.0)(5)))(jnp.array([2.0, 0.5]))
    with pytest.raises((eqx.EquinoxRuntimeError, ValueError), match="amplitude must be"):
        jax.grad(lambda a: OscillatingWeights(3, a, 10.0)(5)[0])(0.5)


@pytest.mark.parametrize("num_classes", [1, 0, -3])
def test_fewer_than_two_classes_are_refused(num_classes):
    with pytest.raises(ValueError, match="num_classes must be at least 2"):
        OscillatingWeights(num_classes, 70.0, 10.0)


@pytest.mark.parametrize("weights", [[-1.0, 2.0], [jnp.nan, 1.0], [jnp.inf, 1.0], [0.0, 0.0]], ids=str)
def test_bad_static_weights_are_refused(weights):
    with pytest.raises(ValueError, match="weights must be finite, non-negative and not all zero"):
        StaticWeights(jnp.array(weights))
    with pytest.raises(eqx.EquinoxRuntimeError, match="weights must be finite, non-negative and not all zero"):
        eqx.filter_jit(lambda w: StaticWeights(w)(0))(jnp.array(weights))


@pytest.mark.parametrize("weights", [1.0, [1.0]])
def test_static_weights_without_two_classes_are_refused(weights):
    with pytest.raises(ValueError, match="at least 2 classes"):
        StaticWeights(jnp.array(weights))


@pytest.mark.parametrize("stop", [-1, jnp.nan])
def test_until_step_refuses_a_bad_stop(stop):
    with pytest.raises(ValueError, match="stop must be a step, 0 or later"):
        UntilStep(StaticWeights(jnp.array([1.0, 1.0])), stop)


@pytest.mark.parametrize(
    "batched",
    [
        lambda: OscillatingWeights(3, jnp.array([1.0, 2.0, 3.0]), 5.0),
        lambda: OscillatingWeights(3, 2.0, jnp.array([5.0])),
        lambda: OscillatingWeights(3, 2.0, 5.0, stop=jnp.array([5.0, 6.0])),
        lambda: OscillatingWeights(3, 2.0, 5.0, phase=jnp.zeros((2, 2))),
        lambda: StaticWeights(jnp.ones((3, 3))),
        lambda: UntilStep(
            StaticWeights(jnp.array([1.0, 2.0, 3.0])), jnp.array([1.0, 5.0, 9.0])
        ),  # as many stops as classes
        lambda: UntilStep(StaticWeights(jnp.array([1.0, 2.0, 3.0])), jnp.array([1.0])),
        lambda: UntilStep(OscillatingWeights(3, jnp.ones(3), 5.0), 9),
    ],
)
def test_a_batched_schedule_must_be_called_under_vmap(batched):
    with pytest.raises(ValueError, match="vmap"):
        batched()(1)


def test_wrong_shapes_are_refused_in_this_package():
    with pytest.raises(Exception, match="(?s)Type-check error.*step"):
        StaticWeights(jnp.array([1.0, 2.0]))(jnp.zeros(2))


def test_docstrings_run():
    names = [f"eqx_dynloss.{module.name}" for module in pkgutil.walk_packages(eqx_dynloss.__path__)]
    assert {"eqx_dynloss.loss", "eqx_dynloss.schedule"} <= set(names)
    results = [doctest.testmod(importlib.import_module(name)) for name in ["eqx_dynloss", *names]]
    assert sum(result.failed for result in results) == 0
    assert sum(result.attempted for result in results) > 0


@pytest.mark.parametrize("inclusive, phase", [(False, 0.0), (True, 0.0), (False, 0.5), (False, 4.0)])
def test_in_a_random_order_every_class_has_one_turn_in_every_pass(inclusive, phase):
    classes, period, passes = 5, 12, 40
    in_order = OscillatingWeights(classes, 9.0, period, phase=phase, inclusive_period=inclusive)
    schedule = RandomOrder(in_order, jax.random.key(3))
    turn = period + inclusive
    shift = round(-phase * turn) % (classes * turn)  # where the first whole pass begins
    steps = shift + jnp.arange(passes * classes * turn)
    found, expected = (np.asarray(jax.vmap(s)(steps)) for s in (schedule, in_order))
    np.testing.assert_array_equal(np.sort(found, -1), np.sort(expected, -1))
    np.testing.assert_allclose(found.sum(-1), classes, rtol=1e-6)
    middle = found.reshape(passes, classes, turn, classes)[:, :, period // 2]  # [pass, turn, class]
    orders = middle.argmax(-1)
    assert (np.sort(orders, -1) == np.arange(classes)).all()
    assert len(np.unique(orders, axis=0)) > passes / 2  # of 120
    quarter = found.reshape(passes, classes, turn, classes)[:, :, period // 4].argmax(-1)
    np.testing.assert_array_equal(quarter, orders)  # one class for a whole turn
    counts = np.stack([(orders[:, 0] == c).sum() for c in range(classes)])
    assert counts.min() >= 1  # any class may begin


@pytest.mark.parametrize("period, phase", [(7.3, 0.0), (97.0, 0.0), (7.3, 2.5)])
def test_late_in_a_run_a_random_order_is_that_of_float64(period, phase):
    """Passes begin where turns do, to which a float32 quotient of the step is not exact enough."""
    steps, key, period = np.arange(900_000, 901_000), jax.random.key(1), float(np.float32(period))
    late = lambda: jax.vmap(RandomOrder(OscillatingWeights(5, 70.0, period, phase=phase), key))(jnp.asarray(steps))
    found = np.asarray(late())
    with jax.enable_x64(True):
        expected = np.asarray(late())
    assert found.dtype == np.float32 and expected.dtype == np.float64
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_a_random_order_is_decided_by_its_key_and_can_be_mapped():
    keys = jax.random.split(jax.random.key(0), 3)
    schedules = RandomOrder(OscillatingWeights(4, jnp.array([1.0, 5.0, 9.0]), 6.0), keys)
    steps = jnp.arange(200)
    mapped = eqx.filter_jit(eqx.filter_vmap(lambda s: jax.vmap(s)(steps)))(schedules)
    for i, (amplitude, key) in enumerate(zip((1.0, 5.0, 9.0), keys, strict=True)):
        alone = jax.vmap(RandomOrder(OscillatingWeights(4, amplitude, 6.0), key))(steps)
        np.testing.assert_allclose(mapped[i], alone, rtol=1e-6)
    np.testing.assert_array_equal(mapped[0], 1.0)
    other = jax.vmap(RandomOrder(OscillatingWeights(4, 9.0, 6.0), jax.random.key(9)))(steps)
    assert not np.allclose(mapped[2], other)
