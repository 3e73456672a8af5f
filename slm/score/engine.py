"""A reference model in vLLM, in this process: `slm score scores=vllm`.

Of what LLM.generate returns for a window's token ids, prompt_token_ids and prompt_logprobs (None,
then {token id: object with logprob}) are read, and every token is compared with the corpus as in
served answers (served.py). Its log-probs are of its own kernels: the store says so. Tried on a
stand-in with the documented interface alone: vLLM itself was not at hand.
"""

import importlib
import importlib.metadata
import importlib.util
from typing import Any

import numpy as np

from slm.errors import UserError
from slm.score.scorer import Arrays
from slm.score.served import Responses, check_logprobs
from slm.store.columns import LOGPROBS
from slm.store.files import Json
from slm.store.hub import check_model_folder
from slm.store.shards import Corpus
from slm.store.tokenizer import check_same_tokenizer, load_tokenizer, with_eos_of
from slm.store.windows import IGNORE_INDEX

PARAMS: Json = {
    "max_tokens": 1,
    "temperature": 0.0,
    "prompt_logprobs": 0,  # of the tokens that were read, and no alternatives
    "detokenize": False,
}
DTYPES = ("float32", "bfloat16")  # bf16-mixed is no dtype of an engine


class EngineScores(Responses):
    """The columns of windows as the engine gives them; nothing is kept beside the shards."""

    def __init__(self, corpus: Corpus, config: Any):
        super().__init__(corpus, config.reference_model, None)
        vllm = importlib.import_module("vllm")
        self.params = vllm.SamplingParams(**PARAMS)
        self.engine = vllm.LLM(
            model=str(config.reference_model),
            dtype=config.dtype,
            tensor_parallel_size=config.tp_size,
            max_model_len=corpus.seq_len + 2,  # of the one that is generated and not read, too
            enable_prefix_caching=False,  # what was read before has no log-probs
            skip_tokenizer_init=True,
        )

    def scores(self, numbers: np.ndarray) -> Arrays:  # (B, T)
        batch = self.windows.batch(numbers)
        tokens = self.windows.tokens(numbers).tolist()
        asked = [{"prompt_token_ids": ids} for ids in tokens]
        answers = self.engine.generate(asked, self.params, use_tqdm=False)
        if len(answers) != len(asked):
            raise UserError(f"vLLM gave {len(answers)} answers to {len(asked)} windows")
        rows = [
            self.row_of(answer, ids, f"vLLM, window {number}")
            for answer, ids, number in zip(answers, tokens, numbers.tolist(), strict=True)
        ]
        dead = batch["targets"].numpy() == IGNORE_INDEX
        return {LOGPROBS.name: np.where(dead, np.float32(np.nan), np.stack(rows))}

    def row_of(self, answer: Any, tokens: list[int], where: str) -> np.ndarray:  # (T,) float32
        entries = answer.prompt_logprobs
        if entries is None:
            raise UserError(f"{where} has no prompt_logprobs: vLLM of another version?")
        body = {
            "prompt_token_ids": [*answer.prompt_token_ids],
            "prompt_logprobs": [
                None if entry is None else {str(t): float(one.logprob) for t, one in entry.items()}
                for entry in entries
            ],
        }
        return check_logprobs(self.logprobs_of(body, tokens, where), where)


def check_engine(config: Any, corpus: Corpus) -> None:
    """Before a model is loaded, which takes minutes."""
    if config.dtype not in DTYPES:
        raise UserError(f"dtype is {config.dtype!r}, with scores=vllm it is one of {DTYPES}")
    if importlib.util.find_spec("vllm") is None:
        raise UserError("scores=vllm needs vLLM, which is not installed here: pip install vllm")
    folder = config.reference_model
    check_model_folder("reference_model", folder, config.check)
    tokenizer = with_eos_of(folder, load_tokenizer(folder, needs_eos=False), corpus)
    check_same_tokenizer(f"model {folder}", tokenizer, corpus.folder, corpus)


def engine_scoring(config: Any) -> Json:
    """What the scores depend on: kernels are the version's."""
    vllm = {"name": "vllm", "version": importlib.metadata.version("vllm")}
    return {
        "dtype": config.dtype,
        "store_dtype": config.store_dtype,
        "attn_implementation": None,
        "device": None,
        "engine": vllm | {"tp_size": config.tp_size},
    }
