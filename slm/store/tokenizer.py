"""Tokenizers: load or train one, give it an identity, compare two.

The identity (`tokenizer_sha256`) decides whether two folders speak of the same token ids. It covers
everything that maps text to ids and leaves out what only maps ids to batches (padding, truncation).
`transformers` is imported where it is used: the workers of `slm prepare` need only an `Encoder`
(slm.prepare.encoder), and the import costs two seconds and 400 MB each.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm.errors import UserError
from slm.store.fields import of_what
from slm.store.files import hash_json
from slm.store.hub import FOLDER, is_folder, place
from slm.store.shards import Corpus
from slm.store.trust import check_no_code, fields_of, tokenizer_fields

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("slm.store.tokenizer")
EOS = "<|endoftext|>"
PAD = "<|pad|>"  # not EOS: collators take what pads for no target, and no document would end
BATCH_SETTINGS = ("padding", "truncation")
NO_CLASS = ("PreTrainedTokenizerFast", "TokenizersBackend")  # whatever its tokenizer.json says
# A longer token is a ruler of dashes or spaces: useless, and it would not fit the uint8 column.
MAX_TOKEN_LENGTH = 128
LEAST_VOCABULARY = 256 + 2
# Tables have a row for each id up to the highest; the largest vocabularies have 0.9 million.
MAX_VOCABULARY = 2**21
# What pre-tokenizers and normalizers treat each in their way.
PROBE = (
    "In 2024, 1234567 and 3.14159: it's IT'S don't can't; x==y != foo_bar(CamelCase) // {a: [1, 2]}"
    "  two   spaces\t\ttabs\n\n\nlines \r\n http://a.b/c?d=e 10km 5% $3 #1 caf\u00e9 cafe\u0301 "
    "\u00dcber na\u00efve \u4f60\u597d\u4e16\u754c \u3053\u3093 \u043f\u0440\u0438 "
    "\u0665\u0660 \uff11\uff12 \ufb01 \u2168 \U0001f600 \u200b\u00a0 end."
)


def load_tokenizer(
    name: str | Path, eos: str | None = None, *, needs_eos: bool = True
) -> PreTrainedTokenizerFast:
    """A Hugging Face fast tokenizer by folder or hub name; it must have an EOS token.

    eos:        that token, where it is not the tokenizer's own
    needs_eos:  False: it may have none, the caller knows it (`with_eos_of`)
    """
    from transformers import PreTrainedTokenizerFast

    is_folder("no tokenizer at", str(name))
    where = place(name) if not (Path(name) / "tokenizer.json").exists() else {FOLDER: name}
    check_no_code(where[FOLDER])
    check_vocabulary(name, rows_of(Path(name) / "tokenizer.json"))
    try:
        tokenizer = read_tokenizer(name, where)
    # `tokenizers` raises a bare Exception on a damaged file, or panics.
    except BaseException as error:
        if isinstance(error, Exception) or is_panic(error):
            raise UserError(f"no tokenizer at {name}: {first_line(error)}") from None
        raise
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{name}: a fast tokenizer is needed, found {type(tokenizer).__name__}")
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        # Of a folder without files transformers makes one by the model's type.
        raise UserError(f"no tokenizer at {name}: special tokens are all that it has")
    check_vocabulary(name, vocabulary_size(tokenizer))
    if eos is not None:
        if eos not in tokenizer.get_vocab():
            raise UserError(f"{name} has no token {eos!r}, which is to be its EOS")
        tokenizer.add_special_tokens({"eos_token": eos})
    if tokenizer.eos_token_id is None and needs_eos:
        raise UserError(
            f"{name}: the tokenizer has no eos_token; documents end with one: name a token of its "
            "vocabulary with tokenizer.eos of `slm prepare` or `slm import`"
        )
    uncut(tokenizer)
    return tokenizer


def read_tokenizer(name: str | Path, where: dict[str, Any]) -> Any:
    """By transformers' choice of a class; where none is named, as beside a corpus, that choice is
    known, and an import of PyTorch (1.4 s, 150 MB) is saved."""
    from transformers import PreTrainedTokenizerFast

    if is_file_alone(Path(name)):
        return PreTrainedTokenizerFast.from_pretrained(name, trust_remote_code=False)
    from transformers import AutoTokenizer

    return as_in_its_file(name, AutoTokenizer.from_pretrained(**where, trust_remote_code=False))


def is_file_alone(folder: Path) -> bool:
    """No model beside it, and no class of its own that reads tokenizer.json in its way."""
    if (folder / "config.json").exists() or not (folder / "tokenizer.json").exists():
        return False
    fields = fields_of(lambda: tokenizer_fields(folder))
    return "tokenizer_class" in fields and fields["tokenizer_class"] in NO_CLASS


def uncut(tokenizer: PreTrainedTokenizerFast) -> Any:
    """Its backend, which gets into the tokenizer.json of a model's folder: who reads that alone
    would have texts cut."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend


