"""The runs' evaluation.csv and heldout.csv -> results.csv, tokens_to_match.csv, figure.png."""

import csv
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from slm.report.paper.plots import draw
from slm.report.sweep_figures import loss_curves
from slm.train.curves import Curve, read_curve

HERE = Path(__file__).parent
SETS = ("gsm8k_test", "math_500", "noisy")
ARMS = {
    "base": "base, before",
    "reference": "reference model itself",
    "all": "all tokens",
    "random_0.6": "random 0.6",
    "excess_0.6": "excess 0.6",
    "excess_0.4": "excess 0.4",
    "mixed_all": "all, curated mixed in",
}
TRAINED = tuple(name for name in ARMS if name not in ("base", "reference"))


def read_losses(path: Path) -> dict[tuple[str, str], list[float]]:
    """(arm, set) -> loss of each seed."""
    losses = defaultdict(list)
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            losses[row["model"].split("/")[0], row["set"]].append(float(row["loss"]))
    return losses


def write_results(losses: dict[tuple[str, str], list[float]]) -> None:
    """Mean, lowest and highest over seeds, nats per token."""
    rows = [["arm", "set", "mean", "low", "high", "seeds"]]
    for arm in ARMS:
        for name in SETS:
            values = losses[arm, name]
            rows.append([arm, name, f"{np.mean(values):.4f}", f"{min(values):.4f}",
                         f"{max(values):.4f}", str(len(values))])  # fmt: skip
    with open(HERE / "results.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    for row in rows:
        print(*(f"{cell:>20}" for cell in row))


def in_domain(folder: Path, label: str) -> Curve:
    """Mean of the two in-domain sets."""
    one, two = (read_curve(folder, label, name) for name in SETS[:2])
    return Curve(label, one.tokens_seen, (one.loss + two.loss) / 2)


def tokens_to_match(curve: Curve, loss: float) -> float:
    """Tokens until the curve first reaches `loss`, interpolated; NaN if it never does."""
    below = np.flatnonzero(curve.loss <= loss)
    if len(below) == 0:
        return float("nan")
    index = int(below[0])
    if index == 0:
        return float(curve.tokens_seen[0])
    pair = slice(index - 1, index + 1)
    return float(np.interp(-loss, -curve.loss[pair], curve.tokens_seen[pair]))


def main() -> None:
    out = Path(sys.argv[1])
    write_results(read_losses(out / "evaluation.csv"))
    folders = {
        arm: sorted(path.parent for path in (out / "runs" / arm).glob("*/run.json"))
        for arm in TRAINED
    }
    curves = {arm: [in_domain(folder, ARMS[arm]) for folder in folders[arm]] for arm in TRAINED}
    reference = in_domain(out / "runs" / "reference", "reference").loss[-1]
    figure = loss_curves(
        [curve for runs in curves.values() for curve in runs],
        {"reference model": float(reference)},
        "In-domain loss (mean of GSM8K test and MATH-500), thin lines are seeds",
        start=1,
    )
    draw(figure, HERE / "figure.png")
    target = float(np.mean([curve.loss[-1] for curve in curves["all"]]))
    with open(HERE / "tokens_to_match.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["arm", "seed", "tokens_to_reach_all_tokens_final_loss"])
        for arm, runs in curves.items():
            for seed, curve in enumerate(runs):
                writer.writerow([arm, seed, f"{tokens_to_match(curve, target):.0f}"])


if __name__ == "__main__":
    main()
