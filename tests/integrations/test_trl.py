"""A step of `SFTTrainer` with the mixin is the one that float64 defines on each document alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from trl.trainer.sft_config import SFTConfig

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
    make_tokenizer,
    real_texts,
    top,
)
from slm.errors import UserError
from slm.integrations.datasets import score_dataset
from slm.integrations.loss import shifted
from slm.integrations.trl import SelectiveSFTTrainer
from slm_kernels import token_cross_entropy
from text_helpers import needs_data

pytestmark = [
    # peft 0.21 asks transformers 5.23 by an old name
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # refused here, and soon gone there
    pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning"),
]
LENGTHS = [9, 5, 12, 7, 8, 11, 6, 10]


def config(folder: Path, **fields: Any) -> SFTConfig:
    fixed: dict[str, Any] = {"bf16": False, "activation_checkpointing": False}
    fixed["per_device_train_batch_size"] = 8
    return SFTConfig(str(folder), **(ONE_STEP | fixed | fields))


def sft(folder: Path, rows: list[Any], model: Any = None, eval_rows: Any = None, **fields: Any):
    ours = ("peft_config", "selection", "backward")
    extra = {key: fields.pop(key) for key in ours if key in fields}
    recorder = Recorder()
    trainer = SelectiveSFTTrainer(
        model or make_model(),
        config(folder, **fields),
        train_dataset=dataset_of(rows),
        eval_dataset=dataset_of(eval_rows) if eval_rows else None,
        processing_class=make_tokenizer("right"),
        callbacks=[recorder],
        select_ratio=0.4,
        **extra,
    )
    trainer.train()
    return trainer, recorder


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"padding_free": True, "max_length": None},
        {"packing": True, "max_length": 80},
    ],
    ids=["padded", "accumulated", "padding free", "packed"],
)
def test_gradients_are_those_of_each_document_alone(tmp_path, fields):
    rows = make_rows(LENGTHS, prompt=2, unscored=1)
    size = 2 if "gradient_accumulation_steps" in fields else 8
    groups = [rows[i : i + size] for i in range(0, 8, size)]
    expected, loss, _ = expected_gradients(make_model(), groups, 0.4)
    _, recorder = sft(tmp_path, rows, **fields)
    assert_gradients(recorder.gradients[0], expected)
    assert recorder.logs[0]["loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize(
    "fields", [{}, {"packing": True, "max_length": 80}], ids=["padded", "packed"]
)
def test_gradients_along_selected_tokens_are_those_of_the_definition(tmp_path, fields):
    rows = make_rows(LENGTHS, prompt=2, unscored=1)
    expected = cut_gradients(make_model(), rows, 0.4)
    _, recorder = sft(tmp_path, rows, backward="selected", activation_checkpointing=True, **fields)
    assert_gradients(recorder.gradients[0], expected)


@pytest.mark.parametrize(
    "fields", [{}, {"packing": True, "max_length": 80}], ids=["padded", "packed"]
)
def test_weights_stay_with_their_tokens(tmp_path, fields):
    rows = make_rows(LENGTHS, prompt=2, weighted=True)
    expected, loss, _ = expected_gradients(make_model(), [rows], 0.4)
    _, recorder = sft(tmp_path, rows, **fields)
    assert_gradients(recorder.gradients[0], expected)
    assert recorder.logs[0]["loss"] == pytest.approx(loss, rel=1e-4)


def test_several_packed_rows_hold_every_document_once(tmp_path):
    """Bins of 24 tokens: documents change places and are cut, and their scores with them."""
    rows = make_rows([*LENGTHS, 30])
    trainer, recorder = sft(tmp_path, rows, packing=True, max_length=24, learning_rate=0.0)
    packed: Any = trainer.train_dataset
    assert len(packed) > 1
    cut = [{name: column[:24] for name, column in row.items()} for row in rows]
    expected, _, _ = expected_gradients(make_model(), [cut], 0.4)
    assert_gradients(recorder.gradients[0], expected)
    pairs = [set(zip(r["input_ids"], map(str, r["reference_logprob"]), strict=True)) for r in rows]
    for row in packed:
        found = set(zip(row["input_ids"], map(str, row["reference_logprob"]), strict=True))
        assert found <= set().union(*pairs)


def test_completion_masks_become_labels(tmp_path):
    rows = make_rows(LENGTHS, prompt=4)
    masked = [
        {
            "input_ids": row["input_ids"],
            "completion_mask": [int(label != -100) for label in row["labels"]],
            "reference_logprob": row["reference_logprob"],
        }
        for row in rows
    ]
    expected, _, _ = expected_gradients(make_model(), [rows], 0.4)
    _, recorder = sft(tmp_path, masked, completion_only_loss=True)
    assert_gradients(recorder.gradients[0], expected)


def test_a_completion_mask_that_trl_would_ignore_is_refused(tmp_path):
    row = {"input_ids": [5, 6], "completion_mask": [0, 1], "reference_logprob": [-1.0, -1.0]}
    with pytest.raises(ValueError, match="completion_mask, but completion_only_loss is None"):
        sft(tmp_path, [row])


def test_truncation_cuts_scores_with_tokens_and_drops_rows_without_a_target(tmp_path):
    rows = make_rows(LENGTHS, prompt=5)
    cut = [{name: column[:8] for name, column in row.items()} for row in rows]
    kept = [row for row in cut if any(label != -100 for label in row["labels"])]
    assert len(kept) == len(rows) - 1
    expected, _, _ = expected_gradients(make_model(), [kept], 0.4)
    _, recorder = sft(tmp_path, rows, max_length=8)
    assert_gradients(recorder.gradients[0], expected)


def test_rows_that_were_packed_before_they_were_scored(tmp_path):
    rows = make_rows(LENGTHS[:4])
    both = [
        {name: rows[i][name] + rows[i + 1][name] for name in rows[0]}
        | {"seq_lengths": [LENGTHS[i], LENGTHS[i + 1]]}
        for i in (0, 2)
    ]
    expected, _, _ = expected_gradients(make_model(), [rows], 0.4)
    _, recorder = sft(tmp_path, both, padding_free=True, max_length=None)
    assert_gradients(recorder.gradients[0], expected)


def lora(**fields: Any) -> LoraConfig:
    fixed: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0}
    return LoraConfig(task_type=TaskType.CAUSAL_LM, init_lora_weights=False, **(fixed | fields))


def lora_gradients(trainer: Any, groups: list[list[Row]]) -> dict[str, torch.Tensor]:
    """Of the adapter's weights before the step: the learning rate was 0."""
    exact: Any = get_peft_model(make_model(), lora())
    exact.load_state_dict(trainer.model.state_dict())
    exact = exact.double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for group in groups:
        losses, excess = group_losses(exact, group)
        selected = top(excess, 0.4)
        total, count = total + losses[selected].sum(), count + int(selected.sum())
    (total / count).backward()
    return gradients_of(exact)


