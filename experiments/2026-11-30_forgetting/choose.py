"""What is kept out at each share: a bound for tokens, a list for documents. And how good s is.

python choose.py CORPUS REFERENCES TEXT OUT TABLES SHARE...

    OUT/<share>/max_gain         nats: the bound of selection=forget that keeps out so many per cent
    OUT/<share>/<source>.jsonl   the records, `keep` 0 for whole documents of the highest mean s, of
                                 as many tokens
    TABLES/auc.csv                area under the ROC curve of s on the labelled characters
    TABLES/kept_out.csv           of each choice: what share of the domain's and of other tokens
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slm.dynamics.truth import auc
from slm.selection.purposes import Forget
from slm.store.files import write_csv
from slm.store.shards import Corpus
from slm.store.windows import Batch, Windows, open_windows

REACHES = (0, 1, 2, 4, 8, 16)


def whole(windows: Windows) -> Batch:
    return windows.batch(np.arange(len(windows)))


def gains(batch: Batch, reach: int) -> np.ndarray:  # (targets,) nats, as the rule has them
    rule = Forget(max_gain=0.0, smooth=reach)
    return -rule.score(batch, None)[rule.candidates(batch)].numpy()


def documents_of(corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:  # (targets,), (documents, 4)
    """The document of every target of a corpus of one shard."""
    rows = corpus.column("documents", 0)
    places = np.arange(1, corpus.num_targets + 1)
    return np.searchsorted(rows[:, 0], places, side="right") - 1, rows


def left_out(mean: np.ndarray, sizes: np.ndarray, share: float) -> np.ndarray:  # (documents,) bool
    """Those of the highest mean, up to the share of the tokens that one more would overstep."""
    ranked = np.argsort(-mean, kind="stable")
    chosen = ranked[np.cumsum(sizes[ranked]) <= share * sizes.sum()]
    return np.isin(np.arange(len(mean)), chosen)


def write_records(text: Path, out: Path, names: list[str], rows: Any, out_of: np.ndarray) -> None:
    for number, name in enumerate(names):
        records = [json.loads(line) for line in (text / f"{name}.jsonl").read_text().splitlines()]
        gone = set(rows[out_of & (rows[:, 1] == number), 2].tolist())
        lines = [json.dumps(r | {"keep": int(i not in gone)}) for i, r in enumerate(records)]
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def main() -> None:
    folder, references, text, out, tables = map(Path, sys.argv[1:6])
    corpus = Corpus.open(folder)
    both = [str(references / name) for name in ("general", "domain")]
    windows = open_windows(corpus, both, "domain")
    batch = whole(windows)
    label = windows.signal(np.arange(len(windows))).ravel() == 1
    document, rows = documents_of(corpus)
    gain = gains(batch, Forget(max_gain=0.0).smooth)
    sizes = np.bincount(document, minlength=len(rows))
    mean = np.bincount(document, gains(batch, 0), len(rows)) / np.maximum(1, sizes)
    scores = {f"s, mean over {reach} on either side": gains(batch, reach) for reach in REACHES}
    scores |= {
        "mean s of the document": mean[document],
        "low loss of the domain's reference": batch["domain_logprob"].ravel().numpy(),
        "low loss of the general reference": batch["reference_logprob"].ravel().numpy(),
    }
    of_tokens = [
        {"score": name, "auc": f"{auc(values, label):.4f}"} for name, values in scores.items()
    ]
    write_csv(tables / "auc.csv", of_tokens)
    found = []
    for share in map(int, sys.argv[6:]):
        (out / str(share)).mkdir(parents=True, exist_ok=True)
        bound = float(np.quantile(gain, 1 - share / 100))
        (out / str(share) / "max_gain").write_text(f"{bound:.6f}\n")
        whole_ones = left_out(mean, sizes, share / 100)
        write_records(text, out / str(share), corpus.manifest["sources"], rows, whole_ones)
        for what, gone in (("tokens", gain > bound), ("documents", whole_ones[document])):
            shares = {"all": gone, "domain": gone[label], "other": gone[~label]}
            found.append(
                {"share": str(share), "unit": what, "max_gain": f"{bound:.4f}"}
                | {f"kept_out_of_{name}": f"{part.mean():.4f}" for name, part in shares.items()}
            )
    write_csv(tables / "kept_out.csv", found)
    for row in [*of_tokens, *found]:
        print(*row.values())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
