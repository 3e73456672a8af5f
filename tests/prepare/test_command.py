"""Corpora by hand, the same bytes whatever the processes and crashes, exclusion, refusals."""

import copy
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import blake2b
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import warm
from slm.errors import UserError
from slm.prepare import command as preparing
from slm.prepare import parts, scan
from slm.prepare.__main__ import main
from slm.prepare.command import prepare
from slm.prepare.workers import side_of, undisturbed
from slm.store.files import ArrayWriter
from slm.store.shards import Corpus
from slm.store.tokenizer import EOS
from text_helpers import DATA, files, loses_spaces, needs_data, quote, wait_for, write_records


@pytest.fixture
def run(tmp_path, bytes_folder):
    """run(out=..., **settings) -> report, with small windows and one process."""

    def go(out="out", **settings):
        small: dict[str, Any] = {
            "seq_len": 4,
            "heldout_ratio": 0,
            "num_proc": 1,
            "out": str(tmp_path / out),
        }
        if "tokenizer" not in settings:
            small["tokenizer"] = {"path": bytes_folder}
        return prepare(**small | settings).report

    return go


def write(path: Path, *documents: str) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return str(path)


def stream(corpus: Corpus) -> list[int]:
    return [t for i in range(len(corpus.shards)) for t in corpus.column("tokens", i).tolist()]


def decode(corpus: Corpus, tokens: list[int]) -> list[str]:
    """The documents in a stream of byte tokens; the last may lack its end."""
    from slm.store.tokenizer import load_tokenizer

    text = load_tokenizer(corpus.tokenizer_folder).decode(tokens)
    assert isinstance(text, str)
    return text.split(EOS)


# ---- values -------------------------------------------------------------------------------------


def test_arrays_by_hand(run, tmp_path):
    first = write(tmp_path / "one.jsonl", "abcdefg", "h")
    second = write(tmp_path / "two.jsonl", "\u00e9", "ijkl", "mn")
    report = run(sources=[first, second], shard_tokens=9)
    corpus = Corpus.open(tmp_path / "out" / "train", check="full")
    eos, byte = corpus.manifest["eos_id"], {}
    tokenizer = json.loads((corpus.tokenizer_folder / "tokenizer.json").read_text())
    byte = {k: v for k, v in tokenizer["model"]["vocab"].items() if len(k) == 1}
    a_to_g = [byte[c] for c in "abcdefg"]
    e_acute = [byte["\u00c3"], byte["\u00a9"]]  # 0xc3, 0xa9 in the byte-level alphabet
    ijkl = [byte[c] for c in "ijkl"]
    # 21 tokens: shards of 9 and 9 (2 windows of 4, and one more), then 3 that fill no window.
    assert corpus.column("tokens", 0).tolist() == [*a_to_g, eos, byte["h"]]
    assert corpus.column("tokens", 1).tolist() == [eos, *e_acute, eos, *ijkl, eos]
    assert corpus.column("documents", 0).tolist() == [[0, 0, 0, 0], [8, 0, 1, 0]]
    assert corpus.column("documents", 1).tolist() == [[-1, 0, 1, 1], [1, 1, 0, 0], [4, 1, 1, 0]]
    assert corpus.column("bytes", 0).tolist() == [1] * 7 + [0, 1]
    assert corpus.column("bytes", 1).tolist() == [0, 1, 1, 0, 1, 1, 1, 1, 0]
    assert (len(corpus.shards), corpus.num_windows) == (2, 4)
    assert report["train"]["dropped_tail_tokens"] == 3
    assert report["train"]["sources"]["two"] == {"documents": 3, "tokens": 11, "bytes": 8}
    assert report["train"]["windows"] == 4
    assert corpus.column("tokens", 0).dtype == np.uint16
    assert corpus.column("bytes", 0).dtype == np.uint8
    expected = {"split": "train", "sources": ["one", "two"], "packing": "concat", "vocab_size": 258}
    assert {key: corpus.manifest[key] for key in expected} == expected


def test_special_token_strings_are_text(run, tmp_path):
    run(sources=[write(tmp_path / "a.jsonl", f"a{EOS}b", "cdef")], seq_len=1)
    corpus = Corpus.open(tmp_path / "out" / "train")
    tokens = stream(corpus)
    assert tokens.count(corpus.manifest["eos_id"]) == 2
    assert tokens.index(corpus.manifest["eos_id"]) == len(f"a{EOS}b")


def test_weights_repeat_and_thin_out(run, tmp_path):
    texts = [f"{i:03}" for i in range(400)]
    paths = [write(tmp_path / f"{name}.jsonl", *texts) for name in ("half", "more")]
    report = run(
        sources=[{"path": paths[0], "weight": 0.5}, {"path": paths[1], "weight": 2.25}],
        heldout_ratio=0.25,
    )
    train, heldout = (Corpus.open(tmp_path / "out" / side) for side in ("train", "heldout"))
    seen, kept = decode(train, stream(train)), decode(heldout, stream(heldout))
    half, more = report["train"]["sources"]["half"], report["train"]["sources"]["more"]
    assert 110 < half["documents"] < 190  # 0.5 of the 300 that are not held out
    assert 620 < more["documents"] < 730  # 2.25 of them
    assert {seen[half["documents"] :].count(text) for text in texts} <= {0, 2, 3}
    assert max(kept.count(text) for text in texts) <= 2  # once from each source
    assert not {*kept[:-1]} & {*seen[:-1]}


