"""pivots.html: every pivot where it was said, green where it helps and red where it harms."""

from collections.abc import Sequence
from html import escape

from slm.store.files import Json

MOST = 1000  # pivots on a page; all are in pivots.jsonl
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>slm pivots</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }
li { margin: 0 0 1em; white-space: pre-wrap; overflow-wrap: anywhere }
.prompt { color: #767676 }
mark { padding: 0 .15em; border-radius: .2em }
.up { background: #b7e4c7 } .down { background: #ffc9c9 }
.change { color: #555; font-size: .85em; margin-left: .6em }
</style></head><body>
"""


def page(rows: Sequence[Json], sentence: str) -> str:
    """rows: of pivots.jsonl, with the text of their prompts; sentence: what is said of all."""
    items = "\n".join(item(row) for row in rows[:MOST])
    left = f"<p>{len(rows) - MOST:,} more are in pivots.jsonl.</p>" if len(rows) > MOST else ""
    heading = f"<h1>Pivotal tokens</h1>\n<p>{escape(sentence)}</p>\n"
    return f"{HEAD}{heading}<ol>\n{items}\n</ol>\n{left}</body></html>\n"


def item(row: Json) -> str:
    before, after = row["success_before"], row["success_after"]
    change = f"{before:.2f} → {after:.2f}, 95%: {row['gap_low']:+.2f} to {row['gap_high']:+.2f}"
    token = escape(visible(row["token"]))
    return (
        f'<li><span class="prompt">{escape(row["prompt"])}</span>{escape(row["prefix"])}'
        f'<mark class="{"up" if after > before else "down"}">{token}</mark>'
        f'<span class="change">{change} (problem {escape(row["question"])})</span></li>'
    )


def visible(token: str) -> str:
    """A break of line inside a mark shows nothing."""
    return token.replace("\n", "↵") or "␀"
