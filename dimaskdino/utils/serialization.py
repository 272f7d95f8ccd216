"""Reading files of tensors without running code in them, whoever made the file."""

import collections
import io
import pickle
import pickletools
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dimaskdino.utils.errors import UserError, first_line
from dimaskdino.utils.files import require_regular


class _DType:
    """Replaces `numpy.dtype` in a pickle; allows numbers and booleans of a fixed size only."""

    def __init__(self, code: Any, *_: Any) -> None:
        text = code.decode() if isinstance(code, bytes) else code
        if not isinstance(text, str) or not re.fullmatch(r"[<>|=]?[?biufc]\d*", text):
            raise pickle.UnpicklingError(f"it has arrays of the type {text!r}, expected numbers")
        self.value = np.dtype(text)

    def __setstate__(self, state: Any) -> None:
        order, *parts = state[1:5]
        if parts != [None, None, None]:
            raise pickle.UnpicklingError("it has arrays of records, expected numbers")
        if isinstance(order, bytes):
            order = order.decode()
        self.value = self.value.newbyteorder(order)


class _Array:
    """Replaces an array in a pickle; `__setstate__` fills it."""

    value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = _array(dtype, raw).reshape(shape, order="F" if fortran else "C")


class _NDArray:
    """Replaces the class `numpy.ndarray`, which a pickle of arrays refers to but never calls."""

    def __init__(self, *_: Any) -> None:
        raise pickle.UnpicklingError("it calls numpy.ndarray, which arrays do not need")


def _array(dtype: Any, raw: Any) -> np.ndarray:
    if not isinstance(dtype, _DType) or not isinstance(raw, bytes | str):
        raise pickle.UnpicklingError("it has an array that is not made of numbers")
    return np.frombuffer(raw.encode("latin1") if isinstance(raw, str) else raw, dtype.value).copy()


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    if kind is not _NDArray:
        raise pickle.UnpicklingError("it has an object that is not an array")
    return _Array()


def _plain(value: Any, known: dict[int, Any]) -> Any:
    """Put the arrays back into the content of a pickle; what it refers to twice is copied once, and kept in `known`."""
    if isinstance(value, _Array) and value.value is None:
        raise pickle.UnpicklingError("it has an array without values")
    if isinstance(value, dict | list | tuple) and id(value) not in known:
        if isinstance(value, dict):
            known[id(value)] = {_plain(key, known): _plain(item, known) for key, item in value.items()}
        else:
            known[id(value)] = type(value)(_plain(item, known) for item in value)
    return value.value if isinstance(value, _Array) else known.get(id(value), value)


# the functions and classes that a pickle of arrays needs; NumPy 2 renamed numpy.core to numpy._core
_ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _NDArray,
    ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
    **{(module, "bytes"): lambda: b"" for module in ("__builtin__", "builtins")},  # protocol 2's empty bytes
    **{
        (f"numpy.{core}.multiarray", name): function
        for core in ("core", "_core")
        for name, function in (("_reconstruct", _reconstruct), ("scalar", lambda dtype, raw: _array(dtype, raw)[0]))
    },
}


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler that allows dictionaries, lists, numbers, strings and arrays of numbers only.

    It never calls NumPy's own classes: a crafted file could make them read any memory.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which arrays do not need")
        return _ALLOWED[module, name]


DAMAGED = (  # the exceptions of unpickling damaged bytes
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
    pickle.UnpicklingError,
)


def read_pt(path: Path) -> Any:
    """Read a file written by `torch.save`. No code in the file is run.

    Raises:
        UserError: the file is missing, truncated, or holds more than tensors and plain values.
    """
    require_regular(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the warnings concern files that are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"the checkpoint {path} does not exist") from None
    except pickle.UnpicklingError:  # torch's message advises to switch the protection off
        raise UserError(
            f"{path} cannot be read as a checkpoint: it was not written by torch.save, is truncated, or holds more "
            "than tensors and plain values, whose code is not run"
        ) from None
    except DAMAGED as error:
        raise UserError(f"{path} cannot be read as a checkpoint: it may be truncated ({first_line(error)})") from None


def read_pkl(path: Path) -> Any:
    """Read a pickle of NumPy arrays, the format of detectron2's model zoo (`.pkl`). No code in the file is run.

    Raises:
        UserError: the file is missing, truncated, or holds more than arrays and plain values.
    """
    require_regular(path)
    try:
        content = path.read_bytes()
        for code, argument, _ in pickletools.genops(content):  # a number of 2^32 takes 64 GB
            if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(content):
                raise pickle.UnpicklingError("it numbers more objects than it has bytes")
        return _plain(_ArrayUnpickler(io.BytesIO(content), encoding="latin1").load(), {})
    except FileNotFoundError:
        raise UserError(f"the checkpoint {path} does not exist") from None
    except DAMAGED as error:
        raise UserError(
            f"{path} cannot be read as a pickle of arrays: it may be truncated or hold more than arrays "
            f"({first_line(error)})"
        ) from None


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file.

    Raises:
        UserError: the file cannot be read.
    """
    require_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read, it may be truncated ({error})") from None


def is_plain(value: Any) -> bool:
    """Whether a value is a tensor that this kit stores: its numbers in memory, one for each of its elements."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not (value.is_floating_point() and value.element_size() == 1)
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def _is_named_array(item: tuple[Any, Any]) -> bool:
    name, value = item
    return isinstance(name, str) and (isinstance(value, np.ndarray) or is_plain(value))


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict, at the top level of the file or under `model`, from `.pth`, `.pt`, `.pkl` or `.safetensors`.

    Raises:
        UserError: the file cannot be read or holds no state dict.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    content = read_pkl(path) if path.suffix == ".pkl" else read_pt(path)
    state = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not state or not all(map(_is_named_array, state.items())):
        raise UserError(f"{path} holds no state dict (parameter names with tensors, at the top or under 'model')")
    try:
        return {name: torch.as_tensor(value) for name, value in state.items()}
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} has numbers that PyTorch does not know ({first_line(error)})") from None
