"""Small real folders: a tokenizer, corpora made by hand, references with known scores."""

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slm import demo
from slm.prepare.encoder import token_bytes
from slm.selection.registry import RULES
from slm.store.files import write_array, write_json
from slm.store.shards import FORMAT, Corpus, References, write_manifest
from slm.store.sidecars import Shard, shard_path, write_sidecar
from slm.store.tokenizer import tokenizer_sha256, train_tokenizer

SKETCHED = """
from slm.report.paper import plots
plots.lay_out = lambda figure: None
plots.save_picture = lambda figure, path, **_: path.write_bytes(b"drawn")
"""
TEXT = [
    "Selective language modeling trains on the tokens that are worth learning.",
    "A reference model scores every token of the corpus once; the scores are stored.",
    "The loss of the target model minus the loss of the reference model is the excess loss.",
    "def divide(total, count):\n    return total / count\n",
    "Zahlen wie 3,1415 und Zeichen wie \u00e4, \u00f6 und \u00fc haben mehrere Bytes. \U0001f600",
] * 8


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def rules_of_this_test_alone() -> Iterator[None]:
    """A module of one's own registers its rules for the process, which other tests share."""
    before = set(RULES)
    yield
    for word in set(RULES) - before:
        sys.modules.pop(RULES.pop(word).__module__, None)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(TEXT, 300)


@pytest.fixture(scope="session")
def make_corpus(tokenizer) -> Callable[..., Corpus]:
    """make_corpus(folder, shards of token ids, seq_len) -> Corpus"""

    def make(
        folder: Path,
        shards: list[np.ndarray],
        seq_len: int,
        packing: str = "concat",
        starts: list[list[int]] | None = None,
        vocab_size: int | None = None,
        masks: list[list[bool]] | None = None,
        signal: list[list[int]] | None = None,
        weights: list[list[float]] | None = None,
        sources: Sequence[str] = ("test",),  # of a shard's documents in turn
    ) -> Corpus:
        folder.mkdir(parents=True)
        tokenizer.save_pretrained(folder / "tokenizer")
        plan = {
            "format": FORMAT,
            "kind": "corpus",
            "tokenizer_sha256": tokenizer_sha256(tokenizer),
            "vocab_size": vocab_size or len(tokenizer),
            "eos_id": tokenizer.eos_token_id,
            "seq_len": seq_len,
            "packing": packing,
            "split": folder.name,
            "sources": list(sources),
        }
        write_json(folder / "plan.json", plan)
        sizes = token_bytes(tokenizer)
        for index, ids in enumerate(shards):
            tokens = np.asarray(ids, np.uint16)
            first = [0] if starts is None else starts[index]
            columns: dict[str, np.ndarray] = {
                "tokens": tokens,
                "documents": np.array(
                    [[s, i % len(sources), i, 0] for i, s in enumerate(first)], np.int64
                ),
                "bytes": sizes[np.minimum(tokens, len(sizes) - 1)].astype(np.uint8),
            }
            if masks is not None:
                columns["masks"] = np.array(masks[index])
            if signal is not None:
                columns["signal"] = np.array(signal[index], np.int8)
            if weights is not None:
                columns["weights"] = np.array(weights[index], np.float32)
            hashes = {c: write_array(shard_path(folder, c, index), a) for c, a in columns.items()}
            dtypes = {c: str(a.dtype) for c, a in columns.items()}
            rows = {c: len(a) for c, a in columns.items()}
            write_sidecar(folder, "tokens", Shard(index, len(tokens), hashes, dtypes, rows))
        write_manifest(folder, "tokens", len(shards))
        return Corpus.open(folder)

    return make


