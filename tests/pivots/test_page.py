"""The page shows each pivot in its place, and nothing of a text is markup."""

from html.parser import HTMLParser
from typing import Any

from slm.pivots.page import MOST, page

ROW: dict[str, Any] = {"question": "7", "prompt": "a<b & c?", "prefix": " is", "token": "<i>\n"}
ROW |= {"success_before": 0.25, "success_after": 0.75, "gap_low": 0.3, "gap_high": 0.6}


class Marks(HTMLParser):
    """Texts by their element and its class."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[tuple[str, str | None]] = []
        self.found: list[tuple[str, str | None, str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag != "meta":
            self.open.append((tag, dict(attrs).get("class")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open:
            self.found.append((*self.open[-1], data))


def test_a_pivot_is_shown_where_it_was_said():
    marks = Marks(page([ROW, ROW | {"success_after": 0.0}], "2 <pivots>"))
    texts = [one for one in marks.found if one[0] in ("p", "span", "li", "mark")]
    assert [text for text in texts if text[2].strip()][:5] == [
        ("p", None, "2 <pivots>"),
        ("span", "prompt", "a<b & c?"),
        ("li", None, " is"),
        ("mark", "up", "<i>↵"),
        ("span", "change", "0.25 → 0.75, 95%: +0.30 to +0.60 (problem 7)"),
    ]
    assert [text[1] for text in texts if text[0] == "mark"] == ["up", "down"]
    assert not marks.open


def test_a_page_does_not_grow_without_end():
    marks = Marks(page([ROW] * (MOST + 3), ""))
    assert sum(one[0] == "mark" for one in marks.found) == MOST
    assert ("p", None, "3 more are in pivots.jsonl.") in marks.found
