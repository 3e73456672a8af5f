"""How far references agree, and how well the excess over each tells signal from noise.

    python agreement.py BASE CORPUS REFERENCES OUT.csv     REFERENCES: windows/, documents/, other/

Losses are those of the base, from which the targets begin. What is selected in the corpus is the
top k of 32 windows, as in a step (scope=batch): the share of it that another reference does not
select. AUC is over the labelled tokens of the held-out side.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from slm.dynamics.truth import auc
from slm.model.build import SelectiveLM, load_model
from slm.score.command import window_scores
from slm.store.columns import LOGPROBS, columns_named
from slm.store.files import write_csv
from slm.store.shards import Corpus, References
from slm.store.windows import Windows, spread

BATCH, MOST, RATIOS = 32, 1024, (0.4, 0.6)
NAMES = ("windows", "documents", "other")


def losses(lm: SelectiveLM, windows: Windows, numbers: np.ndarray) -> np.ndarray:  # (n, T)
    batches = np.split(numbers, range(BATCH, len(numbers), BATCH))
    found = [window_scores(lm, windows, one, columns_named([]))[LOGPROBS.name] for one in batches]
    return -np.concatenate(found)


def reference_losses(corpus: Corpus, folder: Path, numbers: np.ndarray) -> np.ndarray:  # (n, T)
    batch = Windows(corpus, [References.open(folder)]).batch(numbers)
    return -batch["reference_logprob"].numpy().astype(np.float64)


def selected(excess: np.ndarray, ratio: float) -> np.ndarray:  # (n, T) bool
    """The highest of each batch, ties to the lower index."""
    chosen = np.zeros(excess.shape, bool)
    for start in range(0, len(excess), BATCH):
        values = excess[start : start + BATCH].ravel()
        kept = np.argsort(-values, kind="stable")[: int(ratio * values.size + 0.5)]
        chosen[start : start + BATCH].reshape(-1)[kept] = True
    return chosen


def flips(one: np.ndarray, other: np.ndarray, ratio: float) -> float:
    kept = selected(one, ratio)
    return float((kept & ~selected(other, ratio)).sum() / kept.sum())


def main() -> None:
    base, folder, references, out = sys.argv[1:]
    lm, rows = SelectiveLM(load_model(base)).eval(), []
    sides = {side: Corpus.open(f"{folder}/{side}") for side in ("train", "heldout")}
    numbers = {side: spread(corpus.num_windows, MOST) for side, corpus in sides.items()}
    own = {side: losses(lm, Windows(corpus), numbers[side]) for side, corpus in sides.items()}
    known = {
        side: {
            name: reference_losses(corpus, Path(references) / name / side, numbers[side])
            for name in NAMES
        }
        for side, corpus in sides.items()
    }
    labels = Windows(sides["heldout"]).signal(numbers["heldout"])
    for name in NAMES:
        theirs, before = known["train"][name], known["train"]["windows"]
        row: dict[str, Any] = {"reference": name, "loss": theirs.mean()}
        row["mean_absolute_difference"] = np.abs(theirs - before).mean()
        row["correlation"] = np.corrcoef(theirs.ravel(), before.ravel())[0, 1]
        for ratio in RATIOS:
            row[f"flipped_at_{ratio}"] = flips(own["train"] - before, own["train"] - theirs, ratio)
        known_ones = labels >= 0
        excess = (own["heldout"] - known["heldout"][name])[known_ones]
        row["auc_of_excess"] = auc(excess, labels[known_ones] == 1)
        row["auc_of_loss"] = auc(own["heldout"][known_ones], labels[known_ones] == 1)
        row |= {"windows": theirs.shape[0], "labelled_tokens": int(known_ones.sum())}
        rows.append({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
    write_csv(Path(out), rows)


if __name__ == "__main__":
    main()
