"""Texts as the tests write, read and find them."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from slm.prepare.encoder import Encoder, encoder_state
from slm.prepare.readers import read_blocks
from slm.prepare.records import read_texts
from slm.prepare.sources import Source, parse_sources
from slm.store.tokenizer import EOS

DATA = Path(os.environ.get("SLM_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="SLM_DATA (experiments/fetch_data.py) is not here"
)
LIMIT = 2**20  # bytes of a document


def source(path, **settings) -> Source:
    return parse_sources([{"path": str(path)} | settings], "sources")[0]


def texts(path, max_bytes=LIMIT, **settings):
    """(record, text or fault without the folder) of everything in a source."""
    one = source(path, **settings)
    return [
        (text.record, text.text if text.fault is None else fault(text.fault, path))
        for block in read_blocks([one], max_bytes)
        for text in read_texts(block, one, max_bytes)
    ]


def fault(sentence: str, path: Path) -> str:
    assert sentence.startswith(str(path)), sentence
    return sentence.removeprefix(str(path.parent) + "/")


def write_records(path: Path, *records) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def loses_spaces(tokenizer) -> PreTrainedTokenizerFast:
    """A byte-level vocabulary read as a SentencePiece one, as transformers 5.10.1 does by class."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)


TEXTS = [
    "plain words, and 12 numbers",
    " leading space\n\n  and   runs \t of them ",
    "Zürich, 東京, \U0001f600\U0001f600, e\u0301 (decomposed), \ufb01 (ligature)",
    "x",
    "a <|endoftext|> in the text is text",
]


def encode(tokenizer, texts):
    encoder = Encoder(encoder_state(tokenizer))
    sizes = np.array([len(text.encode()) for text in texts], np.int64)
    return encoder.encode(texts, sizes)


def files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def wait_for(path: Path, exists: bool = True) -> None:
    deadline = time.time() + 60
    while path.exists() != exists:
        assert time.time() < deadline, f"{path}: exists is still {not exists}"
        time.sleep(0.01)


def quote(value: object) -> str:
    if not isinstance(value, dict):
        return json.dumps(value)
    return "{" + ", ".join(f"{k}: {quote(v)}" for k, v in value.items()) + "}"
