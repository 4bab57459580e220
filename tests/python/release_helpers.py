"""What the tests of gradient release share: a model with a bit of everything, pairs of equal models."""

from __future__ import annotations

import torch
from torch import nn

from helpers import CLASSES, HYPERS, assert_same_bits

KINDS = list(CLASSES)


class Model(nn.Module):
    """Embedding tied to the head, a convolution, norms, one parameter that nothing uses."""

    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        torch.manual_seed(7)
        self.embedding = nn.Embedding(64, 72)
        self.conv = nn.Conv1d(72, 72, 3, padding=1)
        self.norm = nn.LayerNorm(72)
        self.block = nn.Sequential(nn.Linear(72, 144), nn.GELU(), nn.Linear(144, 72))
        self.head = nn.Linear(72, 64, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Parameter(torch.ones(5))
        self.to(dtype)

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.head(x + self.block(self.norm(x)))


def tokens(step, batch=4):
    return torch.randint(64, (batch, 16), generator=torch.Generator().manual_seed(step))


def loss_of(model, step, batch=4):
    data = tokens(step, batch)
    return nn.functional.cross_entropy(model(data).float().flatten(0, 1), data.flatten().roll(1))


def groups_of(model):
    """Two groups, the second with its own learning rate and format."""
    norms = [p for p in model.parameters() if p.ndim < 2]
    others = [p for p in model.parameters() if p.ndim >= 2]
    return [{"params": others}, {"params": norms, "lr": 0.02, "weight_decay": 0.0, "min_quantized_numel": 0}]


def train(model, optimizer, steps=range(4), scheduler=None):
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if scheduler is not None:
            scheduler.step()
    return losses


def pair(kind="adamw", dtype=torch.bfloat16, **options):
    """Two equal models with their optimizers: gradient release is for the first."""
    models = [Model(dtype), Model(dtype)]
    return [(model, CLASSES[kind](groups_of(model), **HYPERS[kind], **options)) for model in models]


def assert_pair_agrees(a, b):
    assert_same_bits((list(a[0].parameters()), a[1]), (list(b[0].parameters()), b[1]))


def live_gradients(params):
    return sum(p.grad.nbytes for p in params if p.grad is not None)