def test_documents_by_their_length(run, tmp_path, caplog):
    """A byte is a token, and EOS is one more; the copies of a document are those of its weight."""
    rng = random.Random(0)
    texts = [f"{i:03}{'x' * rng.randint(0, 40)}" for i in range(300)]
    path, prompts = write(tmp_path / "a.jsonl", *texts), tmp_path / "qa.jsonl"
    write_records(prompts, *({"q": text[:3], "a": text[3:] + "y"} for text in texts))
    source: dict[str, Any] = {"path": path, "min_tokens": 20}
    source |= {"weight": 0.75, "weight_long": {"over": 30, "times": 4}}
    asked = {"path": str(prompts), "prompt": "{q}", "text": "{a}", "min_tokens": 44}
    settings = {"sources": [source, asked], "heldout_ratio": 0.25, "seq_len": 1}
    with caplog.at_level("INFO"):
        report = run(**settings)
    train, heldout = (Corpus.open(tmp_path / "out" / side) for side in ("train", "heldout"))
    seen, kept = (Counter(decode(c, stream(c))) for c in (train, heldout))
    short = sum(len(text) + 1 < 20 for text in texts)
    assert report["short_documents"]["a"] == {"min_tokens": 20, "documents": short}
    middle = [text for text in texts if 20 <= len(text) + 1 <= 30]
    long = [text for text in texts if len(text) + 1 > 30]
    assert {text for text in texts if seen[text] or kept[text]} <= {*middle, *long}
    assert {(seen[text], kept[text]) for text in long} == {(3, 0), (0, 1)}
    assert {(seen[text], kept[text]) for text in middle} == {(1, 0), (0, 1), (0, 0)}
    assert 0.6 < sum(seen[text] + kept[text] for text in middle) / len(middle) < 0.9
    own = report["train"]["sources"]["a"]
    assert own["long_documents"] == sum(seen[text] for text in long)
    assert own["long_tokens"] == sum(seen[text] * (len(text) + 1) for text in long)
    assert "long_documents" not in report["train"]["sources"]["qa"]
    answers = sum(len(text) + 2 < 44 for text in texts)
    assert report["short_documents"]["qa"] == {"min_tokens": 44, "documents": answers}
    assert f"qa: {answers} documents of fewer than 44 tokens (min_tokens) are left" in caplog.text
    assert f"{own['long_documents']} of the {own['documents']} documents of a are" in caplog.text
    with pytest.raises(UserError, match=f"min_tokens, which leaves {len(texts)} documents out"):
        run(out="none", sources=[{"path": path, "min_tokens": 50}])
    with pytest.raises(UserError, match=r"exclude\[0\] has .*min_tokens or weight_long: no token"):
        run(out="no", sources=[path], exclude=[source])


def test_split_depends_on_the_text_alone(run, tmp_path):
    texts = [f"document {i}" for i in range(300)]
    run(out="one", sources=[write(tmp_path / "a.jsonl", *texts)], heldout_ratio=0.3)
    shuffled = [*reversed(texts), *(f"new {i}" for i in range(50)), *texts[:20]]
    run(out="two", sources=[write(tmp_path / "b.jsonl", *shuffled)], heldout_ratio=0.3)
    sides = []
    for out in ("one", "two"):
        corpus = Corpus.open(tmp_path / out / "heldout")
        sides.append({*decode(corpus, stream(corpus))[:-2]} & {*texts})
    assert 60 < len(sides[0]) < 120
    assert len(sides[0] ^ sides[1]) <= 2  # the two ends that fill no window


def test_all_held_out(run, tmp_path):
    run(sources=[write(tmp_path / "a.jsonl", "abcdef")], heldout_ratio=1)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "heldout",
        "plan.json",
        "report.json",
    ]


