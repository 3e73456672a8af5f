"""Scores of documents that no classifier gave, as folders of `slm quality`.

python deal.py SCORES OUT                       the same scores, dealt out to documents by chance:
                                                as many are kept, whatever the bound
python deal.py SCORES OUT NAME NAME SOURCES     5 for documents of the sources with these names,
                                                else 0
"""

import sys
from pathlib import Path

import numpy as np
import yaml

from slm.prepare.overlap import read_all
from slm.prepare.sources import parse_sources
from slm.store.quality import KEY_BYTES, read_quality, write_quality


def main() -> None:
    _, given, out, *more = sys.argv
    found = read_quality(Path(given), "scores")
    keys, scores = found.arrays["keys"], found.arrays["scores"]
    if more:
        *names, sources = more
        good = digests(yaml.safe_load(sources), names)
        scores = np.array([5.0 * (key.tobytes() in good) for key in keys])
    else:
        scores = np.random.default_rng(0).permutation(scores)
    assert keys.shape[1] == KEY_BYTES
    manifest = {"kind": found.manifest["kind"], "classifier": "none", "sources": {}}
    write_quality(Path(out), manifest, {"keys": keys, "scores": scores})
    print(out)


def digests(entries: list, names: list[str]) -> set[bytes]:
    sources = parse_sources(entries, "sources")
    return {text.digest for i, text in read_all(sources, 2**26) if sources[i].name in names}


if __name__ == "__main__":
    main()
