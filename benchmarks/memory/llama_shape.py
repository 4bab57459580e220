"""Memory and time of training steps of a model of Llama-3.1-8B's shape, random weights and one batch of random tokens.

    python benchmarks/memory/llama_shape.py                                  FlashAdamW
    python benchmarks/memory/llama_shape.py --gradient-release
    python benchmarks/memory/llama_shape.py --gradient-release --offload --cap 24 --batch 4   states on the host
    python benchmarks/memory/llama_shape.py --optimizer torch-fused-bf16     torch's fused AdamW, all in bf16
    python benchmarks/memory/llama_shape.py --layers 8 --optimizer torch-fused
    python benchmarks/memory/llama_shape.py --device cpu --tiny              tries the script

Each is one process; on an H100 with 80 GB some 30 seconds are expected. Weights are made on the device in the dtype
that they have; every block is checkpointed, or every few (--checkpoint-blocks); the loss is computed for 256 tokens at
a time (chunked_cross_entropy in common.py), so that logits take 0.3 GB and not 2. torch-fused has fp32 weights under
autocast (16 bytes a parameter: not for 80 GB with all layers). report.py makes tables of the JSON files.
"""

import argparse
import contextlib
import json
import os
import tempfile
import time
from pathlib import Path

import torch
from common import (
    GIB,
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
from torch.utils.checkpoint import checkpoint

import flashoptim_native

NAME = "llama_shape"
FULL = {"layers": 32, "dim": 4096, "heads": 32, "kv_heads": 8, "ffn": 14336, "vocab": 128256, "tokens": 2048}
TINY = {"layers": 2, "dim": 64, "heads": 4, "kv_heads": 2, "ffn": 128, "vocab": 512, "tokens": 64}
ROPE_BASE = 500000.0
ADAMW = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
OPTIMIZERS = ("flash", "torch-fused", "torch-fused-bf16")


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of [batch, head, position, width], in fp32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, shape: dict) -> None:
        super().__init__()
        dim, width = shape["dim"], shape["dim"] // shape["heads"]
        self.width = width
        self.attention_norm = nn.RMSNorm(dim, eps=1e-5)
        self.query = nn.Linear(dim, shape["heads"] * width, bias=False)
        self.key = nn.Linear(dim, shape["kv_heads"] * width, bias=False)
        self.value = nn.Linear(dim, shape["kv_heads"] * width, bias=False)
        self.output = nn.Linear(shape["heads"] * width, dim, bias=False)
        self.ffn_norm = nn.RMSNorm(dim, eps=1e-5)
        self.gate = nn.Linear(dim, shape["ffn"], bias=False)
        self.up = nn.Linear(dim, shape["ffn"], bias=False)
        self.down = nn.Linear(shape["ffn"], dim, bias=False)

    def forward(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        y = self.attention_norm(x)
        query, key, value = (
            layer(y).unflatten(-1, (-1, self.width)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        x = x + self.output(y.transpose(1, 2).flatten(2))
        y = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """Decoder with grouped-query attention, SwiGLU and a head of its own."""

    def __init__(self, shape: dict) -> None:
        super().__init__()
        self.width = shape["dim"] // shape["heads"]
        self.embedding = nn.Embedding(shape["vocab"], shape["dim"])
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape["layers"]))
        self.norm = nn.RMSNorm(shape["dim"], eps=1e-5)
        self.head = nn.Linear(shape["dim"], shape["vocab"], bias=False)

    def loss(self, tokens: torch.Tensor, targets: torch.Tensor, chunk: int, checkpoint_blocks: int = 1) -> torch.Tensor:
        exponents = torch.arange(0, self.width, 2, device=tokens.device) / self.width
        angles = torch.outer(torch.arange(tokens.shape[1], device=tokens.device), ROPE_BASE**-exponents)
        cosine, sine = angles.cos(), angles.sin()
        x = self.embedding(tokens)
        for first in range(0, len(self.blocks), checkpoint_blocks):
            x = checkpoint(self.run_blocks, first, checkpoint_blocks, x, cosine, sine, use_reentrant=False)
        return chunked_cross_entropy(self.norm(x), self.head.weight, targets, chunk)

    def run_blocks(
        self, first: int, count: int, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
    ) -> torch.Tensor:
        for block in list(self.blocks)[first : first + count]:
            x = block(x, cosine, sine)
        return x


@torch.no_grad()
def make_model(shape: dict, device: torch.device, dtype: torch.dtype, seed: int) -> Llama:
    """Made without memory first, then given its final memory and random weights: never a copy in another dtype."""
    with torch.device("meta"):
        model = Llama(shape)
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for param in model.parameters():
        if param.ndim == 1:
            param.fill_(1.0)
        else:
            param.normal_(0.0, 0.02, generator=generator)
    return model


def make_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    if args.optimizer != "flash":
        return torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
    weights = {"master_weight_bits": None, "stochastic_rounding": True} if args.no_correction else {}
    if args.offload:
        weights |= {"offload": "states", "offload_buffer": int(args.offload_buffer * GIB)}
    if args.fp32_states:
        weights["quantize"] = False
    return flashoptim_native.FlashAdamW(model.parameters(), state_codec=args.state_codec, **weights, **ADAMW)


def variant_of(args: argparse.Namespace) -> str:
    name = args.optimizer
    if args.optimizer == "flash":
        name += "-paper" * (args.state_codec == "paper") + "-no-correction" * args.no_correction
        name += "-fp32-states" * args.fp32_states + "-offload" * args.offload
    clip = "" if args.clip is None else f"-clip-{args.clip}"
    return name + clip + "-release" * args.gradient_release


@torch.no_grad()
def checksum(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Of every byte of weights and states, wherever they are: runs with the same bits have the same."""
    total = 0
    for number, param in enumerate(model.parameters()):
        held = sorted(optimizer.state[param].items())
        for tensor in (param, *(value for _, value in held if isinstance(value, torch.Tensor))):
            raw = tensor.detach().reshape(-1).view(torch.uint8)
            for part in raw.split(1 << 24):
                part = part.to(param.device).long()
                factors = torch.arange(part.numel(), device=part.device) % 65521 + 1 + number
                total = (total * 31 + int((part * factors).sum())) % (1 << 61)
    return total


def compact_trace(profiler: torch.profiler.profile) -> list[list]:
    """What ran on the device: [stream, name, start, duration], in microseconds."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trace.json")
        profiler.export_chrome_trace(path)
        with open(path) as file:
            events = json.load(file)["traceEvents"]
    wanted = ("kernel", "gpu_memcpy", "gpu_memset")
    found = [
        [event["args"].get("stream"), event["name"][:60], event["ts"], event["dur"]]
        for event in events
        if event.get("cat") in wanted and event.get("dur", 0) > 20
    ]
    return sorted(found, key=lambda event: event[2])


def measure(args: argparse.Namespace, shape: dict, start: float) -> dict:
    device = torch.device(args.device)
    if args.cap is not None:
        share = args.cap * GIB / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(share, device.index or 0)
    if args.deterministic:
        torch.use_deterministic_algorithms(True)
    is_mixed = args.optimizer == "torch-fused"
    start_measuring(device)
    model = make_model(shape, device, torch.float32 if is_mixed else torch.bfloat16, args.seed)
    optimizer = make_optimizer(args, model)
    if args.gradient_release:
        max_norm = None if args.clip is None else 1.0
        flashoptim_native.enable_gradient_release(model, optimizer, clip=args.clip, max_norm=max_norm)
    count = sum(p.numel() for p in model.parameters())
    say(NAME, start, f"{variant_of(args)}: {count / 1e9:.3f} G parameters on {args.device}")

    data = torch.randint(
        shape["vocab"], (args.batch, shape["tokens"] + 1), generator=torch.Generator().manual_seed(args.seed)
    ).to(device)
    # Weights are used once a pass: copies that autocast would keep are of no use.
    autocast = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
    times, losses, gradients = StepTimes(device), [], 0
    activities = [torch.profiler.ProfilerActivity.CUDA]
    for step in range(args.steps):
        is_traced = args.trace is not None and step == args.steps - 1
        profiler = torch.profiler.profile(activities=activities) if is_traced else contextlib.nullcontext()
        profiler.__enter__()
        optimizer.zero_grad()
        marks = [times.clock.mark()]
        with autocast if is_mixed else contextlib.nullcontext():
            loss = model.loss(data[:, :-1], data[:, 1:], args.chunk, args.checkpoint_blocks)
        marks.append(times.clock.mark())
        loss.backward()
        marks.append(times.clock.mark())
        gradients = max(gradients, gradient_bytes(model))
        optimizer.step()
        marks.append(times.clock.mark())
        times.add(*marks)
        losses.append(loss.item())
        profiler.__exit__(None, None, None)
        if is_traced:
            args.trace.write_text(json.dumps(compact_trace(profiler)))
        say(NAME, start, f"step {step + 1} of {args.steps}: loss {losses[-1]:.4f}")
    extra = {}
    if args.offload:
        extra["host_gb"] = torch.ops.flashoptim.host_memory() / 1e9
    if args.checksum:
        peak = peak_memory(device)
        optimizer.synchronize()
        extra["checksum"] = checksum(model, optimizer)
        extra |= peak
    medians = times.medians()
    extra["tokens_per_s"] = args.batch * shape["tokens"] * 1e3 / medians["step_ms"]
    say(NAME, start, f"{extra['tokens_per_s']:,.0f} tokens/s; {extra}")
    return {
        **peak_memory(device),
        **extra,
        **held_bytes(model, optimizer, gradients),
        **medians,
        "loss": losses,
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="flash")
    parser.add_argument("--state-codec", choices=("default", "paper"), default="default")
    parser.add_argument("--gradient-release", action="store_true")
    parser.add_argument(
        "--no-correction", action="store_true", help="master_weight_bits=None, rounded without bias: bf16 weights alone"
    )
    parser.add_argument("--clip", choices=("exact", "previous", "parameter"), help="of released gradients")
    parser.add_argument("--offload", action="store_true", help="states on the host (docs/offload.md)")
    parser.add_argument("--offload-buffer", type=float, default=1.0, help="GiB that they stream through (default: 1)")
    parser.add_argument("--fp32-states", action="store_true", help="quantize=False: 9 bytes a parameter for states")
    parser.add_argument("--cap", type=float, help="GiB of the device that the process may take")
    parser.add_argument("--deterministic", action="store_true", help="torch.use_deterministic_algorithms")
    parser.add_argument("--checksum", action="store_true", help="of weights and states at the end")
    parser.add_argument("--trace", type=Path, help="file for what ran on the device in the last step")
    parser.add_argument("--layers", type=int, help="fewer blocks than the 32")
    parser.add_argument("--tokens", type=int, help="length of a sequence (default: 2048)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=256, help="tokens whose logits exist at a time")
    parser.add_argument(
        "--checkpoint-blocks",
        type=int,
        default=1,
        help="blocks that share a checkpoint: fewer inputs are kept, more is computed anew at a time (default: 1)",
    )
    parser.add_argument("--steps", type=int, default=12, help="the first two are for warming up (default: 12)")
    add_options(parser)
    args = parser.parse_args(arguments)
    ours = args.gradient_release or args.no_correction or args.offload or args.fp32_states or args.checksum
    if args.optimizer != "flash" and (ours or args.state_codec != "default"):
        parser.error("options of states and --gradient-release go with --optimizer flash")
    if min(args.steps, args.checkpoint_blocks) < 1 or (args.layers is not None and args.layers < 1):
        parser.error("--steps, --checkpoint-blocks and --layers are 1 or more")
    return args


def main(arguments: list[str] | None = None) -> dict:
    args = parse(arguments)
    start = time.monotonic()
    shape = dict(TINY if args.tiny else FULL)
    default_layers = shape["layers"]
    for name in ("layers", "tokens"):
        if getattr(args, name) is not None:
            shape[name] = getattr(args, name)
    config = {
        **shape,
        "full_depth": shape["layers"] == default_layers,
        "batch": args.batch,
        "chunk": args.chunk,
        "checkpoint_blocks": args.checkpoint_blocks,
        "steps": args.steps,
        "seed": args.seed,
        "adamw": ADAMW,
    }
    try:
        results = measure(args, shape, start)
    except torch.OutOfMemoryError as error:
        say(NAME, start, f"{variant_of(args)} does not fit: {str(error).splitlines()[0]}")
        results = None
    if results is not None:
        say(
            NAME,
            start,
            f"peak {results['peak_gib']:.2f} GiB ({results['peak_gib'] * GIB / results['parameters']:.3f} bytes a "
            f"parameter; weights, states and gradients {results['bytes_per_parameter']:.3f}), optimizer.step() "
            f"{results['optimizer_ms']:.2f} ms, whole step {results['step_ms']:.1f} ms",
        )
    return write_run(args, NAME, variant_of(args), config, results)


if __name__ == "__main__":
    main()
