import io
import json
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from experiments.results.estimate import Estimate
from experiments.results.files import file_name
from experiments.results.summary import summarise
from experiments.results.tables import console_table, write_summary

from ..synthetic import results


def outputs(dataset, directory) -> dict[str, str]:
    """Everything a user can read about a dataset."""
    summary = summarise(dataset)
    write_summary(summary, dataset, directory)
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(console_table(summary))
    return {
        "markdown": (directory / file_name(dataset.attrs["dataset"], "summary.md")).read_text(encoding="utf-8"),
        "json": (directory / file_name(dataset.attrs["dataset"], "summary.json")).read_text(encoding="utf-8"),
        "console": " ".join(console.export_text().split()),  # undoes the wrapping of lines
    }


def with_accuracy(static: list[float], dynamical: list[float], **options):
    """A run with these validation accuracies at the end."""
    dataset = results(seeds=len(static), **options)
    dataset.accuracy[0, :, :, 1, -1] = static
    dataset.accuracy[1, 0, :, 1, -1] = dynamical
    return dataset


def test_an_estimate_by_hand():
    e = Estimate.of({0: 1.0, 1: 2.0, 2: 6.0})
    assert (e.n, e.mean, e.median, e.std) == (3, 3.0, 2.0, pytest.approx(7**0.5))  # deviations 4 + 1 + 9, over 3 - 1
    half = 4.302653 * (7 / 3) ** 0.5  # Student's t for 2 degrees of freedom
    assert (e.low, e.high) == (pytest.approx(3 - half, abs=1e-5), pytest.approx(3 + half, abs=1e-5))


@pytest.mark.parametrize("width", [40, 60, 80])
def test_on_a_narrow_terminal_the_table_wraps_and_loses_nothing(width):
    table = console_table(summarise(with_accuracy([0.5, 0.625], [0.25, 0.75])))
    narrow, wide = (Console(width=w, file=io.StringIO(), record=True) for w in (width, 200))
    narrow.print(table)
    wide.print(table)
    narrow_text, wide_text = narrow.export_text(), wide.export_text()
    assert "56.25 ± 8.84" in wide_text and max(map(len, narrow_text.splitlines())) <= width
    assert sorted(filter(str.isdigit, narrow_text)) == sorted(filter(str.isdigit, wide_text))


def test_members_at_chance_are_named_and_stay_in_the_means(tmp_path):
    dataset = results(seeds=4)
    dataset.accuracy[1, 0, [1, 3], 1] = 0.1
    dataset.accuracy[1, 0, [1, 3], :, -1] = np.array([[0.11, 0.09], [0.1, 0.124]])
    dataset.accuracy[0, 0, 2, :, -1] = [0.6, 0.11]  # overfitted, but not guessing
    static, dynamical = summarise(dataset).conditions
    assert static.at_chance == [] and dynamical.at_chance == [1, 3]
    assert dynamical.used == 4 and dynamical.outcomes["validation"]["accuracy"].n == 4
    for text in outputs(dataset, tmp_path).values():
        assert "AT CHANCE (accuracies of guessing at the last evaluation): 2 of 8 members." in text
        assert "A = 10, T = 50 (1.25 ep): seed 1, 3" in text
    assert not any("AT CHANCE" in notice for notice in summarise(results(seeds=4)).notices)


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_differences_agree_with_a_paired_t_test(metric, split):
    dataset = results(seeds=8, amplitudes=(10, 70), periods=(20.0, 50.0))
    values = dataset[metric].values[..., split, -1]
    _, *dynamical = summarise(dataset).conditions
    assert [(c.amplitude, c.period) for c in dynamical] == [(10, 20), (10, 50), (70, 20), (70, 50)]
    for c, sample in zip(dynamical, values[1:].reshape(4, 8), strict=True):
        e = c.differences[["train", "validation"][split]][metric]
        oracle = stats.ttest_rel(sample, values[0, 0]).confidence_interval(0.95)
        assert (e.low, e.high) == (pytest.approx(oracle.low), pytest.approx(oracle.high))
        assert e.mean == pytest.approx((sample - values[0, 0]).mean())
        outcome = c.outcomes[["train", "validation"][split]][metric]
        assert (outcome.mean, outcome.std) == (pytest.approx(sample.mean()), pytest.approx(sample.std(ddof=1)))


