"""Which of several texts is the likeliest: BLiMP's minimal pairs, and the endings of stories.

    blimp       a folder of its files (67 paradigms, alexwarstadt/blimp, data/): the good sentence
                must be likelier than the bad one, all of it after one special token
    completion  a story without its last sentence; its own must be likelier than those of three
                other stories. Any text will do: sources as of `slm prepare`

The right one stands last: lm_eval takes the first of equals, and a tie is no success.
"""

import json
import logging
import random
import re
from pathlib import Path
from typing import NamedTuple

from slm.errors import UserError
from slm.prepare.overlap import read_all
from slm.prepare.sources import Source, parse_sources
from slm.store.files import Json

NUM_ENDINGS = 4
MAX_BYTES = 2**26  # of a story
# A sentence ends at its mark, with quotes and brackets behind it.
SENTENCE_END = re.compile(r"""[.!?]+["'\u201d\u2019)\]]*\s+""")

log = logging.getLogger("slm.harness")


# ---- minimal pairs ------------------------------------------------------------------------------


def read_blimp(folder: Path, limit: int | None) -> list[Json]:
    """Documents of a multiple-choice task; `limit` of each file."""
    paths = sorted(folder.glob("*.jsonl"))
    if not paths:
        raise UserError(f"{folder} has no .jsonl files: it must be the folder with those of BLiMP")
    return [one for path in paths for one in read_paradigm(path)[:limit]]


def read_paradigm(path: Path) -> list[Json]:
    with open(path, "rb") as file:
        lines = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    return [read_pair(line, f"{path}:{number}") for number, line in lines]


def read_pair(line: bytes, where: str) -> Json:
    try:
        record = json.loads(line)
        choices = [record["sentence_bad"], record["sentence_good"]]
        group = f"{record['linguistics_term']}/{record['UID']}"
        "".join([*choices, group]).encode()
    except KeyError as error:
        raise UserError(f"{where}: field {error} is missing") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {error}") from None
    if not all(choices):
        raise UserError(f"{where}: a sentence is empty")
    return {"context": "", "choices": choices, "target": 1, "group": group}


# ---- endings ------------------------------------------------------------------------------------


class Story(NamedTuple):
    beginning: str
    ending: str  # the last sentence, with the space before it


def split_story(text: str) -> Story | None:
    """None where there is no sentence before the last."""
    text = text.strip()
    ends = [found for found in SENTENCE_END.finditer(text) if found.end() < len(text)]
    if not ends:
        return None
    end = len(text[: ends[-1].end()].rstrip())
    return Story(text[:end], text[end:])


def read_completion(entries: list[Json], limit: int | None) -> list[Json]:
    """Documents of a multiple-choice task; other endings are drawn with a fixed seed."""
    sources: list[Source] = parse_sources(entries, "stories")
    found = [split_story(text.text) for _, text in read_all(sources, MAX_BYTES)]
    stories = list(dict.fromkeys(story for story in found if story is not None))
    endings = sorted({story.ending.strip() for story in stories})
    if len(endings) < NUM_ENDINGS:
        raise UserError(
            f"stories: {len(found)} documents have {len(endings)} different last sentences after "
            f"others, at least {NUM_ENDINGS} are needed"
        )
    if len(found) > len(stories):
        log.info(f"completion: {len(stories)} of {len(found)} stories, others repeat or are short")
    draw = random.Random(0)
    return [with_other_endings(story, endings, draw) for story in stories][:limit]


def with_other_endings(story: Story, endings: list[str], draw: random.Random) -> Json:
    own = story.ending.strip()
    gap = story.ending[: -len(own)]
    others = [one for one in draw.sample(endings, NUM_ENDINGS) if one != own][: NUM_ENDINGS - 1]
    choices = [gap + one for one in [*others, own]]
    return {"context": story.beginning, "choices": choices, "target": len(choices) - 1}
