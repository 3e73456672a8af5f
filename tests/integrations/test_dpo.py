"""A step of the trainer is the one that float64 defines pair by pair; at ratio 1 it is TRL's."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, TaskType, get_peft_model
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from door_helpers import (
    ONE_STEP,
    Recorder,
    assert_gradients,
    dataset_of,
    gradients_of,
    make_model,
    make_tokenizer,
    top,
)
from slm.integrations.datasets import score_pairs
from slm.integrations.trl import SelectiveDPOTrainer

pytestmark = [
    # peft 0.21 asks transformers 5.23 by an old name
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # refused here, and soon gone there
    # trl 1.16, too
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning"),
]
BETA = 0.7
SIDES = ("chosen", "rejected")
Pair = dict[str, list[Any]]
# Of a prompt, of its two responses: one token, one of them longer, both long.
LENGTHS = [(3, 1, 1), (5, 7, 2), (2, 4, 9), (4, 6, 6)]


def make_pairs(seed: int = 0) -> list[Pair]:
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(2, 61, (count,), generator=generator).tolist()

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [dict(zip(names, map(ids, lengths), strict=True)) for lengths in LENGTHS]


def reference_model() -> Any:
    torch.manual_seed(1)
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return model


def tokenizer() -> Any:
    made = make_tokenizer("right")
    made.backend_tokenizer.pre_tokenizer = WhitespaceSplit()  # for pairs in text
    return made


def dpo(
    folder: Path, pairs: list[Pair] | Any, kind: Any = SelectiveDPOTrainer, **fields: Any
) -> tuple[Any, Recorder]:
    ours = ("select_ratio", "selection", "peft_config", "ref_model", "model", "eval_dataset")
    extra = {key: fields.pop(key) for key in ours if key in fields}
    fixed: dict[str, Any] = {"bf16": False, "beta": BETA, "activation_checkpointing": False}
    fixed["per_device_train_batch_size"] = 4
    recorder = Recorder()
    trainer = kind(
        extra.pop("model", None) or make_model(),
        args=DPOConfig(str(folder), **(ONE_STEP | fixed | fields)),
        train_dataset=dataset_of(pairs) if isinstance(pairs, list) else pairs,
        processing_class=tokenizer(),
        callbacks=[recorder],
        **extra,
    )
    trainer.train()
    return trainer, recorder


def log_probs(model: Any, pair: Pair, side: str) -> Tensor:  # (tokens of the response,)
    ids = torch.tensor([pair["prompt_ids"] + pair[f"{side}_ids"]])
    every = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return every[-len(pair[f"{side}_ids"]) :]


def kept_of(selection: str, side: str, mine: Tensor, reference: Tensor, ratio: float) -> Tensor:
    excess = reference - mine if side == "chosen" else mine - reference
    return top({"excess": excess, "confidence": -mine}[selection], ratio)


def expected(
    exact: Any, reference: Any, pairs: list[Pair], ratio: float, selection: str
) -> tuple[dict[str, Tensor], float, list[int]]:
    """Gradients, loss, and how many tokens of chosen and of rejected responses are kept."""
    total, counts = torch.zeros((), dtype=torch.float64), [0, 0]
    for pair in pairs:
        margin: Any = 0.0
        for at, (side, sign) in enumerate((("chosen", 1), ("rejected", -1))):
            mine = log_probs(exact, pair, side)
            with torch.no_grad():
                other = log_probs(reference, pair, side)
            kept = kept_of(selection, side, mine.detach(), other, ratio)
            counts[at] += int(kept.sum())
            margin = margin + sign * (mine[kept].sum() - other[kept].sum())
        total = total - F.logsigmoid(BETA * margin) / len(pairs)
    total.backward()
    return gradients_of(exact), total.item(), counts


def in_double(model: Any) -> Any:
    exact = copy.deepcopy(model).double()
    exact.zero_grad()
    return exact


@pytest.mark.parametrize("selection", ["excess", "confidence"])
@pytest.mark.parametrize(("where", "size"), [("model", 4), ("model", 2), ("columns", 2)])
def test_gradients_are_those_of_each_pair_alone(tmp_path, selection, where, size):
    pairs, reference = make_pairs(), reference_model()
    fields: dict[str, Any] = {"ref_model": copy.deepcopy(reference)}
    rows: Any = pairs
    if where == "columns":
        rows = score_pairs(dataset_of(pairs), reference)
        fields = {"precompute_ref_log_probs": True}
    words = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
    fields |= {"select_ratio": 0.4, "selection": selection} | words
    _, recorder = dpo(tmp_path, rows, **fields)
    gradients, loss, counts = expected(
        in_double(make_model()), in_double(reference), pairs, 0.4, selection
    )
    assert_gradients(recorder.gradients[0], gradients)
    log = recorder.logs[0]
    assert log["loss"] == pytest.approx(loss, rel=1e-4)
    tokens = [sum(lengths[1 + at] for lengths in LENGTHS) for at in (0, 1)]
    assert log["kept_tokens"] == sum(counts) < sum(tokens)
    assert log["kept_frac/chosen"] == pytest.approx(counts[0] / tokens[0])
    assert log["kept_frac/rejected"] == pytest.approx(counts[1] / tokens[1])
    _, loss_all, _ = expected(in_double(make_model()), in_double(reference), pairs, 1.0, "excess")
    assert log["loss_all"] == pytest.approx(loss_all, rel=1e-4) != pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"loss_type": ["hinge", "aot", "robust"], "label_smoothing": 0.1},
        {"f_divergence_type": "js_divergence"},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_length": 9},
        {"activation_checkpointing": True, "max_steps": 2},
    ],
    ids=["sigmoid", "several losses", "divergence", "cut and accumulated", "checkpointed"],
)
def test_with_every_token_all_numbers_are_those_of_trl(tmp_path, fields):
    """Bit by bit, with pairs in text: TRL tokenizes them, and puts ends after them."""
    rows = [
        {name[:-4]: " ".join(f"w{i}" for i in ids) + " " for name, ids in pair.items()}
        for pair in make_pairs()
    ]
    found = []
    for kind, more in ((SelectiveDPOTrainer, {"select_ratio": 1.0}), (DPOTrainer, {})):
        reference = reference_model()
        found.append(dpo(tmp_path, rows, kind, ref_model=reference, **more, **fields)[1])
    ours, trls = found
    for mine, theirs in zip(ours.gradients, trls.gradients, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    timed = ("runtime", "per_second")
    for mine, theirs in zip(ours.logs, trls.logs, strict=True):
        assert "train_loss" in theirs or mine["loss_all"] == mine["loss"] == theirs["loss"]
        assert {k: mine[k] for k in theirs if not k.endswith(timed)} == {
            k: v for k, v in theirs.items() if not k.endswith(timed)
        }


def test_what_trl_logs_is_of_whole_responses(tmp_path):
    logs = []
    for ratio in (0.3, 1.0):
        words = {"select_ratio": ratio, "ref_model": reference_model(), "learning_rate": 0.0}
        logs.append(dpo(tmp_path, make_pairs(), max_steps=2, **words)[1].logs)
    for few, every in zip(*logs, strict=True):
        for name in set(every) & {"loss_all", "rewards/margins", "logps/chosen", "num_tokens"}:
            assert few[name] == every[name]
    assert logs[0][0]["loss"] != logs[1][0]["loss"]
    assert logs[0][0]["kept_tokens"] == logs[0][1]["kept_tokens"]  # since the log before


def test_responses_are_their_tokens_and_nothing_after(tmp_path):
    pairs = make_pairs()
    fields: Any = {"select_ratio": 1.0, "ref_model": reference_model()}
    trainer, _ = dpo(tmp_path, pairs, **fields)
    (batch,) = trainer.get_train_dataloader()
    for row, (side, pair) in enumerate((s, p) for s in ("chosen", "rejected") for p in pairs):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
        assert ids == pair["prompt_ids"] + pair[f"{side}_ids"]
        response = batch["input_ids"][row][batch["completion_mask"][row].bool()].tolist()
        assert response == pair[f"{side}_ids"]


def test_a_model_that_is_its_own_reference_keeps_the_first_tokens(tmp_path):
    """Nothing but ties, of scores that two forward passes make: the earlier token wins."""
    pair = {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9, 10, 11], "rejected_ids": [12, 13, 14]}
    _, recorder = dpo(tmp_path, [pair], select_ratio=0.4, ref_model=make_model())
    exact = in_double(make_model())
    first = {"chosen": 2, "rejected": 1}
    margin: Any = 0.0
    for side, sign in (("chosen", 1), ("rejected", -1)):
        mine = log_probs(exact, pair, side)[: first[side]]
        margin = margin + sign * (mine - mine.detach()).sum()
    (-F.logsigmoid(BETA * margin)).backward()
    assert_gradients(recorder.gradients[0], gradients_of(exact))


def test_lora_has_the_model_without_its_adapter_as_reference(tmp_path):
    lora = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=2,
        target_modules=["q_proj", "v_proj"],
        lora_dropout=0.0,
        init_lora_weights=False,
    )
    words: Any = {"select_ratio": 0.4, "peft_config": lora, "learning_rate": 0.0}
    trainer, recorder = dpo(tmp_path, make_pairs(), **words)
    exact: Any = get_peft_model(make_model(), lora)
    exact.load_state_dict(trainer.model.state_dict())
    reference = in_double(make_model())
    gradients, _, _ = expected(exact.double(), reference, make_pairs(), 0.4, "excess")
    assert_gradients(recorder.gradients[0], gradients)


def test_random_keeps_as_many_of_other_tokens(tmp_path):
    found = {}
    for name, selection, seed in (
        ("a", "excess", 0),
        ("b", "random", 0),
        ("c", "random", 0),
        ("d", "random", 1),
    ):
        reference = reference_model()
        words = {"select_ratio": 0.4, "selection": selection, "ref_model": reference, "seed": seed}
        found[name] = dpo(tmp_path, make_pairs(), **words)[1]
    assert len({found[name].logs[0]["kept_tokens"] for name in found}) == 1
    losses = {name: found[name].logs[0]["loss"] for name in found}
    assert losses["b"] == losses["c"] and len({*losses.values()}) == 3


class OfIds(DPOTrainer):
    """Stock, but for its tokenizing."""

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        return dataset


def test_evaluation_is_trls_own(tmp_path):
    pairs, held_out = make_pairs(), dataset_of(make_pairs(seed=1))
    found = []
    for kind, more in ((SelectiveDPOTrainer, {"select_ratio": 0.4}), (OfIds, {})):
        words: Any = {"eval_dataset": held_out, "learning_rate": 0.0} | more
        trainer, _ = dpo(tmp_path, pairs, kind, ref_model=reference_model(), **words)
        found.append(trainer.evaluate())
    timed = ("runtime", "per_second")
    ours, trls = ({k: v for k, v in one.items() if not k.endswith(timed)} for one in found)
    assert ours == trls and "eval_rewards/margins" in ours


# ---- refusal ------------------------------------------------------------------------------------


def scored(pairs: list[Pair], **changes: Any) -> Any:
    return dataset_of(
        [
            pair
            | {f"{side}_reference_logprob": [-1.0] * len(pair[f"{side}_ids"]) for side in SIDES}
            | changes
            for pair in pairs
        ]
    )


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"loss_type": ["sigmoid", "ipo"]}, "loss_type is 'ipo', which counts every token"),
        ({"loss_type": "sft"}, "loss_type is 'sft'"),
        ({"loss_type": "sigmoid_norm"}, "loss_type is 'sigmoid_norm'"),
        ({"use_weighting": True}, "use_weighting is True"),
        ({"ld_alpha": 0.5}, "ld_alpha is 0.5"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1"),
        ({"select_ratio": 0}, "select_ratio is 0, it must be a number in"),
        ({"select_ratio": 1.5}, "select_ratio is 1.5"),
        ({"selection": "entropy"}, "selection is 'entropy', it must be one of"),
        (
            {"precompute_ref_log_probs": True},
            "is True, but the train dataset has no chosen_reference_logprob",
        ),
    ],
)
def test_what_would_not_be_the_sum_of_kept_tokens_is_refused(tmp_path, fields, match):
    with pytest.raises(ValueError, match=match):
        dpo(tmp_path, make_pairs(), ref_model=make_model(), **({"select_ratio": 0.4} | fields))


@pytest.mark.parametrize(
    ("changes", "fields", "match"),
    [
        ({}, {"precompute_ref_log_probs": False}, "a reference model would be loaded in its place"),
        ({}, {"truncation_mode": "keep_end"}, "truncation_mode is 'keep_end'"),
        ({"chosen_reference_logprob": [-1.0]}, {}, "has 7 chosen_ids and 1 chosen_reference_logp"),
        (
            {"rejected_ids": [3], "rejected_reference_logprob": [0.5]},
            {},
            r"is \[0.5\], log-probs are",
        ),
        ({"rejected_ids": [3], "rejected_reference_logprob": [None]}, {}, r"is \[nan\], log-probs"),
    ],
)
def test_scores_that_are_none_of_their_tokens_are_refused(tmp_path, changes, fields, match):
    rows = scored(make_pairs()[1:2], **changes)
    with pytest.raises(ValueError, match=match):
        dpo(tmp_path, rows, select_ratio=0.4, **({"precompute_ref_log_probs": True} | fields))


def test_cut_responses_keep_the_scores_of_their_tokens(tmp_path):
    """4 tokens or fewer of a response are left; a prompt that fills 6 is gone."""
    reference, pairs = reference_model(), make_pairs()
    pairs.append({"prompt_ids": [7] * 6, "chosen_ids": [8], "rejected_ids": [9]})
    rows = score_pairs(dataset_of(pairs), reference)
    words: Any = {"select_ratio": 0.4, "precompute_ref_log_probs": True, "max_length": 6}
    _, recorder = dpo(tmp_path, rows, per_device_train_batch_size=8, **words)
    cut = [
        pair | {f"{side}_ids": pair[f"{side}_ids"][: 6 - len(pair["prompt_ids"])] for side in SIDES}
        for pair in pairs[:4]
    ]
    exact = in_double(make_model())
    gradients, _, _ = expected(exact, in_double(reference), cut, 0.4, "excess")
    assert_gradients(recorder.gradients[0], gradients)
