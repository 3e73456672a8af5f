"""Checkpoint files: atomic, hashed, complete; random states; what is refused."""

import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from slm.errors import UserError
from slm.store import files
from slm.store.claims import ClaimLost, Unclaimed, claim
from slm.store.files import hash_file, write_record
from slm.train.callbacks.checkpoints import (
    Checkpoints,
    OnlyWriter,
    RandomStates,
    random_state,
    set_random_state,
)
from slm.train.checkpoint import (
    VerifiedCheckpointIO,
    check_checkpoint,
    newest_checkpoint,
    read_checkpoint,
    sidecar,
)

IO = VerifiedCheckpointIO(Unclaimed())


def save(folder: Path, step: int, kind: str = "step") -> Path:
    path = folder / f"{kind}-{step:08d}.ckpt"
    IO.save_checkpoint(
        {"global_step": step, "about": {"tokens_seen": step}, "w": torch.ones(3) * step}, path
    )
    return path


def test_round_trip(tmp_path):
    path = save(tmp_path, 7)
    assert torch.equal(IO.load_checkpoint(path)["w"], torch.full((3,), 7.0))
    IO.remove_checkpoint(path)
    assert list(tmp_path.iterdir()) == []


def test_flipped_byte_truncation_and_missing_sidecar_are_refused(tmp_path):
    path = save(tmp_path, 7)
    data = path.read_bytes()
    for damaged in (data[:-1], data[:100] + bytes([data[100] ^ 1]) + data[101:], b""):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="step-00000007.ckpt is damaged: sha256"):
            IO.load_checkpoint(path)
    path.write_bytes(data)
    check_checkpoint(path)
    sidecar(path).unlink()
    with pytest.raises(UserError, match="unfinished: step-00000007.ckpt.json is missing"):
        IO.load_checkpoint(path)
    with pytest.raises(UserError, match="does not exist"):
        check_checkpoint(tmp_path / "none.ckpt")


