"""The same small network trained twice: by torch.optim.AdamW in fp32, and by FlashAdamW in bf16 with 24-bit weights."""

import torch
from torch import nn

from flashoptim_native import FlashAdamW, cast_model


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10))


def train(model, optimizer, dtype, steps=200):
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(64, 10, generator=generator)
    losses = []
    for _ in range(steps):
        x = torch.randn(128, 64, generator=generator)
        labels = (x @ teacher).argmax(1)
        loss = nn.functional.cross_entropy(model(x.to(dtype)).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


def bytes_per_parameter(model, optimizer):
    """Parameters, gradients and optimizer states, counted from the tensors themselves."""
    params = list(model.parameters())
    states = [v for p in params for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
    total = sum(t.nbytes for t in [*params, *(p.grad for p in params), *states])
    return total / sum(p.numel() for p in params)


plain = make_model()
adamw = torch.optim.AdamW(plain.parameters(), lr=1e-3)
plain_loss = train(plain, adamw, torch.float32)

model = make_model()
optimizer = FlashAdamW(model.parameters(), lr=1e-3)
cast_model(model, torch.bfloat16, optimizer=optimizer)
loss = train(model, optimizer, torch.bfloat16)

print(f"torch.optim.AdamW, fp32:    loss {plain_loss:.4f}, {bytes_per_parameter(plain, adamw):6.3f} bytes a parameter")
print(f"FlashAdamW, bf16 + 8 bits:  loss {loss:.4f}, {bytes_per_parameter(model, optimizer):6.3f} bytes a parameter")
