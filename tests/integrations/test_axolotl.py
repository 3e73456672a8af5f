"""A step of axolotl's own trainer with the plugin is the one that float64 and a sorted list define.

axolotl runs in other processes, which find it in the folder of tests/doors.txt: config, datasets,
collators, samplers and trainer are its own. The functions up to `main` run there.
"""

import contextlib
import functools
import gc
import importlib
import io
import json
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from door_helpers import (
    ROOT,
    Recorder,
    Row,
    assert_gradients,
    assert_loss_falls,
    cut_gradients,
    dataset_of,
    expected_gradients,
    make_model,
    make_rows,
    make_tokenizer,
    run_python,
)

HERE = Path(__file__).parent
PLUGIN = "slm.integrations.axolotl.SelectivePlugin"
LENGTHS = [9, 5, 12, 7, 8, 11, 6, 10]
PACKED = [13, 8, 10, 6, 9, 11, 12, 7] * 3
pytestmark = pytest.mark.slow  # importing axolotl takes seconds


def rows_of(name: str) -> list[Row]:
    lengths, weighted = (LENGTHS, False) if name == "rows" else (PACKED, True)
    rows = make_rows(lengths, prompt=2, unscored=1, weighted=weighted)
    for row in rows:
        row["attention_mask"] = [1] * len(row["input_ids"])
        row["reference_logprob"][0] = -0.5  # nothing stands before it: it must not be selected
    return rows


# ---- in a process with axolotl ------------------------------------------------------------------


def write_json(path: Path, rows: list[Row]) -> None:
    """JSON has null for NaN."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows).replace("NaN", "null"))


def write_config(folder: Path, **fields: Any) -> Path:
    fixed: dict[str, Any] = {
        "plugins": [PLUGIN],
        "slm_select_ratio": 0.4,
        "base_model": str(folder / "model"),
        "datasets": [{"path": str(folder / "rows.json"), "type": None}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "sequence_len": 32,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "learning_rate": 0.1,
        "optimizer": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "curriculum_sampling": True,  # in the order of the dataset
        "shuffle_merged_datasets": False,
        "pad_to_sequence_len": False,
        "dataset_num_proc": 1,
        "attn_implementation": "sdpa",
        "bf16": False,
        "use_cpu": True,
    }
    path = folder / "config.yaml"
    given = {key: value for key, value in (fixed | fields).items() if value != "absent"}
    path.write_text(json.dumps(given))  # which is YAML
    return path


def make_trainer(folder: Path, **fields: Any) -> Any:
    example = importlib.import_module("axolotl_run")
    return example.make_trainer(write_config(folder, **fields), make_model())


def train(trainer: Any) -> dict[str, Any]:
    """Its first step: gradients, log and micro-batches."""
    recorder, seen, draw = Recorder(), [], trainer.get_batch_samples

    def watched(*arguments: Any) -> Any:
        seen.append(draw(*arguments))
        return seen[-1]

    trainer.get_batch_samples = watched
    trainer.add_callback(recorder)
    trainer.train()
    batches = [dict(batch) for batch in seen[0][0]]
    return {"gradients": recorder.gradients[0], "log": recorder.logs[0], "batches": batches}


def run_rows(folder: Path) -> dict[str, Any]:
    rows = rows_of("rows")
    write_json(folder / "rows.json", rows)
    trainer = make_trainer(folder)
    plain = [{k: v for k, v in row.items() if k != "reference_logprob"} for row in rows[:2]]
    losses = [trainer.evaluate(dataset_of(data))["eval_loss"] for data in (rows[:2], plain)]
    settings = {
        "columns": trainer.train_dataset.column_names,
        "scaled": trainer.loss_is_scaled_for_ga,
        "across": trainer.args.average_tokens_across_devices,
        "bases": [kind.__name__ for kind in type(trainer).__mro__],
    }
    found = train(trainer) | settings | {"eval": losses}
    for row in rows:
        row["reference_logprob"] = [-7.0] * len(row["labels"])
    write_json(folder / "rows.json", rows)
    again = make_trainer(folder).train_dataset["reference_logprob"]
    return found | {"again": [list(column) for column in again]}


def run_along(folder: Path) -> dict[str, Any]:
    write_json(folder / "rows.json", rows_of("rows"))
    words = {"micro_batch_size": 4, "gradient_accumulation_steps": 1}
    return train(make_trainer(folder, slm_backward="selected", **words))


def run_packed(folder: Path) -> dict[str, Any]:
    dataset_of(rows_of("packed")).save_to_disk(folder / "scored")
    source = {"path": str(folder / "scored"), "type": None}
    return train(make_trainer(folder, datasets=[source], sample_packing=True, slm_scope="batch"))


def run_collators(folder: Path) -> dict[str, Any]:
    """What axolotl's collators make with scores and without, of rows and of packed rows."""
    from axolotl.utils.collators import (
        BatchSamplerDataCollatorForSeq2Seq,
        DataCollatorForSeq2Seq,
        V2BatchSamplerDataCollatorForSeq2Seq,
    )

    from slm.integrations.axolotl import PackedCollator

    found = {}
    for kind in (
        DataCollatorForSeq2Seq,
        BatchSamplerDataCollatorForSeq2Seq,
        V2BatchSamplerDataCollatorForSeq2Seq,
    ):
        for side in ("right", "left"):
            collator = kind(make_tokenizer(side), pad_to_multiple_of=8)
            rows = tagged([3, 7, 1, 5, 4])
            scored = rows if kind is DataCollatorForSeq2Seq else [rows[:3], rows[3:]]
            bare = [{k: v for k, v in r.items() if k != "reference_logprob"} for r in rows]
            without = bare if kind is DataCollatorForSeq2Seq else [bare[:3], bare[3:]]
            batch = dict(PackedCollator(collator)(scored))
            same = dict(PackedCollator(collator)(json.loads(json.dumps(without))))
            found[kind.__name__, side] = (batch, same, dict(collator(without)))
    return found  # type: ignore


