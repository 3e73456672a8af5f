"""How fast `slm pivots` draws completions beside a plain `generate`: rows in results/pivots.csv.

    python experiments/benchmarks/pivots.py            a minute of one core
    python experiments/benchmarks/pivots.py --small    toy sizes, for the test suite

A Llama of random weights (D = 256, 2 layers, a token a byte, one of 12 ends a completion: 20
tokens on average), prompts of 100 tokens, and an oracle that is a coin: the search goes down to the
last token of each solution. Timed is the whole stage: search, oracle, files and all. The other side
is what one would write: the same prefixes, each 32 or 64 times, as rows of batches in their order.
Tokens are those up to the end of each completion, per second of the process on one thread, since a
busy machine says nothing by the clock; both are timed in turn.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from pipeline import Rows, ratios  # type: ignore
from transformers import GenerationConfig

from slm.evaluate.generation import ended, padded
from slm.model.architecture import new_model
from slm.model.build import load_model
from slm.model.folder import save_model
from slm.pivots.command import Pivots, pivots
from slm.store.tokenizer import train_tokenizer

RESULTS = Path(__file__).parent / "results" / "pivots.csv"
ORACLE = """
from zlib import crc32

def coin(problem, text):
    return crc32(text.encode()) % 2 == 0
"""
ENDS = 12  # of 258 tokens
PROMPT = [7] * 100


def write_inputs(folder: Path, small: bool) -> dict[str, Any]:
    """Model, problems and oracle; and the settings of the stage."""
    fields = {
        "model_type": "llama",
        "hidden_size": 32 if small else 256,
        "intermediate_size": 64 if small else 704,
        "num_hidden_layers": 1 if small else 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    }
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a"], 258)
    model: Any = new_model(fields, 258, None)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(100, 99 + ENDS)]
    save_model(folder / "model", model, tokenizer, "card", {})
    asked = [{"question": f"{number} " * 50, "answer": ""} for number in range(1 if small else 2)]
    (folder / "p.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    (folder / "coin_oracle.py").write_text(ORACLE)
    how: dict[str, Any] = (
        {"search_samples": 8, "confirm_samples": 16, "max_new_tokens": 16} if small else {}
    )
    more = {"max_new_tokens": 64, "batch_size": 64, "device": "cpu", "solutions": 1} | how
    given = {"problems": str(folder / "p.jsonl"), "target_model": str(folder / "model")}
    return given | more | {"oracle": f"{folder / 'coin_oracle.py'}:coin"}


class Plain:
    """Batches of rows through generate, each prefix as often as the stage drew it."""

    def __init__(self, given: dict[str, Any]):
        self.size, self.room = given["batch_size"], given["max_new_tokens"]
        self.model: Any = load_model(given["target_model"]).eval()
        self.stops = self.model.generation_config.eos_token_id

    def prompts(self, folder: Path) -> list[list[int]]:
        """Some 100 tokens and what the stage went on from, as often as it did."""
        lines = map(json.loads, (folder / "rollouts.jsonl").read_text().splitlines())
        return [[*PROMPT, *one["prefix"]] for one in lines for _ in one["samples"]]

    @torch.no_grad()
    def generate(self, rows: list[list[int]]) -> int:
        """The number of tokens."""
        how: dict[str, Any] = {"do_sample": True, "top_k": 0, "eos_token_id": self.stops}
        found = 0
        for first in range(0, len(rows), self.size):
            prompts = rows[first : first + self.size]
            batch = padded(prompts, self.stops[0], self.model.device)
            width, room = (
                batch["input_ids"].shape[1],
                self.room - min(map(len, prompts)) + len(PROMPT),
            )
            config = GenerationConfig(max_new_tokens=room, pad_token_id=self.stops[0], **how)
            output = self.model.generate(**batch, generation_config=config)
            found += sum(len(ended(row, self.stops)) for row in output[:, width:].tolist())
        return found


def rates(given: dict[str, Any], plain: Plain, out: Path, seed: int) -> tuple[float, float]:
    """Tokens a second of the process: the stage's, and those of generate."""
    start = time.process_time()
    made = pivots(out=out, seed=seed, **given)
    middle = time.process_time()
    assert isinstance(made, Pivots)
    rows = plain.prompts(out)
    begin = time.process_time()
    tokens = plain.generate(rows)
    end = time.process_time()
    return made.summary["tokens"] / (middle - start), tokens / (end - begin)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = write_inputs(folder, options.small)
        plain = Plain(given)
        found = [rates(given, plain, folder / str(n), n) for n in range(options.repeats)]
    rows, (stage, beside) = Rows(), map(list, zip(*found, strict=True))
    rows.add("pivots", "slm pivots, process time", "tokens/s", stage, "")
    rows.add("pivots", "generate, process time", "tokens/s", beside, "")
    rows.add("pivots", "slm pivots / generate, process time", "1", ratios(stage, beside), ">= 0.8")
    rows.write(options.out)


if __name__ == "__main__":
    main()
