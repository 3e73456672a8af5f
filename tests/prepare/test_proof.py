"""gigatoken in the place of `tokenizers`: the same bytes, and who shows other ids is found out."""

import random
from importlib.util import find_spec

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from slm.errors import UserError
from slm.prepare import encoder as encoder_module
from slm.prepare import proof
from slm.prepare.command import prepare
from slm.prepare.encoder import LLAMA, Encoder, encoder_state
from slm.prepare.proof import Unproven, choose_encoder, encoder_name, generated_texts, prove
from slm.store.tokenizer import EOS
from text_helpers import source, write_records

pytestmark = pytest.mark.skipif(
    find_spec("gigatoken") is None, reason="gigatoken, an extra that is part of dev, is not here"
)
TAG = "<tool_call>"


def merged(change=None, split=None) -> PreTrainedTokenizerFast:
    """A byte-level BPE that has merged all it can of what `generated_texts` makes."""
    backend = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    backend.pre_tokenizer = level
    if split is not None:
        cut = pre_tokenizers.Split(Regex(split), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([cut, level])
    if change is not None:
        change(backend)
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[EOS],
        show_progress=False,
    )
    backend.train_from_iterator(generated_texts({"added_tokens": [{"content": TAG}]}), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)


def with_tag(tokenizer, tag=TAG, **how) -> PreTrainedTokenizerFast:
    tokenizer.backend_tokenizer.add_tokens([AddedToken(tag, special=False, **how)])
    return tokenizer


def nfc(backend):
    backend.normalizer = normalizers.NFC()


@pytest.fixture(scope="module")
def own():
    return merged()


@pytest.fixture(autouse=True)
def fewer_probes(monkeypatch):
    """All scripts take half a second; each test looks at other letters of them."""
    monkeypatch.setattr(proof, "probes", lambda: few)
    few = list(every())[:: 1 + len(list(every())) // 200]


every = proof.probes
STRANGE = "\u0378"  # no release of Unicode has a character there


@pytest.mark.parametrize("make", [merged, lambda: merged(nfc), lambda: merged(split=LLAMA)])
def test_ids_are_those_of_tokenizers_on_other_texts(make):
    state = encoder_state(with_tag(make()))
    proven = prove(state, ["of the corpus"])
    assert encoder_name(proven).startswith("gigatoken ")
    assert not Encoder(proven).is_proven(STRANGE)
    rng = random.Random(7)
    pieces = [*proof.TRICKY, EOS, TAG, TAG[:-1], STRANGE]
    texts = ["".join(rng.choices(pieces, k=rng.randint(0, 40))) for _ in range(2000)]
    places = [rng.randrange(3) for _ in texts]
    sizes = np.array([len(text.encode()) for text in texts])
    ours = Encoder(proven).encode(texts, sizes, places)
    theirs = Encoder(state).encode(texts, sizes, places)
    for mine, other in zip(ours[:3], theirs[:3], strict=True):
        np.testing.assert_array_equal(mine, other, strict=True)
    assert ours.faults == theirs.faults


def test_every_script_is_compared(own, monkeypatch):
    """All groups: what is proven is what this Python knows, but for the groups that differ."""
    monkeypatch.setattr(proof, "probes", every)
    real = encoder_module.make_fast

    class Wrong:
        """Cuts before a Tibetan letter, as nobody else does."""

        def __init__(self, spelling):
            self.fast = real(spelling)

        def encode(self, text):
            at = text.find("\u0f40")
            if at <= 0:
                return self.fast.encode(text)
            return np.concatenate([self.fast.encode(t) for t in (text[:at], text[at:])])

    for module in (proof, encoder_module):
        monkeypatch.setattr(module, "make_fast", Wrong)
    proven = Encoder(prove(encoder_state(own), []))
    assert proven.is_proven("\u0f00 \u4e2d \uac01 \U0001f600 \u00e9")
    assert not proven.is_proven("a\u0f40")
    assert proven.proven.sum() > proof.assigned().sum() - 100


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (
            lambda: with_tag(merged(), "    ", rstrip=True),
            "its ids of '.*' are .*, those of tokenizers ",
        ),
        (lambda: with_tag(merged(), single_word=True), "its ids of "),
        (lambda: merged(split=r"\p{L}+|\s+"), "it cannot read the tokenizer: Unknown pre_token"),
    ],
)
def test_a_difference_falls_back_with_a_sentence(make, why, tmp_path, caplog):
    caplog.set_level("INFO", "slm.prepare")
    state = encoder_state(make())
    with pytest.raises(Unproven, match=why):
        prove(state, [])
    assert choose_encoder("auto", state, [], 2**20, None) is state
    assert "gigatoken would be faster, but it" in caplog.text
    assert f"encoding with {encoder_name(state)}" in caplog.text
    with pytest.raises(UserError, match=f"^tokenizer.encoder is gigatoken, and {why}"):
        choose_encoder("gigatoken", state, [], 2**20, None)


