"""A run that is stopped, saved, loaded and continued ends with the very bits of one that was not."""

import torch
from torch import nn

from flashoptim_native import FlashAdamW, cast_model


def make(lr=1e-3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 8))
    optimizer = FlashAdamW(model.parameters(), lr=lr)
    cast_model(model, torch.bfloat16, optimizer=optimizer)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    return model, optimizer, scheduler


def train(parts, first, last):
    model, optimizer, scheduler = parts
    for step in range(first, last):
        x = torch.randn(32, 32, generator=torch.Generator().manual_seed(step)).to(torch.bfloat16)
        loss = nn.functional.mse_loss(model(x).float(), x[:, :8].float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return loss.item()


uninterrupted = make()
loss = train(uninterrupted, 0, 40)

stopped = make()
train(stopped, 0, 20)
names = ("model", "optimizer", "scheduler")
torch.save({name: part.state_dict() for name, part in zip(names, stopped)}, "checkpoint.pt")
del stopped

resumed = make(lr=123.0)  # hyperparameters come from the checkpoint
checkpoint = torch.load("checkpoint.pt", weights_only=True)
for name, part in zip(names, resumed):
    part.load_state_dict(checkpoint[name])
resumed_loss = train(resumed, 20, 40)

same = all(torch.equal(p, q) for p, q in zip(uninterrupted[0].parameters(), resumed[0].parameters()))
print(f"uninterrupted: {loss:.6f}   resumed: {resumed_loss:.6f}   same bits: {same}")

# Weights for inference or for another framework: fp32, with the bits that the corrections hold.
weights = resumed[1].get_fp32_model_state_dict(resumed[0])
torch.save(weights, "weights_fp32.pt")
print("exported:", {key: str(value.dtype) for key, value in weights.items()})
assert same and loss == resumed_loss
