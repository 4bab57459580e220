"""Takes one step with the installed package: 1.0 becomes about 1 - lr."""

import sys

import torch

import flashoptim_native

assert flashoptim_native.__file__.startswith(sys.prefix), f"{flashoptim_native.__file__} is not the installed package"
weight = torch.nn.Parameter(torch.ones(10, 1000, dtype=torch.bfloat16))
optimizer = flashoptim_native.FlashAdamW([weight], lr=1e-3, weight_decay=0.0)
weight.grad = torch.ones_like(weight)
optimizer.step()
value = flashoptim_native.reconstruct_fp32_param(weight, optimizer.state[weight]["correction"])
print(f"flashoptim {flashoptim_native.__version__}: 1.0 -> {value.flatten()[0].item():.6f}, expected about 0.999")
assert abs(value.mean().item() - 0.999) < 5e-5
