"""The optimizers that are compared: how each is made for a model, and the bytes that it holds.

    fp32          torch.optim.AdamW(fused=True) on fp32 weights
    default       FlashAdamW: bf16 weights with 8-bit corrections, 8-bit states
    paper         the same with state_codec="paper"
    exact         FlashAdamW with fp32 states and 32-bit weights (bf16 with 16-bit corrections): a control, which
                  differs from fp32 by the order of operations alone
    uncorrected   the same as default, without corrections (weights rounded to nearest bf16)
    torchao       torchao.optim.AdamW8bit on fp32 weights
    bitsandbytes  bitsandbytes.optim.AdamW8bit on fp32 weights

Nothing of ours is imported for those that are not ours.
"""

import torch
from torch import nn

BETAS, EPS, WEIGHT_DECAY = (0.9, 0.95), 1e-8, 0.1
OURS = {
    "default": {},
    "paper": {"state_codec": "paper"},
    "exact": {"quantize": False, "master_weight_bits": 32},
    "uncorrected": {"master_weight_bits": None},
}
VARIANTS = ("fp32", *OURS, "torchao", "bitsandbytes")


def make_optimizer(variant: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The variant's optimizer; casts the model to bf16 where the variant has 16-bit weights. Biases and norms do not
    decay."""
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; allowed are {', '.join(VARIANTS)}")
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    arguments = {"lr": lr, "betas": BETAS, "eps": EPS}
    if variant == "fp32":
        return torch.optim.AdamW(groups, fused=True, **arguments)
    if variant == "torchao":
        from torchao.optim import AdamW8bit

        return AdamW8bit(groups, **arguments)
    if variant == "bitsandbytes":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **arguments)
    from flashoptim_native import FlashAdamW, cast_model

    optimizer = FlashAdamW(groups, **arguments, **OURS[variant])
    cast_model(model, torch.bfloat16, optimizer=optimizer)
    return optimizer


def clip_gradients(optimizer: torch.optim.Optimizer, model: nn.Module, max_norm: float) -> torch.Tensor:
    """Clips by the norm of all gradients and returns it: ours in the step's own pass, others as torch does."""
    own = getattr(optimizer, "clip_grad_norm_", None)
    return own(max_norm) if own else nn.utils.clip_grad_norm_(model.parameters(), max_norm)


def plain_tensors(value):
    """The tensors of a state: those inside of tensor subclasses, lists and dicts."""
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value)]
    if isinstance(value, list | tuple):
        for part in value:
            yield from plain_tensors(part)
    elif hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(value, name))
    elif isinstance(value, torch.Tensor):
        yield value.detach()


def tensor_bytes(value) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in plain_tensors(value))


def held_bytes(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, int]:
    """Numbers of parameters, and bytes of weights, gradients and of everything that the optimizer holds."""
    params = list(model.parameters())
    return {
        "parameters": sum(param.numel() for param in params),
        "weight_bytes": tensor_bytes(params),
        "gradient_bytes": tensor_bytes([param.grad for param in params]),
        "state_bytes": tensor_bytes([dict(state) for state in optimizer.state.values()]),
    }


def fingerprint(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[int]:
    """A number for every tensor of weights and states that changes with any of its bytes, and with their order."""
    numbers = []
    for tensor in plain_tensors([list(model.parameters()), [dict(state) for state in optimizer.state.values()]]):
        data = tensor.contiguous().view(-1).view(torch.uint8)
        places = torch.arange(data.numel(), device=data.device, dtype=torch.int32) % 65521 + 1
        numbers.append(int((data * places).sum(dtype=torch.int64)))
    return numbers
