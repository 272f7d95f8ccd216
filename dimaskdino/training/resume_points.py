"""Resume points: the state of a training, written whole or not at all, the newest two of them kept."""

from pathlib import Path
from typing import Any

import torch

from dimaskdino.checkpoints.model_files import LAST, PREVIOUS, read_resume_point
from dimaskdino.errors import UserError
from dimaskdino.serialization import write_atomically


def save_resume_point(folder: Path, state: dict[str, Any]) -> None:
    """Write `last.pt` and keep the previous one as `previous.pt`.

    Raises:
        UserError: it cannot be written, for example because the disk is full. Existing files are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / LAST, lambda path: torch.save(state, path), backup=folder / PREVIOUS)


def load_resume_point(folder: Path) -> tuple[dict[str, Any] | None, str | None]:
    """Load the newest readable resume point of a folder.

    Returns:
        The state, None if the folder has none; and a remark if the newest file could not be read.

    Raises:
        UserError: there are resume points but none can be read.
    """
    candidates = [folder / name for name in (LAST, PREVIOUS) if (folder / name).exists()]
    remark = None
    for path in candidates:
        try:
            return read_resume_point(path), remark
        except UserError as error:
            remark = str(error)
    if candidates:
        raise UserError(f"{remark}; no other resume point is left. Delete {folder} to start again")
    return None, None
