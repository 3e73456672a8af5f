"""Checkpoints in shards: what one process would have written, for any number of ranks."""

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_flatten_with_path, tree_leaves

import warm
from sharded_helpers import KEPT, TRAIN, cut, in_one, on_ranks, refused, same, words
from slm.errors import UserError
from slm.store.files import remove
from slm.train.checkpoint import read_checkpoint, remove_checkpoint
from slm.train.consolidate import consolidate_checkpoint
from slm.verify import verify
from train_helpers import TWO_RANKS, same_results


@pytest.fixture(scope="module")
def finished(tmp_path_factory, made_corpus) -> Path:
    folder = tmp_path_factory.mktemp("sharded") / "whole"
    on_ranks(2, words(folder, made_corpus, *KEPT))
    return folder


@pytest.fixture
def sharded(tmp_path, finished) -> Path:
    """A finished run on two ranks, a test's own copy."""
    return shutil.copytree(finished, tmp_path / "whole")


def test_a_run_in_shards_goes_on_bit_for_bit(tmp_path, text_corpus, sharded):
    again = cut(sharded, tmp_path / "again")
    assert "continuing" in on_ranks(2, words(again, text_corpus, *KEPT))
    same_results(sharded, again)


@pytest.mark.slow
def test_written_beside_the_training_they_are_the_same(tmp_path, text_corpus, sharded):
    more = ("trainer.strategy.async_checkpoints=true", "callbacks.checkpoints.best_of=held")
    on_ranks(2, words(tmp_path / "run", text_corpus, *KEPT, *more))
    same_results(sharded, tmp_path / "run")
    found = list(verify(tmp_path / "run" / "checkpoints"))
    assert [good for _, good, _ in found] == [True] * 5
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    for path, _, _ in found[1:]:
        one, other = path / "__1_0.distcp", sharded / "checkpoints" / path.name / "__1_0.distcp"
        assert one.read_bytes() == other.read_bytes()
    again = cut(tmp_path / "run", tmp_path / "again")
    on_ranks(2, words(again, text_corpus, *KEPT))
    same_results(sharded, again)


@pytest.mark.slow
def test_a_run_goes_on_with_other_ranks_and_strategies(tmp_path, text_corpus, sharded):
    """From two ranks in shards to four, to one, to DDP; from one process to two ranks in shards."""
    on_ranks(4, words(cut(sharded, tmp_path / "four"), text_corpus, *KEPT))
    same(sharded, tmp_path / "four")
    in_one(words(cut(sharded, tmp_path / "one"), text_corpus, *KEPT))
    same(sharded, tmp_path / "one")
    line = words(cut(sharded, tmp_path / "ddp"), text_corpus, *KEPT)
    codes, said = warm.run_ranks(2, [*TRAIN, *line, *TWO_RANKS])
    assert codes == [0, 0], said
    same(sharded, tmp_path / "ddp")
    in_one(words(tmp_path / "plain", text_corpus, *KEPT))
    on_ranks(2, words(cut(tmp_path / "plain", tmp_path / "back"), text_corpus, *KEPT))
    same(tmp_path / "plain", tmp_path / "back")
    kinds = {
        path.name: path.is_dir() for path in (tmp_path / "back" / "checkpoints").glob("*.ckpt")
    }
    assert kinds == {f"step-{n:08d}.ckpt": n > 2 for n in (0, 2, 4, 6)}


@pytest.mark.slow
def test_a_folder_of_shards_is_the_checkpoint_of_one_process(tmp_path, text_corpus, sharded):
    in_one(words(tmp_path / "one", text_corpus, *KEPT))
    name = "checkpoints/step-00000006.ckpt"
    found, expected = read_checkpoint(sharded / name), read_checkpoint(tmp_path / "one" / name)
    assert found.keys() == expected.keys()
    tied = [f"lm.model.{part}.weight" for part in ("lm_head", "model.embed_tokens")]
    assert found["state_dict"][tied[0]] is found["state_dict"][tied[1]]
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        pairs = zip(*(tree_flatten_with_path(c[part])[0] for c in (found, expected)), strict=True)
        for (where, value), (there, wanted) in pairs:
            assert where == there and type(value) is type(wanted)
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-7)
    folder = sharded / name
    assert {path.name for path in folder.iterdir()} == {
        *("__0_0.distcp", "__1_0.distcp", "index.json", "rest.pt")
    }
    # A rank has its half, and tied weights are there once.
    index = json.loads((folder / "index.json").read_text())
    numbers = Counter[str]()
    for tensor in index.values():
        for piece in tensor["pieces"]:
            numbers[piece["file"]] += math.prod(piece["size"])
    leaves = [*expected["state_dict"].values(), *tree_leaves(expected["optimizer_states"])]
    once = {
        leaf.data_ptr(): leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim
    }
    assert numbers.total() == sum(leaf.numel() for leaf in once.values())
    assert max(numbers.values()) < 0.6 * numbers.total()


@pytest.mark.slow
def test_what_is_wrong_with_a_folder_of_shards_is_one_sentence(tmp_path, text_corpus, sharded):
    name = "checkpoints/step-00000006.ckpt"
    assert list(verify(sharded / "checkpoints"))[-1][1:] == (True, "checkpoint, 4 files")
    (sharded / name / "__1_0.distcp").unlink()
    with pytest.raises(UserError, match=r"__1_0\.distcp is missing"):
        read_checkpoint(sharded / name)
    assert [good for _, good, _ in verify(sharded / "checkpoints")] == [True, True, True, False]
    run = cut(sharded, tmp_path / "again", step=6)
    said = on_ranks(2, words(run, text_corpus, *KEPT))
    assert said.count("__1_0.distcp is missing; it is step-00000006.ckpt.damaged now") == 1
    assert [good for _, good, _ in verify(run / "checkpoints")] == [True] * 4
    assert not list((run / "checkpoints").glob("*.damaged"))
    # Of another model, as whoever moves folders about may have it.
    other = cut(sharded, tmp_path / "other", step=4)
    on_ranks(2, words(tmp_path / "wide", text_corpus, *KEPT, "model.architecture.hidden_size=32"))
    for path in (tmp_path / "wide" / "checkpoints").glob("step-00000004.ckpt*"):
        mine = other / "checkpoints" / path.name
        remove(mine)
        path.rename(mine)
    assert "step-00000004.ckpt is of another model: " in refused(
        2, words(other, text_corpus, *KEPT)
    )


@pytest.mark.slow
def test_shards_become_one_file_that_a_run_goes_on_from(tmp_path, text_corpus, sharded):
    run = cut(sharded, tmp_path / "one", step=4)
    source = run / "checkpoints" / "step-00000004.ckpt"
    out = consolidate_checkpoint(source, tmp_path / "made" / source.name)
    assert list(verify(out)) == [(out, True, "checkpoint")]
    one, other = (tree_flatten_with_path(read_checkpoint(path))[0] for path in (source, out))
    for (place, value), (same_place, same_value) in zip(one, other, strict=True):
        assert place == same_place
        assert torch.equal(value, same_value) if torch.is_tensor(value) else value == same_value
    with pytest.raises(UserError, match=r"made/step-00000004\.ckpt exists"):
        consolidate_checkpoint(source, out)
    with pytest.raises(UserError, match="is one file already"):
        consolidate_checkpoint(out, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="out=.*x must end in"):
        consolidate_checkpoint(source, tmp_path / "x")
    remove_checkpoint(source)
    for path in out.parent.iterdir():
        path.rename(source.parent / path.name)
    in_one(words(run, text_corpus, *KEPT))
    same(sharded, run)
