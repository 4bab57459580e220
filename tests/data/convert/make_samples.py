"""Writes the samples beside it with the packages that the formats belong to: what test_convert.py reads.

    python make_samples.py FOLDER [bitsandbytes] [torchao] [reference]

in an environment with torch 2.13 and bitsandbytes 0.50.2, torchao 0.18.0, or flashoptim (0.1.3 or 0.1.4).
A file holds ``saved``, what the package's state_dict() gave, and ``expected``, what the package itself makes of it: of
every state its first 64 values and its sum in double. tests/python/test_convert_peers.py runs this, too.
"""

import os
import sys
from importlib import metadata
from pathlib import Path

import torch

SHAPES = [(64, 64), (80,), (67, 62)]


def make_params(dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def run(optimizer, params, steps=3):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = (0.1 * torch.randn(param.shape, generator=generator)).to(param.dtype)
        optimizer.step()
    return optimizer.state_dict()


def shown(values):
    values = values.detach().float().reshape(-1)
    return {"first": values[:64].clone(), "sum": float(values.double().sum()), "count": values.numel()}


def write(folder, name, saved, decoded):
    expected = {n: {slot: shown(value) for slot, value in held.items()} for n, held in decoded.items()}
    torch.save({"saved": saved, "expected": expected}, Path(folder) / f"{name}.pt")
    print(name)


def bitsandbytes(folder):
    import bitsandbytes as bnb

    def decoded(saved, slots):
        result = {}
        for number, outer in saved["state"].items():
            held = {**outer, **outer.get("__bnb_optimizer_quant_state__", {})}
            result[number] = {}
            for index, slot in enumerate(slots, 1):
                value = held[f"state{index}"]
                if value.dtype == torch.uint8:
                    absmax, qmap = held[f"absmax{index}"], held[f"qmap{index}"]
                    parts = zip(value, absmax) if absmax.dim() == 2 else [(value, absmax)]
                    made = [
                        bnb.functional.dequantize_blockwise(part.contiguous(), absmax=scale, code=qmap, blocksize=256)
                        for part, scale in parts
                    ]
                    value = torch.stack(made) if absmax.dim() == 2 else made[0]
                if slot == "both":
                    result[number] |= {"exp_avg": value[0], "exp_avg_slow": value[1]}
                else:
                    result[number][slot] = value
        return result

    adam = ("exp_avg", "exp_avg_sq")
    for name, cls, arguments, slots in (
        ("bitsandbytes_adamw8", bnb.optim.AdamW8bit, {}, adam),
        ("bitsandbytes_paged_adamw8", bnb.optim.PagedAdamW8bit, {}, adam),
        ("bitsandbytes_lion8", bnb.optim.Lion8bit, {}, ("exp_avg",)),
        ("bitsandbytes_sgd8", bnb.optim.SGD8bit, {"momentum": 0.9}, ("momentum_buffer",)),
        ("bitsandbytes_ademamix8", bnb.optim.AdEMAMix8bit, {}, ("both", "exp_avg_sq")),
        ("bitsandbytes_adamw32", bnb.optim.AdamW32bit, {}, adam),
    ):
        params = make_params()
        saved = run(cls(params, lr=1e-3, **arguments), params)
        write(folder, name, saved, decoded(saved, slots))


def torchao(folder):
    from torchao import optim

    for name, cls in (("8", optim.AdamW8bit), ("4", optim.AdamW4bit), ("fp8", optim.AdamWFp8)):
        params = make_params(shapes=SHAPES[:2])  # the third would be fp32: no whole blocks
        saved = run(cls(params, lr=1e-3), params)
        decoded = {
            number: {
                slot: held[slot].dequantize() if type(held[slot]) is not torch.Tensor else held[slot]
                for slot in ("exp_avg", "exp_avg_sq")
            }
            for number, held in saved["state"].items()
        }
        write(folder, f"torchao_adamw_{name}", saved, decoded)


def reference(folder):
    """Uncompressed files as its optimizer writes them on the CPU. It compresses on CUDA alone, so that compressed ones
    are made here by the format's description: what is expected of them, too.
    """
    import flashoptim.optimizers as theirs

    version = os.environ.get("FLASHOPTIM_REFERENCE_VERSION", metadata.version("flashoptim").replace(".", ""))
    params = make_params(torch.bfloat16, SHAPES[1:])
    optimizer = theirs.FlashAdamW(params, lr=1e-3, quantize=False, master_weight_bits=None, fused=False)
    saved = run(optimizer, params)
    decoded = {
        n: {slot: held[slot].float() for slot in ("exp_avg", "exp_avg_sq")} for n, held in saved["state"].items()
    }
    write(folder, f"reference_{version}_adamw_plain", saved, decoded)
    for kind, bits in (("adamw", 8), ("sgd", 16)):
        held, decoded = {}, {}
        for number, param in enumerate(make_params(shapes=SHAPES[1:])):
            held[number], decoded[number] = {}, {}
            for slot in ("exp_avg", "exp_avg_sq") if kind == "adamw" else ("momentum_buffer",):
                values = 0.01 * torch.randn(param.shape, generator=torch.Generator().manual_seed(number))
                codes, scales, decoded[number][slot] = described_codes(values, slot == "exp_avg_sq")
                if version == "014":  # as its state_dict() shows scales beside bf16 parameters
                    scales = scales.view(torch.bfloat16)
                held[number] |= {f"{slot}::quantized": codes, f"{slot}::scales": scales}
            errors, decoded[number]["weights"] = described_errors(param.detach(), bits)
            # In the parameter's dtype, which torch would cast them to.
            held[number]["error_bits"] = errors.to(torch.bfloat16) if bits == 8 else errors.view(torch.bfloat16)
            if kind == "adamw":
                held[number]["step"] = torch.tensor(3, dtype=torch.int64 if version == "014" else torch.float32)
        group = {"lr": 1e-3, "initial_lr": 1e-3, "weight_decay": 0.01, "master_bytewidth": 2 + bits // 8}
        more = {"betas": (0.9, 0.999), "eps": 1e-8} if kind == "adamw" else {"momentum": 0.9, "dampening": 0.0}
        saved = {"state": held, "param_groups": [{**group, **more, "quantize": True, "params": [0, 1]}]}
        write(folder, f"reference_{version}_{kind}_compressed", saved, decoded)


def described_codes(values, is_variance):
    """Codes, fp16 scales, and what they stand for: 32 elements a group, the root of a variance linear, momentum by
    y = 2 x / (1 + |x|) of x in units of the group's largest.
    """
    flat = values.reshape(-1).abs() if is_variance else values.reshape(-1)
    groups = torch.nn.functional.pad(flat, (0, -flat.numel() % 32)).view(-1, 32)
    largest = groups.abs().amax(1, keepdim=True).clamp(min=1e-12)
    x = groups / largest
    codes = torch.floor((x * 255 if is_variance else 254 * x / (1 + x.abs())) + 0.5)
    scales = largest.half()
    y = codes / 255 if is_variance else codes / (254 - codes.abs())
    decoded = ((y * scales.float()) ** 2 if is_variance else y * scales.float()).reshape(-1)[: flat.numel()]
    codes = codes.reshape(-1)[: flat.numel()].to(torch.uint8 if is_variance else torch.int8)
    return codes.view(values.shape), scales.view(-1), decoded.view(values.shape)


def described_errors(weights, bits):
    """What bf16 weights lack, in half units of their last place times the largest signed number of ``bits``."""
    narrow = weights.bfloat16().double()
    half = torch.exp2(torch.floor(torch.log2(narrow.abs())) - 8)
    most = 2 ** (bits - 1) - 1
    errors = torch.round(((weights.double() - narrow) / half).clamp(-1, 1) * most)
    merged = (narrow + errors / most * half).float()
    return errors.to(torch.int8 if bits == 8 else torch.int16), merged


if __name__ == "__main__":
    for package in sys.argv[2:] or ("bitsandbytes", "torchao", "reference"):
        globals()[package](sys.argv[1])
