"""Log-probs of a model that only a server has: what to ask it, and what to make of its answers.

    slm score corpus=corpus/train served_model=NAME requests=requests.jsonl
    (send the `body` of every line to /v1/completions, or the file to a batch API)
    slm score corpus=corpus/train served_model=NAME responses=[responses.jsonl] out=references/x

A line of requests.jsonl is one window in the OpenAI batch format: `custom_id` names it, the prompt
is its seq_len + 1 token ids. The server needs room for one token more, which it generates and
nobody reads, and the corpus's tokenizer; its log-probs are taken as they are, so they must be of
temperature 1. A batch API takes so many lines a file (OpenAI's 50,000): `split -l`, and name all
the answers in `responses`.

A line of the answers is as in batch.py. Of a body is read (vLLM fills in all of it, LLM.generate's
outputs have the last two)

    model                                            where it is there, it must be `served_model`
    choices[0].logprobs.{tokens, token_logprobs}     from echo=true; text_offset says nothing more
    [choices[0].]prompt_logprobs                     null, then {"<token id>": {"logprob": x}, ...}
    [choices[0].]prompt_token_ids                    the prompt, from return_token_ids=true

and every token of it is compared with the corpus: by its id where there is one, and then exactly.
Several alternatives in one entry of prompt_logprobs do not say which of them was read, so they need
prompt_token_ids, or the tokens of an echo. Those are compared as text: token_texts.py says how, and
what text cannot tell apart.

Costs: one pass over the answers (JSON, about 1 us a token), 4 bytes a token of disk for the time.
"""

import logging
import os
from pathlib import Path
from typing import IO, Any

import numpy as np

from slm.errors import UserError
from slm.score.batch import (
    batch_line,
    body_of,
    choice_of,
    lookup,
    read_answers,
    short,
    write_lines,
)
from slm.score.scorer import Arrays, Source
from slm.score.token_texts import TokenTexts
from slm.store.columns import LOGPROBS
from slm.store.files import Json, naming
from slm.store.shards import Corpus
from slm.store.tokenizer import load_corpus_tokenizer
from slm.store.windows import IGNORE_INDEX, Windows

log = logging.getLogger("slm.score")
# A float32 log-softmax of logits near 100 can end this far above 0, and that is stored as 0.
ROUNDING = 1e-5
STANDS_FOR_INFINITY = -9999.0  # JSON has no -Infinity; OpenAI and vLLM write this
ID_CHARACTERS = 12  # of the corpus's fingerprint


# ---- what is asked ------------------------------------------------------------------------------


def check_packing(corpus: Corpus) -> None:
    if corpus.manifest["packing"] == "documents":
        raise UserError(
            f"{corpus.folder} has packing 'documents', which no server can score: it sees a window "
            "as one text, and the documents before a token's own would count; prepare the corpus "
            "with packing=concat"
        )


def custom_id(corpus: Corpus, window: int) -> str:
    """Names the corpus too: answers about another one are found by it."""
    return f"{corpus.fingerprint[:ID_CHARACTERS]}-{window}"


def request(corpus: Corpus, window: int, tokens: list[int], served_model: str) -> Json:
    """logprobs=0 asks for the prompt's own tokens alone; servers may refuse max_tokens=0."""
    body = {"model": served_model, "prompt": tokens, "max_tokens": 1, "temperature": 1}
    body |= {"echo": True, "logprobs": 0}
    return batch_line(custom_id(corpus, window), "/v1/completions", body)


def write_requests(corpus: Corpus, path: Path, served_model: str) -> Path:
    """One line a window, in order."""
    windows = Windows(corpus)
    tokens = (windows.tokens(np.array([window]))[0].tolist() for window in range(len(windows)))
    lines = (request(corpus, window, ids, served_model) for window, ids in enumerate(tokens))
    write_lines(path, lines, len(windows))
    log.info(f"{len(windows):,} requests of {corpus.seq_len + 1} tokens")
    return path