def as_in_its_file(name: str | Path, tokenizer: Any) -> Any:
    """The tokenizer whose ids are those of its tokenizer.json, which every other engine reads.

    transformers 5 makes some classes (GPT-2's, GPT-NeoX's, Qwen's) of the file's vocabulary and
    merges alone, with a pre-tokenizer of their own: 2024 may be one token where the model was
    trained on four.
    """
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return tokenizer
    if type(tokenizer) is PreTrainedTokenizerFast or not has_file(name):
        return tokenizer
    by_file = PreTrainedTokenizerFast.from_pretrained(name, trust_remote_code=False)
    made, meant = (
        uncut(one).encode(PROBE, add_special_tokens=False) for one in (tokenizer, by_file)
    )
    if made.ids == meant.ids:
        return tokenizer
    log.warning(
        "%s: tokenizer.json gives other ids than transformers' %s, which leaves parts of it out; "
        "those of the file are taken",
        *(name, type(tokenizer).__name__),
    )
    return by_file


def has_file(name: str | Path) -> bool:
    from transformers.utils import cached_file

    options = {"_raise_exceptions_for_missing_entries": False}
    return cached_file(str(name), "tokenizer.json", **options) is not None


def rows_of(path: Path) -> int:
    """Rows for the ids in a tokenizer.json; 0 where there is none or it is damaged."""
    try:
        state = json.loads(path.read_bytes())
        vocab, added = state["model"]["vocab"], len(state["added_tokens"])
        highest = max(vocab.values(), default=-1) if isinstance(vocab, dict) else len(vocab) - 1
        return max(highest + 1, len(vocab) + added)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return 0


def check_vocabulary(name: str | Path, rows: int) -> None:
    """Before `tokenizers` reads a huge one for minutes, or tables of it take the whole memory."""
    if rows > MAX_VOCABULARY:
        raise UserError(f"{name}: the vocabulary needs {rows:,} ids, at most {MAX_VOCABULARY:,} do")


def is_panic(error: BaseException) -> bool:
    """`tokenizers` gives up in a panic, e.g. where a pattern exhausts its regex engine.

    That is no Exception, and its class can be imported from nowhere.
    """
    return type(error).__name__ == "PanicException"


def first_line(error: BaseException) -> str:
    """And those after it, where it ends with a colon."""
    lines = [line.strip() for line in str(error).split("\n")]
    said = " ".join(lines) if lines[0].endswith(":") else lines[0]
    return said or type(error).__name__


def check_vocab_size(vocab_size: int) -> None:
    if vocab_size < LEAST_VOCABULARY:
        raise UserError(
            f"tokenizer.vocab_size is {vocab_size}, it must be at least {LEAST_VOCABULARY}: the "
            f"single bytes, {EOS} and {PAD}"
        )


