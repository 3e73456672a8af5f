"""What `trainer=fsdp` takes and saves, on CPUs with gloo: rows in results/sharded.csv.

    python experiments/benchmarks/sharded.py            80 million parameters, two minutes
    python experiments/benchmarks/sharded.py --small    toy sizes, for the test suite

memory   bytes of parameters, gradients and AdamW's states that a rank holds after a step
save     a checkpoint in shards by two ranks, beside one file by rank 0 while the other waits, as
         under DDP: written, synced, hashed, renamed, in turn
weights  bytes that four ranks read from the disk, beside the file's, as each takes its rows of a
         model; the page cache has forgotten the file before (Linux, a folder on a disk)
heldout  held-out windows shared out over ranks, each with a whole model; ranks beyond the machine's
         cores take turns
"""

import argparse
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bind import write_corpus  # type: ignore
from pipeline import Rows, in_turn, ratios  # type: ignore
from torch.distributed.device_mesh import init_device_mesh

from slm.evaluate.command import window_losses
from slm.model.architecture import new_model
from slm.model.build import SelectiveLM
from slm.model.sharded import (
    Cut,
    deal_out,
    fill_from,
    local,
    shard,
    weights_in,
    without_weights,
)
from slm.store.claims import Unclaimed
from slm.store.shards import Corpus
from slm.train.checkpoint import VerifiedCheckpointIO
from slm.train.sharded import Saving, at_once, begin_saving, end_saving
from slm.train.sharded_checkpoint import own_hashes, write_shards

RESULTS = Path(__file__).parent / "results" / "sharded.csv"
VOCAB, WINDOWS = 32000, 8
SIZES = {"hidden_size": 640, "intermediate_size": 1760, "num_hidden_layers": 12}
NARROW = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2}
TOY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
HEADS = {"model_type": "llama", "num_attention_heads": 4, "tie_word_embeddings": True}


def make_lm(sizes: dict[str, int], vocab: int) -> SelectiveLM:
    torch.manual_seed(0)
    return SelectiveLM(new_model(HEADS | sizes, vocab, None)).train()


def trained(lm: SelectiveLM, vocab: int) -> torch.optim.Optimizer:
    """After one step, which makes all that an optimizer keeps."""
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-4)
    ids = torch.arange(16)[None] % vocab
    lm({"input_ids": ids, "targets": ids}, torch.ones(1, 16)).loss.backward()
    optimizer.step()
    return optimizer


def held_bytes(lm: SelectiveLM, optimizer: torch.optim.Optimizer) -> int:
    states = [v for state in optimizer.state.values() for v in state.values()]
    gradients = [p.grad for p in lm.parameters() if p.grad is not None]
    return sum(local(value).nbytes for value in (*lm.parameters(), *gradients, *states))


