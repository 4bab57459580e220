"""A language model of GPT-2's shape, its tokens, and how it is compiled.

Weights may be fp32 or bf16: they are used rounded to bf16, as are activations, so that runs with fp32 weights and runs
with 16-bit ones compute the same and differ by their optimizers alone.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    layers: int = 12
    dim: int = 768
    heads: int = 12
    vocabulary: int = 49152
    context: int = 1024


class Linear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class LayerNorm(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = LayerNorm(dim), LayerNorm(dim)
        self.qkv, self.project = Linear(dim, 3 * dim), Linear(dim, dim)
        self.expand, self.contract = Linear(dim, 4 * dim), Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(y.transpose(1, 2).flatten(2))
        return x + self.contract(F.gelu(self.expand(self.mlp_norm(x)), approximate="tanh"))


class LanguageModel(nn.Module):
    """The head is the embedding. Initial weights depend on `seed` alone, not on the device."""

    def __init__(self, shape: Shape, seed: int) -> None:
        super().__init__()
        self.shape = shape
        self.tokens = nn.Embedding(shape.vocabulary, shape.dim)
        self.positions = nn.Embedding(shape.context, shape.dim)
        self.blocks = nn.ModuleList(Block(shape.dim, shape.heads) for _ in range(shape.layers))
        self.norm = LayerNorm(shape.dim)
        generator = torch.Generator().manual_seed(seed)
        for name, param in self.named_parameters():
            if param.ndim == 2:
                share = math.sqrt(2 * shape.layers) if name.endswith(("project.weight", "contract.weight")) else 1.0
                nn.init.normal_(param, std=0.02 / share, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(param)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.embedding(tokens, self.tokens.weight.to(DTYPE)) + self.positions.weight[: tokens.shape[1]].to(DTYPE)

    def head_loss(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = F.linear(self.norm(x), self.tokens.weight.to(DTYPE))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """Mean loss in nats a token; windows: int64 (batch, context + 1)."""
        x = self.embed(windows[:, :-1])
        for block in self.blocks:
            x = block(x)
        return self.head_loss(x, windows[:, 1:])


def compile_parts() -> None:
    """Compiles the model's parts for all instances: one block's code serves all blocks, in seconds, not a minute."""
    Block.forward = torch.compile(Block.forward, dynamic=False)
    LanguageModel.embed = torch.compile(LanguageModel.embed, dynamic=False)
    LanguageModel.head_loss = torch.compile(LanguageModel.head_loss, dynamic=False)


class Windows:
    """Windows of context + 1 tokens that overlap by one, of a file of uint16 tokens, on the device.

    A training run takes them in an order that depends on its seed alone, anew for every pass over the text.
    """

    def __init__(self, path: Path, context: int, device: torch.device) -> None:
        tokens = np.fromfile(path, dtype=np.uint16)
        self.tokens = torch.from_numpy(tokens.astype(np.int32)).to(device)
        self.count = (len(tokens) - 1) // context
        self.context, self.device = context, device
        self._passes: dict[tuple[int, int], torch.Tensor] = {}

    def take(self, indices: torch.Tensor) -> torch.Tensor:
        starts = indices.to(self.device).unsqueeze(1) * self.context
        return self.tokens[starts + torch.arange(self.context + 1, device=self.device)].long()

    def _order(self, seed: int, number: int) -> torch.Tensor:
        if (seed, number) not in self._passes:
            generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + number)
            self._passes[seed, number] = torch.randperm(self.count, generator=generator)
        return self._passes[seed, number]

    def training(self, step: int, batch: int, seed: int) -> torch.Tensor:
        """The batch of a step, int64 (batch, context + 1)."""
        places = range(step * batch, (step + 1) * batch)
        return self.take(torch.stack([self._order(seed, p // self.count)[p % self.count] for p in places]))

    def first(self, most: int, batch: int) -> list[torch.Tensor]:
        """The first windows in batches, whole ones only, `most` windows at most (at least one batch)."""
        batches = max(1, min(most, self.count) // batch)
        return [self.take(torch.arange(i * batch, (i + 1) * batch) % self.count) for i in range(batches)]
