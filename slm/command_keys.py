"""The keys of every command but `slm train`, whose table is in train/keys.py.

`anything` is left to its reader, whose sentence says more.
"""

import re
from collections.abc import Mapping

from slm.checks import (
    CHECKS,
    Kind,
    Table,
    anything,
    each,
    either,
    file,
    flag,
    folders,
    is_list,
    number,
    optional,
    real,
    section,
    seed,
    several,
    text,
    texts,
    whole,
    word,
)

count, rate = whole(1), real(0)
check = word(*CHECKS)
modules = several(text, least=0)
megabytes = real(1e-6, 1e6)
DTYPES = ("float32", "bfloat16", "bf16-mixed")
PRECISIONS = {"32-true": "float32", "bf16-mixed": "bf16-mixed"}  # Lightning's words for them
FORWARD: Table = {
    "batch_size": count,
    "dtype": word(*DTYPES),
    "device": text,
    "modules": modules,
    "check": check,
}


def is_budget(value: object) -> bool:
    if isinstance(value, str):
        return bool(re.fullmatch(r"\d+(\.\d+)?%", value)) and 0 < float(value[:-1]) <= 100
    return type(value) is int and value > 0


def is_keep(value: object) -> bool:
    if not isinstance(value, Mapping) or value.keys() != {"by", "over"}:
        return False
    return text.fits(value["by"]) and number.fits(value["over"])


