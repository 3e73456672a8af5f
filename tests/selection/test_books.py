"""Sums and keep rates against counting, quantiles against NumPy, on records made by hand."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from slm.selection.books import (
    SUMS,
    StepResult,
    TokenRecord,
    loss_metrics,
    means,
    named,
    quantiles,
    source_metrics,
    step_sums,
    token_metrics,
)


def make_records(with_reference: bool = True) -> list[TokenRecord]:
    """Two micro-batches of 3 windows of 7 tokens."""
    generator = torch.Generator().manual_seed(0)
    records = []
    for part in range(2):
        shape = (3, 7)
        valid = torch.rand(shape, generator=generator) < 0.8
        chosen = valid & (torch.rand(shape, generator=generator) < 0.5)
        token_loss = 5 * torch.rand(shape, generator=generator)
        reference = (3 * torch.rand(shape, generator=generator)).masked_fill(~valid, torch.nan)
        windows = torch.arange(3) + 10 * part
        given = reference if with_reference else None
        weight = torch.rand(shape, generator=generator).masked_fill(~valid, 0.0)
        records.append(TokenRecord(windows, valid, chosen, token_loss, given, weight))
    return records


def test_sums_are_of_the_right_tokens():
    """By a loop over tokens; a target without a score counts in what is about targets alone."""
    record = make_records()[0]
    reference = record.reference_loss
    assert reference is not None
    reference[0, 0], record.valid[0, 0], record.selected[0, 0] = torch.nan, True, False
    expected = dict.fromkeys(SUMS, 0.0)
    for valid, chosen, loss, given, weight in zip(
        *(values.flatten().tolist() for values in record[1:] if values is not None), strict=True
    ):
        scored = valid and given == given
        expected["loss_weighted"] += weight * loss * valid
        expected["loss_selected"] += loss * chosen
        expected["loss_valid"] += loss * valid
        expected["loss_scored"] += loss if scored else 0
        expected["num_selected"] += chosen
        expected["num_trained"] += weight != 0
        expected["num_valid"] += valid
        expected["reference_loss"] += given if scored else 0
        expected["reference_loss_selected"] += given if chosen else 0
        expected["num_scored"] += scored
        expected["num_below_reference"] += scored and loss < given
        expected["weight"] += weight
        expected["weight_squared"] += weight**2
    assert named(step_sums(record).tolist()) == pytest.approx(expected, rel=1e-12)
    assert expected["num_scored"] == expected["num_valid"] - 1
    without = named(step_sums(record._replace(reference_loss=None)).tolist())
    about = ("loss_scored", "reference_loss", "reference_loss_selected", "num_scored")
    nothing = dict.fromkeys((*about, "num_below_reference"), 0.0)
    assert without == pytest.approx(expected | nothing, rel=1e-12)


def test_what_has_no_tokens_has_no_mean():
    assert means(dict.fromkeys(SUMS, 0.0)) == {}
    all_of_two = {"num_valid": 2.0, "num_selected": 2.0, "loss_valid": 3.0, "loss_selected": 3.0}
    found = means(dict.fromkeys(SUMS, 0.0) | all_of_two)
    assert found == {
        "loss_all": 1.5,
        "loss_selected": 1.5,
        "kept_frac": 1.0,
        "scored_frac": 0.0,
        "weight_mean": 0.0,
    }


def test_loss_metrics_by_hand():
    by_hand = {
        "loss_weighted": 36.0,
        "loss_selected": 30.0,
        "loss_valid": 40.0,
        "loss_scored": 40.0,
        "num_selected": 10.0,
        "num_trained": 12.0,
        "num_valid": 20.0,
        "reference_loss": 25.0,
        "reference_loss_selected": 12.0,
        "num_scored": 20.0,
        "num_below_reference": 5.0,
        "weight": 8.0,
        "weight_squared": 6.4,
    }
    assert by_hand.keys() == set(SUMS)
    metrics = loss_metrics(StepResult(by_hand, 12.0, 0.55, 0.5, 3.0, []))
    assert metrics == {
        "train/loss": 3.0,
        "train/loss_all": 2.0,
        "train/loss_selected": 3.0,
        "train/loss_unselected": 1.0,
        "slm/kept_frac": 0.5,
        "slm/weight_mean": 0.4,
        "slm/effective_frac": 0.5,  # 8 * 8 / 6.4 = 10 of 20
        "slm/select_ratio": 0.55,
        "slm/reference_loss": 1.25,
        "slm/reference_loss_selected": 1.2,
        "slm/excess_mean": 0.75,
        "slm/excess_mean_selected": 1.8,
        "slm/below_reference_frac": 0.25,
        "slm/threshold": 0.5,
        "slm/num_selected": 10.0,
        "train/grad_norm": 3.0,
    }
    everything = {"loss_selected": 40.0, "num_selected": 20.0, "num_scored": 0.0}
    metrics = loss_metrics(StepResult(by_hand | everything, 18.0, None, None, 3.0, []))
    assert metrics == {
        "train/loss": 2.0,
        "train/loss_all": 2.0,
        "train/loss_selected": 2.0,
        "slm/kept_frac": 1.0,
        "slm/weight_mean": 0.4,
        "slm/effective_frac": 0.5,
        "slm/num_selected": 20.0,
        "train/grad_norm": 3.0,
    }


def test_quantiles_are_those_of_numpy():
    generator = torch.Generator().manual_seed(1)
    for size in (1, 2, 3, 10, 1001):
        values = torch.randn(size, generator=generator)
        expected = np.quantile(values.double().numpy(), [0.0, 0.1, 0.5, 0.9, 1.0])
        assert quantiles(values, [0.0, 0.1, 0.5, 0.9, 1.0]) == pytest.approx(expected, abs=1e-12)
    assert quantiles(torch.empty(0), [0.5]) == []


def test_metrics_are_of_the_right_tokens():
    records = make_records()
    metrics = token_metrics(records)
    loss, reference = (
        np.concatenate([np.asarray(part[i]).ravel() for part in records]) for i in (3, 4)
    )
    valid, selected = (
        np.concatenate([np.asarray(part[i]).ravel() for part in records]) for i in (1, 2)
    )
    columns = {"token_loss": loss, "reference_loss": reference, "excess_loss": loss - reference}
    sets = {"selected": selected, "unselected": valid & ~selected}
    assert len(metrics) == 3 * 2 * 3
    for column, values in columns.items():
        for name, mask in sets.items():
            for share in (10, 50, 90):
                expected = np.percentile(values[mask].astype(np.float64), share)
                found = metrics[f"slm/{column}_p{share}_{name}"]
                assert found == pytest.approx(expected, rel=1e-6)


def test_what_is_absent_is_left_out():
    assert len(token_metrics(make_records(with_reference=False))) == 2 * 3
    record = make_records()[0]
    everything = token_metrics([record._replace(selected=record.valid)])
    assert {name.rsplit("_", 1)[1] for name in everything} == {"selected"}
    nothing = token_metrics([record._replace(valid=record.valid & False)])
    assert nothing == {}


def test_keep_rates_count_targets_of_each_source():
    sources = {0: "aabbccd", 1: "bbbbbbb", 2: "aaaaaaa", 10: "ddddddd", 11: "abcdabc", 12: "c" * 7}

    def look_up(windows: np.ndarray) -> np.ndarray:
        return np.array([["abcde".index(letter) for letter in sources[w]] for w in windows])

    names = ["one", "two", "three", "four", "five"]  # of the fifth there is nothing
    windows: Any = SimpleNamespace(
        corpus=SimpleNamespace(manifest={"sources": names}), sources=look_up
    )
    records, counts = make_records(), {name: [0, 0.0, 0] for name in names}
    for part in records:
        for row, window in enumerate(part.window.tolist()):
            for column, letter in enumerate(sources[window]):
                count = counts[names["abcde".index(letter)]]
                count[0] += int(part.selected[row, column])
                count[1] += part.token_weight[row, column].item()
                count[2] += int(part.valid[row, column])
    known = {name: count for name, count in counts.items() if count[2]}
    expected = {f"slm/kept_frac/{name}": k / n for name, (k, _, n) in known.items()}
    expected |= {f"slm/weight_mean/{name}": w / n for name, (_, w, n) in known.items()}
    assert source_metrics(records, windows) == pytest.approx(expected)
    assert len(expected) == 8