def tagged(lengths: list[int]) -> list[Row]:
    """Scores that say which token they belong to: minus its id; also of the first."""
    ids, rows = iter(range(2, 61)), []
    for length in lengths:
        row: Row = {"input_ids": [next(ids) for _ in range(length)]}
        row |= {"labels": row["input_ids"], "attention_mask": [1] * length}
        row |= {"position_ids": list(range(length))}
        rows.append(row | {"reference_logprob": [-float(i) for i in row["input_ids"]]})
    return rows


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "no ratio": (
        {"slm_select_ratio": "absent"},
        "select_ratio is null, it must be a number in (0, 1]",
    ),
    "ratio": ({"slm_select_ratio": 1.5}, "select_ratio is 1.5, it must be a number in (0, 1]"),
    "scope": ({"slm_scope": "rank"}, "scope is 'rank', it must be one of"),
    "selection": ({"slm_selection": "worst"}, "no rule 'worst' is known here (there are all"),
    "truncate": (
        {"excess_length_strategy": "truncate"},
        "excess_length_strategy is 'truncate', which cuts the tokens but not reference_logprob",
    ),
    "no isolation": (
        {"sample_packing": True, "attn_implementation": "absent"},
        "sample_packing is true, but with attn_implementation None packed documents see each other",
    ),
    "backward": ({"slm_backward": "fast"}, "slm_backward is 'fast', it must be one of"),
    "stream": ({"streaming": True}, "streaming is True: it tokenises text on the way"),
    "pretraining": (
        {"pretraining_dataset": [{"path": "text"}]},
        "it tokenises text on the way, where it has no scores, leave SelectivePlugin or it",
    ),
    "rl": ({"rl": "dpo"}, "it has a trainer and a loss of its own, leave SelectivePlugin or it"),
    "trainer": ({"trainer_cls": "a.B"}, "trainer_cls is 'a.B': it has a trainer"),
    "eaft": ({"use_eaft": True}, "use_eaft is True: it has a trainer and a loss of its own"),
    "pose": ({"use_pose": True}, "use_pose is True: it puts tokens at other positions"),
}