def test_large_vocabulary_is_uint32(run, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"[UNK]": 0, "</s>": 1} | {f"w{i}": i for i in range(2, 70_000)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = write(tmp_path / "a.jsonl", "w69999 w65536", "w2")
    run(sources=[path], seq_len=2, tokenizer={"path": str(tmp_path / "tokenizer")})
    corpus = Corpus.open(tmp_path / "out" / "train")
    tokens = corpus.column("tokens", 0)
    assert (tokens.dtype, tokens.tolist()) == (np.uint32, [69999, 65536, 1, 2, 1])
    assert corpus.column("bytes", 0).tolist() == [6, 7, 0, 2, 0]
    assert corpus.vocab_size == 70_000


def test_trained_tokenizer_sees_the_train_side_only(run, tmp_path):
    texts = [f"{i} the cat sat on the mat with the hat\n" * 3 for i in range(60)]
    digests = [blake2b(text.encode(), digest_size=16).digest() for text in texts]
    held = [text for text, d in zip(texts, digests, strict=True) if side_of(d, 0.5) == 1]
    path = write(tmp_path / "a.jsonl", *(t + "zzzz" * 9 * (t in held) for t in texts))
    run(sources=[path], heldout_ratio=0.5, tokenizer={"vocab_size": 290, "train_mb": 1})
    train, heldout = (Corpus.open(tmp_path / "out" / side) for side in ("train", "heldout"))
    assert train.manifest["tokenizer_sha256"] == heldout.manifest["tokenizer_sha256"]
    assert train.vocab_size == 290


# ---- prompts and chats --------------------------------------------------------------------------

IM = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QA = [("The excess lo", "ss of the model"), ("e", "\u0301 \U0001f600"), ("Once", " more")]
SAID = [("system", ""), ("user", "Hi"), ("assistant", "a\n"), ("user", "b?"), ("assistant", "c")]


@pytest.fixture
def chat_folder(tmp_path, tokenizer) -> str:
    """A tokenizer with merges, a chat template and its special tokens."""
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    changed.chat_template = IM
    changed.save_pretrained(tmp_path / "chat_tokenizer")
    return str(tmp_path / "chat_tokenizer")


@pytest.fixture
def asked(tmp_path) -> list[dict[str, Any]]:
    """One source of each kind."""
    chat = [{"role": role, "content": content} for role, content in SAID]
    qa = [{"q": question, "a": answer} for question, answer in QA]
    return [
        {"path": str(write_records(tmp_path / "qa.jsonl", *qa)), "prompt": "{q}", "text": "{a}"},
        {"path": write(tmp_path / "plain.jsonl", "plain text")},
        {"path": str(write_records(tmp_path / "chat.jsonl", {"m": chat})), "messages": "m"},
    ]


def expected_stream(tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Ids and masks by `encode` of the parts, which a chat has between its special tokens."""
    eos = tokenizer.eos_token_id
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    runs: list[tuple[list[int], bool]] = []
    for question, answer in QA:
        runs += [(tokenizer.encode(question), False), ([*tokenizer.encode(answer), eos], True)]
    runs.append(([*tokenizer.encode("plain text"), eos], True))
    for role, content in SAID:
        live = role == "assistant"
        head, body = (role + "\n", content) if live else (f"{role}\n{content}", "")
        runs += [([start, *tokenizer.encode(head)], False)]
        runs += [([*tokenizer.encode(body), end], live), (tokenizer.encode("\n"), False)]
    runs.append(([eos], True))
    return [i for ids, _ in runs for i in ids], [live for ids, live in runs for _ in ids]


def test_prompts_and_chats_by_hand(run, tmp_path, tokenizer, chat_folder, asked):
    from slm.store.tokenizer import load_tokenizer

    ids, masks = expected_stream(load_tokenizer(chat_folder))
    settings = {"tokenizer": {"path": chat_folder}, "sources": asked, "shard_tokens": 21}
    report = run(seq_len=1, **settings)["train"]
    corpus = Corpus.open(tmp_path / "out" / "train", check="full")
    assert (len(corpus.shards) > 3, report["dropped_tail_tokens"]) == (True, 0)
    columns = [corpus.column("masks", i) for i in range(len(corpus.shards))]
    assert stream(corpus) == ids
    assert np.concatenate(columns).tolist() == masks
    assert columns[0].dtype == bool
    assert (report["tokens"], report["targets"]) == (len(ids), sum(masks))
    plain = len(tokenizer.encode("plain text")) + 1
    assert report["sources"]["plain"] == {
        "documents": 1,
        "tokens": plain,
        "bytes": 10,
        "targets": plain,
    }
    assert sum(row["targets"] for row in report["sources"].values()) == sum(masks)


def test_prompts_and_chats_have_the_same_bytes_whatever_num_proc(
    run, tmp_path, chat_folder, asked, monkeypatch
):
    monkeypatch.setattr("slm.prepare.workers.BLOCK_BYTES", 1)  # every block is a batch of its own
    settings = {"tokenizer": {"path": chat_folder}, "sources": asked}
    reports = [run(out=str(n), num_proc=n, **settings) for n in (1, 2)]
    assert reports[0] == reports[1]
    assert files(tmp_path / "1") == files(tmp_path / "2")


def test_a_training_step_counts_the_answers_and_eos_alone(run, tmp_path, chat_folder, asked):
    from slm.store.tokenizer import load_tokenizer
    from slm.store.windows import Windows
    from slm.train.order import Order, Steps

    ids, masks = expected_stream(load_tokenizer(chat_folder))
    seq_len = (len(ids) - 1) // 3
    run(tokenizer={"path": chat_folder}, sources=asked, seq_len=seq_len)
    windows = Windows(Corpus.open(tmp_path / "out" / "train"))
    (batch,) = Steps(windows, Order(3, 0), 3, 3)._read(0)
    used = slice(1, 3 * seq_len + 1)  # a shard's first token is no target, nor is the tail
    assert (batch["targets"] != -100).sum().item() == sum(masks[used])
    rows = batch["targets"][batch["window"].argsort()].flatten().tolist()
    assert rows == [i if live else -100 for i, live in zip(ids[used], masks[used], strict=True)]


def test_without_prompts_there_is_no_mask(run, tmp_path):
    report = run(sources=[write(tmp_path / "a.jsonl", "abcdefgh")])
    assert not list((tmp_path / "out").rglob("masks-*"))
    assert "targets" not in report["train"]


def test_both_sides_have_masks_and_the_split_is_that_of_the_text(run, tmp_path, chat_folder):
    """A prompt and its answer as one text, or masked, or by another template: the same side."""
    pairs = [{"q": f"question {i}\n", "a": f"answer {i}"} for i in range(60)]
    chats = [
        {"m": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": "a"}]}
        for i in range(60)
    ]
    path = str(write_records(tmp_path / "qa.jsonl", *pairs))
    other = str(write_records(tmp_path / "chat.jsonl", *chats))
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.content }}.{% endfor %}")
    own = {"path": chat_folder, "chat_template": str(tmp_path / "own.jinja")}
    cases = {
        "text": ({"path": path, "text": "{q}{a}"}, {"path": chat_folder}),
        "asked": ({"path": path, "prompt": "{q}", "text": "{a}"}, {"path": chat_folder}),
        "chat": ({"path": other, "messages": "m"}, {"path": chat_folder}),
        "own": ({"path": other, "messages": "m"}, own),
    }
    sides = {}
    for name, (source, tokenizer) in cases.items():
        run(out=name, sources=[source], tokenizer=tokenizer, heldout_ratio=0.5, seq_len=1)
        corpus = Corpus.open(tmp_path / name / "heldout")
        assert corpus.has_masks == (name != "text")
        sides[name] = corpus.column("documents", 0)[:, 2].tolist()
    assert 15 < len(sides["text"]) < 45
    assert sides["text"] == sides["asked"]
    assert sides["chat"] == sides["own"]


def test_evaluation_text_is_found_across_prompt_and_answer(run, tmp_path):
    words = [f"w{i}" for i in range(13)]
    evaluation = write(tmp_path / "e.jsonl", " ".join(words))
    record = {"q": " ".join(words[:6]), "a": " ".join(words[6:])}
    chat = {
        "m": [{"role": r, "content": record[k]} for r, k in (("user", "q"), ("assistant", "a"))]
    }
    qa = str(write_records(tmp_path / "qa.jsonl", record, {"q": "other", "a": "text"}))
    chats = str(write_records(tmp_path / "chats.jsonl", chat))
    sources = [{"path": qa, "prompt": "{q} ", "text": "{a}"}, {"path": chats, "messages": "m"}]
    report = run(sources=sources, exclude=[evaluation])
    assert report["train"]["documents"] == 1
    assert report["excluded"]["e"]["documents_dropped"] == 2
    report = run(out="other", sources=[evaluation, qa_text(qa)], exclude=[sources[1]])
    assert report["excluded"]["chats"]["documents_dropped"] == 2


def qa_text(path: str) -> dict[str, str]:
    return {"path": path, "text": "{q} {a}"}


def test_a_tokenizer_without_a_template_gets_one(run, tmp_path, asked, caplog):
    from slm.prepare.chat import DEFAULT_TEMPLATE
    from slm.store.tokenizer import load_tokenizer

    with caplog.at_level("INFO"):
        report = run(sources=asked, seq_len=1)
    assert "the tokenizer has no chat template" in caplog.text
    assert f"{report['train']['targets']} of the tokens are targets" in caplog.text
    tokenizer = load_tokenizer(tmp_path / "out" / "train" / "tokenizer")
    assert tokenizer.chat_template == DEFAULT_TEMPLATE
    corpus = Corpus.open(tmp_path / "out" / "train")
    chat = "<|system|>\n\n<|user|>\nHi\n<|assistant|>\na\n{}\n<|user|>\nb?\n<|assistant|>\nc{}"
    assert str(tokenizer.decode(stream(corpus))).endswith(chat.format(EOS, EOS))
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    folder = str(tmp_path / "out" / "train" / "tokenizer")
    own = {"path": folder, "chat_template": str(tmp_path / "own.jinja")}
    with pytest.raises(UserError, match="holds another run: tokenizer.chat_template_sha256 is"):
        run(sources=asked, seq_len=1, tokenizer=own)
    with pytest.raises(
        UserError, match=r"chat_template is .*own\.jinja, and no source has messages"
    ):
        run(out="no", sources=asked[:2], tokenizer=own)


def test_bad_chats_are_counted(run, tmp_path, chat_folder):
    good = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "answer"}]
    path = str(write_records(tmp_path / "a.jsonl", {"m": good}, {"m": good[:1]}, {"m": good}))
    settings = {"sources": [{"path": path, "messages": "m"}], "tokenizer": {"path": chat_folder}}
    with pytest.raises(UserError, match="line 2: field 'm' has no message of assistant"):
        run(**settings)
    report = run(**settings, on_bad_record="skip")
    assert (report["train"]["documents"], report["bad_records"]["skipped"]) == (2, 1)


# ---- signal and noise ---------------------------------------------------------------------------


def labels_by_hand(document: str, spans: list[tuple[int, int]], pieces: list[bytes]) -> list[int]:
    """Every byte of a token gets the label of its character, and the token that of most of them."""
    inside = [any(a <= i < b for a, b in spans) for i in range(len(document))]
    by_byte = [label for label, c in zip(inside, document, strict=True) for _ in c.encode()]
    assert b"".join(pieces) == document.encode()
    found, at = [], 0
    for piece in pieces:
        share = sum(by_byte[at : at + len(piece)])
        at += len(piece)
        found.append(-1 if 2 * share == len(piece) else int(2 * share > len(piece)))
    return found


def labelled_documents(corpus: Corpus) -> list[tuple[int, int, list[bytes], list[int]]]:
    """(source, record, pieces, labels) of every document that is whole; EOS has no label."""
    from slm.score.token_texts import vocabulary_bytes
    from slm.store.tokenizer import load_tokenizer

    known, ids = vocabulary_bytes(load_tokenizer(corpus.tokenizer_folder)), stream(corpus)
    shards = range(len(corpus.shards))
    labels = [n for i in shards for n in corpus.column("signal", i).tolist()]
    sizes = np.concatenate([[0], np.cumsum([shard.num_tokens for shard in corpus.shards])])
    rows = [(sizes[i] + row[0], *row[1:3]) for i in shards for row in corpus.column("documents", i)]
    found = []
    for start, source, record in dict.fromkeys(rows):
        if corpus.manifest["eos_id"] in ids[start:]:
            end = ids.index(corpus.manifest["eos_id"], start)
            assert labels[end] == -1
            pieces = [known[i] for i in ids[start:end]]
            found.append((int(source), int(record), pieces, labels[start:end]))
    return found


@pytest.fixture
def merges_folder(tmp_path, tokenizer) -> str:
    tokenizer.save_pretrained(tmp_path / "merges")
    return str(tmp_path / "merges")


def test_labels_by_hand(run, tmp_path, merges_folder, caplog):
    """Spans inside words and characters of many bytes; sources without labels are unknown."""
    marked = [
        ("The excess loss of the model \u00e9\u4e2d\U0001f600", [[4, 13], [29, 31]]),
        ("Selective language modeling", [0, 9]),
        ("tokens that are worth learning", []),
    ]
    path = write_records(tmp_path / "a.jsonl", *({"body": t, "s": s} for t, s in marked))
    sources = [
        {"path": str(path), "text": "{body}", "signal": "s"},
        {"path": write(tmp_path / "plain.jsonl", "plain text of the corpus")},
    ]
    settings = {"tokenizer": {"path": merges_folder}, "seq_len": 1, "shard_tokens": 9}
    with caplog.at_level("INFO"):
        report = run(sources=sources, **settings)["train"]
    corpus = Corpus.open(tmp_path / "out" / "train", check="full")
    assert corpus.has_signal and len(corpus.shards) > 3
    assert corpus.column("signal", 0).dtype == np.int8
    documents = labelled_documents(corpus)
    assert [document[:2] for document in documents] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    for (text, spans), (_, _, pieces, labels) in zip(marked, documents, strict=False):
        pairs = [spans] if spans and isinstance(spans[0], int) else spans
        assert labels == labels_by_hand(text, [(a, b) for a, b in pairs], pieces)  # type: ignore
    assert set(documents[3][3]) == {-1}
    counts = [[labels.count(n) for *_, labels in documents] for n in (1, 0)]
    assert (report["signal"], report["noise"]) == (sum(counts[0]), sum(counts[1]))
    assert report["sources"]["a"]["signal"] == sum(counts[0]) > 0
    assert report["sources"]["plain"]["noise"] == report["sources"]["plain"]["signal"] == 0
    assert "targets" not in report
    total = sum(counts[0]) + sum(counts[1])
    assert f"{total} tokens are labelled: {sum(counts[0])} signal, {sum(counts[1])}" in caplog.text


def test_masks_and_weights_by_hand(run, tmp_path, merges_folder, tokenizer, caplog):
    """A mask within words, a document without weight, a source that asks for neither."""
    rows = [
        {"text": "The excess loss of the model", "m": [[4, 15]], "w": 0.5},
        {"text": "Selective language modeling", "m": [], "w": 0},
        {"text": "tokens", "m": [0, 6], "w": 3},
    ]
    path = write_records(tmp_path / "a.jsonl", *rows)
    plain = write(tmp_path / "plain.jsonl", "plain text of the corpus")
    sources = [{"path": str(path), "mask": "m", "token_weight": "w"}, {"path": plain}]
    settings = {"tokenizer": {"path": merges_folder}, "seq_len": 1, "shard_tokens": 9}
    with caplog.at_level("INFO"):
        report = run(sources=sources, **settings)["train"]
    corpus = Corpus.open(tmp_path / "out" / "train", check="full")
    columns = {
        name: np.concatenate([corpus.column(name, i) for i in range(len(corpus.shards))])
        for name in ("tokens", "masks", "weights")
    }
    texts = [*(row["text"] for row in rows), "plain text of the corpus"]
    ids = [[*tokenizer.encode(text), corpus.manifest["eos_id"]] for text in texts]
    assert columns["tokens"].tolist() == [i for document in ids for i in document]
    assert columns["weights"].dtype == np.float32
    weights = [0.5, 0, 3, 1]
    repeated = [w for w, document in zip(weights, ids, strict=True) for _ in document]
    assert columns["weights"].tolist() == repeated
    text = "".join(tokenizer.convert_ids_to_tokens(ids[0][:-1])).replace("\u0120", " ")
    assert text == rows[0]["text"]  # so characters are counted by the tokens' own lengths
    edges = np.cumsum([0, *map(len, tokenizer.convert_ids_to_tokens(ids[0][:-1]))])
    inside = [2 * len(range(max(4, a), min(15, b))) >= b - a for a, b in pairwise(edges)]
    live = [not one for one in inside] + [True]
    live += [False] * (len(ids[1]) + len(ids[2])) + [True] * len(ids[3])
    assert columns["masks"].tolist() == live and 0 < sum(live[: len(ids[0])]) < len(ids[0])
    assert report["targets"] == sum(live)
    found = report["weights"]
    taken = [w for w, is_live in zip(repeated, live, strict=True) if is_live and w > 0]
    assert found["mean"] == pytest.approx(np.mean(taken))
    assert (found["least"], found["largest"], found["tokens_of_0"]) == (0, 3, len(ids[1]))
    assert "weights are 0 to 3, " in caplog.text
    assert "of the tokens are targets" in caplog.text
    assert "their prompt" not in caplog.text and "targets_without_prompt" not in report


def test_a_negative_weight_is_a_bad_record(run, tmp_path):
    rows = [{"text": "abcdefgh", "w": 1}, {"text": "ijkl", "w": -2}]
    path = write_records(tmp_path / "a.jsonl", *rows)
    with pytest.raises(UserError, match=r"a.jsonl, line 2: field 'w' is -2, expected a weight"):
        run(sources=[{"path": str(path), "token_weight": "w"}])
    assert not list(tmp_path.rglob("manifest.json"))


def test_labels_beside_prompts(run, tmp_path, chat_folder, asked):
    """Parts are encoded apart; the labels of a text among them are its own."""
    path = write_records(tmp_path / "l.jsonl", {"text": "The excess loss", "s": [4, 10]})
    settings = {"tokenizer": {"path": chat_folder}, "seq_len": 1}
    run(sources=[*asked, {"path": str(path), "signal": "s"}, asked[1] | {"name": "z"}], **settings)
    corpus = Corpus.open(tmp_path / "out" / "train", check="full")
    columns = set(corpus.shards[0].sha256)
    assert columns == {"tokens", "documents", "bytes", "masks", "signal"}
    documents = corpus.column("documents", 0)
    (start,) = documents[documents[:, 1] == 3, 0]
    (end,) = documents[documents[:, 1] == 4, 0]
    labels = corpus.column("signal", 0)
    alone = {**settings, "sources": [{"path": str(path), "signal": "s"}]}
    run(out="alone", **alone)
    expected = Corpus.open(tmp_path / "alone" / "train").column("signal", 0)
    assert labels[start:end].tolist() == expected.tolist()
    assert set(labels[:start]) | set(labels[end:]) == {-1}
    assert {0, 1} < set(expected.tolist())


def test_without_labels_there_is_no_column(run, tmp_path):
    report = run(sources=[write(tmp_path / "a.jsonl", "abcdefgh")])
    assert not list((tmp_path / "out").rglob("signal-*"))
    assert {"signal", "noise"}.isdisjoint(report["train"])
    assert not Corpus.open(tmp_path / "out" / "train").has_signal


def test_bad_spans_stop_or_are_counted(run, tmp_path):
    rows = [{"text": "abcdefgh", "s": [0, 4]}, {"text": "abc", "s": [0, 4]}]
    source = {"path": str(write_records(tmp_path / "a.jsonl", *rows)), "signal": "s"}
    message = r"a\.jsonl, line 2: field 's' is \[0, 4\], outside the 3 characters of the text"
    with pytest.raises(UserError, match=message):
        run(sources=[source])
    report = run(sources=[source], on_bad_record="skip")
    assert (report["train"]["documents"], report["bad_records"]["skipped"]) == (1, 1)


def test_injected_noise_is_labelled(run, tmp_path, merges_folder):
    from slm.prepare.noise import inject, record_seed

    lines = [f"the scores of document {i} are stored on disk\n" * 5 for i in range(30)]
    source = {"path": write(tmp_path / "a.jsonl", *lines), "noise": 0.3, "noise_seed": 4}
    settings = {"tokenizer": {"path": merges_folder}, "seq_len": 8}
    report = run(sources=[source], **settings)["train"]
    documents = labelled_documents(Corpus.open(tmp_path / "out" / "train"))
    assert len(documents) >= 29
    for _, record, pieces, labels in documents:
        noisy, spans = inject(lines[record], record_seed(4, "a", record), 0.3)
        assert labels == labels_by_hand(noisy, spans, pieces)
    clean = sum(map(len, lines))
    assert 1 - clean / report["bytes"] == pytest.approx(0.3, abs=0.01)
    run(out="other", sources=[source | {"noise_seed": 5}], **settings)
    streams = [stream(Corpus.open(tmp_path / out / "train")) for out in ("out", "other")]
    assert streams[0] != streams[1]


def test_noise_changes_neither_sides_nor_what_is_excluded(run, tmp_path):
    words = " ".join(f"w{i:040}" for i in range(13))  # so long that noise gets between them
    evaluation = write(tmp_path / "e.jsonl", words)
    texts = [f"document {i}" for i in range(80)] * 2 + [f"before {words} after"]
    path = write(tmp_path / "a.jsonl", *texts)
    records = {}
    for noise in (0, 0.8):
        source = {"path": path, "noise": noise, "weight": 1.5}
        sides = {"heldout_ratio": 0.4, "exclude": [evaluation]}
        report = run(out=f"{noise}", seq_len=1, sources=[source], **sides)
        assert report["excluded"]["e"]["documents_dropped"] == 1
        corpora = [Corpus.open(tmp_path / f"{noise}" / side) for side in ("train", "heldout")]
        records[noise] = [corpus.column("documents", 0)[:, 2].tolist() for corpus in corpora]
    assert records[0] == records[0.8]
    held = {texts[i] for i in records[0][1]}
    assert held and not held & {texts[i] for i in records[0][0]}


def test_a_tokenizer_is_not_trained_on_what_noise_hides(run, tmp_path):
    """The evaluation text comes last, so the other records have the noise that they had."""
    words = " ".join(f"w{i:040}" for i in range(13))
    texts = [f"a small document of {i} words\n" * 3 for i in range(80)]
    for name, rows in (("with", [*texts, f"{words} " * 5]), ("without", texts)):
        (tmp_path / name).mkdir()
        source = {"path": write(tmp_path / name / "a.jsonl", *rows), "noise": 0.8}
        exclude = [write(tmp_path / "e.jsonl", words)]
        run(out=f"{name}_out", sources=[source], exclude=exclude, tokenizer={"vocab_size": 400})
    streams = [stream(Corpus.open(tmp_path / f"{name}_out/train")) for name in ("with", "without")]
    assert streams[0] == streams[1]


@pytest.mark.parametrize("label", ["signal", "noise"])
def test_labels_have_the_same_bytes_whatever_num_proc(
    run, tmp_path, merges_folder, label, monkeypatch
):
    monkeypatch.setattr(
        "slm.prepare.readers.BLOCK_BYTES", 256
    )  # of the parent, which cuts the blocks
    monkeypatch.setattr("slm.prepare.workers.BLOCK_BYTES", 256)
    rows = [{"text": f"text {i} of many, " * 4, "s": [i % 9, i % 9 + i]} for i in range(60)]
    path = str(write_records(tmp_path / "a.jsonl", *rows))
    source = {"path": path, "signal": "s"} if label == "signal" else {"path": path, "noise": 0.4}
    settings = {"sources": [source], "tokenizer": {"path": merges_folder}, "heldout_ratio": 0.2}
    reports = [run(out=str(n), num_proc=n, **settings) for n in (1, 2)]
    assert reports[0] == reports[1]
    assert files(tmp_path / "1") == files(tmp_path / "2")


@needs_data
def test_labels_of_real_text(run, tmp_path):
    """TeX pages: what the tokens of signal spell is the prose, up to tokens on the border."""
    path = DATA / "raw" / "planetmath_nt.jsonl"
    with open(path) as file:
        pages = [json.loads(line) for line in islice(file, 40)]
    copy = write_records(tmp_path / "pages.jsonl", *pages)
    source = {"path": str(copy), "signal": "body"}
    run(sources=[source], seq_len=16, tokenizer={"vocab_size": 1000, "train_mb": 1})
    documents = labelled_documents(Corpus.open(tmp_path / "out" / "train"))
    assert len(documents) >= 39
    for _, record, pieces, labels in documents:
        page = pages[record]
        assert labels == labels_by_hand(page["text"], [page["body"]], pieces)
        found = b"".join(p for p, label in zip(pieces, labels, strict=True) if label == 1)
        prose = page["text"][slice(*page["body"])]
        assert abs(len(found) - len(prose.encode())) < 40


# ---- the same bytes -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_text(tmp_path_factory) -> list[dict[str, object]]:
    """1.4 MB: nested threads and prose; where there is no such folder, the standard library."""
    if DATA.is_dir():
        prose = tmp_path_factory.mktemp("prose") / "prose.txt"
        prose.write_bytes((DATA / "general" / "wikitext2_valid.txt").read_bytes()[:300_000])
        threads = "{question.body_text}\n{answers[\n].body_text}"
        return [
            {"path": str(DATA / "raw" / "se_math.*.jsonl"), "text": threads, "name": "se"},
            {"path": str(prose), "document": "line", "weight": 1.5},
            {"path": str(DATA / "raw" / "aqua_dev.jsonl"), "text": "{question}\n{options[]}"},
        ]
    return [{"path": f"{Path(os.__file__).parent}/*.py", "format": "text"}]


def test_same_bytes_whatever_num_proc(run, tmp_path, real_text, monkeypatch):
    settings = {"sources": real_text, "heldout_ratio": 0.1, "seq_len": 128, "shard_tokens": 100_000}
    vocabulary = {"vocab_size": 1000, "train_mb": 1}
    reports = [
        run(out=f"{num_proc}", num_proc=num_proc, tokenizer=vocabulary, **settings)
        for num_proc in (1, 2, 3)
    ]
    outputs = [files(tmp_path / out) for out in ("1", "2", "3")]
    assert outputs[0] == outputs[1] == outputs[2]
    assert reports[0]["train"]["shards"] > 2
    for side in ("train", "heldout"):
        corpus = Corpus.open(tmp_path / "1" / side, check="full")
        in_shards = sum(shard.num_tokens for shard in corpus.shards)
        report = reports[0][side]
        assert in_shards + report["dropped_tail_tokens"] == report["tokens"]
        assert report["windows"] == corpus.num_windows
        num_bytes = sum(int(corpus.column("bytes", s.index).sum()) for s in corpus.shards)
        assert 0 <= report["bytes"] - num_bytes <= 128 * 8


SMALLER_UNITS, UNIT_BYTES = "import slm.prepare.scan as scan; scan.UNIT_BYTES", 150_000


def start(folder: Path, *arguments: str, after: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "slm.prepare", *arguments]
    return warm.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, after=after)


def test_killed_and_run_again(run, tmp_path, real_text, bytes_folder, monkeypatch):
    """kill -9 once some parts are there: they stay, and the bytes are those of one unit."""
    settings = {"seq_len": 64, "shard_tokens": 100_000, "heldout_ratio": 0.1}
    arguments = [f"{key}={value}" for key, value in settings.items()]
    arguments += [f"sources=[{', '.join(map(quote, real_text))}]", "num_proc=2", "out='a b=1,c'"]
    arguments.append(f"tokenizer.path={bytes_folder}")
    out = tmp_path / "a b=1,c"
    process = start(tmp_path, *arguments, after=f"{SMALLER_UNITS} = {UNIT_BYTES}")
    wait_for(out / ".parts" / "part-00002.json")
    process.send_signal(signal.SIGSTOP)
    workers = children(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.communicate()
    assert not (out / "train").exists()
    for worker in workers:
        wait_for(Path(f"/proc/{worker}"), exists=False)
    run(out="whole", sources=real_text, **settings)
    monkeypatch.setattr(scan, "UNIT_BYTES", UNIT_BYTES)
    made, write_part = [], parts.write_part
    monkeypatch.setattr(
        parts, "write_part", lambda work, i, *a: made.append(i) or write_part(work, i, *a)
    )
    there = len(list((out / ".parts").glob("part-*.json")))
    run(out=out.name, sources=real_text, **settings)
    assert files(out) == files(tmp_path / "whole")
    assert there >= 3 and made and min(made) >= there


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# ---- evaluation text ----------------------------------------------------------------------------


def read_excluded(out: Path) -> list[dict[str, Any]]:
    lines = (out / "excluded.jsonl").read_bytes().split(b"\n")
    assert lines.pop() == b""
    return [json.loads(line) for line in lines]


def test_exclusion_by_hand(run, tmp_path):
    words = [f"w{i}" for i in range(20)]
    evaluation = write(tmp_path / "e.jsonl", " ".join(words[:13]), "too short")
    other = write(tmp_path / "f.jsonl", "; ".join(words[5:20]).upper())
    texts = [
        "before " + ", ".join(words[:13]) + " after",  # shared with e
        " ".join(words[:12] + ["x"] + words[12:13]),  # 12 in a row
        " ".join(words),  # shared with both
        " ".join(reversed(words)),
    ]
    report = run(sources=[write(tmp_path / "a.jsonl", *texts)], exclude=[evaluation, other])
    assert report["train"]["documents"] == 2
    assert report["excluded"]["e"] == {
        "records": 2,
        "records_found": 1,
        "records_too_short": 1,
        "documents_dropped": 2,
    }
    assert report["excluded"]["f"]["documents_dropped"] == 1
    rows = read_excluded(tmp_path / "out")
    assert [(row["source"], row["record"], row["found_in"]) for row in rows] == [
        ("a", 0, ["e"]),
        ("a", 2, ["e", "f"]),
    ]
    assert rows[0]["ngram"] == " ".join(words[:13])
    assert rows[0]["where"].endswith("a.jsonl, line 1")


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_proc", [1, 2])
def test_bad_record_stops_or_is_counted(run, tmp_path, num_proc):
    path = tmp_path / "a.jsonl"
    rows = [
        '{"text": "one two"}',
        '{"text": 5}',
        '{"text": "three"}',
        '{"text": "f',
        '{"text": ""}',
    ]
    path.write_text("\n".join(rows))
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: field 'text' is a number") as caught:
        run(sources=[str(path)], num_proc=num_proc)
    assert "on_bad_record=skip" in str(caught.value)
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: field 'text' is a number"):
        run(sources=[str(path)], tokenizer={"vocab_size": 300})  # not: too little text to train on
    assert not (tmp_path / "out").exists()
    report = run(sources=[str(path)], num_proc=num_proc, on_bad_record="skip")
    assert report["bad_records"]["skipped"] == report["bad_records"]["sources"]["a"] == 3
    assert [sentence.split(", line ")[1][0] for sentence in report["bad_records"]["first"]] == [
        "2",
        "4",
        "5",
    ]
    assert report["train"]["documents"] == 2


def test_a_tokenizer_that_loses_text_is_refused_by_name(run, tmp_path, tokenizer):
    loses_spaces(tokenizer).save_pretrained(tmp_path / "lossy")
    sources = [write(tmp_path / "a.jsonl", "word", "two words")]
    settings = {"sources": sources, "tokenizer": {"path": str(tmp_path / "lossy")}}
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: 1 of its 9 bytes are in no token"):
        run(**settings)
    assert not (tmp_path / "out").exists()
    report = run(**settings, on_bad_record="skip", seq_len=2)
    assert (report["bad_records"]["skipped"], report["train"]["documents"]) == (1, 1)


def test_another_run_is_refused_and_a_finished_one_left_alone(run, tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", "abcdefgh")
    run(sources=[path])
    before = files(tmp_path / "out")
    with caplog.at_level("INFO"):
        assert run(sources=[path])["train"]["documents"] == 1
    assert "is finished" in caplog.text
    with pytest.raises(UserError, match="holds another run: seq_len is 4 in plan.json, 2 now"):
        run(sources=[path], seq_len=2)
    with pytest.raises(UserError, match=r"sources\[0\].weight is 1.0 in plan.json, 2 now"):
        run(sources=[{"path": path, "weight": 2}])
    write(tmp_path / "a.jsonl", "abcdefg!")
    with pytest.raises(UserError, match=r"sources\[0\].files_sha256"):
        run(sources=[path])
    assert files(tmp_path / "out") == before


def test_a_source_that_changed_in_its_middle_is_another_run(run, tmp_path):
    path = Path(write(tmp_path / "a.jsonl", *["abcdefgh"] * 2000))
    run(sources=[str(path)])
    before, data = files(tmp_path / "out"), bytearray(path.read_bytes())
    middle = len(data) // 2
    assert min(middle, len(data) - middle) > 10_000
    data[data.index(b"abcdefgh", middle)] = ord("h")
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"sources\[0\].files_sha256"):
        run(sources=[str(path)])
    assert files(tmp_path / "out") == before


def test_a_damaged_corpus_is_made_again(run, tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", "abcdefgh")
    run(sources=[path])
    before = files(tmp_path / "out")
    for name in ("tokens-00000.npy", "manifest.json", "tokens-00000.json"):
        (tmp_path / "out" / "train" / name).unlink()
        caplog.clear()
        run(sources=[path])
        assert f"{tmp_path / 'out'} is made again: {tmp_path / 'out' / 'train'}" in caplog.text
        assert files(tmp_path / "out") == before


def test_foreign_folders_are_refused(run, tmp_path):
    path = write(tmp_path / "a.jsonl", "abcdefgh")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"holds other files \(thesis.tex\)"):
        run(sources=[path])
    assert files(tmp_path / "out") == {"thesis.tex": b"x"}
    with pytest.raises(UserError, match="is a file or lies in one"):
        run(out="a.jsonl/x", sources=[path])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": []}, "sources is empty"),
        ({"seq_len": 0}, "seq_len is 0, it must be a whole number from 1 to"),
        ({"seq_len": 4.5}, "seq_len is 4.5, it must be a whole number"),
        ({"heldout_ratio": 1.5}, r"heldout_ratio is 1.5, it must be a number in \[0, 1\]"),
        ({"shard_tokens": 4}, "shard_tokens is 4, it must be more than seq_len, 4"),
        ({"packing": "best"}, "packing is 'best', it must be one of .'concat', 'documents'"),
        ({"on_bad_record": "no"}, "on_bad_record is 'no', it must be one of"),
        ({"num_proc": 0}, "num_proc is 0"),
        ({"tokenizer": {"path": None}}, "exactly one of tokenizer.path and tokenizer.vocab_size"),
        ({"tokenizer": {"path": "/none"}}, "no tokenizer at /none"),
        ({"tokenizer": {"vocab_size": 300}, "heldout_ratio": 1}, "heldout_ratio=1 leaves none"),
        ({"tokenizer": {"vocab_size": 5000}}, "supports only"),
        (
            {"seq_len": 99},
            r"the train side has 9 tokens in \d documents .*, fewer than the 100 of one window",
        ),
        ({"exclude": ["a.jsonl"]}, "no record has 13 words"),
        ({"exclude": [{"path": "a.jsonl", "noise": 0.1}]}, r"exclude\[0\] has signal, noise, mask"),
    ],
)
def test_mistakes_in_the_configuration(run, tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    write(Path("a.jsonl"), "abcdefgh")
    with pytest.raises(UserError, match=message):
        run(**({"sources": ["a.jsonl"]} | settings))
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sources=[none.jsonl]"], "none.jsonl: there is no such file"),
        ([], "sources must be given"),
        (["sources=[]", "sequence=3"], "sequence"),
    ],
)
def test_command_line_says_one_sentence(call, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(main, "out=x", "tokenizer.vocab_size=300", *words)
    assert (code, out, err.count("\n")) == (1, "", 1), err
    assert message in err


def test_disk_full_leaves_nothing_that_looks_finished(run, tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", "abcdefgh")

    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ArrayWriter, "finish", full)
    with pytest.raises(UserError, match="out cannot be written: .*No space left"):
        run(sources=[path])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("place", "where"),
    [
        ("slm.prepare.readers.cut", "a.jsonl"),
        ("slm.prepare.workers.encode_documents", "a.jsonl, line 1"),
        ("slm.prepare.shard_writer.ShardWriter.add", "out"),
    ],
)
def test_too_little_memory_is_one_sentence(run, tmp_path, monkeypatch, place, where):
    def exhaust(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(place, exhaust)
    path = write(tmp_path / "a.jsonl", "abcdefgh")
    message = rf"{where}: memory ran out; .*\(max_document_mb bounds it\)"
    with pytest.raises(UserError, match=message):
        run(sources=[path])
    assert not (tmp_path / "out").exists()


def start_with_workers(folder: Path, tokenizer: str) -> tuple[subprocess.Popen[str], list[int]]:
    """Two workers in the midst of some seconds of work: their results have filled a shard."""
    write(folder / "a.jsonl", *["abcdefgh" * 1000] * 2000)
    words = ("out=x", "sources=[a.jsonl]", f"tokenizer.path={tokenizer}", "num_proc=2")
    process = start(folder, *words, "shard_tokens=10000")
    wait_for(folder / "x" / "train" / "tokens-00001.json")
    return process, children(process.pid)


def test_two_quick_interrupts_end_the_workers(tmp_path, bytes_folder):
    """Whose work would never end, as they are stopped, and who ignore the signal themselves."""
    process, workers = start_with_workers(tmp_path, bytes_folder)
    assert len(workers) == 3  # one of them tracks resources
    for worker in workers[1:]:
        os.kill(worker, signal.SIGSTOP)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    process.communicate(timeout=60)
    assert process.returncode != 0
    for worker in workers:
        wait_for(Path(f"/proc/{worker}"), exists=False)


def test_workers_hear_no_interrupt_while_they_start(tmp_path, bytes_folder):
    """A terminal sends it to every process; it is the parent's to handle."""
    write(tmp_path / "a.jsonl", *["abcdefgh" * 1000] * 150)
    arguments = ("out=x", "sources=[a.jsonl]", f"tokenizer.path={bytes_folder}", "num_proc=2")
    process = start(tmp_path, *arguments, "heldout_ratio=0")
    while len(workers := children(process.pid)) < 3:  # one of them tracks resources
        time.sleep(0.01)
    for pid in workers:
        os.kill(pid, signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in message, message


@pytest.fixture
def interrupts() -> Iterator[Callable[[Any], None]]:
    """interrupts(handler); the tests themselves may run where a shell has them ignored."""
    before = signal.getsignal(signal.SIGINT)
    yield lambda handler: signal.signal(signal.SIGINT, handler)  # type: ignore[return-value]
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_waits_until_a_worker_has_started(interrupts):
    """Also where another thread is told of it, as Python's handlers run in the main one."""
    interrupts(signal.default_int_handler)
    over, started = threading.Event(), False
    other = threading.Thread(target=over.wait)
    other.start()
    with pytest.raises(KeyboardInterrupt), undisturbed():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        started = True
    over.set()
    other.join()
    assert started and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_that_is_ignored_ends_nothing(interrupts):
    interrupts(signal.SIG_IGN)
    with undisturbed():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_worker_that_dies_is_reported(tmp_path, bytes_folder):
    process, workers = start_with_workers(tmp_path, bytes_folder)
    os.kill(workers[-1], signal.SIGKILL)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "a worker process died" in message
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("key", "wrong", "sentence"),
    [
        ("sources", {"signal": "articel"}, "b.jsonl, line 1: field 'articel'"),
        ("sources", {"messages": "chat"}, "b.jsonl, line 1: field 'chat'"),
        ("exclude", {"text": "{artcle}"}, "b.jsonl, line 1: field 'artcle'"),
    ],
)
def test_a_field_that_is_not_there_is_said_before_the_work(
    tmp_path, monkeypatch, key, wrong, sentence
):
    (tmp_path / "a.jsonl").write_text('{"text": "all is well"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "an article", "article": [0, 2]}\n')
    for name in ("shared_tokenizer", "read_exclusion", "run_plan"):
        monkeypatch.setattr(preparing, name, None)
    entries: dict[str, Any] = {
        "sources": [str(tmp_path / "a.jsonl")],
        key: [str(tmp_path / "a.jsonl")],
    }
    entries[key].append({"path": str(tmp_path / "b.jsonl")} | wrong)
    with pytest.raises(UserError, match=sentence):
        prepare(out=tmp_path / "out", tokenizer={"vocab_size": 300}, **entries)
    assert not (tmp_path / "out").exists()


def test_a_finished_preparation_needs_no_text_that_is_only_looked_at_first(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "all is well"}\n' * 40)
    given: Any = {"sources": [str(tmp_path / "a.jsonl")], "tokenizer": {"vocab_size": 258}}
    prepare(out=tmp_path / "out", seq_len=8, heldout_ratio=0, **given)
    monkeypatch.setattr(preparing, "check_first_records", None)
    prepare(out=tmp_path / "out", seq_len=8, heldout_ratio=0, **given)


def test_a_vocabulary_without_the_bytes_is_refused_before_a_file_is_looked_for(tmp_path):
    with pytest.raises(UserError, match="vocab_size is 257, it must be at least 258"):
        prepare(["no.jsonl"], tmp_path / "out", tokenizer={"vocab_size": 257})
