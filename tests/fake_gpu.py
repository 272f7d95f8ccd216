"""A GPU without a GPU: fake CUDA tensors, and what makes the host wait for them.

Shapes, dtypes and devices are those of a real run, without values: an operation on tensors of two devices fails as it
would there, and every copy between host and device is seen.
"""

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parent.parent
# the host reads a value, or a size that depends on values
READING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal"}
READING |= {"prod"}  # its gradient asks whether a factor is zero
INDEXING = {"index", "index_put", "index_put_"}  # by a mask: by the places where it is true


def _line() -> str:
    """The line of this project that is running."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if any(path.is_relative_to(ROOT / part) for part in ("dimaskdino", "ops")):
            return f"{path.relative_to(ROOT)}:{frame.lineno} {frame.line}"
    return "elsewhere"


class Waits(TorchDispatchMode):
    """Counts the operations that make the host wait for a device, by the line of this project."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        on_gpu = bool(args) and isinstance(args[0], torch.Tensor) and args[0].device.type == "cuda"
        by_mask = name in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
        from_host = name in ("index_put", "index_put_") and args[2].device.type != "cuda"  # x[i] = 1
        if on_gpu and (name in READING or by_mask or from_host):
            self.lines[_line()] += 1
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            asynchronous = kwargs.get("non_blocking", len(args) > 2 and args[2])
            if source.device.type != result.device.type and not asynchronous:
                self.lines[_line()] += 1
        return result


@contextmanager
def fake_gpu() -> Iterator[Waits]:
    """Everything made within is fake."""
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()), Waits() as waits:
        yield waits


def to_fake_gpu(module: nn.Module) -> None:
    """Move a module to the fake GPU, within `fake_gpu`."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                fake = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device="cuda")
                part._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty_strided(
                    buffer.shape, buffer.stride(), dtype=buffer.dtype, device="cuda"
                )
