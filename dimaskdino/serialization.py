"""Reading files of tensors from anywhere without running code in them, and writing files whole or not at all."""

import collections
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dimaskdino.errors import UserError

# The callables that a pickle of arrays refers to. NumPy 2 renamed numpy.core to numpy._core.
_ALLOWED = {
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


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler of dictionaries, lists, numbers, strings and NumPy arrays that refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which arrays do not need")
        return _ALLOWED[module, name]


def read_pt(path: Path) -> Any:
    """Read a file written by `torch.save`. No code in the file is run.

    Raises:
        UserError: the file is missing, truncated, or holds more than tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"the checkpoint {path} does not exist") from None
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path} cannot be read as a checkpoint: it may be truncated or hold more than tensors "
            f"({_first_line(error)})"
        ) from None


def read_pkl(path: Path) -> Any:
    """Read a pickle of NumPy arrays, the format of detectron2's model zoo (`.pkl`). No code in the file is run.

    Raises:
        UserError: the file is missing, truncated, or holds more than arrays and plain values.
    """
    try:
        return _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except FileNotFoundError:
        raise UserError(f"the checkpoint {path} does not exist") from None
    except (OSError, EOFError, ValueError, TypeError, KeyError, IndexError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path} cannot be read as a pickle of arrays: it may be truncated or hold more than arrays "
            f"({_first_line(error)})"
        ) from None


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read, it may be truncated ({error})") from None


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict, at the top level of the file or under `model`, from `.pth`, `.pt`, `.pkl` or `.safetensors`.

    Raises:
        UserError: the file cannot be read or holds no state dict.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    content = read_pkl(path) if path.suffix == ".pkl" else read_pt(path)
    state = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(value, Tensor | np.ndarray) for value in state.values()):
        raise UserError(f"{path} holds no state dict (parameter names with tensors, at the top or under 'model')")
    return {name: torch.as_tensor(value) for name, value in state.items()}


def write_atomically(path: Path, write: Callable[[Path], None], backup: Path | None = None) -> None:
    """Write a file so that readers see the old content or the new one, never a part.

    The content is written beside the target, flushed to disk, then renamed.

    Args:
        path: the target.
        write: writes the content to the path it is given.
        backup: where the previous content of the target is kept.

    Raises:
        UserError: the file cannot be written, for example because the disk is full. Existing files are kept.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        if backup is not None and path.exists():
            os.replace(path, backup)
        os.replace(partial, path)
    # a full disk surfaces as OSError from Python, as RuntimeError or SafetensorError from the writers
    except (OSError, RuntimeError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        kept = "; the existing checkpoints are untouched" if path.exists() or (backup and backup.exists()) else ""
        raise UserError(f"cannot write {path}: {error}. Is the disk full? Free some space and resume{kept}") from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