@pytest.mark.parametrize(
    "dynamical, verdict",
    [
        ([0.55, 0.66, 0.76], ": higher with the dynamical loss by the interval; the ranks alone do not show it."),
        ([0.45, 0.54, 0.64], ": lower with the dynamical loss by the interval; the ranks alone do not show it."),
        ([0.55, 0.56, 0.70], ": no difference established."),
        ([0.60, 0.70, 0.80], ": all seeds differ by the same amount, too few distinct values"),
    ],
)
def test_the_evidence_says_what_the_interval_says(dynamical, verdict):
    dataset = with_accuracy([0.5, 0.6, 0.7], dynamical)
    dataset.loss[:, 0, :, 1, -1] = dataset.accuracy[:, 0, :, 1, -1]
    accuracy, loss = summarise(dataset).conditions[1].evidence[:2]
    assert accuracy.startswith("Validation accuracy, ") and verdict in accuracy and "3 seeds" in accuracy
    assert loss.startswith("Validation loss, ") and verdict in loss and " nats (" in loss


@pytest.mark.parametrize(
    "differences, verdict",
    [
        ([0.01, 0.02, 0.03, 0.01, 0.02, 0.03, 0.02], "signed-rank p = 0.016): higher with the dynamical loss."),
        (  # one member that collapsed decides the interval, but not the ranks
            [-0.6, 0.02, 0.03, 0.01, 0.025, 0.035, 0.015, 0.04, 0.03],
            "signed-rank p = 0.12): no difference established.",
        ),
        (
            [0.01, 0.02, 0.03, 0.011, 0.025, 0.31, 0.015, 0.04, 0.021],
            "signed-rank p = 0.0039): no difference established by the interval, though the ranks speak for one.",
        ),
    ],
)
def test_the_evidence_says_where_interval_and_ranks_disagree(differences, verdict):
    static = np.linspace(0.62, 0.66, len(differences))
    evidence = summarise(with_accuracy(static.tolist(), (static + differences).tolist())).conditions[1].evidence
    assert evidence[0].endswith(verdict), evidence[0]


def test_what_stopping_early_would_change_is_said(tmp_path):
    """A static loss that overfits: in the end its validation loss is higher, at its best evaluation it is not."""
    dataset = results(seeds=4)
    luck = np.array([0.0, 0.01, 0.02, 0.04])
    loss, accuracy = dataset.loss[:, 0, :, 1], dataset.accuracy[:, 0, :, 1]
    loss[0], loss[1] = 3 + luck[:, None], 2.5 + luck[::-1, None]
    loss[0, :, 3], loss[1, :, 3] = 2 + luck, 2 + luck[::-1]
    accuracy[0], accuracy[1] = 0.5 + luck[:, None], 0.6 + luck[::-1, None]
    accuracy[:, :, 5] += 0.05
    static, dynamical = summarise(dataset).conditions
    found = {name: e.mean for name, e in static.outcomes["validation"].items()}
    assert found == pytest.approx({
        "accuracy": 0.5175, "loss": 3.0175, "best accuracy": 0.5675, "loss at best accuracy": 3.0175,
        "lowest loss": 2.0175, "accuracy at lowest loss": 0.5175,
    })  # fmt: skip
    lowest = dynamical.differences["validation"]["lowest loss"]
    oracle = stats.ttest_rel(luck[::-1], luck).confidence_interval(0.95)
    assert (lowest.mean, lowest.low, lowest.high) == pytest.approx((0, oracle.low, oracle.high), abs=1e-12)
    assert len(dynamical.evidence) == 3 and dynamical.evidence[2] == (
        "Stopped early, A = 10, T = 50 (1.25 ep), dynamical − static: every member at its best validation accuracy "
        "+10.00 [4.64 to 15.36] points and −0.50 [−0.55 to −0.45] nats; at its lowest validation loss "
        "+10.00 [4.64 to 15.36] points and +0.00 [−0.05 to 0.05] nats."
    )
    table = outputs(dataset, tmp_path)["markdown"]
    assert (
        "| best validation accuracy, % | loss there, nats | lowest validation loss, nats | accuracy there, % |" in table
    )
    assert "| 56.75 ± 1.71 (56.50) | 3.0175 ± 0.0171 (3.0150) | 2.0175 ± 0.0171 (2.0150) | 51.75 " in table
    assert "| +10.00 [4.64 to 15.36] | −0.5000 [−0.5536 to −0.4464] | +0.0000 [−0.0536 to 0.0536] | +10.00 " in table


def test_where_stopping_early_establishes_the_same_nothing_is_said_of_it():
    assert len(summarise(results(seeds=8)).conditions[1].evidence) == 2
    dataset = with_accuracy([0.5, 0.6, 0.7, 0.65], [0.51, 0.61, 0.71, 0.66])  # all differ by the same amount
    dataset.accuracy[:, :, :, 1, :-1] = 0.1
    dataset.loss[:, :, :, 1] = 1 + dataset.seed.values[:, None] / 10
    assert [e.sign for e in summarise(dataset).conditions[1].differences["validation"].values()] == [0] * 6
    assert len(summarise(dataset).conditions[1].evidence) == 2


