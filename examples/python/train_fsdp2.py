"""Trains a small GPT on English text over several processes: FSDP2, checkpoints, resumed on any number of processes.

    torchrun --nproc-per-node 2 examples/python/train_fsdp2.py              gloo processes, or nccl where there are GPUs
    torchrun --nproc-per-node 2 examples/python/train_fsdp2.py --kill-at 25 the last process dies; a checkpoint stays
    torchrun --nproc-per-node 3 examples/python/train_fsdp2.py              goes on from it, on another number

The last line has a checksum of the weights: of the same number of processes it is the same, stopped or not. (Another
number adds gradients up in another order.)
"""

import argparse
import hashlib
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from flashoptim_native import FlashAdamW, cast_model, enable_gradient_release

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train_gpt"))
from topics_text import joined_topics

#: width, layers, heads, length of a sequence
SHAPES = {"tiny": (64, 2, 4, 48), "gpt2": (768, 12, 12, 1024)}


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for t in self.qkv(self.before_attention(x)).chunk(3, -1))  # fmt: skip
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.before_mlp(x))


class GPT(nn.Module):
    def __init__(self, vocabulary, width, layers, heads, length):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("fsdp2_out"), help="where checkpoints go; resumed from there")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--batch", type=int, default=12, help="sequences of a step, of all processes together")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--release", action="store_true", help="step every parameter as its gradient is reduced")
    parser.add_argument("--fresh", action="store_true", help="begin anew")
    parser.add_argument("--kill-at", type=int, help="the step at which the last process is killed")
    return parser.parse_args()


def set_up():
    """The device and the process group; without torchrun, one process."""
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        store = f"file://{tempfile.mkdtemp()}/store"
    else:
        store = None
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(1)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=world)
    return device, rank, world


def checkpoints(out):
    """Complete ones by step: DCP writes .metadata last."""
    return sorted(path.parent for path in out.glob("step_*/.metadata"))


def save(args, rank, step, model, optimizer):
    folder = args.out / f"step_{step:06d}"
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": states, "step": step}, checkpoint_id=folder)
    if rank == 0:  # the last two stay
        for old in checkpoints(args.out)[:-2]:
            shutil.rmtree(old)


def load(folder, model, optimizer):
    weights, states = get_state_dict(model, optimizer)
    held = {"model": weights, "optimizer": states, "step": 0}
    dcp.load(held, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"])
    return held["step"]


def batch_of(text, step, args, rank, world, length):
    """This process's part of a step's batch, which is the same on any number of processes."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(0, len(text) - length - 1, (args.batch,), generator=generator)[rank::world]
    ids = torch.stack([text[start : start + length + 1] for start in starts.tolist()])
    return ids[:, :-1], ids[:, 1:]


def main():
    args = options()
    device, rank, world = set_up()
    if args.batch % world:
        sys.exit(f"--batch {args.batch} is not divided by {world} processes")
    if args.fresh and rank == 0:
        shutil.rmtree(args.out, ignore_errors=True)
    dist.barrier()
    characters = joined_topics()
    alphabet = sorted(set(characters))
    text = torch.tensor([alphabet.index(c) for c in characters[:100_000]])
    width, layers, heads, length = SHAPES[args.shape]

    torch.manual_seed(0)
    model = cast_model(GPT(len(alphabet), width, layers, heads, length), torch.bfloat16).to(device)
    mesh = init_device_mesh(device.type, (world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = FlashAdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    if args.release:
        enable_gradient_release(model, optimizer)
    found = checkpoints(args.out)
    first = load(found[-1], model, optimizer) if found else 0
    if rank == 0:
        print(f"{world} processes on {device.type}, from step {first}", flush=True)

    begin = time.perf_counter()
    for step in range(first, args.steps):
        if step == args.kill_at and rank == world - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        x, y = (ids.to(device) for ids in batch_of(text, step, args, rank, world, length))
        loss = cross_entropy(model(x).float().flatten(0, 1), y.flatten())
        loss.backward()
        if not args.release:
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(args, rank, step + 1, model, optimizer)
            dist.all_reduce(loss.detach_(), dist.ReduceOp.SUM)
            if rank == 0:
                each = 1000 * (time.perf_counter() - begin) / (step + 1 - first)
                print(f"step {step + 1}: loss {float(loss) / world:.4f}, {each:.0f} ms a step, saved", flush=True)

    whole = optimizer.get_fp32_model_state_dict(model, full_state_dict=True)
    if rank == 0:
        digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in whole.values())).hexdigest()
        print(f"weights after step {args.steps}: {digest[:16]}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
