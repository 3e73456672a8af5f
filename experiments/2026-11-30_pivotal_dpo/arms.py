"""DPO of one SFT model on each kind of pairs: python arms.py RUNS SEED OUT.csv

RUNS holds base/model, sft-SEED/model and pivots-SEED, ../text the problems.

Pairs, as many of each kind, from what `slm pivots` drew:
pivots     a pair of tokens at a place that decides (pairs.jsonl)
tokens     the control: a token of a right completion, at any place, and another that the model
           may say there
responses  a right and a wrong completion of a problem, from its beginning to its EOS
"""

import csv
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.dpo_config import DPOConfig

from slm.evaluate.answers import extract, is_right
from slm.integrations.datasets import pairs_dataset, score_pairs
from slm.integrations.trl import SelectiveDPOTrainer
from slm.pivots.questions import encoder, read_questions

LR, BATCH, EPOCHS, BETA = 5e-5, 16, 5, 1.0
SAMPLES, NEW_TOKENS = 4, 24
Pair = dict[str, list[int]]


class Arm(NamedTuple):
    pairs: str
    select_ratio: float = 1.0
    selection: str = "random"
    reference: str = "sft"


ARMS = {
    "pivotal tokens": Arm("pivots"),
    "random tokens": Arm("tokens"),
    "responses": Arm("responses"),
    "responses, confidence": Arm("responses", 0.4, "confidence"),
    "responses, random": Arm("responses", 0.4, "random"),
    "responses, excess": Arm("responses", 0.4, "excess", "responses"),  # SDPO's second option
}


# ---- pairs --------------------------------------------------------------------------------------


def drawn(folder: Path, problems: Path, model: str, tokenizer: Any) -> list[dict[str, Any]]:
    """Prompt and completions, right and wrong, of the problems with both, from their beginning."""
    asked = read_questions(str(problems), None, None, encoder(model, tokenizer, None))
    prompts = {one.key: one.prompt_ids for one in asked}
    found = []
    for line in (folder / "rollouts.jsonl").read_text().splitlines():
        row = json.loads(line)
        at_root = row["phase"] == "search" and not row["prefix"]
        if not at_root or not 0 < sum(row["right"]) < len(row["right"]):
            continue
        sides: dict[bool, list[list[int]]] = {True: [], False: []}
        for ids, right in zip(row["samples"], row["right"], strict=True):
            sides[bool(right)].append(ids)
        found.append(
            {"prompt_ids": prompts[row["question"]], **{str(k): v for k, v in sides.items()}}
        )
    return found


def of_responses(rows: list[dict[str, Any]], count: int, rng: random.Random) -> list[Pair]:
    """Every problem once before one is taken twice."""
    turns = [row for _ in range(1 + count // len(rows)) for row in rng.sample(rows, len(rows))]
    return [
        {
            "prompt_ids": row["prompt_ids"],
            "chosen_ids": rng.choice(row["True"]),
            "rejected_ids": rng.choice(row["False"]),
        }
        for row in turns[:count]
    ]


@torch.no_grad()
def of_tokens(model: Any, pairs: list[Pair], rng: random.Random) -> list[Pair]:
    """One of each pair of responses: a place of its right one."""
    made = []
    for pair in pairs:
        at = rng.randrange(len(pair["chosen_ids"]))
        prompt, token = pair["prompt_ids"] + pair["chosen_ids"][:at], pair["chosen_ids"][at]
        chances = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        chances[token] = 0
        other = rng.choices(range(len(chances)), chances.tolist())[0]
        made.append({"prompt_ids": prompt, "chosen_ids": [token], "rejected_ids": [other]})
    return made


# ---- training and success -----------------------------------------------------------------------


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def train(folder: Path, pairs: Dataset, arm: Arm, seed: int, tokenizer: Any) -> Any:
    with tempfile.TemporaryDirectory() as out:
        options: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        options |= {"bf16": False, "use_cpu": True, "activation_checkpointing": False}
        options |= {"per_device_train_batch_size": BATCH, "num_train_epochs": EPOCHS}
        options |= {"logging_strategy": "no", "dataloader_pin_memory": False}
        trainer = SelectiveDPOTrainer(
            load(folder),
            args=DPOConfig(
                out,
                learning_rate=LR,
                beta=BETA,
                seed=seed,
                precompute_ref_log_probs=True,
                **options,
            ),
            train_dataset=pairs,
            processing_class=tokenizer,
            select_ratio=arm.select_ratio,
            selection=arm.selection,
        )
        trainer.train()
        return trainer.model


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@torch.no_grad()
def success(model: Any, tokenizer: Any, problems: list[dict[str, Any]]) -> tuple[float, float]:
    """Shares of right completions: sampled at temperature 1, SAMPLES a problem; and greedy."""
    eos = tokenizer.eos_token_id
    prompts = torch.tensor([[eos, *tokenizer.encode(one["question"])] for one in problems])
    model.eval()
    torch.manual_seed(0)
    shares = []
    for copies, how in ((SAMPLES, {"do_sample": True, "top_k": 0}), (1, {"do_sample": False})):
        ids = prompts.repeat_interleave(copies, 0)
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            eos_token_id=eos,
            pad_token_id=eos,
            **how,
        )[:, ids.shape[1] :].tolist()
        shares.append(
            sum(
                eos in row
                and is_right(extract(tokenizer.decode(row[: row.index(eos)])), str(one["answer"]))
                for row, one in zip(
                    found, [p for p in problems for _ in range(copies)], strict=True
                )
            )
            / len(found)
        )
    return shares[0], shares[1]


def make_pairs(runs: Path, seed: int, tokenizer: Any) -> dict[str, Dataset]:
    """As many of each kind as pivots were found."""
    sft, folder, rng = runs / f"sft-{seed}/model", runs / f"pivots-{seed}", random.Random(seed)
    pivots = pairs_dataset(folder / "pairs.jsonl")
    rows = drawn(folder, runs.parent / "text/search.jsonl", str(sft), tokenizer)
    responses = of_responses(rows, len(pivots), rng)
    tokens = of_tokens(load(sft), responses, rng)
    kinds = {"responses": Dataset.from_list(responses), "tokens": Dataset.from_list(tokens)}
    return {"pivots": pivots} | kinds


def main(runs: Path, seed: int, out: Path) -> None:
    sft, rows = runs / f"sft-{seed}/model", []
    tokenizer = AutoTokenizer.from_pretrained(sft)
    test = read(runs.parent / "text/test.jsonl")
    pairs = make_pairs(runs, seed, tokenizer)
    references: dict[str, Any] = {"sft": load(sft)}
    for name, folder in (("before SFT", runs / "base/model"), ("after SFT", sft)):
        rows.append([seed, name, "", *success(load(folder), tokenizer, test)])
    for name, arm in ARMS.items():
        scored = score_pairs(pairs[arm.pairs], references[arm.reference])
        references[name] = train(sft, scored, arm, seed, tokenizer)
        rows.append([seed, name, len(scored), *success(references[name], tokenizer, test)])
        print(*rows[-1], flush=True)
    with open(out, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["seed", "arm", "pairs", "sampled", "greedy"])
        writer.writerows(rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