# ---- one line of the answers --------------------------------------------------------------------


def check_length(name: str, found: Any, length: int, where: str, *, exact: bool) -> None:
    """exact: nothing may follow the window."""
    if not isinstance(found, list):
        raise UserError(f"{where}: {name} is {short(found)}, it must be a list")
    if len(found) < length or (exact and len(found) > length):
        raise UserError(f"{where}: {name} has {len(found)} entries, the window has {length} tokens")


def is_single(entries: Any) -> bool:
    """Every position has one alternative, which then is the token that was read."""
    return isinstance(entries, list) and all(
        entry is None or (isinstance(entry, dict) and len(entry) == 1) for entry in entries
    )


def check_first(value: Any, where: str) -> None:
    if value is not None:
        raise UserError(
            f"{where}, position 0: log-prob is {short(value)}, null was expected: nothing precedes "
            "a window's first token (did the server put a token before it?)"
        )


def is_logprob(value: Any) -> bool:
    return type(value) in (int, float) and STANDS_FOR_INFINITY < value <= ROUNDING


def check_logprobs(values: list[Any], where: str) -> np.ndarray:  # (T,) float32
    for position, value in enumerate(values, 1):
        if not is_logprob(value):
            raise UserError(
                f"{where}, position {position}: log-prob is {value!r}, a number <= 0 and above "
                f"{STANDS_FOR_INFINITY} (which stands for -infinity) is needed"
            )
    return np.minimum(np.array(values, np.float64), 0).astype(np.float32)


# ---- all of them --------------------------------------------------------------------------------


