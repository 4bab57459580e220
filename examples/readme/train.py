"""The README's Python example, as a program."""

import torch

import flashoptim_native

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 1))
optimizer = flashoptim_native.FlashAdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
flashoptim_native.cast_model(model, torch.bfloat16, optimizer=optimizer)  # keeps what bf16 has no bits for

x = torch.randn(256, 64, dtype=torch.bfloat16)
y = x[:, :8].sum(1, keepdim=True)
for _ in range(200):
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
torch.save(optimizer.state_dict(), "optimizer.pt")  # resumes bit for bit

print(f"loss {loss.item():.4f}")
assert loss.item() < 0.1
