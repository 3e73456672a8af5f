"""Corpora of given texts under any tokenizer, a reference for them, tokenizers of other kinds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from model_helpers import small_llama
from slm.model.folder import save_model
from slm.prepare.command import prepare
from slm.score.command import score
from slm.store.document_scores import DocumentScores, open_parts
from slm.store.shards import Corpus
from slm.store.tokenizer import train_tokenizer, vocabulary_size

WORDS = "scores of a text stay with it, wherever the text goes next and whoever reads it".split()
TEXTS = [" ".join(WORDS[i % 7 : 3 + i % 11]) + f" {i}." for i in range(14)]
TEXTS[3] = "Z\u00fcrich \U0001f600  two  spaces\n\tand <|endoftext|> as text"
TEXTS[5] = "e\u0301 decomposed"
END = "the end of a corpus cuts this one, and it is found by its beginning. " * 3


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space in front, words of \u2581, bytes for what has no token."""
    words = ["\u2581" + word for word in ("a", "text", "it", "stay", "with")]
    pieces = sorted(
        {"\u2581", *"".join(words), *(w[:i] for w in words for i in range(2, len(w) + 1))}
    )
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= {piece: 259 + i for i, piece in enumerate(pieces)}
    merges = [(w[: i - 1], w[i - 1]) for w in words for i in range(2, len(w) + 1)]
    merges = list(dict.fromkeys(merges))
    model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(model)
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    backend.normalizer = normalizers.Sequence(steps)  # type: ignore[assignment]
    backend.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def words(joined: bool) -> PreTrainedTokenizerFast:
    """Neither bytes nor fallback: spaces are in no token."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "ab": 2, "cd": 3}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    if joined:
        backend.decoder = decoders.Fuse()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def normalized(tokenizer: Any, step: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.normalizer = step
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokenizer.eos_token)


def byte_level(vocab_size: int = 270) -> PreTrainedTokenizerFast:
    """Another than the tests' own."""
    return train_tokenizer(["wherever whoever next " * 9], vocab_size)


def corpus_of(folder: Path, texts: list[str], tokenizer: Any, **more: Any) -> Corpus:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder / "given")
    (folder / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings: dict[str, Any] = {"seq_len": 8, "shard_tokens": 60, "heldout_ratio": 0, "num_proc": 1}
    made = prepare(
        [{"path": str(folder / "t.jsonl"), "text": "{text}"}],
        str(folder / "made"),
        tokenizer={"path": str(folder / "given")},
        **(settings | more),
    )
    assert made.train is not None
    return made.train


def save_reference(folder: Path, tokenizer: Any, seed: int = 0) -> Path:
    import torch

    torch.manual_seed(seed)
    model = small_llama(vocabulary_size(tokenizer))
    for parameter in model.parameters():  # far from uniform: an error of the place shows
        torch.nn.init.normal_(parameter, std=0.5)
    save_model(folder, model, tokenizer, "card", {})
    return folder


def score_into(out: Path, corpus: Corpus, reference: Path, **more: Any) -> DocumentScores:
    """The part that it made."""
    before = {path.parent for path in out.glob("*/manifest.json")}
    settings: dict[str, Any] = {"layout": "documents", "batch_size": 3, "device": "cpu"}
    score(corpus, out, reference_model=reference, **(settings | more))
    (made,) = [part for part in open_parts([str(out)], "full") if part.folder not in before]
    return made


def documents_of(part: DocumentScores) -> list[np.ndarray]:
    """The log-probs of each document."""
    found = []
    for shard in part.shards:
        starts = part.column("documents", shard.index)[:, 0]
        scores = np.asarray(part.column("logprobs", shard.index))
        found += np.split(scores, starts[1:]) if len(starts) else []
    return found
