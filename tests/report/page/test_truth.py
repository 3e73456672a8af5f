"""The page's figure and table of signal and noise against rows made by hand."""

from dataclasses import replace

import numpy as np

from page_helpers import make_analysis, prose, truth_rows
from slm.report.page.truth import truth_figure, truth_figures, truth_ratios, truth_table


def test_a_line_a_score_of_all_labelled_tokens():
    found = truth_figure(truth_rows())
    assert [trace["name"] for trace in found["data"]] == ["high excess loss", "random"]
    assert found["data"][0]["x"] == [0, 1000, 2000]
    assert found["data"][0]["y"] == [0.6, 0.7, 0.8]
    assert found["data"][1]["y"] == [0.5, 0.5, 0.5]
    assert len({trace["marker"]["symbol"] for trace in found["data"]}) == 2


def test_the_table_is_of_the_last_checkpoint():
    found = truth_table(truth_rows())
    assert [(row["part"], row["label"]) for row in found] == [
        ("all", "high excess loss"),
        ("all", "random"),
        ("<web>", "high excess loss"),
        ("<web>", "random"),
    ]
    assert {row["tokens_seen"] for row in found} == {2000}
    assert found[0]["precision"] == [0.8 + 0.1, 0.8]
    assert truth_ratios(truth_rows()) == ["0.2", "0.4"]


def test_without_labels_there_is_nothing():
    assert truth_table([]) == truth_ratios([]) == []


def test_what_is_kept_of_signal_and_noise_is_the_analysis_own(tmp_path):
    analysis = make_analysis(tmp_path / "a", prose(4, 9), "a")
    assert analysis.kept is not None and truth_figures(analysis, []) == {}
    by_signal = np.linspace(0, 1, 2 * len(analysis.tokens_seen)).reshape(-1, 2)
    analysis = replace(analysis, kept=replace(analysis.kept, by_signal=by_signal))
    found = truth_figures(analysis, truth_rows())["truth_kept"]["data"]
    assert [trace["name"] for trace in found] == ["signal", "noise"]
    np.testing.assert_allclose(found[0]["y"], by_signal[:, 1], atol=1e-4)
    np.testing.assert_allclose(found[1]["y"], by_signal[:, 0], atol=1e-4)
    assert truth_figures(replace(analysis, kept=None), truth_rows()).keys() == {"truth"}
