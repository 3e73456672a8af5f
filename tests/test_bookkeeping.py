"""Quantiles against NumPy, keep rates against counting, on records made by hand."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from slm.bookkeeping import quantiles, source_metrics, token_metrics
from slm.module import TokenRecord


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
