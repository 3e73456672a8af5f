"""datatrove's `.ds`: tokens; `.ds.index`: where documents end; `.ds.loss`: what is a target."""

from collections.abc import Iterator

from slm.errors import UserError
from slm.prepare.imports.parts import (
    Options,
    Part,
    check_ends,
    find_files,
    map_numbers,
    same_length,
)


def read_datatrove(given: str, options: Options) -> Iterator[Part]:
    """A folder's files in the order of their names."""
    for path in find_files(given, ".ds"):
        if path.suffix != ".ds":
            raise UserError(f"{path}: its tokens are in a file named *.ds, and that is to be given")
        tokens = map_numbers(path, options.token_dtype)
        index, loss = path.with_suffix(".ds.index"), path.with_suffix(".ds.loss")
        ends = check_ends(index, map_numbers(index, "uint64"), len(tokens))
        masks = same_length(loss, map_numbers(loss, "bool"), tokens) if loss.exists() else None
        yield Part(str(path), tokens, ends, masks)