def test_the_evidence_in_full():
    evidence = summarise(with_accuracy([0.5, 0.6], [0.51, 0.6])).conditions[1].evidence
    assert evidence[0] == (
        "Validation accuracy, A = 10, T = 50 (1.25 ep): dynamical − static = +0.50 points (95 % CI −5.85 to 6.85, "
        "2 seeds, signed-rank p = 1): no difference established."
    )


def test_members_that_collapsed_are_named_with_what_became_of_them(tmp_path):
    dataset = results(seeds=4, amplitudes=(10, 70), evaluations=8, steps=400)
    validation = dataset.accuracy.sel(split="validation").isel(period=0)
    validation[:] = np.linspace(0.3, 0.7, 8)
    validation[1, 2, 3:] = [0.1, 0.2, 0.5, 0.56, 0.56]  # fell to chance at the fourth evaluation, and came back
    validation[2, 0, 6:] = [0.29, 0.28]  # lost more than half, for good
    validation[2, 1, 6:] = 0.4  # lost less
    dataset.accuracy.loc[{"split": "validation"}] = validation.expand_dims(period=[50.0]).transpose(
        *(name for name in dataset.accuracy.dims if name != "split")
    )
    static, ten, seventy = summarise(dataset).conditions
    assert static.collapsed == {} and set(ten.collapsed) == {2} and set(seventy.collapsed) == {0}
    assert ten.collapsed[2].update == 200 and seventy.collapsed[0].update == 350
    assert ten.outcomes["validation"]["accuracy"].n == 4  # they stay in the means
    for text in outputs(dataset, tmp_path).values():
        assert "2 of 12 members" in text
        assert "T = 50 (1.25 ep): seed 2 from 41% to 10% at update 200, 56% in the end" in text
        assert "seed 0 from 59% to 29% at update 350, 28% in the end" in text
    assert "| 10 | 50 | 4/4 | 0 | 1 |" in outputs(dataset, tmp_path)["markdown"]


def test_a_low_accuracy_that_never_was_higher_is_no_collapse():
    dataset = results(seeds=2)
    dataset.accuracy[..., 1, :] = np.array([0.12, 0.15, 0.17, 0.11, 0.1, 0.12, 0.18, 0.124])
    assert not any(c.collapsed for c in summarise(dataset).conditions)


def test_many_conditions_at_chance_are_counted_and_some_named():
    dataset = results(amplitudes=(1, *range(2, 11)), seeds=2)
    dataset.accuracy[..., -1] = 0.1
    (notice,) = [n for n in summarise(dataset).notices if n.startswith("AT CHANCE")]
    assert "20 of 20 members" in notice and notice.count("seed ") == 6 and "and 4 more" in notice


def test_many_collapsed_members_are_counted_and_some_named():
    dataset = results(seeds=20)
    dataset.accuracy[1, 0, :, 1, -1] = 0.1
    (notice,) = [n for n in summarise(dataset).notices if n.startswith("COLLAPSED")]
    assert "20 of 40 members" in notice and notice.count("seed ") == 6 and "and 14 more" in notice


@pytest.mark.parametrize("n", [2, 5, 6, 8, 11])
@pytest.mark.parametrize("ties", [False, True])
def test_the_signed_rank_test_is_that_of_scipy(n, ties):
    rng = np.random.default_rng(n)
    sample = rng.normal(0.4, 1, n)
    sample = np.round(2 * sample) / 2 if ties else sample
    sample[0] = sample[0] or 0.5
    wilcoxon: Any = stats.wilcoxon  # its stubs know no permutations
    oracle = wilcoxon(sample, method=stats.PermutationMethod())
    found = Estimate.of(dict(enumerate(sample.tolist())), differences=True).rank_p
    assert found == pytest.approx(oracle.pvalue)


def test_differences_that_are_all_zero_but_for_rounding_have_no_ranks():
    assert Estimate.of({0: 0.0, 1: 3e-9, 2: -2e-9}, differences=True).rank_p == 1
    assert Estimate.of({0: 1.0, 1: 2.0}).rank_p is None  # an outcome is no difference


def test_diverged_members_are_left_out_of_both_sides_of_a_difference_and_reported(tmp_path):
    dataset = results(seeds=4, diverged={1: 100, 6: 200})  # static seed 1, dynamical seed 2
    static, dynamical = summarise(dataset).conditions
    assert (static.diverged, dynamical.diverged) == ([1], [2])
    assert list(static.outcomes["validation"]["accuracy"].values) == [0, 2, 3]
    assert list(dynamical.differences["validation"]["loss"].values) == [0, 3]
    for text in outputs(dataset, tmp_path).values():
        assert "DIVERGED (became non-finite): 2 of 8 members" in text


