"""Labelled noise for any text: what logs, tables and scrapers leave between the words.

`inject(text, seed, share)` puts spans of noise at line and word borders and says where the signal
is; cutting the noise out again gives the text, character by character. It is a pure function, the
same on every machine and under every Python, since it draws by `random.Random.random` alone, the
one method whose sequence is promised. Costs about 0.3 s for a megabyte of noise.
"""

import random
import re
from collections.abc import Callable
from hashlib import blake2b
from itertools import pairwise

from slm.prepare.documents import Span

MAX_SHARE = 0.9  # of the result: ten times the text
MIN_PIECE = 8  # characters; a smaller rest is drawn for
LINE_SHARE = 0.5  # of the pieces stand in lines of their own
HEX, SYMBOLS = "0123456789abcdef", "#=-*~_|+<>/\\^%&$@!:;"
LEVELS = ("DEBUG", "INFO", "WARN", "ERROR")
UNITS = ("worker", "cache", "proxy", "db", "cron", "auth")
EVENTS = ("timeout", "retry", "evicted", "connected", "flush", "GET", "POST", "gc", "checksum")
WORD_START = re.compile(r"(?<=\s)(?=\S)")


def record_seed(seed: int, source: str, record: int) -> int:
    """Of one record: neither its neighbours nor the process that reads it matter."""
    digest = blake2b(f"{seed}\0{source}\0{record}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


# ---- drawing ------------------------------------------------------------------------------------


def below(rng: random.Random, limit: int) -> int:
    return int(rng.random() * limit)


def pick(rng: random.Random, choices: tuple[str, ...] | str) -> str:
    return choices[below(rng, len(choices))]


def between(rng: random.Random, low: int, high: int) -> int:
    """Both ends included."""
    return low + below(rng, high - low + 1)


def digits(rng: random.Random, count: int, alphabet: str = HEX) -> str:
    return "".join(pick(rng, alphabet) for _ in range(count))


# ---- kinds of noise -----------------------------------------------------------------------------


def record_id(rng: random.Random) -> str:
    """A hash, a UUID or a numbered record."""
    kind = below(rng, 3)
    if kind == 0:
        return f"sha1:{digits(rng, 40)}"
    if kind == 1:
        return "-".join(digits(rng, size) for size in (8, 4, 4, 4, 12))
    return f"[rec_id={between(rng, 1, 10**9)};v{between(rng, 1, 99)}]"


def timestamp(rng: random.Random) -> str:
    year, month, day = between(rng, 1995, 2029), between(rng, 1, 12), between(rng, 1, 28)
    hour, minute, second = below(rng, 24), below(rng, 60), below(rng, 60)
    return f"{year}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{below(rng, 1000):03}Z"


def symbols(rng: random.Random) -> str:
    """A ruler of a few symbols."""
    unit = digits(rng, between(rng, 1, 3), SYMBOLS)
    return (unit * 60)[: between(rng, 8, 60)]


def numbers(rng: random.Random) -> str:
    """A row of a table."""
    cells = (f"{(rng.random() - 0.5) * 2000:.{below(rng, 5)}f}" for _ in range(between(rng, 3, 9)))
    return "\t".join(cells)


def log_line(rng: random.Random) -> str:
    unit = f"{pick(rng, UNITS)}-{below(rng, 64)}"
    event = f"{pick(rng, EVENTS)} 0x{digits(rng, 8)} {below(rng, 5000)}ms rc={below(rng, 256)}"
    return f"{timestamp(rng)} {pick(rng, LEVELS)} {unit}: {event}"


Kind = Callable[[random.Random], str]
IN_LINES: tuple[Kind, ...] = (record_id, timestamp, symbols)
OWN_LINES: tuple[Kind, ...] = (*IN_LINES, numbers, log_line)
BLOCKS: dict[Kind, int] = {numbers: 6, log_line: 4}  # at most so many lines at once


def piece_of_line(rng: random.Random) -> str:
    return IN_LINES[below(rng, len(IN_LINES))](rng)


def piece_of_lines(rng: random.Random) -> str:
    kind = OWN_LINES[below(rng, len(OWN_LINES))]
    count = between(rng, 1, BLOCKS[kind]) if kind in BLOCKS else 1
    return "\n".join(kind(rng) for _ in range(count))


# ---- text -> noisy text -------------------------------------------------------------------------


def inject(text: str, seed: int, share: float) -> tuple[str, list[Span]]:
    """`text` with noise, and the spans of the result that are signal, ascending.

    share:  of the characters of the result that are noise; short texts have it on average
    """
    assert 0 <= share <= MAX_SHARE, f"{share=}"
    rng = random.Random(seed)
    lines = [0, *(match.end() for match in re.finditer("\n", text)), len(text)]
    words = [match.start() for match in WORD_START.finditer(text)] or lines
    pieces: list[tuple[int, int, str]] = []  # position, number, noise
    left = len(text) * share / (1 - share)
    while left > 0:
        if left < MIN_PIECE:
            left = MIN_PIECE if rng.random() * MIN_PIECE < left else 0
            continue
        own_line = rng.random() < LINE_SHARE
        borders = lines if own_line else words
        at = borders[below(rng, len(borders))]
        noise = separated(draw(rng, own_line)[: int(left) - 1], at, len(text), own_line)
        pieces.append((at, len(pieces), noise))
        left -= len(noise)
    return assemble(text, sorted(pieces))


def draw(rng: random.Random, own_line: bool) -> str:
    return piece_of_lines(rng) if own_line else piece_of_line(rng)


def separated(noise: str, at: int, end: int, own_line: bool) -> str:
    """What parts noise from the text is noise too: it stands before the text, or after its end."""
    mark = "\n" if own_line else " "
    return mark + noise if at == end else noise + mark


def assemble(text: str, pieces: list[tuple[int, int, str]]) -> tuple[str, list[Span]]:
    found, spans, length = [], [], 0
    borders = [0, *(at for at, _, _ in pieces), len(text)]
    for (start, end), noise in zip(
        pairwise(borders), [*(noise for _, _, noise in pieces), ""], strict=True
    ):
        found += [text[start:end], noise]
        if end > start:
            spans.append((length, length + end - start))
        length += end - start + len(noise)
    return "".join(found), spans
