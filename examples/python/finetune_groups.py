"""Fine-tuning: a frozen body, groups with their own learning rates and formats, warm-up, clipping, an fp32 head."""

import torch
from torch import nn

from flashoptim_native import FlashAdamW, cast_model

torch.manual_seed(0)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(1000, 64)
        self.body = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 5)

    def forward(self, tokens):
        hidden = self.embedding(tokens).mean(1)
        return self.head(self.norm(hidden + self.body(hidden)))


model = Classifier()
cast_model(model, torch.bfloat16, full_precision_layers=["head"])
model.body[0].requires_grad_(False)

optimizer = FlashAdamW(
    [
        {"params": model.embedding.parameters(), "lr": 1e-3, "quantize": False},  # fp32 states for a sparse gradient
        {"params": model.body[2].parameters(), "lr": 3e-4, "weight_decay": 0.1},
        {"params": model.norm.parameters(), "weight_decay": 0.0, "master_weight_bits": 32},
        {"params": model.head.parameters(), "lr": 3e-3},
    ],
    lr=1e-3,
)
warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=20)
cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], [20])

first_loss = None
for _ in range(120):
    tokens = torch.randint(1000, (64, 16))
    labels = tokens[:, 0] % 5
    tokens[:, 1:8] = tokens[:, :1]  # something to learn
    loss = nn.functional.cross_entropy(model(tokens), labels)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    first_loss = first_loss or loss.item()

for group, name in zip(optimizer.param_groups, ("embedding", "body", "norm", "head")):
    state = optimizer.state[group["params"][0]]
    stored = {key: str(v.dtype).removeprefix("torch.") for key, v in state.items() if isinstance(v, torch.Tensor)}
    print(f"{name:10} lr {group['initial_lr']:.0e}  {stored}")
print(f"loss {first_loss:.3f} -> {loss.item():.3f}; frozen parameters have no state: {len(optimizer.state)} states")
assert loss.item() < first_loss
