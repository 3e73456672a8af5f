"""What to ask an annotator about documents, and the labels in the answers: `slm annotate`.

    slm annotate 'sources=[web.jsonl]' served_model=NAME requests=requests.jsonl
    (send the `body` of every line to /v1/chat/completions, or the file to a batch API)
    slm annotate 'sources=[web.jsonl]' served_model=NAME responses=answers.jsonl out=labels.jsonl

A line of the requests is one document in OpenAI's batch format (slm/score/batch.py): `custom_id` is
the hash of its text, and the message is the prompt file with the document's beginning for {text}.
Which documents are asked about depends on their texts and the seed, not on files or their order. In
an answer the label is the number behind the last "Score:", or the whole of it, or of a person the
field `label` of the line: {"custom_id": "...", "label": 4}.

After FineWeb-Edu (arXiv 2406.17557), whose labels are a language model's, 0 to 5. Costs one reading
of the sources.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from heapq import heappush, heapreplace
from pathlib import Path
from typing import Any, NamedTuple

from slm.command_keys import ANNOTATE
from slm.console import progress
from slm.errors import UserError
from slm.prepare.overlap import read_all
from slm.prepare.sources import parse_sources
from slm.quality.labels import LABEL, write_labels
from slm.score.batch import (
    batch_line,
    body_of,
    choice_of,
    lookup,
    read_answers,
    response_files,
    short,
    write_lines,
)
from slm.stage import Folder, stage
from slm.store.files import Json

log = logging.getLogger("slm.annotate")
PROMPT = Path(__file__).with_name("prompts") / "educational.txt"
SCORE = re.compile(
    r"(?:score\W*|^\W*)(\d+)(?![\d.,]*\d)(?:\s*/\s*5|\s*points?)?\W*$", re.IGNORECASE | re.MULTILINE
)
MAX_BYTES = 2**26  # of a document
MAX_TOKENS = 512  # of an answer


class Document(NamedTuple):
    id: str
    source: str
    text: str


class NoLabel(UserError):
    """An answer without a label from 0 to 5."""


# ---- which documents ----------------------------------------------------------------------------


def choose(sources: Sequence[Any], num_documents: int, seed: int) -> list[Document]:
    """Random ones of different texts, in an order of their own."""
    parsed = parse_sources(sources, "sources")
    heap: list[tuple[int, Document]] = []
    there: set[str] = set()
    key = seed.to_bytes(8, "big")
    with progress("reading", None, "documents") as advance:
        for number, text in read_all(parsed, MAX_BYTES):
            advance(1)
            name = text.digest.hex()
            rank = -int.from_bytes(blake2b(text.digest, digest_size=16, key=key).digest(), "big")
            if name in there or (len(heap) == num_documents and rank < heap[0][0]):
                continue
            one = rank, Document(name, parsed[number].name, text.text)
            there.add(name)
            if len(heap) < num_documents:
                heappush(heap, one)
            else:
                there.remove(heapreplace(heap, one)[1].id)
    if not heap:
        raise UserError("sources: there is no document")
    if len(heap) < num_documents:
        log.warning(f"there are {len(heap):,} different documents, num_documents={num_documents:,}")
    return [document for _, document in sorted(heap, reverse=True)]


# ---- requests -----------------------------------------------------------------------------------


def read_prompt(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"prompt: {path} is no file")
    text = path.read_text(encoding="utf-8")
    if text.count("{text}") != 1:
        raise UserError(
            f"{path}: the prompt has {{text}} {text.count('{text}')} times, once is needed: where "
            "the document goes"
        )
    return text


def request(document: Document, prompt: str, max_characters: int, served_model: str) -> Json:
    content = prompt.replace("{text}", document.text[:max_characters])
    body = {"model": served_model, "messages": [{"role": "user", "content": content}]}
    body |= {"temperature": 0, "max_tokens": MAX_TOKENS}
    return batch_line(document.id, "/v1/chat/completions", body)


# ---- answers ------------------------------------------------------------------------------------


def label_in(record: Json, served_model: str, where: str) -> int:
    """0 to 5; NoLabel where there is another number or none."""
    if "label" in record:
        label = record["label"]
    else:
        content = content_of(record, served_model, where)
        found = SCORE.findall(content)
        if not found:
            raise NoLabel(f"{where}: the answer has no line `Score: 3` in it: {short(content)}")
        label = int(found[-1])
    if not LABEL.fits(label):
        raise NoLabel(f"{where}: label is {label!r}, expected {LABEL.wanted}")
    return label


def content_of(record: Json, served_model: str, where: str) -> str:
    choice = choice_of(body_of(record, served_model, where), where)
    message = lookup("message", choice)
    content = lookup("content", message) if isinstance(message, dict) else lookup("text", choice)
    if not isinstance(content, str):
        raise NoLabel(f"{where}: choices[0].message.content is {short(content)}, it must be a text")
    return content


def read_labels(
    documents: Mapping[str, Document], paths: list[Path], served_model: str, stop: bool
) -> dict[str, int]:
    """Id -> label of every answer. Answers without a label are counted, unless they stop it."""
    found: dict[str, int] = {}
    bad = 0
    for record, where in read_answers(paths):
        name = record["custom_id"]
        if name not in documents:
            raise UserError(
                f"{where}: custom_id is {name!r}, which is none of the {len(documents):,} "
                "documents that were asked about (are sources, num_documents and seed those of the "
                "requests?)"
            )
        try:
            label = label_in(record, served_model, where)
        except NoLabel as error:
            if stop:
                raise
            bad += 1
            log.warning("left out: %s", error)
            continue
        if found.setdefault(name, label) != label:
            raise UserError(f"{where}: label is {label}, another line about it has {found[name]}")
    if bad:
        log.warning(f"{bad:,} answers have no label (on_bad_answer=skip)")
    return found


def rows_of(documents: Sequence[Document], labels: Mapping[str, int]) -> Iterator[Json]:
    for document in documents:
        if document.id in labels:
            yield {
                "id": document.id,
                "label": labels[document.id],
                "source": document.source,
                "text": document.text,
            }


# ---- the command --------------------------------------------------------------------------------


@stage(ANNOTATE)
def annotate(
    sources: Sequence[Folder | Mapping[str, Any]],
    served_model: str,
    *,
    num_documents: int = 300,
    seed: int = 0,
    prompt: Folder | None = None,
    max_characters: int = 4000,
    on_bad_answer: str = "stop",
    requests: Folder | None = None,
    responses: Folder | Sequence[Folder] | None = None,
    out: Folder | None = None,
) -> Path:
    """Requests to an annotator about random documents, or the labels in its answers.

    Args:
        sources: what to read, as in `slm prepare`.
        served_model: the server's name of the model, as its answers have it.
        num_documents: of so many different texts, chosen by hash.
        seed: of that choice.
        prompt: a file of your own with {text} in it; None: slm/quality/prompts/educational.txt.
        max_characters: of a document, from its beginning.
        on_bad_answer: "stop" at the first without a label from 0 to 5, or "skip" and count them.
        requests: a file to write: a request for every document.
        responses: file or files with the answers, in any order.
        out: with responses: a file for the labels, lines of {id, label, source, text}.

    Returns:
        The file that was written.

    Raises:
        UserError: an answer is about no document that was asked about, or has no label; a file
            cannot be read; a setting is wrong.
    """
    if (requests is None) == (responses is None):
        raise UserError("exactly one of requests and responses must be given")
    if (responses is None) != (out is None):
        raise UserError("out is the file of the labels: it goes with responses")
    paths = [] if responses is None else response_files(responses)
    asked = read_prompt(PROMPT if prompt is None else Path(prompt))
    documents = choose(sources, num_documents, seed)
    if requests is not None:
        lines = (request(one, asked, max_characters, served_model) for one in documents)
        write_lines(Path(requests), lines, len(documents))
        log.info(f"{len(documents):,} requests")
        return Path(requests)
    by_id = {one.id: one for one in documents}
    labels = read_labels(by_id, paths, served_model, on_bad_answer == "stop")
    if not labels:
        raise UserError(f"responses: {paths[0]} has no label of {len(documents):,} documents")
    write_labels(Path(str(out)), rows_of(documents, labels))
    counts = ", ".join(
        f"{[*labels.values()].count(n):,} of {n}" for n in sorted({*labels.values()})
    )
    missing = len(documents) - len(labels)
    log.info(f"{len(labels):,} labels: {counts}; {missing:,} documents have none")
    return Path(str(out))
