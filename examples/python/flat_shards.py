"""Parameters cut out of one flat buffer, as Megatron-LM's distributed optimizer has them, stepped to the whole's bits.

Both "ranks" are here, in one process: each holds one stretch of the buffer and steps the pieces that lie in it.
"""

import torch
from torch import nn

from flashoptim_native import FlashAdamW, describe_shard

torch.manual_seed(0)
RANKS = 2
whole = {"weight": torch.randn(96, 64).bfloat16(), "bias": torch.randn(96).bfloat16()}
buffer = torch.cat([value.flatten() for value in whole.values()])
each = buffer.numel() // RANKS // 64 * 64  # cuts at multiples of 32 elements, as its padded buffers have


def pieces_of(rank):
    """The pieces of a rank: views into its stretch, with shape and first element of the parameter that they are of."""
    begin, end = rank * each, (buffer.numel() if rank == RANKS - 1 else (rank + 1) * each)
    first = 0
    for name, value in whole.items():
        a, b = max(begin, first), min(end, first + value.numel())
        if a < b:
            piece = nn.Parameter(buffer[a:b])
            piece.grad_dtype = torch.float32  # main_grad
            yield name, describe_shard(piece, whole_shape=value.shape, first_element=a - first), a - first
        first += value.numel()


reference = {name: nn.Parameter(value.clone()) for name, value in whole.items()}
for param in reference.values():
    param.grad_dtype = torch.float32
alone = FlashAdamW(reference.items(), lr=1e-3)
ranks = [list(pieces_of(rank)) for rank in range(RANKS)]
optimizers = [FlashAdamW([(name, piece) for name, piece, _ in pieces], lr=1e-3) for pieces in ranks]
for _ in range(10):
    main_grads = {name: torch.randn(value.shape) for name, value in whole.items()}
    for name, param in reference.items():
        param.grad = main_grads[name]
    alone.step()
    for pieces, optimizer in zip(ranks, optimizers):
        for name, piece, at in pieces:
            piece.grad = main_grads[name].flatten()[at : at + piece.numel()]
        optimizer.step()

same = torch.equal(buffer, torch.cat([param.detach().flatten() for param in reference.values()]))
print(f"{RANKS} stretches of one buffer, 10 steps: the bits of whole parameters: {same}")
assert same