def test_lora_trains_its_adapters_on_the_same_tokens(tmp_path):
    rows = make_rows(LENGTHS, prompt=2)
    trainer, recorder = sft(tmp_path, rows, peft_config=lora(), learning_rate=0.0)
    assert recorder.gradients[0] and all("lora" in name for name in recorder.gradients[0])
    assert_gradients(recorder.gradients[0], lora_gradients(trainer, [rows]))


def test_lora_along_selected_tokens_has_the_gradients_of_the_definition(tmp_path):
    rows, words = make_rows(LENGTHS, prompt=2), {"backward": "selected", "learning_rate": 0.0}
    trainer, recorder = sft(tmp_path, rows, peft_config=lora(), **words)
    exact: Any = get_peft_model(make_model(), lora())
    trained: Any = trainer.model
    exact.load_state_dict(trained.state_dict())
    assert_gradients(recorder.gradients[0], cut_gradients(exact, rows, 0.4))


@pytest.mark.parametrize(
    ("adapter", "match"),
    [
        (lora(target_modules=["q_proj", "lm_head"]), "PEFT adapter to `lm_head`|output layer"),
        (lora(modules_to_save=["lm_head"]), "the output layer is a peft.*ModulesToSaveWrapper"),
        (
            PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2),
            "prompt learning moves the tokens",
        ),
    ],
)
def test_adapters_that_the_loss_would_not_see_are_refused(tmp_path, adapter, match):
    with pytest.raises(ValueError, match=match):
        sft(tmp_path, make_rows(LENGTHS), peft_config=adapter)


