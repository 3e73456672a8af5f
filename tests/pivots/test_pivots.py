"""A small Llama that was trained on sums, with an exact oracle, against brute force at every token.

The answer is right where all of its text is the sum, so that the exact probability of success at a
place is a product of the model's own probabilities, without any sampling.
"""

from itertools import product
from math import exp
from pathlib import Path

import pytest
import torch

from pivot_helpers import write_problems
from slm.model.architecture import new_model
from slm.model.build import SelectiveLM, load_model, set_special_ids
from slm.model.folder import save_model
from slm.pivots.command import Pivots, pivots
from slm.store.tokenizer import load_tokenizer
from slm.store.windows import IGNORE_INDEX

FIELDS = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64}
FIELDS |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
SUMS = [(a, b) for a, b in product(range(3, 10), repeat=2)]
ORACLE = """
def is_sum(problem, text):
    return text == problem["answer"]
"""
GAP = 0.2


@pytest.fixture(scope="module")
def sums(tmp_path_factory, bytes_folder) -> Path:
    """Trained for a few seconds, so that it knows how an answer looks and often which."""
    folder, tokenizer = tmp_path_factory.mktemp("sums"), load_tokenizer(bytes_folder)
    torch.manual_seed(0)
    lm = SelectiveLM(new_model(FIELDS, 258, None)).train()
    optimizer = torch.optim.AdamW(lm.parameters(), 5e-3)
    eos = tokenizer.eos_token_id
    rows = [[eos, *tokenizer.encode(f"{a}+{b}={a + b:02}"), eos] for a, b in SUMS]
    ids = torch.tensor(rows)
    targets = ids[:, 1:].clone()
    targets[:, :4] = IGNORE_INDEX
    for _ in range(60):
        loss = lm({"input_ids": ids[:, :-1], "targets": targets}, (targets >= 0).float()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    set_special_ids(lm.model, tokenizer)
    save_model(folder / "model", lm.model, tokenizer, "card", {})
    return folder


def exact(folder: Path, prompt: list[int], answer: list[int]) -> list[float]:
    """Of success behind each part of the right answer, from none to the last token."""
    model = SelectiveLM(load_model(folder / "model"))
    ids = torch.tensor([[*prompt, *answer]])
    batch = {"input_ids": ids[:, :-1], "targets": ids[:, 1:].clone()}
    with torch.no_grad():
        nats = model(batch).loss[0, len(prompt) - 1 :].tolist()
    return [exp(-sum(nats[done:])) for done in range(len(answer) + 1)]


@pytest.mark.slow
def test_pivots_are_those_of_brute_force_at_every_token(tmp_path, sums, bytes_folder):
    tokenizer = load_tokenizer(bytes_folder)
    asked = [{"question": f"{a}+{b}=", "answer": f"{a + b:02}"} for a, b in SUMS[::4]]
    problems = write_problems(tmp_path / "p.jsonl", *asked)
    oracle = tmp_path / "sum_oracle.py"
    oracle.write_text(ORACLE)
    how = {"oracle": f"{oracle}:is_sum", "keep": [0.1, 0.9], "solutions": 4, "p_gap": GAP}
    made = pivots(problems, tmp_path / "out", target_model=sums / "model", max_new_tokens=4, **how)
    assert isinstance(made, Pivots) and made.summary["searched"] >= 4
    found = {(row["question"], row["prefix"], row["token_id"]) for row in made.pivots}
    surely, perhaps = set(), set()
    for number, one in enumerate(asked, 1):
        prompt = [tokenizer.eos_token_id, *tokenizer.encode(one["question"])]
        answer = [*tokenizer.encode(one["answer"]), tokenizer.eos_token_id]
        shares = exact(sums, prompt, answer)
        for place, token in enumerate(answer):
            said = (str(number), one["answer"][:place])
            for other in {row[2] for row in found if row[:2] == said} | {token}:
                move = (shares[place + 1] if other == token else 0) - shares[place]
                if abs(move) >= GAP - 0.15:
                    perhaps.add((*said, other))
                if move >= GAP + 0.15 and 0.2 < shares[0] < 0.8:
                    surely.add((*said, token))
    assert found <= perhaps  # nothing that brute force does not see, beside luck of 64 samples
    assert len(surely) >= 3 and len(found & surely) >= 0.8 * len(surely)
    for row in made.pairs:
        chosen, (right,) = row["chosen_success"], row["chosen_ids"]
        place = asked[int(row["question"]) - 1]
        answer = tokenizer.encode(place["answer"])
        assert right in [*answer, tokenizer.eos_token_id] and chosen > row["rejected_success"]
