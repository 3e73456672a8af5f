"""What a preparation says of its speed; the rest is read by the tests of the command."""

import re
from types import SimpleNamespace
from typing import Any

import numpy as np

from slm import console
from slm.prepare.report import show_progress


def test_speed_is_of_text_and_tokens_and_needs_no_total(monkeypatch, capsys, caplog):
    monkeypatch.setattr(console, "LINE_EVERY_S", 0.0)
    documents = np.array([[7, 0, 0, 0, 2_000_000], [3, 0, 0, 0, 500_000]])  # tokens, ..., bytes
    result: Any = SimpleNamespace(documents=documents, num_input_bytes=3_000_000)
    with caplog.at_level("INFO"), show_progress(None) as speed:
        speed.add(result)
        speed.add(result)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" bytes")[0] for line in lines] == [
        "preparing 3,000,000",
        "preparing 6,000,000",
    ]
    assert re.search(r"bytes  [\d.]+ MB/s, \d+k tokens/s$", lines[1])
    assert caplog.messages[0].startswith("5.0 MB of text in ") and speed.tokens == 20
