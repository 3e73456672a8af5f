"""`python readers.py FORMAT FOLDER`: an export as the format's own library reads it, in JSON.

The libraries of tests/readers.txt, without what they import for clouds and codecs: tokens of plain
files need none of it.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

READERS = Path(sys.prefix) / "readers"
CLOUDS = ["boto3", "botocore", "botocore.credentials", "botocore.utils"]
IMAGES = ["torchvision", "torchvision.datasets", "torchvision.transforms"]
IMAGES.append("torchvision.transforms.functional")
ABSENT = {
    "datatrove": ["loguru"],
    "litdata": CLOUDS,
    "mds": [*CLOUDS, *IMAGES, "brotli", "snappy", "zstd"],
    "olmo": ["cached_path", "cached_path.schemes"],
    "megatron": [],
}
TOKENS = 40  # of the test's corpus
Read = dict[str, list[list[int]]]


def datatrove(folder: Path) -> Read:
    from datatrove.utils.dataset import DatatroveFileDataset

    options = {"token_size": 2, "return_positions": True}
    dataset: Any = DatatroveFileDataset
    item = dataset(str(folder / "train.ds"), TOKENS - 1, **options)[0]
    return {"tokens": [item["input_ids"].tolist()], "positions": [item["positions"].tolist()]}


def mds(folder: Path) -> Read:
    sys.modules["torchvision.datasets"].VisionDataset = type("VisionDataset", (), {})  # type: ignore
    from streaming.base.format import reader_from_json

    found: Read = {}
    for shard in json.loads((folder / "index.json").read_text())["shards"]:
        reader = reader_from_json(str(folder), None, shard)
        for number in range(len(reader)):
            for name, value in reader[number].items():
                found.setdefault(name, []).append(value.tolist())
    return found


def litdata(folder: Path) -> Read:
    from litdata import StreamingDataset, TokensLoader

    blocks = StreamingDataset(str(folder), item_loader=TokensLoader(block_size=8))
    return {"tokens": [block.tolist() for block in blocks]}


def megatron(folder: Path) -> Read:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    items: Any = IndexedDataset(str(folder / "train"))
    return {"tokens": [item.tolist() for item in items]}


def olmo(folder: Path) -> Read:
    from olmo_core.data.numpy_dataset import NumpyFSLDataset

    ids = {"pad_token_id": 1, "eos_token_id": 0, "vocab_size": 258}
    masks: Any = {"label_mask_paths": [folder / "label_mask-00000.npy"]}
    whole = NumpyFSLDataset(folder / "part-00000.npy", sequence_length=TOKENS, **ids, **masks)
    whole.prepare()
    item: Any = whole[0]
    return {"tokens": [item["input_ids"].tolist()], "mask": [item["label_mask"].tolist()]}


BY: dict[str, Callable[[Path], Read]] = {
    read.__name__: read for read in (datatrove, mds, litdata, megatron, olmo)
}

if __name__ == "__main__":
    sys.path.append(str(READERS))
    sys.modules |= {name: MagicMock() for name in ABSENT[sys.argv[1]]}
    print(json.dumps(BY[sys.argv[1]](Path(sys.argv[2]))))
