"""Byte counts and encoding, on every family of tokenizers."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from slm.prepare import encoder as encoder_module
from slm.prepare.documents import Part
from slm.prepare.encode import encode_parts
from slm.prepare.encoder import (
    KNOWN_SPLITS,
    Encoder,
    encoder_state,
    has_safe_cuts,
    token_bytes,
)
from slm.prepare.offsets import fit
from slm.store.tokenizer import (
    EOS,
    load_tokenizer,
    tokenizer_sha256,
    vocabulary_size,
)
from text_helpers import TEXTS, encode, loses_spaces


def check_sums(tokenizer, texts):
    """Bytes sum to each text's UTF-8, and EOS stands at the end with none."""
    encoded = encode(tokenizer, texts)
    assert encoded.faults == {}
    ends = np.cumsum(encoded.lengths)
    for text, end, length in zip(texts, ends, encoded.lengths, strict=True):
        assert encoded.tokens[end - 1] == tokenizer.eos_token_id
        assert encoded.sizes[end - 1] == 0
        assert encoded.sizes[end - length : end].sum() == len(text.encode())
        assert tokenizer.eos_token_id not in encoded.tokens[end - length : end - 1]
    return encoded


TRICKY = list("aZ9é東。! \n\t\r'\u00a0\u0301\u200d\u0e31²_/") + [
    *("'s", "'LL", "  ", " \n", "\r\n", "don't", " the", "</a> ", "\u0085", "\U0001f600", " x y"),
]


@pytest.fixture(scope="module", params=["own", "nfc", *sorted(KNOWN_SPLITS)])
def cuttable(request):
    """Byte-level BPE that has merged all it can of tricky text, under each known split."""
    rng = random.Random(1)
    texts = ["".join(rng.choices(TRICKY, k=40)) for _ in range(2000)]
    backend = Tokenizer(models.BPE())
    own = request.param not in KNOWN_SPLITS
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own)
    backend.pre_tokenizer = level
    if not own:
        split = pre_tokenizers.Split(Regex(request.param), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    if request.param == "nfc":
        backend.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, initial_alphabet=alphabet, special_tokens=[EOS], show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)


def test_a_text_in_pieces_has_the_tokens_of_the_whole(cuttable, monkeypatch):
    monkeypatch.setattr(encoder_module, "PIECE_CHARACTERS", 5)
    rng, encoder = random.Random(2), Encoder(encoder_state(cuttable))
    assert encoder.can_cut
    num_pieces = 0
    for _ in range(300):
        text = "".join(rng.choices(TRICKY, k=80))
        pieces = list(encoder_module.cut_text(text))
        assert "".join(pieces) == text
        num_pieces += len(pieces)
        whole = encoder.backend.encode(text, add_special_tokens=False).ids
        found = encoder.encode([text, "x"], np.array([len(text.encode()), 1]))
        assert found.tokens[: found.lengths[0] - 1].tolist() == whole
    assert num_pieces > 1500


def test_only_what_surely_cuts_is_cut(cuttable, llama_like):
    state = json.loads(cuttable.backend_tokenizer.to_str())
    assert has_safe_cuts(state)
    plain = {"special": False, "rstrip": False}
    level = {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}
    none_else = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": ".+"}, "behavior": "Isolated", "invert": False}
    for change in (
        {"added_tokens": [plain | {"content": "two words"}]},
        {"added_tokens": [plain | {"content": "x", "rstrip": True}]},
        {"normalizer": {"type": "NFKC"}},
        {"pre_tokenizer": level},
        {"pre_tokenizer": none_else},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, none_else]}},
        {"model": state["model"] | {"dropout": 0.1}},
    ):
        assert not has_safe_cuts(state | change), change
    assert has_safe_cuts(state | {"added_tokens": [plain | {"content": "  "}]})
    assert not Encoder(encoder_state(llama_like)).can_cut


def test_memory_of_a_long_text_is_that_of_a_piece(cuttable, monkeypatch):
    """Nothing longer than a piece and a word reaches the backend, and no cut is asked twice."""
    encoder = Encoder(encoder_state(cuttable))
    lengths = []

    class Backend:
        def encode_batch_fast(self, batch, **settings):
            lengths.extend(map(len, batch))
            return encoder_backend.encode_batch_fast(batch, **settings)

    encoder_backend, encoder.backend = encoder.backend, Backend()  # type: ignore
    text = "some words\nof code " * 20_000
    encoder.encode([text], np.array([len(text)]))
    assert sum(lengths) == len(text) and max(lengths) < 2**16 + 20


def word_level(vocab, pre_tokenizer):
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="[UNK]")


