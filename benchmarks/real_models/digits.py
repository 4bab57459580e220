"""A small residual network on scikit-learn's digits: torch's fp32 optimizers beside flashoptim's on a bf16 model.

    PYTHONPATH=python FLASHOPTIM_OPS_LIBRARY=build/dev/libtorch/ops/libflashoptim_ops.so \\
        python benchmarks/real_models/digits.py --seeds 10 --jobs 2

1,797 pictures of 8 x 8, a third of them held out, the same ones in every run. The seed decides initial weights, the
order of the pictures and their shifts. Finished runs are not run again. report.py makes tables and pictures.
"""

import argparse
import functools
import importlib.metadata
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import runs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flashoptim_native

BATCH = 64
WARMUP = 0.05  # share of the steps
SPLIT_SEED = 0
# Found with the fp32 optimizers. Decay is for matrices.
HYPERPARAMETERS = {
    "sgd": {"lr": 0.05, "weight_decay": 5e-4, "momentum": 0.9},
    "lion": {"lr": 5e-4, "weight_decay": 0.1, "betas": (0.9, 0.99)},
    "adamw": {"lr": 3e-3, "weight_decay": 0.05, "betas": (0.9, 0.999)},
}
# None: torch, everything in fp32. The others: arguments of the flash optimizers, over bf16 parameters.
VARIANTS = {
    "fp32": None,
    "paper": {"state_codec": "paper"},
    "default": {"state_codec": "default"},
    # What bf16 arithmetic changes without the codecs' part in it.
    "fp32-states": {"quantize": False},
}


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al. 2023) in the parameters' own precision, which torch lacks."""

    def __init__(self, params, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(torch.sign(beta1 * m + (1 - beta1) * p.grad), alpha=group["lr"])
                m.mul_(beta2).add_(p.grad, alpha=1 - beta2)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.skip = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        change = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(self.skip(x) + change)


class ResNet(nn.Module):
    """0.11 M parameters, 95 % of them in tensors of 4,096 or more, whose states are quantized by default."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.blocks = nn.Sequential(Block(24, 24, 1), Block(24, 48, 2), Block(48, 64, 2))
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = images.unsqueeze(1).to(self.stem.weight.dtype)
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3))).float()


@functools.cache
def load(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images.astype("float32") - 5.0) / 6.0  # about mean 0, deviation 1
    parts = train_test_split(images, digits.target, test_size=1 / 3, random_state=SPLIT_SEED, stratify=digits.target)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part).to(device) for part in parts)
    return train_x, train_y, test_x, test_y


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to one pixel, so that 1,198 images are not learnt by heart."""
    background = images.min().item()
    padded = F.pad(images, (1, 1, 1, 1), value=background)
    offsets = torch.randint(3, (2, len(images), 1), generator=generator).to(images.device)
    span = torch.arange(8, device=images.device)
    rows, columns = (offset + span for offset in offsets)
    return padded[torch.arange(len(images), device=images.device)[:, None, None], rows[:, :, None], columns[:, None, :]]


def make_model(seed: int, variant: str, device: str) -> ResNet:
    torch.manual_seed(seed)
    model = ResNet().to(device)
    if VARIANTS[variant] is None:
        return model
    return flashoptim_native.cast_model(model, torch.bfloat16)  # batch norms stay in fp32


def make_optimizer(model: nn.Module, optimizer: str, variant: str, seed: int, min_quantized_numel: int):
    options = dict(HYPERPARAMETERS[optimizer])
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": options.pop("weight_decay")},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if VARIANTS[variant] is None:
        return {"sgd": torch.optim.SGD, "lion": Lion, "adamw": torch.optim.AdamW}[optimizer](groups, **options)
    flash = {
        "sgd": flashoptim_native.FlashSGD,
        "lion": flashoptim_native.FlashLion,
        "adamw": flashoptim_native.FlashAdamW,
    }[optimizer]
    return flash(groups, **options, **VARIANTS[variant], seed=seed, min_quantized_numel=min_quantized_numel)


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy."""
    model.eval()
    logits = model(images)
    model.train()
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()


def train(
    optimizer: str, variant: str, seed: int, epochs: int, device: str = "cpu", min_quantized_numel: int = 4096
) -> dict:
    """One run: its final results and its curve, an entry an epoch."""
    train_x, train_y, test_x, test_y = load(device)
    model = make_model(seed, variant, device)
    stepper = make_optimizer(model, optimizer, variant, seed, min_quantized_numel)
    generator = torch.Generator().manual_seed(seed)
    batches = math.ceil(len(train_x) / BATCH)
    steps, warmup = epochs * batches, max(1, round(WARMUP * epochs * batches))

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(stepper, share)
    curve: dict[str, list] = {"step": [], "train_loss": [], "val_loss": [], "accuracy": []}
    for epoch in range(epochs):
        total = 0.0
        for chosen in torch.randperm(len(train_x), generator=generator).to(device).split(BATCH):
            loss = F.cross_entropy(model(shifted(train_x[chosen], generator)), train_y[chosen])
            stepper.zero_grad()
            loss.backward()
            stepper.step()
            schedule.step()
            total += loss.item() * len(chosen)
        test_loss, accuracy = evaluate(model, test_x, test_y)
        values = {
            "step": (epoch + 1) * batches,
            "train_loss": total / len(train_x),
            "val_loss": test_loss,
            "accuracy": accuracy,
        }
        for key, value in values.items():
            curve[key].append(round(value, 5))
    return {
        "final": {"val_loss": test_loss, "accuracy": accuracy, "train_loss": total / len(train_x)},
        "curve": curve,
        "facts": {"parameters": sum(p.numel() for p in model.parameters())},
    }


def run_job(job: dict) -> dict:
    config = job["config"]
    torch.set_num_threads(config["threads"])
    machine = runs.machine(config["device"], config["threads"], ("python", "benchmarks/real_models/digits.py"))
    facts = {"isa": flashoptim_native.cpu_isa(), "scikit-learn": importlib.metadata.version("scikit-learn")}
    start = time.monotonic()
    result = train(
        job["optimizer"], job["variant"], job["seed"], config["epochs"], config["device"], config["min_quantized_numel"]
    )
    return job | result | {"machine": machine | facts, "seconds": time.monotonic() - start}


def make_jobs(args: argparse.Namespace) -> list[dict]:
    return [
        {
            "task": "digits",
            "optimizer": optimizer,
            "variant": variant,
            "seed": seed,
            "config": {
                "epochs": args.epochs,
                "batch": BATCH,
                "hyperparameters": {
                    k: list(v) if isinstance(v, tuple) else v for k, v in HYPERPARAMETERS[optimizer].items()
                },
                "min_quantized_numel": args.min_quantized_numel,
                "threads": args.threads,
                "device": args.device,
            },
        }
        for seed in range(args.first_seed, args.first_seed + args.seeds)
        for optimizer in args.optimizers
        for variant in args.variants
    ]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=runs.DEFAULT_FOLDER, help="folder of results (default: build/real_models)"
    )
    parser.add_argument("--optimizers", nargs="+", choices=HYPERPARAMETERS, default=list(HYPERPARAMETERS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=10, help="seeds per optimizer and variant (default: 10)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="threads of a run (default: 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--min-quantized-numel", type=int, default=4096, help="0 quantizes every tensor's states")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[dict]:
    args = parse(arguments)
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as executor:
        return runs.execute(make_jobs(args), args.out, executor, run_job)


if __name__ == "__main__":
    main()
