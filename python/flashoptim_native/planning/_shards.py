"""What a rank of several holds: its shard of the parameters, and what is gathered and reduced around a block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ._trace import rounded

LAYOUTS = ("fsdp2", "ddp")


def shard_of(tensor: Tensor, ranks: int, layout: str) -> Tensor:
    """The part of a parameter that the rank with the most has: FSDP2 cuts the first dimension into equal pieces."""
    if ranks == 1 or layout == "ddp" or tensor.dim() == 0:
        return tensor
    rows = -(-tensor.shape[0] // ranks)
    return torch.empty((rows, *tensor.shape[1:]), dtype=tensor.dtype, device="meta")


def communication(params: Mapping[str, Tensor], blocks: Sequence[Sequence[str]], gradients: int, layout: str) -> int:
    """Bytes of what travels between ranks, at the most: an estimate by how the two layouts work.

    DDP keeps all gradients a second time, in buckets. FSDP2 over blocks holds the parameters that are in no block
    whole, those of two blocks (the next is gathered ahead), and one block's gradients twice (whole, and as sent).
    """
    if layout == "ddp":
        return gradients
    sizes = [sum(rounded(params[name].nbytes) for name in block) for block in blocks]
    inside = {name for block in blocks for name in block}
    outside = sum(rounded(tensor.nbytes) for name, tensor in params.items() if name not in inside)
    return outside + 4 * max(sizes, default=0)


__all__ = ["LAYOUTS", "communication", "shard_of"]
