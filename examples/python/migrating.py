"""The lines of docs/migrating.md, run: from torch.optim.AdamW in mid-training to FlashAdamW, and back."""

import copy
import tempfile
from pathlib import Path

import torch

import flashoptim_native
from flashoptim_native import convert

torch.manual_seed(0)


def make_model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64))


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(32, 64, dtype=dtype)
        optimizer.zero_grad()
        loss = (model(x) - x.flip(1)).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()


def from_torch(model: torch.nn.Module, path: Path) -> flashoptim_native.FlashAdamW:
    optimizer = flashoptim_native.FlashAdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    flashoptim_native.cast_model(model, torch.bfloat16, optimizer=optimizer)
    optimizer.load_state_dict(torch.load(path, weights_only=True))  # of torch.optim.AdamW: its states are encoded
    return optimizer


def back_to_torch(
    model: torch.nn.Module, optimizer: flashoptim_native.FlashAdamW
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    fp32 = make_model()
    fp32.load_state_dict(optimizer.get_fp32_model_state_dict(model))  # parameters and corrections, in fp32
    theirs = torch.optim.AdamW(fp32.parameters(), lr=1e-3, weight_decay=0.01)
    theirs.load_state_dict(convert.state_dict(optimizer.state_dict(), to="torch"))
    return fp32, theirs


def main() -> None:
    model = make_model()
    theirs = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    train(model, theirs, 200)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adamw.pt"
        torch.save(theirs.state_dict(), path)
        going_on = copy.deepcopy(model)
        ours = from_torch(model, path)
    again = torch.optim.AdamW(going_on.parameters(), lr=1e-3, weight_decay=0.01)
    again.load_state_dict(theirs.state_dict())
    torch.manual_seed(1)
    expected = train(going_on, again, 100)
    torch.manual_seed(1)
    loss = train(model, ours, 100)
    print(f"torch.optim.AdamW, fp32: {expected:.4f}    FlashAdamW from its checkpoint, bf16: {loss:.4f}")
    assert abs(loss - expected) < 0.03 * expected + 0.002, (loss, expected)

    back, optimizer = back_to_torch(model, ours)
    torch.manual_seed(2)
    print(f"back in torch.optim.AdamW, 100 steps later: {train(back, optimizer, 100):.4f}")


if __name__ == "__main__":
    main()