def run_refusals(folder: Path) -> dict[str, Any]:
    from axolotl.cli.config import load_cfg

    found = {}
    for name, (fields, _) in REFUSALS.items():
        found[name] = ""
        try:
            load_cfg(str(write_config(folder, **fields)))
        except ValueError as error:
            found[name] = str(error)
    models = {name: refused_model(name) for name in ("llama", "gemma2", "opt", "mamba")}
    return found | models | {"columns": refused_columns(), "import": refused_import()}


def refused_model(name: str) -> str:
    from slm.integrations.axolotl import check_isolation

    try:
        check_isolation(make_model(name))
    except ValueError as error:
        return str(error)
    return ""


def refused_columns() -> str:
    from slm.integrations.axolotl import make_trainer_class

    plain = dataset_of([{"input_ids": [1], "labels": [1], "attention_mask": [1]}])
    try:
        rule = {"slm_select_ratio": 0.6, "slm_scope": "batch", "slm_selection": "excess"}
        make_trainer_class()(args=SimpleNamespace(**rule), train_dataset=plain)
    except ValueError as error:
        return str(error)
    return ""


def refused_import() -> str:
    """axolotl itself goes on when importing a plugin raises ImportError."""
    from axolotl.cli.config import prepare_plugins
    from axolotl.integrations.base import BasePlugin
    from axolotl.utils.dict import DictDefault

    del sys.modules["slm.integrations.axolotl"]
    BasePlugin.get_trainer_cls = lambda self, config: None  # type: ignore[method-assign]
    try:
        prepare_plugins(DictDefault({"plugins": [PLUGIN]}))
    except RuntimeError as error:
        return str(error)
    return ""


