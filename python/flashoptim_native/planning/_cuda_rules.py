"""What a training step does on a CUDA device and not on the CPU, for a step that is traced on fake CPU tensors.

A build of torch without CUDA cannot run autograd on fake CUDA tensors, and one with CUDA would wake the driver; so
steps are traced as CPU tensors, with the operators replaced whose CUDA way holds other tensors: attention, dropout,
RMS norm, and what autocast casts. ``workspace`` knows what kernels allocate besides their results.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

MIB = 2**20
_NARROW = (torch.bfloat16, torch.float16)

aten = torch.ops.aten


class Device(NamedTuple):
    """What of a CUDA device decides which kernels run and what they allocate."""

    #: Compute capability: (9, 0) for H100 and H200.
    capability: tuple[int, int] = (9, 0)
    #: Whether attention goes to cuDNN first, as from cuDNN 9.15.1 on at capabilities 9.0 and 10.0.
    prefers_cudnn_attention: bool = True

    @property
    def cublas_workspace(self) -> int:
        """Bytes for one thread that multiplies matrices (torch's default of CUBLAS_WORKSPACE_CONFIG)."""
        return 32 * MIB if self.capability >= (9, 0) else 4096 * 2 * 1024 + 16 * 8 * 1024

    @classmethod
    def current(cls) -> Device:
        """The current CUDA device."""
        major, minor = torch.cuda.get_device_capability()
        cudnn = torch.backends.cudnn.version() or 0
        return cls((major, minor), minor == 0 and major in (9, 10) and cudnn >= 91501)


# Attention


def attention_backend(device: Device, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str:
    """Which kernel torch chooses for one call of scaled_dot_product_attention: "cudnn", "flash", "efficient", "math".

    Source: the order and conditions of torch's select_sdp_backend for CUDA, as far as dtype, mask and head size go.
    """
    width = query.shape[-1]
    is_narrow = query.dtype in _NARROW
    is_plain = query.dim() == 4 and key.dim() == 4 and query.stride(-1) == 1
    if not is_plain:
        return "math"
    same_width = width == value.shape[-1]
    if mask is not None and mask.requires_grad:
        return "math"
    if device.prefers_cudnn_attention and is_narrow and same_width and width % 8 == 0 and width <= 128:
        return "cudnn"
    if is_narrow and mask is None and same_width and width <= 256 and device.capability >= (8, 0):
        return "flash"
    if query.dtype in (*_NARROW, torch.float32) and width % (8 if is_narrow else 4) == 0:
        return "efficient"
    return "math"


def _additive(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """A mask as the fused kernels take it: added to the scores, in the queries' dtype."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -math.inf)


def _attention(device: Device) -> Callable[..., Tensor]:
    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        backend = attention_backend(device, query, key, value, attn_mask)
        needs_grad = torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value))
        result: Tensor
        if backend == "math":
            if enable_gqa and query.shape[-3] != key.shape[-3]:
                repeats = query.shape[-3] // key.shape[-3]
                key, value = (one.repeat_interleave(repeats, -3) for one in (key, value))
            result = aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale
            )[0]
            return result
        mask = _additive(attn_mask, query)
        if backend == "cudnn":
            if mask is not None:
                mask = mask.expand(*query.shape[:-1], key.shape[-2])
            result = aten._scaled_dot_product_cudnn_attention(
                query, key, value, mask, needs_grad, dropout_p, is_causal, scale=scale
            )[0]
            return result
        padding = -query.shape[-1] % 8 if backend == "flash" else 0
        if padding:
            query, key, value = (torch.nn.functional.pad(one, (0, padding)) for one in (query, key, value))
        if backend == "flash":
            result = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
            return result[..., : result.shape[-1] - padding] if padding else result
        if mask is not None:
            mask = mask.expand(*query.shape[:-1], key.shape[-2])
        if enable_gqa and query.shape[-3] != key.shape[-3]:
            repeats = query.shape[-3] // key.shape[-3]
            key, value = (one.repeat_interleave(repeats, -3) for one in (key, value))
        result = aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, needs_grad, dropout_p, is_causal, scale=scale
        )[0]
        return result

    return scaled_dot_product_attention


def _dropout(input: Tensor, p: float, train: bool) -> Tensor:
    """CUDA's dropout keeps a mask of bool."""
    if not train or p == 0:
        return input
    if p == 1:
        return input * torch.zeros((), dtype=input.dtype)
    result: Tensor = aten.native_dropout(input, p, True)[0]
    return result


class _RmsNorm(torch.autograd.Function):
    """The tensors of CUDA's kernel, which keeps one number a row; not its values."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, rows: list[int], weight: Tensor | None) -> Tensor:
        factors = torch.empty(rows, dtype=torch.float32, device=input.device)
        ctx.save_for_backward(input, weight, factors)
        return torch.empty_like(input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, _ = ctx.saved_tensors
        grads = (input, None, weight)
        return tuple(
            torch.empty_like(one) if one is not None and needed else None
            for one, needed in zip(grads, ctx.needs_input_grad)
        )


def _rms_norm(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    rows = [*input.shape[: input.dim() - len(normalized_shape)], *(1 for _ in normalized_shape)]
    result: Tensor = _RmsNorm.apply(input, rows, weight)
    return result


# Autocast

#: Operators whose narrow arguments autocast makes fp32 on CUDA and not on the CPU (ATen/autocast_mode.h).
_FP32_ON_CUDA = (
    "acos",
    "asin",
    "cosh",
    "erfinv",
    "exp",
    "expm1",
    "log",
    "log10",
    "log2",
    "log1p",
    "reciprocal",
    "rsqrt",
    "sinh",
    "tan",
    "pow.Tensor_Scalar",
    "pow.Tensor_Tensor",
    "pow.Scalar",
    "softplus",
    "layer_norm",
    "native_layer_norm",
    "rms_norm",
    "group_norm",
    "cosine_similarity",
    "nll_loss",
    "nll_loss2d",
    "kl_div",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "mse_loss",
    "logsumexp",
    "linalg_vector_norm",
    "upsample_nearest2d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
)
#: Operators that take the dtype to compute in, which autocast sets to fp32.
_FP32_BY_DTYPE = (
    "softmax.int",
    "log_softmax.int",
    "prod",
    "prod.dim_int",
    "cumprod",
    "cumsum",
    "sum",
    "sum.dim_IntList",
)


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in _NARROW:
        return value.to(torch.float32)
    return [_widened(one) for one in value] if isinstance(value, list) else value


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def _in_fp32(name: str, by_dtype: bool) -> Callable[..., Any]:
    operator = _overload(name)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
            if by_dtype:
                narrow = isinstance(args[0], Tensor) and args[0].is_floating_point()
                if narrow and kwargs.get("dtype") is None and not any(isinstance(one, torch.dtype) for one in args):
                    kwargs["dtype"] = torch.float32
                return operator(*args, **kwargs)
            widened = {key: _widened(value) for key, value in kwargs.items()}
            return operator(*(_widened(one) for one in args), **widened)

    return run


@contextlib.contextmanager
def as_on_cuda(device: Device) -> Iterator[None]:
    """CPU tensors are computed with as ``device`` would compute with CUDA tensors. For the whole process: not for
    threads that meanwhile compute something."""
    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("scaled_dot_product_attention", _attention(device), "AutogradCPU")
        library.impl("dropout", _dropout, "AutogradCPU")
        library.impl("rms_norm", _rms_norm, "AutogradCPU")
        for names, by_dtype in ((_FP32_ON_CUDA, False), (_FP32_BY_DTYPE, True)):
            for name in names:
                if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCPU"):
                    library.impl(name, _in_fp32(name, by_dtype), "AutocastCPU")
        yield
    finally:
        library._destroy()


# Workspaces


def _rounded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _flash_backward(args: tuple[Any, ...]) -> int:
    """The sums of the scores' gradients, and queries' gradients in fp32; with shared keys, those of each head."""
    query: Tensor = args[1]
    key: Tensor = args[2]
    batch, heads, length, width = query.shape
    rows = batch * heads * _rounded(length, 128)
    total = 4 * rows + 4 * rows * _rounded(width, 32 if width <= 128 else 64)
    if key.shape[1] != heads:
        total += 2 * batch * heads * key.shape[2] * width * key.element_size()
    return total


def _cudnn_backward(args: tuple[Any, ...]) -> int:
    query: Tensor = args[1]
    key: Tensor = args[2]
    batch, heads, length, width = query.shape
    total = 4 * batch * heads * length * (width + 1)
    if key.shape[1] != heads:
        total += 2 * batch * heads * key.shape[2] * width * key.element_size()
    return total


def _efficient_backward(args: tuple[Any, ...]) -> int:
    """Gradients of keys and values in fp32, where they are narrow, and the sums of the scores' gradients."""
    query: Tensor = args[1]
    batch, heads, length, width = query.shape
    sums = 4 * batch * heads * length
    return sums + (0 if query.dtype == torch.float32 else 4 * batch * heads * length * width)


def _layer_norm_backward(args: tuple[Any, ...]) -> int:
    """Partial sums of the weight's and bias's gradients, for blocks of rows."""
    values, shape = args[1], args[2]
    columns = math.prod(shape)
    rows = values.numel() // max(1, columns)
    return 0 if rows < 64 else 2 * 4 * columns * min(128, _rounded(rows, 64) // 64)


def _embedding_backward(args: tuple[Any, ...]) -> int:
    """Indices sorted with their places, where there are many."""
    count: int = args[1].numel()
    return 0 if count <= 3072 else 5 * 8 * count


def _convolution(input: Tensor, weight: Tensor, transposed: bool, stride: list[int], padding: list[int]) -> int:
    """cuDNN computes 16-bit convolutions with channels last: copies of a channels-first input and output.

    Depthwise ones have kernels of torch's own, without.
    """
    is_depthwise = not transposed and weight.shape[1] == 1 and weight.shape[0] > 1
    if input.dtype not in _NARROW or input.dim() != 4 or is_depthwise:
        return 0
    if not input.is_contiguous() or input.is_contiguous(memory_format=torch.channels_last):
        return 0
    outputs = weight.shape[1] if transposed else weight.shape[0]
    area = 1
    for side, kernel, step, edge in zip(input.shape[2:], weight.shape[2:], stride, padding):
        area *= (side - 1) * step - 2 * edge + kernel if transposed else (side + 2 * edge - kernel) // step + 1
    return input.nbytes + input.shape[0] * outputs * area * input.element_size()


def _convolution_forward(args: tuple[Any, ...]) -> int:
    return _convolution(args[0], args[1], args[6], args[3], args[4])


def _convolution_backward(args: tuple[Any, ...]) -> int:
    return _convolution(args[1], args[2], args[7], args[4], args[5])


_WORKSPACES: dict[Any, Callable[[tuple[Any, ...]], int]] = {
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten._scaled_dot_product_cudnn_attention_backward.default: _cudnn_backward,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    aten.convolution.default: _convolution_forward,
    aten.convolution_backward.default: _convolution_backward,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten.embedding_dense_backward.default: _embedding_backward,
}
_MATRIX_PRODUCTS = frozenset(
    getattr(aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "addbmm")
)


def workspace(operator: Any, args: tuple[Any, ...]) -> int:
    """Bytes that an operator's kernels allocate on CUDA and free before it returns, besides its results."""
    rule = _WORKSPACES.get(operator)
    return 0 if rule is None else rule(args)


def is_matrix_product(operator: Any) -> bool:
    return operator in _MATRIX_PRODUCTS


__all__ = ["Device", "as_on_cuda", "attention_backend", "is_matrix_product", "workspace"]
