"""Names that users give and that become one part of a path: a file's or a folder's.

`path_component` refuses what is none, where the name is the user's own to choose; `file_name` makes
one of any text, where a path must be found for what is named already.
"""

import hashlib
import re
from typing import Any

from slm.errors import UserError

MOST_BYTES = 255  # of a name in every common file system


def path_component(field: str, value: Any) -> str:
    """`value`, where it is the name of one entry of a folder and of no other folder."""
    is_name = isinstance(value, str) and value not in ("", ".", "..")
    if not is_name or re.search(r"[/\\\0]", value) or len(value.encode()) > MOST_BYTES:
        raise UserError(
            f"{field} is {value!r}, it must be one name: no slash, not '.' or '..', "
            f"1 to {MOST_BYTES} bytes"
        )
    return value


def file_name(text: str, most_bytes: int = MOST_BYTES) -> str:
    """`text` where it can be a name, else its beginning and a hash: other texts, other names."""
    fits = len(text.encode(errors="replace")) <= most_bytes
    if fits and text not in ("", ".", "..") and not re.search(r"[/\0]", text):
        return text
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]
    start = re.sub(r"[/\0]", "_", text).encode(errors="replace")[: most_bytes // 2]
    return f"{start.decode(errors='ignore')}~{digest}"