@pytest.fixture(scope="module")
def llama_like():
    """Byte fallback, and a space put in front of every text."""
    vocab = {"<unk>": 0, "</s>": 1, "\u2581": 2, "a": 3, "\u2581a": 4}
    vocab |= {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    backend = Tokenizer(
        models.BPE(
            vocab,
            [("\u2581", "a")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def test_byte_level_sums_and_uint8(tokenizer):
    encoded = check_sums(tokenizer, TEXTS)
    assert (encoded.tokens.dtype, encoded.sizes.dtype) == (np.uint16, np.uint8)
    assert tokenizer.decode(encoded.tokens[: encoded.lengths[0] - 1]) == TEXTS[0]


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, max_size=5))
def test_byte_level_sums_on_any_text(tokenizer, texts):
    check_sums(tokenizer, texts)


def test_byte_level_with_prefix_space_and_normalizer(tokenizer):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    changed = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)
    check_sums(changed, TEXTS)


def test_byte_fallback_sums(llama_like):
    encoded = check_sums(llama_like, [*TEXTS, "a a"])
    first = len(encoded.tokens) - int(encoded.lengths[-1])
    assert encoded.tokens[first:].tolist() == [4, 4, 1]
    assert encoded.sizes[first:].tolist() == [1, 2, 0]  # the first space is not the text's


def test_sizes_by_offsets_where_spaces_are_dropped():
    vocab = {"[UNK]": 0, "</s>": 1, "ab": 2, "\u00e9": 3}
    tokenizer = word_level(vocab, pre_tokenizers.Whitespace())
    encoded = check_sums(tokenizer, ["ab  \u00e9 zz ", " ab"])
    assert encoded.tokens.tolist() == [2, 3, 0, 1, 2, 1]
    assert encoded.sizes.tolist() == [2, 4, 4, 0, 3, 0]
    assert encoded.sizes.dtype == np.uint16


def test_text_that_is_in_no_token_is_a_fault(tokenizer):
    texts = ["some words, and more", "word"]
    assert encode(tokenizer, texts).faults == {}
    changed = loses_spaces(tokenizer)
    assert changed.decode(changed.encode(texts[0])) == "somewords,andmore"
    assert encode(changed, texts).faults == {
        0: "3 of its 20 bytes are in no token: as this release of transformers reads the "
        "tokenizer, it loses text"
    }


def test_texts_that_cannot_be_documents():
    vocab = {"[UNK]": 0, "</s>": 1, "ab": 2}
    tokenizer = word_level(vocab, pre_tokenizers.WhitespaceSplit())
    faults = encode(tokenizer, ["ab", "ab </s> ab", "   ", "ab" + " " * 70_000]).faults
    assert faults == {
        1: "the tokenizer finds its end-of-text token in the text",
        2: "3 bytes of text make only 0 tokens",
        3: "70002 bytes of text make only 1 tokens",
    }


def gives_up(tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer whose pattern takes exponential time on many x."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    split = pre_tokenizers.Split(Regex("(x+x+)+y"), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)


def test_a_text_that_exhausts_the_pattern_is_a_fault_and_the_others_are_read(tokenizer):
    changed = gives_up(tokenizer)
    encoded = encode(changed, ["some", "x" * 60, "more"])
    assert encoded.faults.keys() == {1}
    assert "the tokenizer gives up on the text (Onig: " in encoded.faults[1]
    alone = encode(changed, ["more"])
    np.testing.assert_array_equal(encoded.tokens[-alone.lengths[0] :], alone.tokens, strict=True)


def test_a_prompt_that_exhausts_the_pattern_drops_its_document(tokenizer):
    """Masked parts without a token are no fault, but this one has some."""
    parts = [(Part("x" * 60, False), Part("answer", True)), (Part("asked", False),)]
    found = encode_parts(Encoder(encoder_state(gives_up(tokenizer))), parts)
    assert found.faults.keys() == {0}
    assert "gives up" in found.faults[0]


def test_special_token_strings_are_text(tokenizer):
    tokens = encode(tokenizer, [f"{EOS}{EOS}"]).tokens
    assert (tokens == tokenizer.eos_token_id).tolist() == [False] * (len(tokens) - 1) + [True]
    assert tokenizer.decode(tokens[:-1]) == EOS * 2
    assert tokenizer(EOS)["input_ids"] == [tokenizer.eos_token_id]  # what the default would do


def test_truncation_padding_and_special_tokens_of_the_file_are_ignored(tokenizer):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=9, pad_id=tokenizer.eos_token_id, pad_token=EOS)
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, tokenizer.eos_token_id)]
    )
    changed = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)
    assert tokenizer_sha256(changed) == tokenizer_sha256(tokenizer)
    np.testing.assert_array_equal(
        encode(changed, TEXTS).tokens, encode(tokenizer, TEXTS).tokens, strict=True
    )


@pytest.mark.parametrize(("size", "dtype"), [(65_536, "uint16"), (70_000, "uint32")])
def test_dtype_of_large_vocabularies(size, dtype):
    vocab = {"[UNK]": 0, "</s>": 1} | {f"w{i}": i for i in range(2, size)}
    tokenizer = word_level(vocab, pre_tokenizers.WhitespaceSplit())
    encoded = encode(tokenizer, [f"w{size - 1} w2"])
    assert encoded.tokens.tolist() == [size - 1, 2, 1]
    assert encoded.tokens.dtype == np.dtype(dtype)
    assert vocabulary_size(tokenizer) == size


def test_added_tokens_count(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    changed = load_tokenizer(tmp_path)
    changed.add_tokens(["<calculate>"])
    changed.add_special_tokens({"additional_special_tokens": ["<secret>"]})
    assert vocabulary_size(changed) == len(tokenizer) + 2
    assert token_bytes(changed)[-2:].tolist() == [11, 0]
    encoded = check_sums(changed, ["1 <calculate> 2 <secret>"])
    assert len(tokenizer) in encoded.tokens
    assert len(tokenizer) + 1 not in encoded.tokens


@given(st.lists(st.integers(0, 30), min_size=1, max_size=20))
def test_fit_keeps_the_sum(sizes):
    before = np.array(sizes)
    if before.sum() <= 10 * len(before):
        after = fit(before, 10)
        assert after.sum() == before.sum()
        assert after.min() >= 0 and after.max() <= 10