def test_a_difference_in_the_corpus_alone_is_found(own, monkeypatch, tmp_path):
    path = write_records(tmp_path / "a.jsonl", {"text": "x"}, {"text": "a rare zyx here"})
    real = encoder_module.make_fast

    class Wrong:
        def __init__(self, spelling):
            self.fast = real(spelling)

        def encode(self, text):
            return self.fast.encode(text)[: -1 if "zyx" in text else None]

    for module in (proof, encoder_module):
        monkeypatch.setattr(module, "make_fast", Wrong)
    prove(encoder_state(own), [])
    with pytest.raises(Unproven, match="'a rare zyx here'"):
        prove(encoder_state(own), proof.sample_texts([source(path)], 2**20))


def test_small_input_and_what_is_not_installed(own, monkeypatch):
    state = encoder_state(own)
    assert choose_encoder("auto", state, [], 2**20, proof.WORTH_BYTES - 1) is state
    assert choose_encoder("tokenizers", state, [], 2**20, None) is state
    assert choose_encoder("auto", state, [], 2**20, proof.WORTH_BYTES).proven is not None
    monkeypatch.setattr(proof, "encoder_version", lambda name: None)
    with pytest.raises(Unproven, match="it is not installed"):
        prove(state, [])


def test_another_id_where_both_encode_is_an_error(own):
    """The bytes of a text that NFC changes are counted by offsets, of tokenizers."""
    proven = prove(encoder_state(merged(nfc)), [])
    encoder = Encoder(proven)
    text = "e\u0301 word"
    size = np.array([len(text.encode())])
    assert encoder.encode([text], size).sizes.sum() == size[0]

    class Wrong:
        def encode(self, text):
            letters = [encoder.backend.encode(letter).ids for letter in "\u00e9 word"]
            return np.concatenate(letters).astype(np.uint32)

    encoder.fast = [Wrong()] * 3  # type: ignore[misc]
    with pytest.raises(UserError, match="gigatoken has other ids than tokenizers for 'e"):
        encoder.encode([text], size)


def test_it_is_made_anew_before_what_it_keeps_fills_the_memory(own, monkeypatch):
    encoder = Encoder(prove(encoder_state(own), []))
    monkeypatch.setattr(encoder_module, "KEPT_CHARACTERS", 40)
    made, real = [], encoder_module.make_fast
    monkeypatch.setattr(encoder_module, "make_fast", lambda one: made.append(one) or real(one))
    texts = ["a word of twenty two.."] * 5
    for text in texts:
        encoder.encode([text], np.array([len(text)]))
    assert len(made) == 3  # of 44 characters, of 44, of what came then
    np.testing.assert_array_equal(
        encoder.encode(texts, np.array([22] * 5)).tokens,
        Encoder(encoder_state(own)).encode(texts, np.array([22] * 5)).tokens,
    )


def test_a_corpus_has_the_same_bytes(tmp_path, own):
    own.save_pretrained(tmp_path / "tokenizer")
    rng = random.Random(3)
    texts = ["".join(rng.choices([*proof.TRICKY, EOS, STRANGE], k=30)) + "x" for _ in range(300)]
    texts = [text.replace("\0", "") for text in texts]
    plain = write_records(tmp_path / "plain.jsonl", *({"text": text} for text in texts))
    asked = [{"q": a, "a": b} for a, b in zip(texts[::2], texts[1::2], strict=True)]
    answers = write_records(tmp_path / "qa.jsonl", *asked)
    reports = []
    for encoder in ("tokenizers", "gigatoken"):
        made = prepare(
            [
                {"path": str(plain), "noise": 0.2},
                {"path": str(answers), "prompt": "{q}", "text": "{a}"},
            ],
            tmp_path / encoder,
            tokenizer={"path": tmp_path / "tokenizer", "encoder": encoder},
            seq_len=16,
            heldout_ratio=0.2,
            num_proc=1,
        )
        reports.append(made.report)
    names = [report.pop("encoder").split()[0] for report in reports]
    assert names == ["tokenizers", "gigatoken"]
    assert reports[0] == reports[1]
    for side in ("train", "heldout"):
        first, second = (
            {p.name: p.read_bytes() for p in (tmp_path / name / side).rglob("*") if p.is_file()}
            for name in names
        )
        assert first == second and any(name.startswith("masks") for name in first)
