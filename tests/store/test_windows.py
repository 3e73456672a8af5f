"""Windows, alignment with the reference scores, order, resume."""

import math

import numpy as np
import pytest
import torch

from slm.errors import UserError
from slm.store.files import write_record
from slm.store.windows import (
    COMBINE,
    IGNORE_INDEX,
    Windows,
    combine,
    open_windows,
    positions,
    spread,
)
from slm.train.order import MicroBatches, Order, Steps


def naive_windows(shards: list[np.ndarray], seq_len: int) -> list[np.ndarray]:
    """The definition: window w of a shard reads tokens [w * T, (w + 1) * T]."""
    out = []
    for tokens in shards:
        for start in range(0, len(tokens) - seq_len, seq_len):
            out.append(tokens[start : start + seq_len + 1])
    return out


def test_every_token_but_a_shards_first_is_a_target_once(tmp_path, make_corpus):
    shards = [np.arange(0, 13), np.arange(13, 22)]
    corpus = make_corpus(tmp_path / "c", shards, 4)
    batch = Windows(corpus).batch(np.arange(5))
    assert sorted(batch["targets"].flatten().tolist()) == [*range(1, 13), *range(14, 22)]
    assert torch.equal(Windows(corpus).batch([3, 1])["targets"], batch["targets"][[3, 1]])
    expected = naive_windows(shards, 4)
    for row, window in enumerate(expected):
        assert batch["input_ids"][row].tolist() == window[:-1].tolist()
        assert batch["targets"][row].tolist() == window[1:].tolist()


def test_a_score_belongs_to_the_target_it_stands_beside(tmp_path, make_corpus, make_references):
    # Off by one, in either direction, would pair token t with the score of t - 1 or t + 1.
    shards = [np.arange(0, 13), np.arange(13, 22)]
    corpus = make_corpus(tmp_path / "c", shards, 4)
    scores = [np.r_[np.nan, -shards[0][1:]], np.r_[np.nan, -shards[1][1:]]]
    references = make_references(tmp_path / "r", corpus, scores)
    batch = Windows(corpus, [references]).batch(np.array([4, 0, 3, 1]))
    assert torch.equal(-batch["reference_logprob"], batch["targets"].float())


def test_missing_or_positive_score_under_a_live_target_is_refused(
    tmp_path, make_corpus, make_references
):
    corpus = make_corpus(tmp_path / "c", [np.arange(13)], 4)
    for value in (np.nan, 0.5, np.inf):
        scores = np.r_[np.nan, -np.ones(12)]
        scores[6] = value
        references = make_references(tmp_path / f"r{value}", corpus, [scores])
        with pytest.raises(UserError, match="target 1 of window 1 has log-prob"):
            Windows(corpus, [references]).batch(np.array([0, 1]))


def test_references_of_another_corpus_are_refused(tmp_path, make_corpus, make_references):
    one = make_corpus(tmp_path / "one", [np.arange(13)], 4)
    other = make_corpus(tmp_path / "other", [np.arange(13)[::-1]], 4)
    wider = make_corpus(tmp_path / "wider", [np.arange(13)], 6)
    references = make_references(tmp_path / "r", one, [np.r_[np.nan, -np.ones(12)]])
    with pytest.raises(UserError, match=f"{one.fingerprint}.*{other.fingerprint}"):
        Windows(other, [references])
    with pytest.raises(UserError, match="seq_len is 4 in the reference, 6 in the corpus"):
        Windows(wider, [references])


def test_token_id_beyond_the_vocabulary_is_refused(tmp_path, make_corpus):
    corpus = make_corpus(tmp_path / "c", [np.array([1, 2, 299, 4, 300])], 4)
    with pytest.raises(
        UserError, match="tokens-00000.npy: window 0 of .*c holds token id 300, the tok.* has 300"
    ):
        Windows(corpus).batch(np.array([0]))


