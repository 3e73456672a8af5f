"""A whole pilot on a corpus of no size: its answers, a kill, what it refuses.

Through it go slm.pilot.trials, slm.pilot.arms and slm.pilot.answers.
"""

import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from model_helpers import small_llama
from slm.cli import conf_folder
from slm.errors import UserError
from slm.model.folder import save_model
from slm.pilot import arms as training
from slm.pilot.__main__ import main
from slm.pilot.answers import saving
from slm.pilot.arms import arms_of
from slm.pilot.command import pilot
from slm.pilot.trials import CORPUS
from slm.pilot.verdict import BEFORE, MIXED, REFERENCE, excess, random
from slm.selection.names import ALL_TOKENS
from slm.store.shards import Corpus
from slm.store.tokenizer import load_corpus_tokenizer

LENGTH = 16


def made(make_corpus, folder: Path, documents: int, seed: int, **more: Any) -> Corpus:
    """Documents of 20 to 60 tokens, of two sources; shards of whole windows."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(20, 60, documents)
    ids = generator.integers(1, 290, sizes.sum())
    ids = ids[: (len(ids) - 1) // LENGTH * LENGTH + 1]
    starts = np.cumsum([0, *sizes[:-1]])
    starts = starts[starts < len(ids)].tolist()
    return make_corpus(folder, [ids], LENGTH, starts=[starts], sources=("a", "b"), **more)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, make_corpus) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("inputs")
    corpus = made(make_corpus, folder / "corpus", 60, 0)
    curated = made(make_corpus, folder / "curated", 20, 1)
    held = made(make_corpus, folder / "held", 12, 2)
    tokenizer = load_corpus_tokenizer(corpus)
    for name in ("base", "reference"):
        lineage = {"train_seconds": 2.0, "train_flops": 5e8, "corpus": "curated"}
        save_model(folder / name, small_llama(corpus.vocab_size), tokenizer, "card", lineage)
    return {
        "corpus": corpus.folder,
        "reference_model": folder / "reference",
        "heldout": {"math": held.folder},
        "model": {"init_from": folder / "base"},
        "curated": curated.folder,
        "budget": 4 * 4 * LENGTH,
        "select_ratios": [0.5],
        "seeds": 2,
        "max_seeds": 2,
        "heldout_windows": 16,
        "data": {"batch_size": 4, "micro_batch_size": 4},
        "optimizer": {"adamw": {"lr": 1e-3}},
        "trainer": {"accelerator": "cpu"},
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory, inputs):
    return pilot(out=tmp_path_factory.mktemp("pilots") / "pilot", **inputs)


ARMS = {ALL_TOKENS, random(0.5), excess(0.5), MIXED}


def numbers(found: dict[str, Any]) -> dict[str, Any]:
    """Without clocks."""
    left = {k: v for k, v in found.items() if k not in ("overhead", "costs", "to_equal_loss")}
    return json.loads(json.dumps(left))


def test_the_answers_are_there_and_are_those_of_the_token_losses(done):
    found = json.loads((done.folder / "pilot.json").read_text())
    assert numbers(found) == numbers(done.answers)
    asked = {(row["arm"], row["minus"]) for row in found["questions"]}
    assert asked == {
        *((arm, BEFORE) for arm in (ALL_TOKENS, MIXED, excess(0.5))),
        (MIXED, ALL_TOKENS),
        (excess(0.5), MIXED),
        (excess(0.5), random(0.5)),
        (excess(0.5), ALL_TOKENS),
    }
    held = np.load(done.folder / "seed-0" / "all" / "tokens" / "math-256.npy")
    other = np.load(done.folder / "seed-1" / "all" / "tokens" / "math-256.npy")
    (row,) = [r for r in found["arms"] if (r["arm"], r["set"]) == (ALL_TOKENS, "math")]
    assert row["mean"] == pytest.approx((held.mean() + other.mean()) / 2, abs=1e-6)
    assert (row["low"], row["high"]) == pytest.approx(sorted([held.mean(), other.mean()]), abs=1e-6)
    assert held.shape == (16, LENGTH) and found["heldout"]["math"]["targets"] == held.size
    assert found["seeds"] == dict.fromkeys(ARMS, 2)
    assert found["verdict"]["sentence"] == done.verdict
    assert {row["set"] for row in found["elsewhere"]} == {
        CORPUS,
        f"{CORPUS}, outside the top 0.5",
    }
    assert {row["arm"] for row in found["beside"]} == {REFERENCE}
    assert found["keep_rates"]["0.5"].keys() == {"a", "b"}
    assert np.mean([*found["keep_rates"]["0.5"].values()]) == pytest.approx(0.5, abs=0.05)


def test_arms_of_a_seed_share_its_sample_and_order_and_seeds_do_not(done):
    read = {
        arm.name: [
            json.loads((done.folder / f"seed-{s}" / arm.folder / "run.json").read_text())
            for s in range(2)
        ]
        for arm in arms_of([0.5], True)
    }
    for s in range(2):
        mine = [read[name][s] for name in ARMS - {MIXED}]
        assert len({run["corpus"] for run in mine}) == 1
        assert {run["seed"] for run in mine} == {s} and {run["data.order"] for run in mine}
        assert {run["max_tokens"] for run in mine} == {256}
    assert read[ALL_TOKENS][0]["corpus"] != read[ALL_TOKENS][1]["corpus"]
    assert read[MIXED][0]["corpus"] != read[ALL_TOKENS][0]["corpus"]
    assert done.answers["samples"]["seed 0"]["tokens"] == 257


def test_all_costs_are_counted(done):
    (row,) = done.answers["to_equal_loss"]
    counted = row["flops"]["counted"]
    assert counted["reference"] == 5e8 and row["seconds"]["counted"]["reference"] == 2.0
    records = [
        json.loads((done.folder / f"seed-{s}" / "excess_0.5" / "arm.json").read_text())
        for s in range(2)
    ]
    assert counted["excess"] == sum(r["train_flops"] for r in records) / 512
    assert counted["all"] > counted["excess"] > counted["scoring"] > 0
    clocks = [r["train_seconds"] for r in records]
    controls = [
        json.loads((done.folder / f"seed-{s}" / "all" / "arm.json").read_text())["train_seconds"]
        for s in range(2)
    ]
    assert row["clock"] == [mine / its for mine, its in zip(clocks, controls, strict=True)]
    overhead = done.answers["overhead"]
    assert overhead["overhead"] == overhead["own_seconds"] / overhead["work_seconds"]


def test_what_is_saved_is_said_in_words():
    counted = {"reference": 1.0}
    flops = {"counted": counted, "break_even_tokens": {"mean": 1234567.2}}
    text = saving({"reached": "yes", "tokens": {"mean": 0.353}, "flops": flops})
    assert text == (
        "all tokens' loss takes 35% of the tokens, and in FLOPs it has paid for reference and "
        "scores from 1,234,567 target tokens on"
    )
    unknown = flops | {"counted": {"reference": None}}
    for other in (None, unknown):
        text = saving({"reached": "yes", "tokens": {"mean": 0.353}, "flops": other})
        assert text == "all tokens' loss takes 35% of the tokens"
    nothing = {"reached": "all tokens learn nothing", "tokens": {"mean": None}, "flops": flops}
    assert saving(nothing).startswith("all tokens end no lower than the base")


def test_models_are_not_kept_and_the_page_asks_for_nothing(done):
    assert not [*done.folder.rglob("*.safetensors"), *done.folder.rglob("*.ckpt")]
    page = done.page.read_text()
    assert done.verdict in page.replace("&#39;", "'") and "<script" not in page
    assert not re.search(r"https?://", page)


def test_the_same_call_trains_nothing_again(done, inputs, monkeypatch):
    monkeypatch.setattr(training, "train", None)
    before = done.answers["overhead"]
    again = pilot(out=done.folder, **inputs)
    assert numbers(again.answers) == numbers(done.answers)
    now = again.answers["overhead"]
    assert now["work_seconds"] == pytest.approx(before["work_seconds"])
    assert now["own_seconds"] > before["own_seconds"]


def test_after_a_kill_only_what_is_missing_is_trained(done, inputs, monkeypatch, tmp_path):
    out = tmp_path / "pilot"
    shutil.copytree(done.folder, out)
    for name in ("pilot.json", "pilot.html", "made.json", "seed-1/all/arm.json"):
        (out / name).unlink()
    shutil.rmtree(out / "seed-1" / "all")
    shutil.rmtree(out / "seed-1" / "excess_0.5")
    trained, train = [], training.train
    monkeypatch.setattr(training, "train", lambda *a, **k: trained.append(a[1]) or train(*a, **k))
    again = pilot(out=out, **inputs)
    assert [path.name for path in trained] == ["all", "excess_0.5"]
    assert {path.parent.name for path in trained} == {"seed-1"}
    assert numbers(again.answers) == numbers(done.answers)


def test_another_pilot_in_the_folder_is_refused(done, inputs):
    with pytest.raises(UserError, match="holds another pilot: max_tokens is 256 .*, 512 now"):
        pilot(out=done.folder, **inputs | {"budget": 8 * 4 * LENGTH})


def test_what_somebody_else_wrote_is_not_replaced(tmp_path, inputs):
    (tmp_path / "pilot.html").write_text("mine")
    with pytest.raises(UserError, match="pilot.html would be replaced"):
        pilot(out=tmp_path, **inputs)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"budget": 32}, r"budget=32 is 32 of the 2,\d+ tokens .* can have 2,\d+: less .* 64$"),
        ({"budget": "1%"}, r"budget=1% is 2\d of the 2,\d+ tokens .* less than one optimizer ste"),
        ({"budget": "a lot"}, "budget is 'a lot', it must be a share of the corpus such as 1%, or"),
        ({"budget": "0%"}, "budget is '0%', it must be a share"),
        ({"select_ratios": [0.0]}, r"select_ratios is \[0.0\], .* at 0 nothing is trained on"),
        ({"select_ratios": [0.5, 1]}, "select_ratios is .* 1 is all tokens, an arm of every pilot"),
        ({"select_ratios": []}, r"select_ratios is \[\], it must be a list of at least 1"),
        ({"max_seeds": 1}, "max_seeds is 1, seeds 2: it must be at least as many"),
        ({"model": {}}, "model.init_from must be given: the base that all arms begin with"),
        ({"level": 1}, r"level is 1, it must be a number in \(0, 1\)"),
        ({"heldout_windows": 4}, r"held-out set math .* has \d documents in the 4 windows .* 8$"),
    ],
)
def test_what_does_not_fit_is_one_sentence(tmp_path, inputs, change, sentence):
    with pytest.raises(UserError, match=sentence) as refused:
        pilot(out=tmp_path / "out", **inputs | change)
    assert "\n" not in str(refused.value)
    assert not [*tmp_path.rglob("pilot.json")]


def test_held_out_text_that_is_trained_on_is_refused(tmp_path, inputs, make_corpus):
    same = Corpus.open(inputs["corpus"])
    more = inputs | {"out": tmp_path / "out"}
    with pytest.raises(UserError, match="held-out set a is .*corpus, the corpus that the pilot tr"):
        pilot(**more | {"heldout": {"a": same.folder}})
    part = same.column("tokens", 0)[: 40 * LENGTH + 1]
    starts = [s for s in same.column("documents", 0)[:, 0].tolist() if s < len(part)]
    held = make_corpus(tmp_path / "held", [part], LENGTH, starts=[starts])
    with pytest.raises(UserError, match="held-out set a .* has .* documents that were drawn from"):
        pilot(**more | {"heldout": {"a": held.folder}, "budget": "90%"})


def test_a_corpus_without_a_window_is_refused(tmp_path, inputs, make_corpus):
    none = make_corpus(tmp_path / "none", [np.array([1])], LENGTH)
    with pytest.raises(UserError, match="none holds no window of 16 tokens"):
        pilot(**inputs | {"corpus": none.folder, "out": tmp_path / "out"})


def test_keywords_are_the_keys_of_the_command():
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        keys: Any = OmegaConf.to_container(compose("pilot"))
    parameters = inspect.signature(pilot).parameters
    assert keys.keys() == parameters.keys()
    plain = {k: v for k, v in keys.items() if k not in ("model", "optimizer", "trainer")}
    for key, value in plain.items():
        default = parameters[key].default
        wanted = "???" if default is inspect.Parameter.empty else default
        assert value == (list(wanted) if isinstance(wanted, tuple) else wanted), key


def test_a_corpus_of_one_document_has_nothing_left_to_train_on(tmp_path, inputs, make_corpus):
    ids = np.arange(1, 40 * LENGTH + 2) % 290
    one = make_corpus(tmp_path / "one", [ids], LENGTH)
    with pytest.raises(UserError, match="of which an arm can have 0: less than one optimizer ste"):
        pilot(**inputs | {"corpus": one.folder, "out": tmp_path / "out"})


def test_the_command_prints_the_verdict(done, inputs, call):
    folders = {"corpus": "corpus", "curated": "curated", "reference_model": "reference_model"}
    words = [f"{key}='{inputs[name]}'" for key, name in folders.items()]
    words += [f"heldout={{math: '{inputs['heldout']['math']}'}}", f"out='{done.folder}'"]
    words += [f"model.init_from='{inputs['model']['init_from']}'", "select_ratios=[0.5]"]
    words += ["budget=256", "seeds=2", "max_seeds=2", "heldout_windows=16", "data.batch_size=4"]
    words += ["data.micro_batch_size=4", "trainer.accelerator=cpu"]
    code, out, err = call(main, *words)
    assert (code, out.strip()) == (0, done.verdict), err
