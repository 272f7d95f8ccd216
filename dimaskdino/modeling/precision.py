"""Numerical precision of a forward pass."""

from typing import Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The autocast context for a precision; does nothing for `fp32`."""
    return torch.autocast(device.type, _DTYPES.get(precision), enabled=precision != "fp32")
