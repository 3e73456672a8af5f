"""Analyses of small stores made by hand, whose tokens are any bytes."""

from pathlib import Path
from typing import Any

import numpy as np

from slm.dynamics.analysis import Analysis, analyse
from slm.dynamics.token_set import TokenSet
from slm.dynamics.trajectories import KIND, TrajectoryStore
from slm.store.shards import FORMAT

EXCESS = {"_target_": "slm.selection.Excess", "select_ratio": 0.5, "scope": "batch"}


def make_token_set(
    texts: list[list[bytes]], dead: int = 1, references: bool = True, labels: bool = False
) -> TokenSet:
    """One window a list of bytes; the last `dead` targets of the first window are none.

    Labels are noise, signal, unknown, over and over.
    """
    known = {piece: index for index, piece in enumerate(dict.fromkeys(sum(texts, [])))}
    tokens = np.array([[known[piece] for piece in text] for text in texts], np.uint32)
    live = np.ones((len(texts), tokens.shape[1] - 1), bool)
    live[0, live.shape[1] - dead :] = False
    count = int(live.sum())
    columns: dict[str, Any] = {"source": (np.arange(count) % 2).astype(np.uint16)}
    if references:
        shuffled = np.random.default_rng(1).permutation(np.linspace(0.1, 4, count))
        columns["reference_loss"] = shuffled.astype(np.float32)
    if labels:
        columns["signal"] = np.resize(np.array([0, 1, -1], np.int8), count)
    pieces = {index: piece for piece, index in known.items()}
    return TokenSet(np.arange(len(texts)) * 3, tokens, live, columns, pieces)


def make_losses(checkpoints: int, count: int, seed: int = 0) -> np.ndarray:  # (C, M)
    """A quarter each: high, rising, falling, low."""
    rng = np.random.default_rng(seed)
    kind, x = np.arange(count) % 4, np.linspace(0, 1, checkpoints)[:, None]
    start = np.array([5.0, 1.0, 4.0, 0.5])[kind]
    slope = np.array([0.0, 2.0, -3.0, 0.0])[kind]
    return np.abs(start + slope * x + rng.normal(0, 0.03, (checkpoints, count)))


def make_analysis(
    folder: Path,
    texts: list[list[bytes]],
    name: str = "run",
    checkpoints: int = 6,
    references: bool = True,
    spacing: int = 1000,
    sources: tuple[str, str] = ("prose", "code"),
    batch: int = 2,  # windows that are ranked together
    **more: Any,
) -> Analysis:
    tokens = make_token_set(texts, references=references, **more)
    run = {"seed": 0, "selection": EXCESS, "selection_start": 0, "micro_batch_size": batch}
    plan = {
        "format": FORMAT,
        "kind": KIND,
        "corpus_fingerprint": "c0ffee",
        "windows_sha256": str(tokens.windows.tolist()),
        "sources": list(sources),
        "run": run,
    }
    store = TrajectoryStore.create(folder, plan, tokens)
    for index, column in enumerate(make_losses(checkpoints, tokens.num_targets)):
        store.append(index * spacing, column)
    return analyse(store, name)


WORDS = [b"The", b" loss", b" of", b" a", b" token", b" falls", b".", b"\n", b" It", b" rises"]


def prose(windows: int, length: int) -> list[list[bytes]]:
    rng = np.random.default_rng(0)
    return [[WORDS[i] for i in rng.integers(0, len(WORDS), length)] for _ in range(windows)]


def truth_rows(run: str = "a") -> list[dict]:
    found = []
    for part, signal in (("all", 30), ("<web>", 10)):
        for seen in (0, 1000, 2000):
            for score, auc in (("excess_loss", 0.6 + seen / 10_000), ("random", 0.5)):
                found.append(
                    {
                        "run": run,
                        "part": part,
                        "tokens_seen": seen,
                        "score": score,
                        "auc": auc,
                        "base_rate": signal / 40,
                        "precision_at_0.2": auc + 0.1,
                        "precision_at_0.4": auc,
                        "num_signal": signal,
                        "num_noise": 40 - signal,
                    }
                )
    return found