def run_example(folder: Path) -> str:
    """As `python experiments/doors/axolotl_run.py 10`; what it printed."""
    sys.argv = ["axolotl_run.py", "10"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        runpy.run_path(str(ROOT / "experiments" / "doors" / "axolotl_run.py"), run_name="__main__")
    return said.getvalue()


def main(folder: str) -> None:
    """Without what costs seconds and shows nothing: a compiler, new interpreters, garbage."""
    os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"  # otherwise it waits for the network
    os.environ["NUMBA_DISABLE_JIT"] = "1"
    contexts: Any = importlib.import_module("multiprocess.context")._concrete_contexts
    contexts["spawn"] = contexts["fork"]  # datasets saves in two other processes
    sys.path.insert(0, str(ROOT / "experiments" / "doors"))
    config: Any = importlib.import_module("axolotl.utils.config")
    config.merge_input_args = functools.cache(config.merge_input_args)  # makes a schema every time
    for run in (run_example, run_rows, run_along, run_packed, run_collators, run_refusals):
        gc.freeze()  # axolotl collects before every batch
        own = Path(folder) / run.__name__.removeprefix("run_")
        make_model().save_pretrained(own / "model")
        make_tokenizer("right").save_pretrained(own / "model")
        with contextlib.chdir(own):
            torch.save(run(own), "found.pt")


# ---- here ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By name, what a run left; one process runs them all."""
    folder = tmp_path_factory.mktemp("axolotl")
    code = f"import sys; sys.path[:0] = [{str(HERE)!r}]; import test_axolotl as here"
    call = f"{code}; here.main({str(folder)!r})"
    run_python("-W", "ignore", "-c", call, doors=True, timeout=300)
    return lambda name: torch.load(folder / name / "found.pt", weights_only=False)


def test_the_example_runs_and_its_loss_falls(found):
    assert_loss_falls(found("example"))


def test_accumulated_rows_take_the_step_of_the_definition(found):
    run, rows = found("rows"), rows_of("rows")
    gradients, loss, count = expected_gradients(make_model(), [rows[:2], rows[2:4]], 0.4)
    assert_gradients(run["gradients"], gradients)
    assert run["log"]["loss"] == pytest.approx(loss, rel=1e-4)
    assert run["log"]["kept_frac"] == pytest.approx(count / sum(n - 2 for n in LENGTHS[:4]))


def test_gradients_along_selected_tokens_are_those_of_the_definition(found):
    expected = cut_gradients(make_model(), rows_of("rows")[:4], 0.4)
    assert_gradients(found("along")["gradients"], expected)


def documents_of(batch: dict[str, Any], rows: list[Row]) -> list[Row]:
    """Those rows that the packed rows of a batch hold, by where positions start again."""
    known, found = {tuple(row["input_ids"]): row for row in rows}, []
    for ids, positions in zip(
        batch["input_ids"].tolist(), batch["position_ids"].tolist(), strict=True
    ):
        starts = [i for i, position in enumerate(positions) if position == 0]
        pieces = [ids[a:b] for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]
        found += [known[tuple(piece)] for piece in pieces if any(piece)]
    return found


def test_packed_documents_take_the_step_of_documents_alone(found):
    """Two micro-batches of two rows of several documents, each trained as if it stood alone, and
    weighted."""
    run, rows = found("packed"), rows_of("packed")
    groups = [documents_of(batch, rows) for batch in run["batches"]]
    assert len(groups) == 2 and all(len(group) > 4 for group in groups)
    gradients, loss, _ = expected_gradients(make_model(), groups, 0.4)
    assert_gradients(run["gradients"], gradients)
    assert run["log"]["loss"] == pytest.approx(loss, rel=1e-4)


def test_the_column_survives_and_the_trainer_is_axolotls(found):
    run = found("rows")
    assert set(run["columns"]) == {"input_ids", "labels", "attention_mask", "reference_logprob"}
    bases = run["bases"]
    assert bases.index("SelectiveTrainerMixin") < bases.index("AxolotlTrainer")
    assert run["across"] and run["scaled"]


def test_evaluation_is_plain_cross_entropy_with_scores_or_without(found):
    rows = [row | {"reference_logprob": [-1.0] * len(row["labels"])} for row in rows_of("rows")]
    expected = expected_gradients(make_model(), [rows[:2]], 1.0)[1]
    assert found("rows")["eval"] == pytest.approx([expected, expected], rel=1e-5)


def test_new_scores_at_the_same_path_are_read(found):
    """axolotl's own name of a prepared dataset does not change with what is in it."""
    assert all(set(column) == {-7.0} for column in found("rows")["again"])


def test_scores_go_where_axolotls_collators_put_their_tokens(found):
    runs = found("collators")
    assert len(runs) == 6
    firsts = torch.tensor([row["input_ids"][0] for row in tagged([3, 7, 1, 5, 4])])
    for batch, same, plain in runs.values():
        scores = batch.pop("reference_logprob")
        assert batch.keys() == same.keys() == plain.keys()
        assert all(torch.equal(batch[key], plain[key]) for key in plain)
        assert all(torch.equal(same[key], plain[key]) for key in plain)
        tokens = (batch["input_ids"] >= 2) & ~torch.isin(batch["input_ids"], firsts)
        assert tokens.sum() == 20 - 5
        assert torch.equal(-scores[tokens], batch["input_ids"][tokens].float())
        assert scores[~tokens].isnan().all() and scores.dtype == torch.float32


@pytest.mark.parametrize("name", REFUSALS)
def test_what_would_lose_scores_or_move_tokens_is_refused(found, name):
    assert REFUSALS[name][1] in found("refusals")[name]


def test_a_model_that_looks_past_the_beginning_of_a_document_is_refused(found):
    messages = found("refusals")
    assert messages["llama"] == messages["gemma2"] == ""
    assert "OPTForCausalLM does not keep documents apart" in messages["opt"]
    assert "MambaForCausalLM does not keep documents apart" in messages["mamba"]


def test_a_dataset_that_lost_its_scores_is_refused(found):
    message = found("refusals")["columns"]
    assert "has no reference_logprob (it has input_ids, labels, attention_mask)" in message


def test_another_axolotl_is_refused_by_what_axolotl_does_not_swallow(found):
    message = found("refusals")["import"]
    assert "has no parameter cfg" in message and "made for axolotl 0.19" in message