def test_what_trl_logs_is_still_logged(tmp_path):
    rows = make_rows(LENGTHS, prompt=2)
    _, recorder = sft(tmp_path, rows, max_steps=2, logging_steps=2, learning_rate=0.0)
    exact = make_model().double()
    correct = entropy = count = 0.0
    for row in rows:
        logits = exact(torch.tensor([row["input_ids"]])).logits[0, :-1].detach()
        labels = torch.tensor(row["labels"])[1:]
        live = labels != -100
        entropy += torch.special.entr(logits.softmax(-1)).sum(-1)[live].sum().item()
        correct += (logits.argmax(-1) == labels)[live].sum().item()
        count += live.sum().item()
    log = recorder.logs[0]
    assert log["entropy"] == pytest.approx(entropy / count, rel=1e-4)
    assert log["mean_token_accuracy"] == pytest.approx(correct / count, rel=1e-4)
    assert log["num_tokens"] == 2 * sum(LENGTHS)


def test_how_often_is_logged_changes_nothing(tmp_path):
    """With dropout, whose random numbers a measurement could take away."""
    rows, found = make_rows(LENGTHS), []
    for every in (1, 4):
        _, recorder = sft(
            tmp_path, rows, make_model(attention_dropout=0.5), max_steps=3, logging_steps=every
        )
        found.append(recorder.gradients[-1])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_without_labels_is_prepared_with_its_scores(tmp_path, packing):
    rows = make_rows(LENGTHS)
    plain = [{k: row[k] for k in ("input_ids", "reference_logprob")} for row in rows]
    recorder = Recorder()
    SelectiveSFTTrainer(
        make_model(),
        config(tmp_path, packing=packing, max_length=80),
        train_dataset=dataset_of(plain).to_iterable_dataset(),
        processing_class=make_tokenizer("right"),
        callbacks=[recorder],
        select_ratio=0.4,
    ).train()
    expected, _, _ = expected_gradients(make_model(), [rows], 0.4)
    assert_gradients(recorder.gradients[0], expected)


def test_evaluation_is_trls_own(tmp_path):
    rows = make_rows(LENGTHS, prompt=2)
    plain = [{key: row[key] for key in ("input_ids", "labels")} for row in rows]
    weighted = [row | {"token_weight": [0.5] * len(row["labels"])} for row in plain]
    found = []
    for data in (rows, plain, weighted):
        trainer, _ = sft(tmp_path, rows, eval_rows=data, learning_rate=0.0)
        found.append(trainer.evaluate()["eval_loss"])
    _, loss, _ = expected_gradients(make_model(), [plain_as_scored(rows)], 1.0)
    assert found == pytest.approx([loss] * 3, rel=1e-4)
    cut = [{name: column[:6] for name, column in row.items()} for row in plain]
    trainer, _ = sft(tmp_path, rows, eval_rows=weighted, learning_rate=0.0, max_length=6)
    _, loss, _ = expected_gradients(make_model(), [plain_as_scored(cut)], 1.0)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-4)


def plain_as_scored(rows: list[Row]) -> list[Row]:
    return [row | {"reference_logprob": [-1.0] * len(row["input_ids"])} for row in rows]