@pytest.fixture(scope="session")
def make_references() -> Callable[..., References]:
    """make_references(folder, corpus, log-probs of each shard, entropies) -> References

    more: fields of its plan
    """

    def make(
        folder: Path,
        corpus: Corpus,
        logprobs: list[np.ndarray],
        entropy: list[np.ndarray] | None = None,
        **more: Any,
    ) -> References:
        folder.mkdir(parents=True)
        fields = ("tokenizer_sha256", "vocab_size", "seq_len", "packing")
        plan = {
            "format": FORMAT,
            "kind": "reference",
            "corpus_fingerprint": corpus.fingerprint,
            "model_sha256": "by hand",
            "scoring": {"dtype": "float32", "attn_implementation": "sdpa", "device": "cpu"},
        } | {field: corpus.manifest[field] for field in fields}
        write_json(folder / "plan.json", plan | more)
        for index, scores in enumerate(logprobs):
            columns = {"logprobs": np.asarray(scores, np.float32)}
            if entropy is not None:
                columns["entropy"] = np.asarray(entropy[index], np.float32)
            hashes = {c: write_array(shard_path(folder, c, index), a) for c, a in columns.items()}
            dtypes, rows = dict.fromkeys(columns, "float32"), dict.fromkeys(columns, len(scores))
            write_sidecar(folder, "logprobs", Shard(index, len(scores), hashes, dtypes, rows))
        write_manifest(folder, "logprobs", len(logprobs))
        return References.open(folder)

    return make


@pytest.fixture(scope="session")
def made_corpus(tmp_path_factory, tokenizer, make_corpus) -> Corpus:
    """Two shards of real text in windows of 16, for reading."""
    ids = [token for text in TEXT for token in [*tokenizer.encode(text), tokenizer.eos_token_id]]
    cut = 16 * 20 + 1
    folder = tmp_path_factory.mktemp("made") / "corpus"
    return make_corpus(folder, [np.array(ids[:cut]), np.array(ids[cut : 2 * cut])], 16)


@pytest.fixture
def text_corpus(tmp_path, made_corpus) -> Corpus:
    """A test's own copy."""
    return Corpus.open(shutil.copytree(made_corpus.folder, tmp_path / "corpus"))


@pytest.fixture(scope="session")
def bytes_folder(tmp_path_factory) -> str:
    """A tokenizer without merges: every byte is a token."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["a"], 258).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def cut_demo_texts() -> Callable[[Path, int], None]:
    """cut_demo_texts(folder, bytes): of so much source on either side; more would show no more."""

    def cut(folder: Path, size: int) -> None:
        kept, sizes = [], {True: 0, False: 0}
        for name, path in demo.source_files():
            side = demo.is_heldout(name)
            if sizes[side] < size:
                kept.append((name, path))
                sizes[side] += path.stat().st_size
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(demo, "source_files", lambda: kept)
            demo.write_texts(folder)

    return cut


def swap_ids(folder: Path) -> None:
    """Two tokens of the tokenizer in `folder` change their ids."""
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text())
    vocab = state["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(state))


@pytest.fixture
def kept(monkeypatch) -> Iterator[list[Any]]:
    """The figures that would have been closed."""
    import matplotlib.pyplot as plt

    figures: list[Any] = []
    close = plt.close
    monkeypatch.setattr(plt, "close", figures.append)
    yield figures
    close("all")


@pytest.fixture
def sketched(monkeypatch) -> None:
    """Of pictures only the names and tables are written: what draws them has tests of its own."""
    from slm.report.paper import plots

    monkeypatch.setattr(plots, "lay_out", plots.lay_out)  # put back afterwards
    monkeypatch.setattr(plots, "save_picture", plots.save_picture)
    exec(SKETCHED, {})


@pytest.fixture
def call(monkeypatch, capsys) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """call(main, words) runs a command in this process; exit code, stdout, stderr."""
    loggers = [logging.getLogger(name) for name in (None, "hydra", "slm", "slm_kernels")]
    handlers, levels = loggers[0].handlers[:], [one.level for one in loggers]

    def run(main: Callable[[], Any], *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["slm x", *words])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        out, err = capsys.readouterr()
        return code, out, err

    yield run
    loggers[0].handlers[:] = handlers  # Hydra has put its own there, and conf/base.yaml levels
    for one, level in zip(loggers, levels, strict=True):
        one.setLevel(level)
