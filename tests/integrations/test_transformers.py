"""A step of `Trainer` with the mixin is the step that float64 and a sorted list define."""

import copy
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DataCollatorWithFlattening,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from door_helpers import (
    ONE_STEP,
    Recorder,
    Row,
    assert_gradients,
    cut_gradients,
    dataset_of,
    expected_gradients,
    gradients_of,
    group_losses,
    make_model,
    make_rows,
    padding,
    run_on_ranks,
    top,
    weights_of,
)
from slm.errors import UserError
from slm.integrations import transformers as door
from slm.integrations.datasets import score_dataset
from slm.integrations.transformers import SelectiveTrainer

LENGTHS = [9, 5, 12, 7, 8, 11, 6, 10]


def arguments(folder: Path, **fields: Any) -> TrainingArguments:
    batch: dict[str, Any] = {"per_device_train_batch_size": 2}
    return TrainingArguments(str(folder), **(ONE_STEP | batch | fields))


def train(folder: Path, rows: list[Row], model: Any = None, collator: Any = None, **fields: Any):
    ours = ("scope", "selection", "backward")
    loss = {key: fields.pop(key) for key in ours if key in fields}
    recorder, model = Recorder(), model or make_model()
    trainer = SelectiveTrainer(
        model,
        arguments(folder, **fields),
        data_collator=collator or padding(),
        train_dataset=dataset_of(rows),
        callbacks=[recorder],
        select_ratio=0.4,
        **loss,
    )
    trainer.train()
    return trainer, recorder