def test_a_frozen_member_whose_evaluations_stay_finite_is_left_out():
    dataset = results(seeds=3)
    dataset.diverged_at[1, 0, 2] = 7
    assert summarise(dataset).conditions[1].outcomes["train"]["loss"].n == 2


def test_a_member_that_is_not_finite_counts_as_diverged_even_if_not_flagged():
    dataset = results(seeds=3)
    dataset.loss[1, 0, 2, 1, -1] = np.inf
    assert summarise(dataset).conditions[1].diverged == [2]


def test_members_that_an_interrupted_run_never_came_to_are_not_called_diverged(tmp_path):
    dataset = results(seeds=3, finished=False)
    dataset.accuracy.loc[{"amplitude": 10, "seed": 2}] = dataset.loss.loc[{"amplitude": 10, "seed": 2}] = np.nan
    static, dynamical = summarise(dataset).conditions
    assert (static.missing, dynamical.missing, dynamical.diverged) == (0, 1, [])
    assert (static.used, dynamical.used) == (3, 2)
    assert list(dynamical.differences["validation"]["accuracy"].values) == [0, 1]
    for text in outputs(dataset, tmp_path).values():
        assert "NOT REACHED: 1 of 6 members" in text and "DIVERGED" not in text


def test_when_every_member_diverged_there_is_nothing_to_compare(tmp_path):
    dataset = results(seeds=2, diverged={2: 10, 3: 10})
    evidence = summarise(dataset).conditions[1].evidence
    assert len(evidence) == 2 and all("nothing to compare" in sentence for sentence in evidence)
    assert "| 10 | 50 | 0/2 | 2 | 0 | – |" in outputs(dataset, tmp_path)["markdown"]


def test_one_seed_has_a_mean_but_no_spread(tmp_path):
    dataset = results(seeds=1)
    texts = outputs(dataset, tmp_path)
    rows = [line for line in texts["markdown"].splitlines() if line.startswith("| 1")]
    assert len(rows) == 6 and not any("±" in row or "[" in row or "nan" in row for row in rows)
    assert "(1 seed): one seed has no interval, so no difference is established" in texts["markdown"]
    difference = json.loads(texts["json"])["conditions"][1]["differences"]["validation"]["accuracy"]
    assert difference["n"] == 1 and difference["std"] is None and difference["low"] is None


def test_the_last_evaluation_of_each_split_counts():
    dataset = results(evaluations=4, steps=400)
    dataset.accuracy[..., 0, :] = np.nan
    summary = summarise(dataset)
    assert summary.evaluated_at == {"train": None, "validation": 400}
    assert "train" not in summary.conditions[0].outcomes


@pytest.mark.parametrize("evaluations", [2, 0])
def test_an_interrupted_run_says_so(tmp_path, evaluations):
    dataset = results(evaluations=evaluations, finished=False, steps_done=1300, steps_planned=4000)
    for text in outputs(dataset, tmp_path).values():
        assert "INTERRUPTED after 1,300 of 4,000 updates" in text


def test_digits_are_never_mistaken_for_cifar10(tmp_path):
    for text in outputs(results(dataset="digits"), tmp_path).values():
        assert "stand-in, not CIFAR-10" in text and "NOT CIFAR-10" in text
    for text in outputs(results(), tmp_path).values():
        assert "CIFAR-10" in text and "stand-in" not in text


def test_json_is_strict_and_complete(tmp_path):
    dataset = results(diverged={4: 10}, command="python -m x", device="cpu", jax="0.1", weird=np.float32("nan"))

    def reject(token):
        raise AssertionError(token)

    text = outputs(dataset, tmp_path)["json"]
    document = json.loads(text, parse_constant=reject)
    assert document["attributes"]["command"] == "python -m x" and document["attributes"]["weird"] is None
    assert document["conditions"][1]["evidence"] and document["conditions"][0]["evidence"] == []


def test_markdown_says_how_it_was_made_and_warns_of_many_comparisons(tmp_path):
    dataset = results(amplitudes=(10, 70), command="python -m x", device="cpu", jax="0.1", git_commit="abc")
    text = outputs(dataset, tmp_path)["markdown"]
    for line in ("command: `python -m x`", "device: `cpu`", "jax: `0.1`", "git commit: `abc`"):
        assert f"- {line}\n" in text
    assert "not corrected for multiple comparisons: of 2 conditions" in text
    assert "multiple comparisons" not in outputs(results(), tmp_path)["markdown"]


def test_the_static_loss_must_come_first():
    with pytest.raises(ValueError, match="static"):
        summarise(results().isel(amplitude=[1, 0]))