class Responses(Source):
    """The scores of every window, as answered: a `Source` of `slm score` once they are read.

    Answers come in any order and may exceed the memory, so `file` holds a row of float32 for each
    window until the shards are cut from it.
    """

    columns = (LOGPROBS,)

    def __init__(self, corpus: Corpus, served_model: str, file: IO[bytes] | Any):
        self.corpus, self.served_model, self.file = corpus, served_model, file
        self.windows = Windows(corpus)
        self.texts = TokenTexts(load_corpus_tokenizer(corpus))
        self.present = np.zeros(len(self.windows), bool)
        self.row_bytes = 4 * corpus.seq_len
        self.num_bytes = len(self.windows) * self.row_bytes

    def read(self, paths: list[Path]) -> None:
        for record, where in read_answers(paths):
            self.take(record, where)
        self.check_complete()
        if self.texts.num_partial:
            log.warning(
                f"{self.texts.num_partial:,} tokens are parts of a character, which the answers do "
                "not show; that these are the corpus's follows only from their neighbours"
            )

    def take(self, record: Json, where: str) -> None:
        window = self.window_of(record["custom_id"], where)
        where = f"{where}, window {window}"
        body = body_of(record, self.served_model, where)
        tokens = self.windows.tokens(np.array([window]))[0].tolist()
        self.keep(window, check_logprobs(self.logprobs_of(body, tokens, where), where), where)

    def window_of(self, name: str, where: str) -> int:
        corpus, _, number = name.rpartition("-")
        if corpus != self.corpus.fingerprint[:ID_CHARACTERS] or not number.isdecimal():
            raise UserError(
                f"{where}: custom_id is {name!r}, that of a window of {self.corpus.folder} is like "
                f"{custom_id(self.corpus, 0)!r}"
            )
        if int(number) >= len(self.windows):
            raise UserError(f"{where}: window {number} of {len(self.windows)} in the corpus")
        return int(number)

    def logprobs_of(self, body: Json, tokens: list[int], where: str) -> list[Any]:
        """The log-probs of tokens[1:], after every token has been compared."""
        choice = choice_of(body, where)
        prompt = lookup("prompt_token_ids", choice, body)
        if prompt is not None:
            self.check_ids(prompt, tokens, where)
        entries, echo = lookup("prompt_logprobs", choice, body), lookup("logprobs", choice)
        if entries is not None and (prompt is not None or echo is None or is_single(entries)):
            return self.from_entries(entries, tokens, prompt is not None, where)
        if not isinstance(echo, dict):
            raise UserError(
                f"{where} has neither prompt_logprobs nor choices[0].logprobs; ask for echo=true "
                "and logprobs=0"
            )
        return self.from_echo(echo, tokens, where)

    def check_ids(self, prompt: Any, tokens: list[int], where: str) -> None:
        check_length("prompt_token_ids", prompt, len(tokens), where, exact=True)
        for position, (theirs, ours) in enumerate(zip(prompt, tokens, strict=True)):
            if theirs != ours:
                self.refuse_token(where, position, ours, repr(theirs))

    def from_entries(
        self, entries: Any, tokens: list[int], prompt_is_known: bool, where: str
    ) -> list[Any]:
        check_length("prompt_logprobs", entries, len(tokens), where, exact=True)
        check_first(entries[0], where)
        values = []
        for position, token in enumerate(tokens[1:], 1):
            entry = entries[position]
            if not isinstance(entry, dict) or str(token) not in entry:
                self.refuse_token(where, position, token, short(entry))
            if len(entry) > 1 and not prompt_is_known:
                raise UserError(
                    f"{where}, position {position}: prompt_logprobs has {len(entry)} alternatives "
                    "and nothing says which was read; ask for logprobs=0 or return_token_ids=true"
                )
            found = entry[str(token)]
            values.append(lookup("logprob", found) if isinstance(found, dict) else found)
        return values

    def from_echo(self, echo: Json, tokens: list[int], where: str) -> list[Any]:
        texts, values = lookup("tokens", echo), lookup("token_logprobs", echo)
        check_length("logprobs.tokens", texts, len(tokens), where, exact=False)
        check_length("logprobs.token_logprobs", values, len(tokens), where, exact=False)
        position = self.texts.first_other(texts[: len(tokens)], tokens)
        if position is not None:
            self.refuse_token(where, position, tokens[position], repr(texts[position]))
        check_first(values[0], where)
        return values[1 : len(tokens)]

    def refuse_token(self, where: str, position: int, ours: int, theirs: str) -> None:
        raise UserError(
            f"{where}, position {position}: token is {theirs} in the answer, "
            f"{self.texts.describe(ours)} in the corpus"
        )

    def keep(self, window: int, values: np.ndarray, where: str) -> None:
        if self.present[window]:
            before = self.row(window)
            if (before != values).any():
                index = int((before != values).argmax())
                raise UserError(
                    f"{where}, position {index + 1}: log-prob is {values[index]}, another line "
                    f"about this window has {before[index]}"
                )
        with naming(Path("the temporary file of the answers")):
            os.pwrite(self.file.fileno(), values.tobytes(), window * self.row_bytes)
        self.present[window] = True

    def check_complete(self) -> None:
        missing = np.flatnonzero(~self.present)
        if missing.size:
            raise UserError(
                f"responses: {missing.size:,} of {len(self.windows):,} windows have no answer, the "
                f"first is window {missing[0]} ({custom_id(self.corpus, int(missing[0]))})"
            )

    # ---- as a source of scores ----

    def row(self, window: int) -> np.ndarray:  # (T,)
        found = os.pread(self.file.fileno(), self.row_bytes, window * self.row_bytes)
        return np.frombuffer(found, np.float32)

    def scores(self, numbers: np.ndarray) -> Arrays:  # (B, T)
        """NaN for prompts, as a model's own scores have it: they are no targets."""
        dead = self.windows.batch(numbers)["targets"].numpy() == IGNORE_INDEX
        rows = np.stack([self.row(int(number)) for number in numbers])
        return {LOGPROBS.name: np.where(dead, np.float32(np.nan), rows)}

    def cost(self, seconds: float, tokens: int) -> None:
        """Nobody here knows what the server did."""
