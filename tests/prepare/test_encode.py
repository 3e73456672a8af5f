"""Documents of parts: each part's own tokens, one EOS, masks, bytes, borders without a space."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from slm.prepare import encode as parts
from slm.prepare.documents import Part, Text
from slm.prepare.encode import encode_documents, encode_parts
from slm.prepare.encoder import Encoder, encoder_state


def text(pieces: tuple[Part, ...]) -> Text:
    whole = "".join(part.text for part in pieces)
    plain = len(pieces) == 1 and pieces[0].is_target
    return Text("a, line 1", 0, whole, whole.encode(), None, () if plain else pieces)


@pytest.mark.parametrize("with_plain", [False, True])
def test_parts_are_encoded_apart(tokenizer, with_plain):
    """Borders inside a word and between a letter and its accent; a special token; a plain text."""
    documents = [
        (Part("The excess lo", False), Part("ss of the model", True)),
        (Part("e", False), Part("\u0301\U0001f600", True), Part("", True, 7), Part("", False)),
        (Part("plain text", True),),
    ][: 2 + with_plain]
    eos, encode = tokenizer.eos_token_id, tokenizer.encode
    assert encode("The excess loss of the model") != (
        encode("The excess lo") + encode("ss of the model")
    )
    expected = [
        [(encode("The excess lo"), False), ([*encode("ss of the model"), eos], True)],
        [(encode("e"), False), ([*encode("\u0301\U0001f600"), 7], True), ([eos], False)],
        [([*encode("plain text"), eos], True)],
    ][: 2 + with_plain]
    ids = [[i for run, _ in document for i in run] for document in expected]
    masks = [[live for run, live in document for _ in run] for document in expected]
    found = encode_documents(Encoder(encoder_state(tokenizer)), list(map(text, documents)))
    assert found.tokens.tolist() == sum(ids, [])
    assert found.masks.tolist() == sum(masks, [])
    assert found.lengths.tolist() == list(map(len, ids))
    assert found.num_targets.tolist() == list(map(sum, masks))
    assert found.num_bytes.tolist() == [28, 7, 10][: 2 + with_plain]
    ends = np.cumsum(found.lengths) - 1
    assert np.add.reduceat(found.sizes, ends - found.lengths + 1).tolist() == (
        found.num_bytes.tolist()
    )
    assert found.sizes[ends].tolist() == [0] * len(ends)
    assert found.faults == {}


def sentencepiece_like(scheme: str) -> PreTrainedTokenizerFast:
    vocab = {"<unk>": 0, "</s>": 1, "<x>": 2, "\u2581": 3, "a": 4, "\u2581a": 5, "b": 6}
    merges = [("\u2581", "a")]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    made.add_special_tokens({"additional_special_tokens": ["<x>"]})
    return made


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_a_space_in_front_comes_where_the_whole_text_has_one(scheme):
    tokenizer = sentencepiece_like(scheme)
    parts = (Part("b", False), Part("a", True), Part("", True, 2), Part("a", True))
    found = encode_parts(Encoder(encoder_state(tokenizer)), [parts])
    assert found.tokens.tolist() == [*tokenizer.encode("ba<x>a"), 1]
    assert found.sizes.sum() == 3
    spaced = (Part("b", False), Part(" a", True))
    found = encode_parts(Encoder(encoder_state(tokenizer)), [spaced])
    assert found.tokens.tolist() == [*tokenizer.encode("b a"), 1]


def test_faults_belong_to_documents(tokenizer):
    vocab = {"[UNK]": 0, "</s>": 1, "ab": 2}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="[UNK]")
    documents = [
        (Part("ab", False), Part("ab", True)),
        (Part("ab", False), Part("\n", False), Part("ab", True)),  # a line end makes no token
        (Part("ab", False), Part("  ", True)),
        (Part("ab </s>", False), Part("ab", True)),
    ]
    found = encode_parts(Encoder(encoder_state(words)), documents)
    assert found.faults == {
        2: "2 bytes of text make only 0 tokens",
        3: "the tokenizer finds its end-of-text token in the text",
    }
    assert found.lengths[:2].tolist() == [3, 3]
    assert found.tokens[:6].tolist() == [2, 2, 1] * 2


# ---- what the windows make of it ----------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 2, 4096])
def test_targets_whose_prompt_is_cut_off_are_counted(tmp_path, make_corpus, monkeypatch, block):
    monkeypatch.setattr(parts, "WINDOWS_AT_ONCE", block)
    generator = np.random.default_rng(0)
    shards = [np.arange(41), np.arange(21)]
    starts = [[0, 3, 4, 16, 17, 30], [-3, 5, 20]]
    masks = [(generator.random(len(shard)) < 0.6).tolist() for shard in shards]
    corpus = make_corpus(tmp_path / "c", shards, 4, starts=starts, masks=masks)
    targets = cut_off = 0
    for index, shard in enumerate(shards):
        for begin in range(0, len(shard) - 1, 4):
            for place in range(begin + 1, begin + 5):
                document = max(start for start in starts[index] if start <= place)
                targets += masks[index][place]
                cut_off += masks[index][place] and document < begin
    found = parts.window_targets(corpus)
    assert found == {"targets_in_windows": targets, "targets_without_prompt": cut_off}
    assert 0 < cut_off < targets
