"""What one call of `slm score` may ask for: one way to scores, and nothing that is not read."""

from collections.abc import Mapping
from typing import Any

from slm.errors import UserError
from slm.score.pieces import check_short

WAYS = {  # what says where the scores come from: what it needs beside the corpus
    "reference_model": ("out",),
    "requests": ("served_model",),
    "responses": ("out", "served_model"),
}


def check_way(settings: Mapping[str, Any]) -> None:
    """One of WAYS, with what it needs, and nothing that it would not read."""
    way = way_of(settings)
    for key in ("out", "served_model"):
        needed = key in WAYS[way]
        if needed and settings[key] is None:
            raise UserError(f"{key} must be given with {way}: {key}=...")
        if not needed and settings[key] is not None:
            raise UserError(f"{key} is {settings[key]!r}, but {way} does not use it")
    if settings["max_tokens"] is not None and way != "reference_model":
        raise UserError(f"max_tokens is {settings['max_tokens']}, but {way} goes by whole corpora")
    if settings["layout"] == "documents":
        if settings["scores"] == "vllm":
            raise UserError("scores is 'vllm', but layout=documents is scored by transformers")
        check_documents(settings, way)
    elif settings["context"] is not None or settings["stride"] is not None:
        check_short(settings, way)
    held = [f"{key} is {settings[key]}" for key in ("tp_size", "fsdp_size") if settings[key] > 1]
    given = [*(["direct is true"] if settings["direct"] else []), *held]
    if given and (way != "reference_model" or settings["layout"] == "documents"):
        raise UserError(f"{given[0]}, but it is for windows that a reference_model scores here")
    if len(held) > 1:
        raise UserError(f"{' and '.join(held)}: processes hold a model in one of the two ways")
    if settings["scores"] == "vllm" and (
        way != "reference_model"
        or settings["more"]
        or settings["direct"]
        or settings["fsdp_size"] > 1
    ):
        raise UserError(
            "scores is 'vllm', which gives log-probs alone of a reference_model, and reads its "
            "weights in its own way: no columns, entropy, direct, fsdp_size, requests or responses"
        )
    if settings["more"] and way != "reference_model":
        more = ", ".join(settings["more"])
        raise UserError(f"{more} cannot be had with {way}: servers return log-probs alone")


def check_documents(settings: Mapping[str, Any], way: str) -> None:
    if way != "reference_model":
        raise UserError(f"layout=documents needs a reference_model here, found {way}")
    if settings["max_tokens"] is not None or settings["more"]:
        key, value = "columns", ", ".join(settings["more"])
        if settings["max_tokens"] is not None:
            key, value = "max_tokens", settings["max_tokens"]
        raise UserError(
            f"{key} is {value}, but layout=documents stores the log-probs of whole corpora"
        )


def way_of(settings: Mapping[str, Any]) -> str:
    given = [key for key in WAYS if settings[key] is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise UserError(f"one of {', '.join(WAYS)} must be given, found {found}")
    return given[0]
