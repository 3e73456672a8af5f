"""How fast `slm bind` lays scores of documents onto a corpus: rows in results/bind.csv.

    python experiments/benchmarks/bind.py            50 million tokens, a minute
    python experiments/benchmarks/bind.py --small    toy sizes, for the test suite

The reference has the corpus's tokenizer: every document is hashed, looked up among all of them in
another order, copied, and what is written is hashed and synced to the disk.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from pipeline import Rows, in_turn  # type: ignore

from slm.score.bind import bind_scores
from slm.store.document_scores import keys_of
from slm.store.documents import Documents
from slm.store.files import write_array, write_json
from slm.store.shards import FORMAT, Corpus, write_manifest
from slm.store.sidecars import Shard, shard_path, write_sidecar

SEQ_LEN, SHARDS = 2048, 4
TARGET = 50e6
RESULTS = Path(__file__).parent / "results" / "bind.csv"
IDENTITY = {"format": FORMAT, "tokenizer_sha256": "", "vocab_size": 32000}


def write_store(folder: Path, column: str, shards: list[dict[str, np.ndarray]], plan: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "plan.json", IDENTITY | plan)
    for index, arrays in enumerate(shards):
        hashes = {
            name: write_array(shard_path(folder, name, index), a) for name, a in arrays.items()
        }
        dtypes = {name: str(array.dtype) for name, array in arrays.items()}
        rows = {name: len(array) for name, array in arrays.items()}
        write_sidecar(folder, column, Shard(index, rows[column], hashes, dtypes, rows))
    write_manifest(folder, column, len(shards))


def write_corpus(folder: Path, num_tokens: int, mean: int) -> Corpus:
    """Documents of random tokens and lengths, EOS (0) at the end of each."""
    generator = np.random.default_rng(0)
    length = max(1, num_tokens // SHARDS // SEQ_LEN) * SEQ_LEN + 1
    tokens = generator.integers(1, 32000, SHARDS * length, dtype=np.uint16)
    ends = np.cumsum(generator.integers(mean // 5, 2 * mean - mean // 5, len(tokens) // mean))
    starts = np.append(0, ends[ends < len(tokens) - 1])
    tokens[np.append(starts[1:], len(tokens)) - 1] = 0
    shards = []
    for begin in range(0, len(tokens), length):
        low, high = np.searchsorted(starts, [begin, begin + length])
        low -= low == len(starts) or starts[low] != begin  # it began in the shard before
        first = starts[low:high] - begin
        rows = np.column_stack([first, 0 * first, 0 * first, np.maximum(0, -first)])
        mine = tokens[begin : begin + length]
        shards.append({"tokens": mine, "documents": rows, "bytes": np.ones(length, np.uint8)})
    (folder / "tokenizer").mkdir(parents=True)  # of no files: nothing is decoded
    plan = {"kind": "corpus", "seq_len": SEQ_LEN, "packing": "concat"}
    write_store(folder, "tokens", shards, plan | {"eos_id": 0, "sources": ["random"]})
    return Corpus.open(folder)


def write_scores(folder: Path, corpus: Corpus) -> None:
    """Of all documents, in another order."""
    generator, documents = np.random.default_rng(1), Documents(corpus)
    ids = keys_of(documents.ids_sha256("uint16"))
    order = generator.permutation(len(ids))
    counts = np.diff(documents.bounds)[order]
    total = int(counts.sum())
    columns = {
        "documents": np.column_stack([np.cumsum(counts) - counts, counts]),
        "texts": np.zeros((len(ids), 32), np.uint8),
        "ids": ids[order].view(np.uint8).reshape(-1, 32),
        "logprobs": -generator.random(total, np.float32),
        "bytes": np.ones(total, np.uint16),
        "checks": np.zeros(total, np.uint8),
    }
    scoring = {"dtype": "float32", "store_dtype": "float32", "attn_implementation": None}
    scoring |= {"device": "cpu", "stride": SEQ_LEN, "first_token": 0}
    plan = {"kind": "document_scores", "seq_len": SEQ_LEN, "packing": "documents"}
    plan |= {"model_sha256": "random", "scoring": scoring, "after": []}
    write_store(folder, "logprobs", [columns], plan)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="toy sizes; numbers mean nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV that the rows are added to")
    arguments = parser.parse_args()
    rows, size, repeats = Rows(), 100_000 if arguments.small else 50_000_000, 5
    for mean in (1000, 250):
        with tempfile.TemporaryDirectory() as place:
            folder, counter = Path(place), iter(range(repeats))
            corpus = write_corpus(folder / "corpus", size, mean)
            write_scores(folder / "scores" / "part", corpus)

            def bind(corpus: Any = corpus, folder: Path = folder, counter: Any = counter) -> None:
                bind_scores(corpus, folder / "scores", folder / f"references{next(counter)}")

            seconds = in_turn(1 if arguments.small else repeats, bind=bind)["bind"]
            rates = [corpus.num_targets / value for value in seconds]
            rows.add("bind", f"documents of {mean} tokens", "tokens/s", rates, f">= {TARGET:g}")
    rows.write(arguments.out)


if __name__ == "__main__":
    main()