# ---- the step -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "gpt2"])
def test_gradients_are_those_of_the_definition(tmp_path, name):
    rows, model = make_rows(LENGTHS[:4], prompt=2, unscored=1), make_model(name)
    expected, loss, _ = expected_gradients(model, [rows], 0.4)
    _, recorder = train(tmp_path, rows, model, per_device_train_batch_size=4)
    assert_gradients(recorder.gradients[0], expected)
    assert recorder.logs[0]["loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
def test_gradients_along_selected_tokens_are_those_of_the_definition(tmp_path, side, recomputes):
    rows, model = make_rows(LENGTHS[:4], prompt=2, unscored=1), make_model()
    expected = cut_gradients(model, rows, 0.4)
    if recomputes:
        model.activation_checkpointing_enable()
    size = {"per_device_train_batch_size": 4}
    _, recorder = train(tmp_path, rows, model, padding(side), backward="selected", **size)
    assert_gradients(recorder.gradients[0], expected)


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_weights_multiply_what_is_selected(tmp_path, scope, side):
    """And choose nothing but for those of 0, which are no candidates; loss_all has no weights."""
    rows, model = make_rows(LENGTHS, prompt=3, unscored=3, weighted=True), make_model()
    pairs = [rows[i : i + 2] for i in (0, 2, 4, 6)]
    groups = [[row] for row in rows] if scope == "sequence" else pairs
    expected, loss, _ = expected_gradients(model, groups, 0.4)
    live = torch.cat([torch.tensor(row["labels"][1:]) != -100 for row in rows])
    every = group_losses(model, rows)[0][live & (weights_of(rows) != 0)]
    steps = {"gradient_accumulation_steps": 4, "scope": scope}
    _, recorder = train(tmp_path, rows, model, padding(side), **steps)
    assert_gradients(recorder.gradients[0], expected)
    assert recorder.logs[0]["loss"] == pytest.approx(loss, rel=1e-4)
    assert recorder.logs[0]["loss_all"] == pytest.approx(every.mean().item(), rel=1e-4)


def test_weights_with_gradients_along_selected_tokens(tmp_path):
    rows, model = make_rows(LENGTHS[:4], prompt=2, weighted=True), make_model()
    expected, size = cut_gradients(model, rows, 0.4), {"per_device_train_batch_size": 4}
    _, recorder = train(tmp_path, rows, model, backward="selected", **size)
    assert_gradients(recorder.gradients[0], expected)


def test_weights_that_are_none_are_refused(tmp_path):
    rows: Any
    for wrong in (-1.0, float("nan"), float("inf")):
        rows = make_rows(LENGTHS[:2], weighted=True)
        rows[0]["token_weight"][2] = wrong
        with pytest.raises(ValueError, match=f"token_weight: a finite number >= 0 .*first {wrong}"):
            train(tmp_path, rows)
    scalars: Any = [row | {"token_weight": 0.5} for row in make_rows(LENGTHS[:2])]
    with pytest.raises(ValueError, match="a column is 0.5, it must have a number for each token"):
        train(tmp_path, scalars)
    rows = [row | {"token_weight": [0.0] * len(row["labels"])} for row in make_rows(LENGTHS[:2])]
    with pytest.raises(ValueError, match="have NaN as score, or weight 0"):
        train(tmp_path, rows)


def test_a_backward_that_is_not_computed_is_refused(tmp_path):
    rows, word = make_rows(LENGTHS[:4]), {"backward": "selected"}
    with pytest.raises(
        UserError, match="has a dropout of 0.1 within sdpa, .*attn_implementation=eager"
    ):
        train(tmp_path, rows, make_model("gpt2", attn_pdrop=0.1), **word)
    with pytest.raises(ValueError, match="torch_compile is True, which backward='selected' does"):
        train(tmp_path, rows, torch_compile=True, **word)
    with pytest.raises(UserError, match="backward is 'fast', it must be one of"):
        train(tmp_path, rows, backward="fast")


@pytest.mark.parametrize("scope", ["batch", "sequence", "global"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_accumulated_micro_batches_are_divided_once(tmp_path, scope, side):
    """Micro-batches of very different numbers of targets: a mean of their means differs."""
    rows = make_rows(LENGTHS, prompt=3)
    groups = (
        [[row] for row in rows] if scope == "sequence" else [rows[i : i + 2] for i in (0, 2, 4, 6)]
    )
    expected, loss, count = expected_gradients(make_model(), groups, 0.4)
    _, recorder = train(
        tmp_path, rows, collator=padding(side), gradient_accumulation_steps=4, scope=scope
    )
    assert_gradients(recorder.gradients[0], expected)
    assert recorder.logs[0]["loss"] == pytest.approx(loss, rel=1e-4)
    assert recorder.logs[0]["kept_frac"] == pytest.approx(count / sum(n - 3 for n in LENGTHS))


def test_models_that_take_no_loss_arguments_are_not_divided_again(tmp_path, monkeypatch):
    """Trainer would divide what it did not hand num_items_in_batch to."""
    rows = make_rows(LENGTHS[:4])
    monkeypatch.setattr(SelectiveTrainer, "model_accepts_loss_kwargs", False, raising=False)
    monkeypatch.setattr(Trainer, "__setattr__", ignoring("model_accepts_loss_kwargs"))
    expected, _, _ = expected_gradients(make_model(), [rows[:2], rows[2:]], 0.4)
    _, recorder = train(tmp_path, rows, gradient_accumulation_steps=2)
    assert_gradients(recorder.gradients[0], expected)


def ignoring(name: str) -> Any:
    def set_others(self: Any, key: str, value: Any) -> None:
        if key != name:
            object.__setattr__(self, key, value)

    return set_others


def test_last_step_of_an_epoch_has_fewer_micro_batches(tmp_path):
    rows = make_rows(LENGTHS[:6])
    _, recorder = train(
        tmp_path, rows, gradient_accumulation_steps=2, max_steps=2, learning_rate=0.0
    )
    for found, group in zip(recorder.gradients, ([rows[:2], rows[2:4]], [rows[4:6]]), strict=True):
        assert_gradients(found, expected_gradients(make_model(), group, 0.4)[0])


def test_documents_that_a_collator_flattens_are_ranked_together(tmp_path):
    """One row of several documents, kept apart by position_ids."""
    rows = make_rows(LENGTHS[:4])
    expected, _, _ = expected_gradients(make_model(), [rows], 0.4)
    _, recorder = train(
        tmp_path, rows, collator=DataCollatorWithFlattening(), per_device_train_batch_size=4
    )
    assert_gradients(recorder.gradients[0], expected)


def test_a_streamed_dataset_that_ends_begins_again(tmp_path):
    rows = make_rows(LENGTHS[:4])
    trainer, recorder = stream(rows, tmp_path, max_steps=3)
    trainer.train()
    assert len(recorder.gradients) == 3
    for name, gradient in recorder.gradients[0].items():
        assert torch.equal(gradient, recorder.gradients[2][name])


def stream(rows: list[Row], folder: Path, **fields: Any) -> tuple[SelectiveTrainer, Recorder]:
    recorder = Recorder()
    trainer = SelectiveTrainer(
        make_model(),
        arguments(folder, learning_rate=0.0, **fields),
        data_collator=padding(),
        train_dataset=dataset_of(rows).to_iterable_dataset(),
        callbacks=[recorder],
        select_ratio=0.4,
    )
    return trainer, recorder


def test_a_stream_that_ends_within_a_step_goes_on_with_its_next_pass(tmp_path):
    """Three rows, two to a step: the second step is the third row and the first again."""
    rows = make_rows(LENGTHS[:3], prompt=2)
    fields: dict[str, Any] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    trainer, recorder = stream(rows, tmp_path, max_steps=3, **fields)
    trainer.train()
    groups = ([rows[0]], [rows[1]]), ([rows[2]], [rows[0]]), ([rows[1]], [rows[2]])
    assert len(recorder.gradients) == 3
    for gradients, log, group in zip(recorder.gradients, recorder.logs, groups, strict=False):
        expected, loss, _ = expected_gradients(make_model(), list(group), 0.4)
        assert_gradients(gradients, expected)
        assert log["loss"] == pytest.approx(loss, rel=1e-4)


def test_a_stream_of_less_than_a_step_is_refused(tmp_path):
    fields: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "max_steps": 2,
    }
    trainer, _ = stream(make_rows(LENGTHS[:3]), tmp_path, **fields)
    with pytest.raises(ValueError, match="ended after 3 batches, gradient_accumulation_steps is 4"):
        trainer.train()


def test_a_second_training_logs_its_own_steps(tmp_path):
    """The first stops between two logs."""
    rows = make_rows(LENGTHS[:6])
    fields: dict[str, Any] = {"max_steps": 3, "logging_steps": 2, "learning_rate": 0.0}
    trainer, recorder = train(tmp_path, rows, **fields)
    trainer.train()
    first, second = (log["loss_all"] for log in recorder.logs if "loss_all" in log)
    assert first == second


def test_losses_of_both_sets_are_logged_of_all_steps_since_the_last_log(tmp_path):
    rows = make_rows(LENGTHS[:4], prompt=1, unscored=2)
    _, recorder = train(tmp_path, rows, max_steps=2, logging_steps=2, learning_rate=0.0)
    _, each = train(tmp_path, rows, max_steps=2, logging_steps=1, learning_rate=0.0)
    exact = make_model().double()
    totals = torch.zeros(5, dtype=torch.float64)
    for group in (rows[:2], rows[2:]):
        losses, excess = group_losses(exact, group)
        live, selected, scored = losses.detach() > 0, top(excess, 0.4), ~excess.isnan()
        sums = (losses.sum(), losses[selected].sum(), live.sum(), selected.sum(), scored.sum())
        totals += torch.stack([value.detach().double() for value in sums])
    total, kept, valid, count, scored = totals.tolist()
    log = recorder.logs[0]
    assert log["loss_all"] == pytest.approx(total / valid, rel=1e-4)
    assert log["loss_selected"] == pytest.approx(kept / count, rel=1e-4)
    assert log["loss_unselected"] == pytest.approx((total - kept) / (valid - count), rel=1e-4)
    assert (log["kept_frac"], log["scored_frac"]) == pytest.approx((count / valid, scored / valid))
    sizes = [sum(len(row["input_ids"]) - 1 for row in rows[i : i + 2]) for i in (0, 2)]
    apart = sum(n * log["loss_all"] for n, log in zip(sizes, each.logs, strict=False)) / sum(sizes)
    assert apart == pytest.approx(log["loss_all"], rel=1e-4)
    assert each.logs[0]["loss_all"] != pytest.approx(each.logs[1]["loss_all"], rel=1e-3)


def test_random_takes_as_many_of_the_same_candidates(tmp_path):
    rows = make_rows(LENGTHS[:4], prompt=2, unscored=1)
    chosen = []
    for seed in (0, 1):
        _, recorder = train(tmp_path, rows, selection="random", seed=seed, learning_rate=0.0)
        chosen.append(recorder)
    counts = [round(recorder.logs[0]["kept_frac"] * 1e6) for recorder in chosen]
    _, excess = train(tmp_path, rows, learning_rate=0.0)
    assert counts[0] == counts[1] == round(excess.logs[0]["kept_frac"] * 1e6)
    assert chosen[0].logs[0]["loss_selected"] != chosen[1].logs[0]["loss_selected"]


def test_all_tokens_are_the_trainers_own_loss(tmp_path):
    """select_ratio 1 with every token scored."""
    rows = make_rows(LENGTHS[:4])
    own, recorder = make_model(), Recorder()
    plain = [{key: row[key] for key in ("input_ids", "labels")} for row in rows]
    Trainer(
        own,
        arguments(tmp_path, gradient_accumulation_steps=2),
        data_collator=padding(),
        train_dataset=dataset_of(plain),
        callbacks=[recorder],
    ).train()
    ours, found = make_model(), Recorder()
    SelectiveTrainer(
        ours,
        arguments(tmp_path, gradient_accumulation_steps=2),
        data_collator=padding(),
        train_dataset=dataset_of(rows),
        callbacks=[found],
        select_ratio=1.0,
    ).train()
    assert_gradients(found.gradients[0], {k: g.double() for k, g in recorder.gradients[0].items()})
    assert found.logs[0]["loss"] == pytest.approx(recorder.logs[0]["loss"], rel=1e-5)


def test_bfloat16_autocast_selects_by_float32_scores(tmp_path, monkeypatch):
    rows, seen = make_rows(LENGTHS[:4]), []
    own = door.SelectiveLoss.__call__

    def call(self: Any, *args: Any) -> Any:
        seen.append((*args, own(self, *args)))
        return seen[-1][-1]

    monkeypatch.setattr(door.SelectiveLoss, "__call__", call)
    expected, loss, _ = expected_gradients(make_model(), [rows], 0.4)
    fields: dict[str, Any] = {"per_device_train_batch_size": 4, "learning_rate": 0.0}
    _, recorder = train(tmp_path, rows, bf16=True, **fields)
    assert recorder.logs[0]["loss"] == pytest.approx(loss, rel=0.05)
    for name, gradient in expected.items():
        similarity = torch.cosine_similarity(
            recorder.gradients[0][name].double().flatten(), gradient.flatten(), dim=0
        )
        assert similarity > 0.95, name
    hidden, head, targets, *_, output = seen[0]
    weight = head["weight"].detach().bfloat16().float()
    logits = hidden.detach().bfloat16().float() @ weight.T  # of the operands; never rounded itself
    losses = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none")
    assert (logits - logits.bfloat16().float()).abs().max() > 1e-3
    torch.testing.assert_close(output.token_loss, losses, rtol=1e-5, atol=1e-5)


def test_evaluation_is_plain_cross_entropy_with_scores_or_without(tmp_path):
    rows = make_rows(LENGTHS[:4], prompt=2)
    trainer, _ = train(tmp_path, rows, learning_rate=0.0)
    losses = [expected_gradients(make_model(), [[row]], 1.0) for row in make_rows(LENGTHS[:4], 2)]
    total = sum(loss * count for _, loss, count in losses)
    plain = [{key: row[key] for key in ("input_ids", "labels")} for row in rows]
    for data in (rows, plain):
        found = trainer.evaluate(dataset_of(data))["eval_loss"]
        assert found == pytest.approx(total / sum(n for *_, n in losses), rel=1e-4)
    same = trainer.evaluate(dataset_of(rows))["eval_loss"]
    assert same == pytest.approx(trainer.evaluate(dataset_of(plain))["eval_loss"], rel=1e-6)


def test_rows_without_labels_are_predicted_with_scores_or_without(tmp_path):
    rows = make_rows([6, 6])
    trainer, _ = train(tmp_path, rows, collator=default_data_collator)
    model: Any = trainer.model
    expected = model.eval()(torch.tensor([row["input_ids"] for row in rows])).logits.detach()
    for dropped in (["labels"], ["labels", "reference_logprob"]):
        data = dataset_of(rows).remove_columns(dropped)
        found = trainer.predict(data)
        torch.testing.assert_close(torch.from_numpy(found.predictions), expected)
        assert "eval_loss" not in trainer.evaluate(data)


def test_evaluating_in_between_does_not_change_the_next_step(tmp_path):
    rows = make_rows(LENGTHS)
    found = []
    for fields in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        recorder, model = Recorder(), make_model()
        SelectiveTrainer(
            model,
            arguments(tmp_path, max_steps=3, **fields),
            data_collator=padding(),
            train_dataset=dataset_of(rows),
            eval_dataset=dataset_of(rows[:2]),
            callbacks=[recorder],
            select_ratio=0.4,
        ).train()
        found.append(recorder.gradients)
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_saved_model_is_a_stock_one(tmp_path):
    from transformers import AutoModelForCausalLM

    trainer, _ = train(tmp_path, make_rows(LENGTHS[:4]))
    trainer.save_model(str(tmp_path / "model"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.arange(2, 12)[None]
    model: Any = trainer.model
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_a_deep_copy_of_the_model_calls_itself():
    model = make_model()
    door.attach(model, door.SelectiveLoss(0.5))
    other = copy.deepcopy(model)
    ids = torch.arange(2, 12)[None]
    other(ids, labels=ids).loss.backward()
    other(ids, labels=ids, reference_logprob=-torch.ones(1, 10), denominator=1.0).loss.backward()
    assert gradients_of(other) and not gradients_of(model)


# ---- refusal ------------------------------------------------------------------------------------


def test_missing_scores_never_become_plain_cross_entropy(tmp_path):
    plain = [{k: row[k] for k in ("input_ids", "labels")} for row in make_rows(LENGTHS[:4])]
    with pytest.raises(ValueError, match="the batch has no reference_logprob .*input_ids, labels"):
        train(tmp_path, plain)
    unlabelled = [{k: v for k, v in row.items() if k != "labels"} for row in make_rows([5, 5])]
    with pytest.raises(ValueError, match="the batch has no labels .it has .*input_ids"):
        train(tmp_path, unlabelled)


def test_all_nan_scores_are_refused(tmp_path):
    rows = make_rows(LENGTHS[:2], unscored=100)
    with pytest.raises(ValueError, match="all of the step's 12 targets .* have NaN"):
        train(tmp_path, rows)


@pytest.mark.parametrize("value", [0.5, float("-inf")])
def test_numbers_that_are_no_scores_are_refused(tmp_path, value):
    rows = make_rows(LENGTHS[:2])
    rows[1]["reference_logprob"][3] = value
    with pytest.raises(ValueError, match=f"a finite number <= 0 is needed, .* the first {value}"):
        train(tmp_path, rows)


def test_an_encoder_with_a_decoder_is_refused():
    small: dict[str, Any] = {"vocab_size": 61, "d_model": 16, "d_kv": 8, "num_layers": 1}
    model = T5ForConditionalGeneration(T5Config(**small))
    with pytest.raises(UserError, match="T5ForConditionalGeneration is no causal LM"):
        SelectiveTrainer(model, select_ratio=0.5)
    with pytest.raises(UserError, match="T5ForConditionalGeneration is no causal LM"):
        score_dataset(dataset_of(make_rows([5])).select_columns("input_ids"), model)


def test_rows_of_several_documents_are_refused(tmp_path):
    rows = [row | {"seq_lengths": [2, len(row["input_ids"]) - 2]} for row in make_rows([6, 6])]
    with pytest.raises(ValueError, match="several documents .seq_lengths., which Trainer would"):
        train(tmp_path, rows)


def test_a_wrong_ratio_scope_or_selection_is_refused():
    cases: list[tuple[dict[str, Any], str]] = [
        ({"select_ratio": 0.0}, r"select_ratio is 0.0, it must be a number in \(0, 1\]"),
        ({"select_ratio": 1.5}, "select_ratio is 1.5"),
        ({"select_ratio": "0.6"}, "select_ratio is '0.6', it must be"),
        ({"select_ratio": 0.5, "scope": "rank"}, "scope is 'rank'"),
        ({"select_ratio": 0.5, "selection": "worst"}, "no rule 'worst' is known"),
    ]
    for fields, match in cases:
        with pytest.raises(ValueError, match=match):
            SelectiveTrainer(make_model(), **fields)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1"),
        ({"n_gpu": 2}, "2 GPUs in one process"),
        ({"liger": True}, "use_liger_kernel would replace the model's forward"),
        ({"tp": 2}, "tp_size is 2"),
        ({"average_tokens_across_devices": False, "world": 2}, "average_tokens_across_devices"),
    ],
)
def test_settings_that_would_change_the_loss_are_refused(tmp_path, monkeypatch, fields, match):
    known = {k: v for k, v in fields.items() if k.startswith(("label", "average"))}
    trainer, _ = train(tmp_path, make_rows(LENGTHS[:2]))
    trainer.args = arguments(tmp_path, **known)
    if "n_gpu" in fields:
        trainer.args._n_gpu = 2
    trainer.args.use_liger_kernel = "liger" in fields
    if "tp" in fields:
        monkeypatch.setattr(trainer, "get_tp_size", lambda: 2)
    if "world" in fields:
        monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 2))
    with pytest.raises(ValueError, match=match):
        door.check_trainer(trainer)