KEEP = Kind("{by: a folder of slm quality or '{field}' of the records, over: a number}", is_keep)
PREPARE: Table = {
    "out": text,
    "sources": anything,
    "exclude": anything,
    "tokenizer.path": optional(text),
    "tokenizer.eos": optional(text),
    "tokenizer.vocab_size": optional(whole(1, 2**31)),
    "tokenizer.train_mb": megabytes,
    "tokenizer.chat_template": optional(text),
    "tokenizer.encoder": word("auto", "tokenizers", "gigatoken"),
    "seq_len": whole(1, 2**31),
    "packing": word("concat", "documents"),
    "heldout_ratio": real(0, 1),
    "on_bad_record": word("stop", "skip"),
    "max_document_mb": megabytes,
    "shard_tokens": whole(2, 2**40),
    "num_proc": optional(whole(1, 4096)),
    "keep": optional(KEEP),
}
TOKEN_FILES = "nanogpt llmc npy megatron olmo datatrove mds litdata datasets".split()
INTEGERS = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
IMPORT: Table = {
    "format": word(*TOKEN_FILES),
    "path": texts,
    "out": text,
    "tokenizer.path": text,
    "tokenizer.eos": optional(text),
    "seq_len": PREPARE["seq_len"],
    "packing": PREPARE["packing"],
    "documents": word("index", "eos"),
    "add_eos": flag,
    "dtype": optional(word(*INTEGERS)),
    "column": optional(text),
    "masks": optional(text),
    "shard_tokens": PREPARE["shard_tokens"],
    "link": flag,
}
EXPORTS = [name for name in TOKEN_FILES if name != "npy"]
EXPORT: Table = {
    "corpus": text,
    "format": optional(word(*EXPORTS)),
    "out": optional(text),
    "as": optional(word("documents", "spans", "rows")),
    "run": optional(text),
    "references": optional(either(texts, folders)),
    "combine": anything,
    "target_model": optional(text),
    "keep": anything,
    "scores": optional(text),
    "by": optional(word("share", "excess")),
    "least": optional(number),
    "max_tokens": optional(count),
    **{key: FORWARD[key] for key in ("batch_size", "dtype", "device", "modules")},
    "check": check,
}
SCORE: Table = FORWARD | {
    "corpus": text,
    "reference_model": optional(text),
    "requests": optional(text),
    "responses": optional(texts),
    "served_model": optional(text),
    "out": optional(text),
    "layout": word("windows", "documents"),
    "context": optional(count),
    "stride": optional(count),
    "max_tokens": optional(count),
    "entropy": flag,
    "columns": several(text, least=0),
    "store_dtype": word("float32", "float16"),
    "direct": flag,
    "tp_size": count,
    "fsdp_size": count,
    "scores": word("transformers", "vllm"),
}
CONSOLIDATE: Table = {"checkpoint": text, "out": text}
BIND: Table = {
    "corpus": text,
    "scores": texts,
    "out": text,
    "missing": word("refuse", "score", "skip"),
    "reference_model": optional(text),
    "check": check,
}
EVALUATE: Table = FORWARD | {
    "models": folders,
    "sets": folders,
    "max_windows": optional(count),
    "by_position": optional(several(count)),
    "override": optional(section),
    "out": optional(file),
}
QUESTION = Kind("a text with {question} in it", lambda v: text.fits(v) and "{question}" in v)
HARNESS: Table = {
    "models": folders,
    "problems": optional(text),
    "files": optional(folders),
    "stories": anything,
    "tasks": several(text),
    "limit": optional(count),
    "num_fewshot": whole(0),
    "prompt": QUESTION,
    "batch_size": count,
    "max_new_tokens": count,
    "device": text,
    "modules": modules,
    "out": optional(file),
    "samples": optional(file),
}
NEEDLE: Table = FORWARD | {
    "models": folders,
    "sets": folders,
    "lengths": several(count),
    "depths": several(real(0, 1)),
    "pairs": whole(2, 26),
    "samples": count,
    "seed": seed,
    "override": optional(section),
    "out": optional(file),
}
SPEAK: Table = {
    "models": folders,
    "prompts": either(text, Kind("a list of sources", is_list)),
    "corpus": optional(texts),
    "max_new_tokens": count,
    "prompt_tokens": optional(count),
    "num_samples": count,
    "temperature": rate,
    "top_p": real(0, 1, "(]"),
    "seed": seed,
    **{key: FORWARD[key] for key in ("batch_size", "dtype", "device", "modules")},
    "out": optional(file),
}
ANNOTATE: Table = {
    "sources": anything,
    "served_model": text,
    "num_documents": count,
    "seed": seed,
    "prompt": optional(text),
    "max_characters": count,
    "on_bad_answer": word("stop", "skip"),
    "requests": optional(file),
    "responses": optional(texts),
    "out": optional(file),
}
QUALITY: Table = {
    "out": text,
    "labels": optional(texts),
    "features": word("hashed", "hidden"),
    "base_model": optional(text),
    "context": count,
    "threshold": real(0, 5),
    "folds": whole(2, 100),
    "seed": seed,
    "classifier": optional(text),
    "sources": anything,
    **{key: FORWARD[key] for key in ("batch_size", "dtype", "device", "modules")},
}
DYNAMICS: Table = FORWARD | {
    "runs": texts,
    "corpus": text,
    "name": anything,
    "references": optional(either(texts, folders)),
    "combine": anything,
    "num_targets": count,
    "seed": seed,
    "by_source": flag,
    "threshold": rate,
    "mean_loss": optional(number),
}
REPORT: Table = {
    "runs": texts,
    "out": text,
    "baselines": optional(folders),
    "heldout": optional(folders),
    "sets": optional(several(text)),
    "speech": optional(text),
    "max_dynamics": count,
    "modules": modules,
    "check": check,
}
PILOT: Table = {
    "corpus": text,
    "out": text,
    "reference_model": text,
    "heldout": folders,
    "elsewhere": optional(folders),
    "curated": optional(text),
    "curated_share": optional(real(0, 1, "()")),
    "budget": Kind(
        "a share of the corpus such as 1%, or a whole number of tokens of at least 1", is_budget
    ),
    "select_ratios": several(
        Kind(
            "a number in (0, 1): at 0 nothing is trained on, and 1 is all tokens, an arm of every "
            "pilot",
            real(0, 1, "()").fits,
        )
    ),
    "target_tokens": optional(count),
    "seeds": count,
    "max_seeds": count,
    "level": real(0, 1, "()"),
    "margin": rate,
    "heldout_windows": count,
    "model": either(section, text),
    "data": section,
    "data.batch_size": count,
    "data.micro_batch_size": count,
    "optimizer": either(section, text),
    "trainer": either(section, text),
    "seed": seed,
    "modules": modules,
}
SETS = "gsm8k math_500 svamp asdiv mawps tabmwp mathqa mmlu_stem sat_math".split()
PIVOTS: Table = {
    "problems": text,
    "out": text,
    "target_model": optional(text),
    "served_model": optional(text),
    "tokenizer": optional(text),
    "requests": optional(file),
    "responses": optional(texts),
    "oracle": text,
    "format": optional(word(*SETS)),
    "prompt": optional(QUESTION),
    "limit": optional(count),
    "p_gap": real(0, 1, "(]"),
    "search_gap": real(0, 1, "(]"),
    "search_samples": whole(1, 4096),
    "confirm_samples": whole(1, 4096),
    "level": real(0, 1, "()"),
    "keep": each(real(0, 1), 2),
    "solutions": count,
    "pair_samples": count,
    "max_new_tokens": count,
    "temperature": real(0, ends="()"),
    "top_p": real(0, 1, "(]"),
    "seed": seed,
    **{key: FORWARD[key] for key in ("batch_size", "dtype", "device", "modules")},
}
DASHBOARD: Table = {
    "project": optional(text),
    "entity": optional(text),
    "name": text,
    "group": optional(text),
    "runs": optional(text),
    "out": file,
    "save": Kind("auto, true or false", lambda v: v == "auto" or isinstance(v, bool)),
}
DEMO: Table = {
    "out": text,
    "vocab_size": whole(1, 2**31),
    "seq_len": count,
    "base_tokens": whole(16),
    "target_tokens": whole(16),  # looked at 16 times as it trains
    "base_lr": rate,
    "continue_lr": rate,
    "select_ratio": real(0, 1, "(]"),
    "seeds": count,
    "dynamics_targets": count,
    "train": several(text, least=0),
}
