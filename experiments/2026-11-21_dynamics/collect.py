"""Classes and separation of the runs at their first and last checkpoint -> two small tables.

python collect.py OUT   (after run.sh; reads OUT/runs and OUT/report, writes beside this file)
"""

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np

from slm.dynamics.classes import CLASSES
from slm.dynamics.trajectories import TrajectoryStore
from slm.prepare.labels import NOISE, SIGNAL
from slm.selection.names import selection_name
from slm.store.files import write_csv

HERE = Path(__file__).parent


def class_rows(store: TrajectoryStore, seed: str) -> list[dict[str, Any]]:
    """Share of each class among all tokens, signal, noise and each source; their mean losses."""
    label = np.load(store.folder / "trajectories.npy")["label"]
    signal, source = store.tokens.columns["signal"], store.tokens.columns["source"]
    parts = {"all": signal > -2, "signal": signal == SIGNAL, "noise": signal == NOISE}
    parts |= {name: source == index for index, name in enumerate(store.sources)}
    first, last = store.losses()[0], store.losses()[-1]
    run = selection_name(store.plan["run"]["selection"])
    return [
        {"run": run, "seed": seed, "part": name, "num_tokens": int(mask.sum())}
        | {key: round(float((label[mask] == i).mean()), 4) for i, key in enumerate(CLASSES)}
        | {"loss_first": round(float(first[mask].mean()), 4)}
        | {"loss_last": round(float(last[mask].mean()), 4)}
        for name, mask in parts.items()
    ]


def main() -> None:
    out = Path(sys.argv[1])
    rows = []
    for folder in sorted((out / "runs").glob("*/*seed=*/dynamics/tokens")):
        rows += class_rows(TrajectoryStore(folder), folder.parts[-3].rpartition("=")[2])
    write_csv(HERE / "results.csv", rows)
    with open(out / "report" / "truth.csv", newline="") as file:
        found = list(csv.DictReader(file))
    ends = {found[0]["tokens_seen"], found[-1]["tokens_seen"]}
    write_csv(HERE / "truth.csv", [row for row in found if row["tokens_seen"] in ends])


if __name__ == "__main__":
    main()
