"""Files of tensors from anywhere, read without running any code in them."""

import collections
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dimaskdino.errors import UserError

# what arrays in a pickle are made by; NumPy 2 calls numpy.core numpy._core
_HARMLESS = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
    **{
        (f"numpy.{core}.multiarray", name): getattr(np._core.multiarray, name)
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    },
}


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that makes dictionaries, lists, numbers, texts and NumPy arrays, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"it wants to use {module}.{name}, which arrays do not need")
        return _HARMLESS[module, name]


def read_pt(path: Path) -> Any:
    """What a file written by `torch.save` holds; no code in it is run.

    Raises:
        UserError: the file is missing, truncated, or holds more than tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"the checkpoint {path} does not exist") from None
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path} cannot be read as a checkpoint, it may be truncated or hold more than tensors "
            f"({_first_line(error)})"
        ) from None


def read_pkl(path: Path) -> Any:
    """What a pickle of NumPy arrays holds, as detectron2's model zoo has them (`.pkl`); no code in it is run.

    Raises:
        UserError: the file is missing, truncated, or holds more than arrays and plain values.
    """
    try:
        return _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except FileNotFoundError:
        raise UserError(f"the checkpoint {path} does not exist") from None
    except (OSError, EOFError, ValueError, TypeError, KeyError, IndexError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path} cannot be read as a pickle of arrays, it may be truncated or hold more than arrays "
            f"({_first_line(error)})"
        ) from None


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Names with tensors, alone or under `model`, from `.pth`, `.pt`, `.pkl` or `.safetensors`.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read, it may be truncated ({error})") from None
    content = read_pkl(path) if path.suffix == ".pkl" else read_pt(path)
    state = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(value, Tensor | np.ndarray) for value in state.values()):
        raise UserError(f"{path} holds no state dict: names with tensors, alone or under 'model'")
    return {name: torch.as_tensor(value) for name, value in state.items()}


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
