"""Numerical precision of a forward pass."""

from typing import Literal

import torch

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def fast_precision(device: torch.device) -> Precision:
    """`bf16` where the device computes with it faster than with float32, else `fp32`.

    These are NVIDIA GPUs from compute capability 8.0 (Ampere), and x86 processors with AMX or AVX-512 for bfloat16.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)  # which older versions of PyTorch do not have
    known: dict[str, bool] = capabilities() if device.type == "cpu" else {}
    return "bf16" if known.get("amx_bf16") or known.get("avx512_bf16") else "fp32"


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The autocast context for a precision; does nothing for `fp32`.

    On an NVIDIA GPU `tf32` lets float32 matrix products of this process use TF32, which keeps 10 of the 23 bits of the
    mantissa. That lasts until the next call for a GPU, so that it holds in the backward pass. Elsewhere `tf32` is
    `fp32`. PyTorch's convolutions use TF32 with every precision.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    return torch.autocast(device.type, _DTYPES.get(precision), enabled=precision in _DTYPES)
