"""What a reference cost: its scoring, shard by shard, and where its model comes from.

    references/x/cost-00000.json   of one shard: seconds, tokens, flops, device
                 lineage.json      the reference model's own record, where its folder has one

None of it is in manifest.json or in the fingerprint: no two runs take the same seconds. Only the
scoring that ended up in a shard counts, not what a killed process had begun, nor the start.
"""

from pathlib import Path

from slm.store.fields import NUMBER, TEXT, check_fields, optional
from slm.store.files import Json, read_json, write_record
from slm.store.sidecars import shard_path

SUMMED = ("seconds", "tokens", "flops")


def write_cost(folder: Path, index: int, cost: Json, adds: bool = False) -> None:
    """adds: to what an earlier part of the shard has cost, on the same device or another"""
    path = shard_path(folder, "cost", index, ".json")
    if adds and path.exists():
        before = read_cost(path)
        cost = cost | {name: total([before[name], cost[name]]) for name in SUMMED}
    write_record(path, cost)


def references_cost(folder: str | Path) -> Json | None:
    """Seconds, tokens and FLOPs of all shards, and the devices; None where a shard has no record.

    A sum without that shard would be too small. Seconds are those of all processes together.
    """
    folder = Path(folder)
    shards = read_json(folder / "manifest.json")["shards"]
    paths = [shard_path(folder, "cost", shard["index"], ".json") for shard in shards]
    if not all(path.exists() for path in paths):
        return None
    costs = [read_cost(path) for path in paths]
    sums = {name: total([cost[name] for cost in costs]) for name in SUMMED}
    return sums | {"devices": sorted({cost["device"] for cost in costs})}


def read_cost(path: Path) -> Json:
    cost = read_json(path)
    check_fields(path, cost, dict.fromkeys(SUMMED, optional(NUMBER)) | {"device": TEXT})
    return cost


def total(values: list[float | None]) -> float | None:
    """None where one of them is unknown: a sum without it would be too small."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def copy_lineage(model: str | Path, folder: Path) -> None:
    """What the reference model was made of, so that a target can tell what its reference cost."""
    record = Path(model) / "slm.json"
    if record.exists():
        write_record(folder / "lineage.json", read_json(record)["lineage"])


def reference_lineage(folder: str | Path) -> Json | None:
    """The lineage of the model that scored; None where its folder had none."""
    path = Path(folder) / "lineage.json"
    return read_json(path) if path.exists() else None