def test_models_that_the_loss_would_not_reproduce_are_refused(tmp_path):
    with pytest.raises(UserError, match="its logits are not its head"):
        train(tmp_path, make_rows([5, 5]), make_model("hyperclovax"))
    model = make_model(model_type="mixtral", num_local_experts=2, output_router_logits=True)
    with pytest.raises(ValueError, match="output_router_logits is True, its auxiliary loss would"):
        train(tmp_path, make_rows([5, 5]), model)
    with pytest.raises(ValueError, match="Linear is no causal LM"):
        door.attach(torch.nn.Linear(2, 2), door.SelectiveLoss(0.5))


def test_another_signature_is_refused_at_import(monkeypatch):
    import importlib

    monkeypatch.setattr(Trainer, "compute_loss", lambda self, model, batch: None)
    with pytest.raises(ImportError, match="no parameter inputs .*made for transformers 5.23"):
        importlib.reload(door)


# ---- two processes ------------------------------------------------------------------------------


def train_on_ranks(folder: str) -> None:
    rank, rows, found = int(os.environ["RANK"]), make_rows(LENGTHS, prompt=2), {}
    for scope in ("sequence", "batch", "global"):
        _, recorder = train(
            Path(folder), rows, scope=scope, gradient_accumulation_steps=2, ddp_backend="gloo"
        )
        found[scope] = (recorder.gradients[0], recorder.logs[0])
    torch.save(found, Path(folder) / f"rank-{rank}.pt")


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path):
    run_on_ranks(__file__, tmp_path)
    rows = make_rows(LENGTHS, prompt=2)
    pairs = [rows[i : i + 2] for i in (0, 2, 4, 6)]  # by turns for rank 0 and rank 1
    groups = {
        "sequence": [[row] for row in rows],
        "batch": pairs,
        "global": [pairs[0] + pairs[1], pairs[2] + pairs[3]],
    }
    for scope, ranked in groups.items():
        expected, loss, count = expected_gradients(make_model(), ranked, 0.4)
        for rank in (0, 1):
            gradients, log = torch.load(tmp_path / f"rank-{rank}.pt")[scope]
            named = {name.removeprefix("module."): value for name, value in gradients.items()}
            assert_gradients(named, expected)
            assert log["loss"] == pytest.approx(loss, rel=1e-4)
            assert log["kept_frac"] == pytest.approx(count / sum(n - 2 for n in LENGTHS))


if __name__ == "__main__":
    train_on_ranks(sys.argv[1])
