"""What the arms of a report share and in what they differ, from run folders made by hand."""

from run_helpers import make_run
from slm.report.arms import arms_of, read_runs
from slm.report.provenance import provenance

HASH = "0123456789abcdef" * 4


def arms(tmp_path):
    more = {"packages": {"torch": "2.13.0"}, "init_from": "base/model", "git": None}
    for name, seed, ratio, lr, device in [
        ("a", 0, 0.3, 1e-3, "cpu"),
        ("b", 1, 0.3, 1e-3, "H200"),
        ("c", 0, 0.6, 2e-3, "cpu"),
    ]:
        settings = {"optimizer.adamw.lr": lr, "init_from": HASH, "data.combine": None}
        make_run(tmp_path / name, "Excess", ratio, seed, identity=settings, device=device, **more)
    runs, _ = read_runs([str(tmp_path)])
    return arms_of(runs)


def test_what_all_share_is_said_once_and_hashes_give_way_to_names(tmp_path):
    found = provenance(arms(tmp_path))
    assert found.shared["init_from"] == "base/model"
    assert found.shared["torch"] == "2.13.0"
    assert not {"seed", "git", "combine", "seal"} & {*found.shared, *found.columns}


def test_what_differs_is_a_column_with_the_values_of_all_seeds(tmp_path):
    found = provenance(arms(tmp_path))
    rows = {
        label: dict(zip(found.columns, texts, strict=True)) for label, texts in found.arms.items()
    }
    (first, second) = rows.values()
    assert (first["select_ratio"], first["lr"], first["device"]) == ("0.3", "0.001", "cpu / H200")
    assert (second["select_ratio"], second["lr"], second["device"]) == ("0.6", "0.002", "cpu")
    assert set(first) == {"select_ratio", "lr", "device"}


def test_a_hash_beside_its_name_is_no_column_and_references_say_what_they_read(tmp_path):
    for name, sha, corpus in (("a", "1", "x"), ("b", "2", "y"), ("c", "3", "y")):
        model = {"corpus": "curated", "train_seconds": 1, "train_flops": 1}
        store = {"served_model": None, "model_sha256": sha * 64, "model_lineage": model}
        store |= {"scoring_cost": None}
        names = {"corpus": corpus, "init_from": f"from {name}", "init_from_sha256": sha * 64}
        seed = {"corpus_fingerprint": sha * 64, "references": [store], "online_reference": name}
        make_run(tmp_path / name, "Excess", 0.5, identity={"lr": name}, **names, **seed)
    found = provenance(arms_of(read_runs([str(tmp_path)])[0]))
    columns = [name for name in found.columns if not name.startswith("reference train")]
    # corpus x, y, y has the hashes 1, 2, 3: these say more
    assert {"corpus", "corpus_fingerprint", "init_from", "references"} <= set(columns)
    assert not {"init_from_sha256", "needs_references"} & {*columns, *found.shared}
    rows = [dict(zip(found.columns, texts, strict=True)) for texts in found.arms.values()]
    assert [row["references"] for row in rows] == [
        f"{n * 8} of curated+{m}" for n, m in ("1a", "2b", "3c")
    ]


def test_costs_are_columns_though_all_agree(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        make_run(tmp_path / name, "All", None, seed, train_seconds=12.4, train_flops=2e14)
    runs, _ = read_runs([str(tmp_path)])
    found = provenance(arms_of(runs))
    assert found.columns == ["train seconds", "train FLOPs"]
    assert list(found.arms.values()) == [["12", "2.0e+14"]]