def test_documents_packing_masks_first_tokens_and_restarts_positions(tmp_path, make_corpus):
    # Tokens 0-12; documents start at 0, 3 and 8; windows of 4.
    starts = [[0, 3, 8]]
    corpus = make_corpus(tmp_path / "c", [np.arange(13)], 4, "documents", starts)
    batch = Windows(corpus).batch(np.arange(3))
    x = IGNORE_INDEX
    assert batch["targets"].tolist() == [[1, 2, x, 4], [5, 6, 7, x], [9, 10, 11, 12]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert torch.equal(batch["input_ids"], torch.arange(12).view(3, 4))


@pytest.mark.parametrize("packing", ["concat", "documents"])
def test_prompts_are_no_targets(tmp_path, make_corpus, make_references, packing):
    """Entry i of the mask is about the token at i; two shards, and a window of prompts alone."""
    shards = [np.arange(0, 13), np.arange(13, 22)]
    asked = {1, 3, 4, 5, 6, 7, 8, 11, 16, 21}
    masks = [[int(token) not in asked for token in tokens] for tokens in shards]
    starts = [[0, 3, 9], [0, 4]]  # the first tokens of documents: 0, 3, 9, 13, 17
    corpus = make_corpus(tmp_path / "c", shards, 4, packing, starts, masks=masks)
    silent = asked | ({3, 9, 17} if packing == "documents" else set())
    batch = Windows(corpus).batch(np.array([3, 1, 0, 2, 4]))
    expected = [[14, 15, 16, 17], [5, 6, 7, 8], [1, 2, 3, 4], [9, 10, 11, 12], [18, 19, 20, 21]]
    expected = [[IGNORE_INDEX if t in silent else t for t in row] for row in expected]
    assert batch["targets"].tolist() == expected
    assert batch["input_ids"][1].tolist() == [4, 5, 6, 7]  # a prompt is read all the same
    # A score is needed under live targets alone.
    scores = [np.array([np.nan if t in silent | {0, 13} else -t for t in s]) for s in shards]
    references = make_references(tmp_path / "r", corpus, scores)
    batch = Windows(corpus, [references]).batch(np.arange(5))
    live = batch["targets"] != IGNORE_INDEX
    assert torch.equal(-batch["reference_logprob"][live], batch["targets"][live].float())


def test_weights_are_those_of_the_targets(tmp_path, make_corpus):
    """Entry i is about the token at i; a target of weight 0 is none; a negative one is refused."""
    shards = [np.arange(0, 13), np.arange(13, 22)]
    weights = [[float(token % 5) / 2 for token in tokens] for tokens in shards]
    masks = [[int(token) != 6 for token in tokens] for tokens in shards]
    corpus = make_corpus(tmp_path / "c", shards, 4, masks=masks, weights=weights)
    batch = Windows(corpus).batch(np.array([3, 1, 0, 4]))
    targets = [[14, 15, 16, 17], [5, 6, 7, 8], [1, 2, 3, 4], [18, 19, 20, 21]]
    x = IGNORE_INDEX
    assert batch["token_weight"].dtype == torch.float32
    assert batch["token_weight"].tolist() == [[t % 5 / 2 for t in row] for row in targets]
    silent = {0, 5, 6, 10, 15, 20}
    assert batch["targets"].tolist() == [[x if t in silent else t for t in row] for row in targets]
    assert "token_weight" not in Windows(make_corpus(tmp_path / "d", shards, 4)).batch([0])
    for value in (-1.0, math.nan, math.inf):
        weights[1][2] = value
        damaged = Windows(make_corpus(tmp_path / str(value), shards, 4, weights=weights))
        with pytest.raises(UserError, match=f"target 1 of window 3 has weight {value}, expected"):
            damaged.batch([0, 3])


def test_labels_are_those_of_the_targets(tmp_path, make_corpus):
    """Entry i is about the token at i; two shards, and a prompt's label is read as any other."""
    shards = [np.arange(0, 13), np.arange(13, 22)]
    signal = [[int(token) % 3 - 1 for token in tokens] for tokens in shards]
    masks = [[int(token) != 6 for token in tokens] for tokens in shards]
    windows = Windows(make_corpus(tmp_path / "c", shards, 4, masks=masks, signal=signal))
    numbers = np.array([3, 1, 0, 4])
    found = windows.signal(numbers)
    targets = [[14, 15, 16, 17], [5, 6, 7, 8], [1, 2, 3, 4], [18, 19, 20, 21]]
    assert windows.has_signal and found.dtype == np.int8
    assert found.tolist() == [[token % 3 - 1 for token in row] for row in targets]
    plain = Windows(make_corpus(tmp_path / "d", shards, 4))
    assert not plain.has_signal
    with pytest.raises(UserError, match="d has no labels"):
        plain.signal(numbers)


def test_positions_of_hand_made_starts():
    first = np.array([[0, 0, 1, 0, 1, 1, 0]], bool)
    assert positions(first).tolist() == [[0, 1, 0, 1, 0, 0, 1]]


def test_target_bytes_are_those_of_the_targets(tmp_path, make_corpus, tokenizer):
    text = "caf\u00e9 \U0001f600 und mehr Text, damit ein Fenster voll wird"
    ids = np.array(tokenizer.encode(text))
    seq_len = len(ids) - 1
    windows = Windows(make_corpus(tmp_path / "c", [ids], seq_len))
    found = int(windows.target_bytes(np.array([0])).sum())
    assert found == len(text.encode()) - len(tokenizer.decode(ids[:1]).encode())


@pytest.mark.parametrize(("world_size", "micro"), [(1, 8), (1, 2), (2, 2), (4, 2), (2, 4)])
def test_one_step_reads_the_same_windows_however_it_is_split(text_corpus, world_size, micro):
    windows = Windows(text_corpus)
    expected = Order(len(windows), 1).samples(8, 16)[0].tolist()
    found: dict[int, list[int]] = {}
    for rank in range(world_size):
        steps = Steps(windows, Order(len(windows), 1), 8, micro, rank, world_size)
        for number, batch in enumerate(steps[1]):  # type: ignore[arg-type]
            found[number * world_size + rank] = batch["window"].tolist()
    assert [w for key in sorted(found) for w in found[key]] == expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream_started_later_goes_on_where_it_would_have_been(text_corpus, num_workers):
    windows = Windows(text_corpus)
    state = torch.get_rng_state()

    def stream(start: int, count: int) -> list[list[int]]:
        steps = Steps(windows, Order(len(windows), 5), 16, 4)
        batches = iter(MicroBatches(steps, start, num_workers, pin_memory=False))
        return [next(batches)["window"].tolist() for _ in range(count)]

    whole = stream(0, 24)  # 96 windows: two passes over 40 and a bit
    assert stream(3, 12) == whole[12:]
    assert torch.equal(state, torch.get_rng_state())


def test_an_error_in_a_worker_arrives_as_one_sentence(tmp_path, make_corpus):
    corpus = make_corpus(tmp_path / "c", [np.array([1, 2, 299, 4, 300])], 4)
    steps = Steps(Windows(corpus), Order(1, 0), 1, 1)
    with pytest.raises(UserError, match="^[^\n]*token id 300[^\n]*$"):
        next(iter(MicroBatches(steps, 0, 2, pin_memory=False)))


def test_spread_is_even_and_stays_inside():
    assert spread(10, 4).tolist() == [0, 2, 5, 7]
    assert spread(3, 8).tolist() == [0, 1, 2]
    assert spread(3, None).tolist() == [0, 1, 2]


# ---- several references, entropies, sources -------------------------------------------------


def test_several_references_become_one(tmp_path, make_corpus, make_references):
    corpus = make_corpus(tmp_path / "c", [np.arange(9)], 4)
    stored = [np.r_[np.nan, -np.arange(1.0, 9)], np.r_[np.nan, -np.full(8, 4.5)]]
    references = [make_references(tmp_path / f"r{i}", corpus, [s]) for i, s in enumerate(stored)]
    losses = [[1.0, 2, 3, 4], [4.5] * 4]
    pairs = list(zip(*losses, strict=True))
    expected = {
        "mean": [-(a + b) / 2 for a, b in pairs],
        "min": [-min(a, b) for a, b in pairs],
        "max": [-max(a, b) for a, b in pairs],
        "mixture": [math.log((math.exp(-a) + math.exp(-b)) / 2) for a, b in pairs],
    }
    assert {*expected, "domain"} == set(COMBINE)
    for how, values in expected.items():
        batch = Windows(corpus, references, how).batch(np.array([0]))
        assert batch["reference_logprob"][0].tolist() == pytest.approx(values, rel=1e-6)


def test_the_second_of_two_stands_beside_the_first(tmp_path, make_corpus, make_references):
    corpus = make_corpus(tmp_path / "c", [np.arange(9)], 4)
    stored = [np.r_[np.nan, -np.arange(1.0, 9)], np.r_[np.nan, -np.full(8, 4.5)]]
    stores = [make_references(tmp_path / f"r{i}", corpus, [s]) for i, s in enumerate(stored)]
    folders = [str(store.folder) for store in stores]
    windows = open_windows(corpus, folders, "domain")
    batch = windows.batch(np.array([1]))
    assert [column.key for column in windows.columns] == ["reference_logprob", "domain_logprob"]
    assert batch["reference_logprob"].tolist() == [[-5.0, -6.0, -7.0, -8.0]]
    assert batch["domain_logprob"].tolist() == [[-4.5] * 4]
    with pytest.raises(UserError, match="combine is 'domain' for 3 references: .* names two"):
        open_windows(corpus, [*folders, folders[0]], "domain")
    broken = make_references(tmp_path / "b", corpus, [np.r_[np.nan, np.ones(8)]])
    with pytest.raises(UserError, match="b: target 0 of window 0 has log-prob 1.0"):
        open_windows(corpus, [folders[0], str(broken.folder)], "domain").batch(np.array([0]))


@pytest.mark.parametrize(
    ("general", "domain", "fits"),
    [
        (("g", "base"), ("d", "base"), True),
        (("base", None), ("d", "base"), True),  # the base itself
        (("base", "older"), ("d", "base"), True),
        (("g", "base"), ("d", "other"), False),
        (("g", None), ("d", None), False),  # each from new weights
        (("g", "base"), ("d", "nobody says"), True),
    ],
)
def test_two_references_have_one_base(
    tmp_path, make_corpus, make_references, general, domain, fits
):
    corpus = make_corpus(tmp_path / "c", [np.arange(9)], 4)
    for model, base in (general, domain):
        scores = [np.r_[np.nan, -np.ones(8)]]
        store = make_references(tmp_path / model, corpus, scores, model_sha256=model)
        if base != "nobody says":
            write_record(store.folder / "lineage.json", {"init_from_sha256": base})
    folders = [str(tmp_path / general[0]), str(tmp_path / domain[0])]
    if fits:
        assert open_windows(corpus, folders, "domain").combine == "domain"
        return
    with pytest.raises(UserError, match="g and .*d come from different bases .*from one model"):
        open_windows(corpus, folders, "domain")


def test_each_source_has_a_reference_of_its_own(tmp_path, make_corpus, make_references):
    corpus = make_corpus(
        tmp_path / "c", [np.arange(9)], 4, starts=[[0, 3, 7]], sources=["math", "code"]
    )
    stored = {"code": np.r_[np.nan, -np.arange(1.0, 9)], "math": np.r_[np.nan, -np.full(8, 0.5)]}
    folders = {
        name: str(make_references(tmp_path / name, corpus, [scores]).folder)
        for name, scores in stored.items()
    }
    windows = open_windows(corpus, folders, None)
    found = windows.batch(np.array([0, 1]))["reference_logprob"]  # tokens 1, 2, 7 and 8 are math's
    assert found.tolist() == [[-0.5, -0.5, -3, -4], [-5, -6, -0.5, -0.5]]
    assert (windows.combine, len(windows.references)) == ("source", 2)
    for given, how, message in [
        (folders, "mean", "data.combine is 'mean', and data.references names one of each source"),
        (
            {"math": folders["math"]},
            None,
            r"names the sources \['math'\], those of .* \['code', 'm",
        ),
        (folders | {"x": "y"}, None, r"the sources \['code', 'math', 'x'\]"),
        ([*folders.values()], "source", "it must be {math: ..., code: ...}"),
    ]:
        with pytest.raises(UserError, match=message):
            open_windows(corpus, given, how)


def test_entropies_stand_beside_their_targets(tmp_path, make_corpus, make_references):
    corpus = make_corpus(tmp_path / "c", [np.arange(9)], 4)
    scores, entropy = np.r_[np.nan, -np.ones(8)], np.r_[np.nan, 10 + np.arange(8)]
    store = make_references(tmp_path / "r", corpus, [scores], [entropy])
    windows = Windows(corpus, [store])
    assert [column.name for column in windows.columns] == ["logprobs", "entropy"]
    batch = windows.batch(np.array([1, 0]))
    assert batch["reference_entropy"].tolist() == [[14, 15, 16, 17], [10, 11, 12, 13]]
    assert [c.name for c in Windows(corpus, [store, store], "mean").columns] == ["logprobs"]
    for value in (np.nan, -0.5):
        entropy[3] = value
        bad = make_references(tmp_path / f"r{value}", corpus, [scores], [entropy])
        with pytest.raises(UserError, match=f"target 2 of window 0 has entropy {value}"):
            Windows(corpus, [bad]).batch(np.array([0]))


def test_a_mixture_of_hopeless_references_is_finite():
    assert combine(np.array([[-2000.0], [-1000.0]]), "mixture") == pytest.approx(
        -1000 - math.log(2)
    )


def test_every_one_of_several_references_is_checked(tmp_path, make_corpus, make_references):
    corpus = make_corpus(tmp_path / "c", [np.arange(9)], 4)
    good, bad = np.r_[np.nan, -np.ones(8)], np.r_[np.nan, -np.ones(7), np.nan]
    references = [
        make_references(tmp_path / f"r{i}", corpus, [s]) for i, s in enumerate((good, bad))
    ]
    with pytest.raises(UserError, match="r1: target 3 of window 1 has log-prob nan"):
        Windows(corpus, references, "mean").batch(np.array([0, 1]))


def test_sources_are_those_of_the_targets(tmp_path, make_corpus):
    corpus = make_corpus(
        tmp_path / "c", [np.arange(13), np.arange(9)], 4, starts=[[0, 3, 9], [0, 4]]
    )
    for index, sources in enumerate(([5, 6, 7], [8, 9])):
        path = corpus.folder / f"documents-{index:05d}.npy"
        rows = np.load(path)
        rows[:, 1] = sources
        np.save(path, rows)
    found = Windows(corpus).sources(np.array([4, 0, 2, 1]))
    # Window 4 is the second of shard 1: targets 5 to 8. Window 0: targets 1 to 4 of shard 0.
    assert found.tolist() == [[9] * 4, [5, 5, 6, 6], [7, 7, 7, 7], [6, 6, 6, 6]]