def train_tokenizer(texts: Iterable[str] | Iterator[str], vocab_size: int):
    """A byte-level BPE of exactly `vocab_size` entries, EOS and PAD among them, for any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    check_vocab_size(vocab_size)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[EOS, PAD],
        max_token_length=MAX_TOKEN_LENGTH,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() != vocab_size:
        raise UserError(
            f"the text supports only {backend.get_vocab_size()} token types, "
            f"tokenizer.vocab_size asks for {vocab_size}"
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token=PAD)


def tokenizer_sha256(tokenizer: PreTrainedTokenizerFast) -> str:
    return identity(tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id)


@lru_cache(maxsize=2)  # a command asks several times, and 2 MB of JSON take 0.1 s
def identity(spelling: str, eos_id: int | None) -> str:
    state = json.loads(spelling)
    for key in BATCH_SETTINGS:
        state.pop(key, None)
    # Prompts get no special tokens here, so what would add them is not part of the identity.
    state.pop("post_processor", None)
    return hash_json({"tokenizer": state, "eos": eos_id})


def load_corpus_tokenizer(corpus: Corpus) -> PreTrainedTokenizerFast:
    """The tokenizer beside a corpus, which is the one that made it.

    Its identity is spelled as the release of `tokenizers` at hand spells it: where that is another
    than in the manifest, and the files are whole, an upgrade has come in between.
    """
    folder = corpus.tokenizer_folder
    if not (folder / "tokenizer.json").exists():
        raise UserError(f"{folder / 'tokenizer.json'} is missing")
    tokenizer = load_tokenizer(folder)
    found, expected = tokenizer_sha256(tokenizer), corpus.manifest["tokenizer_sha256"]
    if found != expected:
        log.warning(
            "%s: these releases of tokenizers and transformers read the same files otherwise than "
            "those that made the corpus (tokenizer_sha256 %s, manifest.json says %s)",
            *(folder, found, expected),
        )
    return tokenizer


def spellings(one: Corpus | PreTrainedTokenizerFast | str) -> Iterator[str]:
    """Identities of a tokenizer: as one was written down, and as these releases spell it."""
    if isinstance(one, str):
        yield one
    elif isinstance(one, Corpus):
        yield one.manifest["tokenizer_sha256"]
        yield tokenizer_sha256(load_corpus_tokenizer(one))
    else:
        yield tokenizer_sha256(one)


def with_eos_of(
    name: str | Path, theirs: PreTrainedTokenizerFast, ours: Corpus | PreTrainedTokenizerFast
) -> PreTrainedTokenizerFast:
    """The tokenizer of a model (`name`) with the EOS of a corpus or its tokenizer.

    Which token ends a document is the corpus's to say: a model's own may end the turn of a chat,
    and some name none. What the two call by that id is for `check_same_tokenizer`.
    """
    eos_id = ours.manifest["eos_id"] if isinstance(ours, Corpus) else ours.eos_token_id
    if theirs.eos_token_id == eos_id:
        return theirs
    eos: Any = theirs.convert_ids_to_tokens(eos_id) if eos_id < len(theirs) else None
    if eos is None:
        return theirs
    log.info("%s: EOS is %r; documents end with %r here", name, theirs.eos_token, eos)
    return load_tokenizer(name, eos)


def check_same_tokenizer(
    name: object,
    theirs: Corpus | PreTrainedTokenizerFast | str,
    other_name: object,
    ours: Corpus | PreTrainedTokenizerFast,
) -> None:
    """Refuse other token ids, whatever releases made the two. A text is a recorded identity."""
    first, second = next(spellings(theirs)), next(spellings(ours))
    if first != second and not {*spellings(theirs)} & {*spellings(ours)}:
        raise UserError(
            f"{name} has tokenizer {first}, {other_name} has {second}"
            + of_what("tokenizer_sha256", first, second)
        )


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Rows that an embedding needs: added tokens count, and so do gaps between the ids."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)


def byte_alphabet(tokenizer: PreTrainedTokenizerFast) -> tuple[bool, bool]:
    """Does the vocabulary spell bytes as characters (byte-level), or has it <0xNN> (fallback)?"""
    steps = (tokenizer.backend_tokenizer.pre_tokenizer, tokenizer.backend_tokenizer.decoder)
    # Their JSON alone: that of a whole vocabulary takes a while.
    parts = b"".join(step.__getstate__() for step in steps if step is not None)
    return b"ByteLevel" in parts, b"ByteFallback" in parts


def byte_characters() -> list[str]:
    """The alphabet of byte-level vocabularies: a character for each byte (GPT-2)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(256 + hidden.index(b)) if b in hidden else chr(b) for b in range(256)]