def checkpoint_of(lm: SelectiveLM, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state = {"state_dict": lm.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    return state | {"global_step": 1, "about": {"tokens_seen": 1}}


# ---- what a rank does ----------------------------------------------------------------------------


def memory_and_save(
    rank: int, ranks: int, folder: Path, sizes: dict[str, int], vocab: int, repeats: int
) -> dict[str, Any]:
    plain = make_lm(sizes, vocab)
    optimizer = trained(plain, vocab)
    held, whole = held_bytes(plain, optimizer), checkpoint_of(plain, optimizer)
    with without_weights():
        lm = make_lm(sizes, vocab)
    shard(lm, lm.model, Cut(init_device_mesh("cpu", (ranks,))))
    deal_out(lm, make_lm(sizes, vocab) if rank == 0 else None)
    mine = trained(lm, vocab)
    content = checkpoint_of(lm, mine)
    ties = {"model.lm_head.weight": "model.model.embed_tokens.weight"}

    def one_file() -> None:
        dist.barrier()
        if rank == 0:
            VerifiedCheckpointIO(Unclaimed()).save_checkpoint(whole, folder / "step-00000001.ckpt")
        dist.barrier()

    def in_shards() -> None:
        dist.barrier()
        path = folder / "step-00000002.ckpt"
        new = begin_saving(path, Unclaimed())

        def write() -> dict[str, str]:
            write_shards(new, content, ties)
            return own_hashes(new)

        end_saving(Saving(path, new, content, Unclaimed(), at_once(write)))
        dist.barrier()

    in_turn(1, one_file=one_file, in_shards=in_shards)  # memory that nothing has used yet is slow
    seconds = in_turn(repeats, before=os.sync, one_file=one_file, in_shards=in_shards)
    parameters = sum(p.numel() for p in plain.parameters())
    return seconds | {"memory": held_bytes(lm, mine) / held, "parameters": parameters}


def weights_read(
    rank: int, ranks: int, folder: Path, sizes: dict[str, int], vocab: int
) -> dict[str, Any]:
    weights = folder / "weights" / "model.safetensors"
    if rank == 0:
        make_lm(sizes, vocab).model.save_pretrained(weights.parent)
        with open(weights, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    dist.barrier()
    with without_weights():
        lm = make_lm(sizes, vocab)
    shard(lm, lm.model, Cut(init_device_mesh("cpu", (ranks,))))
    before = bytes_from_disk()
    fill_from(weights_in(weights.parent, lm) or {}, lm)
    read = torch.tensor([bytes_from_disk() - before])
    dist.all_reduce(read)
    return {"share": read.item() / weights.stat().st_size}


def bytes_from_disk() -> int:
    """That this process has had read so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def heldout(
    rank: int, ranks: int, folder: Path, sizes: dict[str, int], vocab: int, repeats: int
) -> dict[str, Any]:
    lm, corpus = make_lm(sizes, vocab), Corpus.open(folder / "corpus")

    def evaluate() -> None:
        dist.barrier()
        window_losses(lm, corpus, 1, WINDOWS, rank=rank, ranks=ranks)
        dist.barrier()

    evaluate()
    return in_turn(repeats, evaluate=evaluate)


def on_ranks(ranks: int, work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What `work` gives on rank 0; the processes are forked."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=rank, world_size=ranks)
        found = work(rank, ranks, *arguments)
        if rank == 0:
            queue.put(found)
        dist.destroy_process_group()

    processes = [context.Process(target=run, args=(rank,)) for rank in range(ranks)]
    for process in processes:
        process.start()
    found = queue.get(timeout=600)
    for process in processes:
        process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="toy sizes; numbers mean nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV that the rows are added to")
    arguments = parser.parse_args()
    sizes, vocab, repeats = (TOY, 300, 1) if arguments.small else (SIZES, VOCAB, 9)
    rows = Rows()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        found = on_ranks(2, memory_and_save, folder, sizes, vocab, repeats)
        held = "parameters, gradients, AdamW of a rank, 2 ranks / one process"
        rows.add("memory", held, "1", [found["memory"]], "<= 0.55")
        size = f"{found['parameters'] / 1e6:.0f}M parameters" if not arguments.small else "toy"
        rows.add("save", f"one file by one of 2 ranks, {size}", "s", found["one_file"], "")
        rows.add("save", f"in shards by 2 ranks, {size}", "s", found["in_shards"], "")
        against = ratios(found["in_shards"], found["one_file"])
        rows.add("save", f"in shards / one file, 2 ranks, {size}", "1", against, "<= 0.6")
        read = on_ranks(4, weights_read, folder, sizes, vocab)["share"]
        rows.add("weights", "read from the disk by 4 ranks / the file", "1", [read], "<= 1.05")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_corpus(folder / "corpus", 100_000 if arguments.small else 2_000_000, 1000)
        model = (TOY if arguments.small else NARROW, VOCAB, repeats)
        times = {n: on_ranks(n, heldout, folder, *model)["evaluate"] for n in (1, 2, 4)}
        for ranks, target in ((2, ""), (4, "<= 0.35 on 4 cores")):
            case = f"held-out windows, {ranks} ranks / one"
            rows.add("heldout", case, "1", ratios(times[ranks], times[1]), target)
    rows.write(arguments.out)


if __name__ == "__main__":
    main()
