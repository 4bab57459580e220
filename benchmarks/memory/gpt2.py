"""Trains a model of GPT-2 124M's shape on the demo's text: FlashAdamW in bf16, with and without gradient release,
beside torch's fused AdamW with fp32 weights under bf16 autocast. Same initial weights (those that bf16 holds), same
batches.

    python benchmarks/memory/gpt2.py                       all three: some 90 seconds expected on an H100
    python benchmarks/memory/gpt2.py --variants flash --steps 50
    python benchmarks/memory/gpt2.py --device cpu --tiny   tries the script

Tokens are the text's bytes; the vocabulary keeps its 50,304 rows, so that the shape is GPT-2's. Losses are nats per
byte, not to be compared with other tokenizers'. No variant clips gradients, which gradient release could not do by
their global norm.
"""

import argparse
import contextlib
import math
import sys
import time

import torch
from common import (
    ROOT,
    StepTimes,
    add_options,
    chunked_cross_entropy,
    gradient_bytes,
    held_bytes,
    peak_memory,
    say,
    start_measuring,
    write_run,
)
from torch import nn
from torch.nn import functional as F

import flashoptim_native

sys.path.insert(0, str(ROOT / "examples" / "train_gpt"))
from topics_text import joined_topics

NAME = "gpt2"
FULL = {"layers": 12, "dim": 768, "heads": 12, "vocab": 50304, "context": 1024, "batch": 16, "steps": 300}
TINY = {"layers": 2, "dim": 64, "heads": 4, "vocab": 256, "context": 64, "batch": 8, "steps": 40}
VARIANTS = ("torch-fused", "flash", "flash-release")
ADAMW = {"betas": (0.9, 0.95), "weight_decay": 0.1}
LR, LR_SHARE_AT_END, WARM_UP_SHARE = 6e-4, 0.1, 0.05
HELD_OUT = 0.1  # of the text, at its end
EVALUATIONS = 5


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)
        self.mlp_norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, 4 * dim)
        self.contract = nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(y.transpose(1, 2).flatten(2))
        return x + self.contract(F.gelu(self.expand(self.mlp_norm(x)), approximate="tanh"))


class Gpt2(nn.Module):
    """The head is the embedding."""

    def __init__(self, shape: dict) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape["vocab"], shape["dim"])
        self.positions = nn.Embedding(shape["context"], shape["dim"])
        self.blocks = nn.Sequential(*(Block(shape["dim"], shape["heads"]) for _ in range(shape["layers"])))
        self.norm = nn.LayerNorm(shape["dim"])
        for name, param in self.named_parameters():
            if param.ndim == 2:
                share = math.sqrt(2 * shape["layers"]) if name.endswith(("project.weight", "contract.weight")) else 1.0
                nn.init.normal_(param, std=0.02 / share)
            elif name.endswith("bias"):
                nn.init.zeros_(param)

    def loss(self, data: torch.Tensor) -> torch.Tensor:
        inputs, targets = data[:, :-1], data[:, 1:]
        x = self.tokens(inputs) + self.positions.weight[: inputs.shape[1]]
        return chunked_cross_entropy(self.norm(self.blocks(x)), self.tokens.weight, targets, 2048)


class Text:
    """The demo's text as bytes, and the batches of every step, which depend on the seed alone."""

    def __init__(self, shape: dict, seed: int, device: torch.device) -> None:
        whole = torch.frombuffer(bytearray(joined_topics().encode()), dtype=torch.uint8)
        split = int((1 - HELD_OUT) * len(whole))
        self.train, self.held_out = whole[:split], whole[split:]
        self.context, self.batch, self.seed, self.device = shape["context"], shape["batch"], seed, device

    def training(self, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + step)
        starts = torch.randint(len(self.train) - self.context, (self.batch, 1), generator=generator)
        return self.train[starts + torch.arange(self.context + 1)].long().to(self.device, non_blocking=True)

    def evaluation(self) -> list[torch.Tensor]:
        """All held-out text, in windows that overlap by one byte."""
        windows = self.held_out.unfold(0, self.context + 1, self.context).long()
        return [part.to(self.device) for part in windows.split(self.batch)]


