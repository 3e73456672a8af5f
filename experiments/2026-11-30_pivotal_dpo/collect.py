"""results.csv and figure.png of arms-*.csv: python collect.py OUT HERE"""

import csv
import statistics
import sys
from pathlib import Path

import matplotlib.pyplot as plt


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def main(out: Path, here: Path) -> None:
    rows = [row for path in sorted(out.glob("arms-*.csv")) for row in rows_of(path)]
    with open(here / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    shown = [arm for arm in arms if arm != "before SFT"]  # far to the left
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    for axis, measure in zip(axes, ("sampled", "greedy"), strict=True):
        for arm in arms:
            found = [100 * float(row[measure]) for row in rows if row["arm"] == arm]
            mean, spread = statistics.mean(found), statistics.stdev(found)
            print(f"{measure} {arm}: {mean:.1f} +- {spread:.1f}")
            if arm not in shown:
                continue
            place = shown.index(arm)
            axis.plot(found, [place] * len(found), "o", color="0.6", markersize=4)
            axis.plot(mean, place, "|", color="C0", markersize=14, markeredgewidth=2.5)
        axis.set_xlabel(f"solved, {measure}, % of problems")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(shown)), shown)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(here / "figure.png", dpi=150)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
