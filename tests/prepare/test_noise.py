"""Noise that can be cut out again, at borders, in the share that was asked for, and no chance."""

import hashlib
import random
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm.prepare import noise
from slm.prepare.noise import BLOCKS, OWN_LINES, WORD_START, inject, record_seed

PROSE = "The quick brown fox\njumps over the lazy dog; then it rests.\n\n" * 20


def noise_of(noisy: str, spans: list[tuple[int, int]]) -> list[str]:
    """What lies between the spans of signal, counted character by character."""
    signal = {i for start, end in spans for i in range(start, end)}
    kinds = "".join("s" if i in signal else "n" for i in range(len(noisy)))
    return [noisy[match.start() : match.end()] for match in re.finditer("n+", kinds)]


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    text=st.text(max_size=200) | st.text(" \nab\u0301\r", max_size=80),
    seed=st.integers(0, 2**64 - 1),
    share=st.floats(0, 0.9),
)
def test_the_signal_is_the_text(text, seed, share):
    noisy, spans = inject(text, seed, share)
    assert "".join(noisy[start:end] for start, end in spans) == text
    assert all(start < end for start, end in spans)
    assert [*spans] == sorted(spans)
    assert all(one[1] < other[0] for one, other in zip(spans, spans[1:], strict=False))
    total = sum(map(len, noise_of(noisy, spans)))
    assert total == len(noisy) - len(text)
    assert abs(total - len(text) * share / (1 - share)) <= noise.MIN_PIECE


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_share_is_that_of_the_result(share):
    noisy, _ = inject(PROSE, 3, share)
    assert 1 - len(PROSE) / len(noisy) == pytest.approx(share, abs=0.005)
    lines = [f"line {i} of many" for i in range(4000)]  # each too short for its own share
    total = sum(len(inject(line, i, share)[0]) for i, line in enumerate(lines))
    assert 1 - sum(map(len, lines)) / total == pytest.approx(share, abs=0.01)


def test_no_share_is_no_noise():
    assert inject(PROSE, 0, 0) == (PROSE, [(0, len(PROSE))])
    assert inject("", 0, 0.5) == ("", [])


def test_noise_stands_at_borders_of_lines_and_words():
    noisy, spans = inject(PROSE, 5, 0.4)
    borders = {0, len(PROSE)} | {match.end() for match in re.finditer("\n", PROSE)}
    words = {match.start() for match in WORD_START.finditer(PROSE)}
    cuts, done = set(), 0
    for start, end in spans:
        cuts |= {done, done + end - start}
        done += end - start
    assert cuts <= borders | words
    assert cuts & words - borders and cuts & borders - words - {0, len(PROSE)}
    for piece in noise_of(noisy, spans):
        assert piece[-1] in " \n" or noisy.endswith(piece)


def test_every_kind_occurs():
    pieces = "".join(noise_of(*inject(PROSE * 5, 1, 0.5)))
    for pattern in (
        r"sha1:[0-9a-f]{40}",
        r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
        r"\[rec_id=\d+;v\d+\]",
        r"\n\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z\n",
        r"([-=#*~_|+<>/\\^%&$@!:;])\1{7}",
        r"\n(-?\d+(\.\d+)?\t){2,8}-?\d+(\.\d+)?\n",
        r"Z (DEBUG|INFO|WARN|ERROR) [a-z]+-\d+: \w+ 0x[0-9a-f]{8} \d+ms rc=\d+",
    ):
        assert re.search(pattern, pieces), pattern
    assert set(BLOCKS) < set(OWN_LINES)
    rng = random.Random(0)
    assert all("\n" not in kind(rng) for kind in OWN_LINES for _ in range(50))


def test_the_same_in_every_process():
    """Not by `hash`, which differs from one process to the next; and never otherwise than now."""
    code = f"from slm.prepare.noise import inject; print(inject({PROSE!r}, 7, 0.3), end='')"
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "1", "PYTHONPATH": ":".join(sys.path)},
    )
    assert found.stdout == str(inject(PROSE, 7, 0.3))
    digest = hashlib.sha256(found.stdout.encode()).hexdigest()
    assert digest.startswith("68b51a2bbdd6c6fc")
    assert inject(PROSE, 8, 0.3) != inject(PROSE, 7, 0.3)


def test_every_record_has_its_own_seed():
    seeds = {record_seed(*key) for key in [(0, "a", 1), (0, "a", 2), (1, "a", 1), (0, "b", 1)]}
    assert len(seeds) == 4
    assert record_seed(0, "a", 1) == 13675636746056083729
