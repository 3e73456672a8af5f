"""evaluation.csv, the classifiers and what they keep -> results.csv, quality.csv, kept.csv."""

import csv
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from slm.store.files import read_json

HERE = Path(__file__).parent
SETS = ("gsm8k_test", "math_500", "corpus")
REFERENCES = ("hashed", "hidden", "random", "truth")
ARMS = ["base", "all", "random_0.6", "mixed_all"]
ARMS += [f"excess_{name}" for name in REFERENCES] + [f"reference_{name}" for name in REFERENCES]
GOOD = ("gsm8k", "math", "aqua")  # what answer.py gives 3 and more


def read_losses(path: Path) -> dict[tuple[str, str], list[float]]:
    """(arm, set) -> loss of each seed."""
    losses = defaultdict(list)
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            losses[row["model"].split("/")[0], row["set"]].append(float(row["loss"]))
    return losses


def write(name: str, rows: list[list[str]]) -> None:
    with open(HERE / name, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    for row in rows:
        print(*(f"{cell:>16}" for cell in row))


def results(folder: Path) -> list[list[str]]:
    """Mean, lowest and highest over seeds, nats per token."""
    losses = read_losses(folder / "evaluation.csv")
    rows = [["arm", "set", "mean", "low", "high", "seeds"]]
    for arm in ARMS:
        for name in SETS:
            found = losses[arm, name]
            values = (np.mean(found), min(found), max(found))
            rows.append([arm, name, *(f"{value:.4f}" for value in values), str(len(found))])
    return rows


def quality(folder: Path) -> list[list[str]]:
    """Cross-validated on the labels, and F1 of all documents by their sources."""
    rows = [["features", "on", "agreement", "kappa", "precision", "recall", "f1", "auc", "kept"]]
    for name in ("hashed", "hidden"):
        found = read_json(folder / "quality" / name / "manifest.json")["cross_validation"]
        rows.append(
            [name, "300 labels, cross-validated", *(f"{found[k]:.3f}" for k in rows[0][2:])]
        )
        sources = read_json(folder / "scores" / name / "manifest.json")["sources"]
        total = sum(one["documents"] for one in sources.values())
        kept = sum(one["kept"] for one in sources.values())
        right = sum(sources[one]["kept"] for one in GOOD)
        precision, recall = right / kept, right / sum(sources[one]["documents"] for one in GOOD)
        values = {"precision": precision, "recall": recall, "kept": kept / total}
        values["f1"] = 2 * precision * recall / (precision + recall)
        cells = [f"{values[k]:.3f}" if k in values else "" for k in rows[0][2:]]
        rows.append([name, f"{total} documents by source", *cells])
    return rows


def kept(folder: Path) -> list[list[str]]:
    """Documents of each source, and how many of them a curated corpus has."""
    reports = {name: read_json(folder / "corpora" / name / "report.json") for name in REFERENCES}
    rows = [["source", "documents", *REFERENCES]]
    for source, one in reports["hashed"]["kept"].items():
        shares = [reports[name]["kept"][source]["kept"] for name in REFERENCES]
        rows.append([source, str(one["documents"]), *map(str, shares)])
    return rows


def main() -> None:
    folder = Path(sys.argv[1])
    write("results.csv", results(folder))
    write("quality.csv", quality(folder))
    write("kept.csv", kept(folder))


if __name__ == "__main__":
    main()