def test_hostile_pickle_is_refused_even_with_a_matching_hash(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    path = tmp_path / "step-00000001.ckpt"
    IO.save_checkpoint({"global_step": 1, "about": {"tokens_seen": 1}, "x": Evil()}, path)
    with pytest.raises(UserError, match="is no checkpoint of slm train"):
        IO.load_checkpoint(path)
    assert not (tmp_path / "owned").exists()


def test_newest_valid_of_both_kinds_is_found_and_the_rest_reported(tmp_path):
    warnings: list[str] = []
    assert newest_checkpoint(tmp_path, warnings.append) is None
    save(tmp_path, 5)
    best = save(tmp_path, 6, "best")
    newest = save(tmp_path, 10)
    assert newest_checkpoint(tmp_path, warnings.append) == newest
    newest.write_bytes(b"torn")
    assert newest_checkpoint(tmp_path, warnings.append) == best
    assert len(warnings) == 1 and "step-00000010.ckpt is damaged" in warnings[0]
    assert not newest.exists() and not sidecar(newest).exists()
    assert newest.with_name("step-00000010.ckpt.damaged").read_bytes() == b"torn"
    assert save(tmp_path, 10) == newest_checkpoint(tmp_path, print)
    assert not list(tmp_path.glob("*.damaged"))
    for path in tmp_path.glob("*.ckpt"):
        path.write_bytes(b"torn")
    assert newest_checkpoint(tmp_path, warnings.append) is None
    assert (
        len(warnings) == 5 and warnings[-1] == f"{tmp_path} holds no other checkpoint to go on from"
    )


def strategy_of(rank_zero_says: Any = None) -> Any:
    """What Checkpoints uses of a trainer; `rank_zero_says` is what every broadcast brings."""

    def write(path: Path) -> None:
        IO.save_checkpoint({"global_step": trainer.global_step, "about": {"tokens_seen": 1}}, path)

    def broadcast(mine: Any) -> Any:
        return mine if rank_zero_says is None else rank_zero_says

    strategy = SimpleNamespace(broadcast=broadcast, remove_checkpoint=IO.remove_checkpoint)
    trainer = SimpleNamespace(is_global_zero=True, save_checkpoint=write, strategy=strategy)
    return trainer


def test_pruning_counts_only_what_verifies(tmp_path):
    save(tmp_path, 2)
    unfinished, flipped = save(tmp_path, 7), save(tmp_path, 8)
    sidecar(unfinished).unlink()
    flipped.write_bytes(flipped.read_bytes()[:-1])
    trainer, checkpoints = strategy_of(), Checkpoints(str(tmp_path), None, 2, None)
    for step, kept in ((3, [2, 3]), (4, [3, 4])):
        trainer.global_step = step
        checkpoints.save(trainer)
        names = [path.name for path in sorted(tmp_path.glob("*.ckpt"))]
        assert names == [f"step-{number:08d}.ckpt" for number in kept]
    assert {path.name for path in tmp_path.glob("*.damaged")} == {
        "step-00000007.ckpt.damaged",
        "step-00000008.ckpt.damaged",
    }


def test_rank_zero_decides_whether_a_loss_is_the_best(tmp_path):
    """A rank that decides by its own float saves alone and waits for the others for ever."""
    trainer, checkpoints = strategy_of(rank_zero_says=2.0), Checkpoints(str(tmp_path), 1, 1, "a")
    trainer.global_step = 1
    checkpoints._save_best(trainer, {"a": 2.5})
    assert checkpoints.best_loss == 2.0
    trainer.global_step = 2
    checkpoints._save_best(trainer, {"a": 1.9})
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["best-00000001.ckpt"]


def test_a_failed_save_leaves_the_old_checkpoints_alone(tmp_path, monkeypatch):
    old = save(tmp_path, 5)

    def opened(path: Path, mode: str) -> Any:
        path.touch()
        return open("/dev/full", mode)

    body = {"global_step": 6, "about": {"tokens_seen": 6}, "w": torch.ones(50_000)}
    with monkeypatch.context() as patch, pytest.raises(UserError) as told:
        patch.setattr(files, "open", opened, raising=False)
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        IO.save_checkpoint(body, tmp_path / "step-00000006.ckpt")
    assert str(told.value) == (
        f"{tmp_path}/step-00000006.ckpt cannot be written: No space left on device; more than "
        "200,000 bytes are needed, the disk has 1,000 free"
    )
    assert newest_checkpoint(tmp_path, print) == old
    assert sorted(p.name for p in tmp_path.iterdir()) == [old.name, sidecar(old).name]


def test_nothing_is_saved_in_a_folder_that_is_another_s(tmp_path):
    kept, steps = save(tmp_path, 5), []
    with claim(tmp_path / "run.claim") as mine:
        assert mine is not None
        mine.path.unlink()
        with pytest.raises(ClaimLost):
            VerifiedCheckpointIO(mine).save_checkpoint({"global_step": 5}, kept)
    check_checkpoint(kept)
    owner: Any = SimpleNamespace(check=lambda: steps.append(1))
    only_writer = OnlyWriter(owner)
    trainer: Any = SimpleNamespace(accumulate_grad_batches=2)
    for batch in range(4):
        only_writer.on_train_batch_end(trainer, None, None, None, batch)  # type: ignore[arg-type]
    assert len(steps) == 2


def test_one_that_wakes_up_too_late_leaves_its_successor_s(tmp_path, monkeypatch):
    """Suspended as it wrote: the folder was taken, and the step saved by another meanwhile."""
    write, kept, run = torch.save, save(tmp_path, 5), tmp_path / "run"
    run.mkdir()
    with claim(run / "run.claim") as mine:
        assert mine is not None

        def late(checkpoint: Any, file: Any) -> None:
            monkeypatch.setattr(torch, "save", write)
            mine.path.unlink()
            for file_there in (kept, sidecar(kept)):
                shutil.copy(file_there, run)
            write(checkpoint, file)

        monkeypatch.setattr(torch, "save", late)
        with pytest.raises(ClaimLost):
            old = {"global_step": 5, "about": {"tokens_seen": 1}, "x": torch.zeros(9)}
            VerifiedCheckpointIO(mine).save_checkpoint(old, run / kept.name)
    assert "x" not in read_checkpoint(run / kept.name)
    assert sorted(p.name for p in run.iterdir()) == [kept.name, sidecar(kept).name]


def test_random_states_come_back_through_a_file(tmp_path):
    def draw() -> tuple:
        return random.random(), np.random.rand(), np.random.randn(), torch.rand(2).tolist()

    draw()
    np.random.randn()  # leaves a cached Gaussian behind
    path = tmp_path / "step-00000001.ckpt"
    IO.save_checkpoint(
        {"global_step": 1, "about": {"tokens_seen": 1}, **RandomStates().state_dict()}, path
    )
    expected = [draw() for _ in range(3)]
    set_random_state(IO.load_checkpoint(path)["ranks"][0])
    assert [draw() for _ in range(3)] == expected
    with_more = RandomStates(seed=3)
    with_more.load_state_dict(IO.load_checkpoint(path))

    def begun(rank: int, step: int) -> list[tuple]:
        trainer: Any = SimpleNamespace(
            global_rank=rank, world_size=4, strategy=None, global_step=step
        )
        with_more.on_train_start(trainer, None)  # type: ignore[arg-type]
        return [draw() for _ in range(3)]

    assert begun(0, 1) == expected  # a state for one rank was saved
    others = [begun(1, 1), begun(5, 1), begun(1, 2)]
    assert len({*map(str, others), str(expected)}) == 4
    assert others == [begun(1, 1), begun(5, 1), begun(1, 2)]
    assert random_state().keys() == {"python", "numpy", "torch", "cuda"}


@pytest.mark.parametrize("content", ["list", "text"])
def test_what_is_no_checkpoint_is_one_sentence(tmp_path, content):
    path = tmp_path / "step-00000001.ckpt"
    if content == "text":
        path.write_text("no checkpoint")
    else:
        torch.save([1], path)
    said = {"kind": "checkpoint", "sha256": hash_file(path), "step": 1, "tokens_seen": 1}
    write_record(sidecar(path), said)
    with pytest.raises(UserError, match=r"step-00000001\.ckpt (is no|holds a list, not a) checkpo"):
        read_checkpoint(path)
