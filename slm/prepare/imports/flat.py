"""One array of tokens a file: nanoGPT's `.bin`, llm.c's with a header, NumPy's `.npy`.

None says where documents end; files follow one another, and a document may go on in the next.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from slm.command_keys import INTEGERS
from slm.errors import UserError
from slm.prepare.imports.parts import Options, Part, find_files, map_numbers

HEADER = 256  # int32, of llm.c: magic, version, number of tokens
TOKENS_OF = {20240520: "uint16", 20240801: "uint32"}  # GPT-2's, Llama 3's
NUMPY = b"\x93NUMPY"


def read_nanogpt(given: str, options: Options) -> Iterator[Part]:
    for path in find_files(given, ".bin"):
        tokens = map_numbers(path, options.token_dtype)
        check_headerless(path, tokens)
        yield Part(str(path), tokens)


def check_headerless(path: Path, tokens: np.ndarray) -> None:
    start = tokens[:4].tobytes()
    magic = int.from_bytes(start[:4], "little")
    if magic in TOKENS_OF:
        raise UserError(f"{path} begins with {magic}, llm.c's header: format=llmc reads it")
    if tokens[:8].tobytes().startswith(NUMPY):
        raise UserError(f"{path} begins with NumPy's header: format=npy reads it")


def read_llmc(given: str, options: Options) -> Iterator[Part]:
    for path in find_files(given, ".bin"):
        magic, _, count = (int(number) for number in map_numbers(path, "int32", 0, HEADER)[:3])
        if magic not in TOKENS_OF:
            raise UserError(
                f"{path} begins with {magic}, llm.c's files with one of {sorted(TOKENS_OF)} "
                "(format=nanogpt reads files without a header)"
            )
        tokens = map_numbers(path, TOKENS_OF[magic], 4 * HEADER)
        if len(tokens) != count:
            raise UserError(f"{path} holds {len(tokens)} tokens, its header says {count}")
        yield Part(str(path), tokens)


def read_npy(given: str, options: Options) -> Iterator[Part]:
    for path in find_files(given, ".npy"):
        try:
            tokens = np.lib.format.open_memmap(path, mode="r")
        except OSError:
            raise
        except Exception as error:  # a header is parsed as Python
            reason = str(error).partition("\n")[0]
            hint = "" if path.read_bytes()[:6] == NUMPY else "; format=olmo reads those without"
            raise UserError(f"{path} has no header of NumPy's ({reason}){hint}") from None
        if tokens.ndim != 1 or tokens.dtype.name not in INTEGERS:
            raise UserError(
                f"{path} holds {tokens.dtype} of shape {tokens.shape}, one row of whole numbers "
                "is needed"
            )
        yield Part(str(path), tokens)