def lr_share(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine."""
    warm_up = max(1, round(WARM_UP_SHARE * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return LR_SHARE_AT_END + (1 - LR_SHARE_AT_END) * 0.5 * (1 + math.cos(math.pi * progress))


def decay_groups(model: nn.Module) -> list[dict]:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices}, {"params": others, "weight_decay": 0.0}]


def make_training(args: argparse.Namespace, variant: str, shape: dict, device: torch.device):
    torch.manual_seed(args.seed)
    model = Gpt2(shape).to(torch.bfloat16)
    if variant == "torch-fused":
        model = model.to(device, torch.float32)
        return model, torch.optim.AdamW(decay_groups(model), lr=LR, fused=True, **ADAMW)
    model = model.to(device)
    optimizer = flashoptim_native.FlashAdamW(decay_groups(model), lr=LR, **ADAMW)
    if variant == "flash-release":
        flashoptim_native.enable_gradient_release(model, optimizer)
    return model, optimizer


def measure(args: argparse.Namespace, variant: str, shape: dict, start: float) -> dict:
    device, steps = torch.device(args.device), shape["steps"]
    start_measuring(device)
    model, optimizer = make_training(args, variant, shape, device)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_share(step, steps))
    text = Text(shape, args.seed, device)
    count = sum(p.numel() for p in model.parameters())
    say(NAME, start, f"{variant}: {count / 1e6:.1f} M parameters, {len(text.train):,} bytes of text to learn from")

    def autocast():
        is_mixed = variant == "torch-fused"
        return torch.autocast(device.type, torch.bfloat16) if is_mixed else contextlib.nullcontext()

    @torch.no_grad()
    def held_out_loss() -> float:
        parts = text.evaluation()
        with autocast():
            losses = [model.loss(part).item() for part in parts]
        return sum(loss * len(part) for loss, part in zip(losses, parts)) / sum(map(len, parts))

    times, losses, curve, gradients, training_s = StepTimes(device), [], [], 0, 0.0
    began = time.monotonic()
    for step in range(steps):
        data = text.training(step)
        optimizer.zero_grad()
        marks = [times.clock.mark()]
        with autocast():
            loss = model.loss(data)
        marks.append(times.clock.mark())
        loss.backward()
        marks.append(times.clock.mark())
        if step == 0:
            gradients = gradient_bytes(model)
        optimizer.step()
        marks.append(times.clock.mark())
        scheduler.step()
        times.add(*marks)
        losses.append(loss.detach())
        if (step + 1) % max(1, steps // EVALUATIONS) == 0 or step + 1 == steps:
            train_loss = torch.stack(losses[-10:]).mean().item()
            training_s += time.monotonic() - began
            curve.append({"step": step + 1, "train_loss": train_loss, "val_loss": held_out_loss()})
            say(
                NAME,
                start,
                f"{variant}: step {step + 1} of {steps}, loss {train_loss:.4f}, held out {curve[-1]['val_loss']:.4f}",
            )
            began = time.monotonic()
    return {
        **peak_memory(device),
        **held_bytes(model, optimizer, gradients),
        **times.medians(),
        "tokens_per_s": steps * shape["batch"] * shape["context"] / training_s,
        "loss": [round(value, 5) for value in torch.stack(losses).tolist()],
        "curve": curve,
        "train_loss": curve[-1]["train_loss"],
        "val_loss": curve[-1]["val_loss"],
        "best_val_loss": min(point["val_loss"] for point in curve),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    for name in ("layers", "context", "batch", "steps"):
        parser.add_argument(f"--{name}", type=int, help=f"(default: {FULL[name]}, with --tiny {TINY[name]})")
    add_options(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[dict]:
    args = parse(arguments)
    start = time.monotonic()
    shape = dict(TINY if args.tiny else FULL)
    default_layers = shape["layers"]
    shape |= {
        name: value for name in ("layers", "context", "batch", "steps") if (value := getattr(args, name)) is not None
    }
    config = {
        **shape,
        "full_depth": shape["layers"] == default_layers,
        "seed": args.seed,
        "adamw": ADAMW,
        "lr": LR,
    }
    runs = []
    for variant in args.variants:
        try:
            results = measure(args, variant, shape, start)
        except torch.OutOfMemoryError as error:
            say(NAME, start, f"{variant} does not fit: {str(error).splitlines()[0]}")
            results = None
        runs.append(write_run(args, NAME, variant, config, results))
    import report

    print("\n".join(["", *report.table(runs)]), flush=True)
    return runs


if __name__ == "__main__":
    main()