@pytest.mark.parametrize(
    "fields",
    [{}, {"padding_free": True, "max_length": None}, {"packing": True, "max_length": 24}],
    ids=["padded", "padding free", "packed"],
)
def test_scores_of_the_model_itself_are_its_losses_in_every_batch(tmp_path, fields):
    """From score_dataset through preparation and collator to the forward that trains."""
    plain = [{"input_ids": row["input_ids"]} for row in make_rows(LENGTHS)]
    scored = score_dataset(dataset_of(plain), make_model())
    trainer, _ = sft(tmp_path, list(scored), learning_rate=0.0, **fields)
    model: Any = trainer.model
    compared = 0
    for batch in trainer.get_train_dataloader():
        scores = {"reference_logprob": batch.pop("reference_logprob")}
        targets, columns = shifted(batch.pop("labels"), scores)
        moved = columns["reference_logprob"]
        hidden = model.model(**batch).last_hidden_state.detach()
        losses = token_cross_entropy(hidden, model.lm_head.weight, targets).loss
        live = (targets != -100) & ~moved.isnan()
        torch.testing.assert_close(losses[live], -moved[live], rtol=1e-5, atol=1e-5)
        compared += int(live.sum())
    assert compared == sum(length - 1 for length in LENGTHS)


# ---- refusal ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"packing": True, "packing_strategy": "wrapped"}, "packing_strategy is 'wrapped'"),
        ({"packing": True, "packing_strategy": "bfd_split"}, "packing_strategy is 'bfd_split'"),
        ({"truncation_mode": "keep_end"}, "truncation_mode is 'keep_end'"),
        ({"packing": True, "max_length": None}, "max_length is None"),
        ({"loss_type": "dft"}, "loss_type is 'dft'"),
    ],
)
def test_preparations_that_move_tokens_away_from_their_context_are_refused(tmp_path, fields, match):
    with pytest.raises(ValueError, match=match):
        sft(tmp_path, make_rows(LENGTHS), **fields)


def test_packed_rows_must_be_kept_apart(tmp_path):
    rows = [row | {"seq_lengths": [4, len(row["input_ids"]) - 4]} for row in make_rows(LENGTHS)]
    with pytest.raises(ValueError, match="several documents .* padding_free is False"):
        sft(tmp_path, rows)
    with pytest.raises(ValueError, match="packing is True, but the rows have seq_lengths"):
        sft(tmp_path, rows, packing=True, max_length=80)
    prepared = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    with pytest.raises(ValueError, match="several documents .* padding_free is False"):
        sft(tmp_path, rows, **prepared)
    positions = [row | {"position_ids": [*range(len(row["input_ids"]))]} for row in make_rows([6])]
    with pytest.raises(ValueError, match="train_dataset has position_ids, which SFTTrainer drops"):
        sft(tmp_path, positions)


def test_a_dataset_without_scores_or_tokens_is_refused_before_anything_is_loaded(tmp_path):
    plain = [{k: row[k] for k in ("input_ids", "labels")} for row in make_rows(LENGTHS)]
    with pytest.raises(ValueError, match="train_dataset has no reference_logprob .*input_ids"):
        sft(tmp_path, plain)
    with pytest.raises(ValueError, match="train_dataset has no input_ids .*tokenise before"):
        sft(tmp_path, [{"text": "one", "reference_logprob": [-1.0]}])
    with pytest.raises(UserError, match="its logits are not its head"):
        sft(tmp_path, make_rows(LENGTHS), make_model("hyperclovax"))


# ---- real text ----------------------------------------------------------------------------------


@needs_data
def test_real_text_trains_packed_and_its_loss_falls(tmp_path):
    """Bytes as tokens; a uniform reference, so the highest losses are selected."""
    rows = [
        {"input_ids": ids, "labels": list(ids), "reference_logprob": [float("nan")] + [-4.0] * n}
        for ids in ([byte % 59 + 2 for byte in text.encode()[:120]] for text in real_texts(40))
        if (n := len(ids) - 1)
    ]
    model = make_model(max_position_embeddings=256)
    fields: dict[str, Any] = {"packing": True, "max_length": 240, "per_device_train_batch_size": 2}
    _, recorder = sft(tmp_path, rows, model, max_steps=12, learning_rate=0.5, **fields)
    losses = [log["loss_all"] for log in recorder.logs if "loss_all" in log]
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.3
