"""Resume points: the state of a training after a step, written whole or not at all, the newest ones kept."""

import contextlib
from pathlib import Path
from typing import Any

import torch

from dimaskdino.checkpoints.model_files import first_non_finite, read_resume_point, resume_point_path, resume_points
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.files import write_atomically


def save_resume_point(folder: Path, state: dict[str, Any], keep: int = 2) -> None:
    """Write the resume point of `state["step"]`, then delete all but the newest `keep`.

    Raises:
        UserError: it cannot be written, for example because the disk is full. Existing files are kept.
    """
    try:
        write_atomically(resume_point_path(folder, state["step"]), lambda path: torch.save(state, path))
    except UserError as error:
        existing = resume_points(folder)
        raise UserError(f"{error}; {existing[0].name} is kept" if existing else str(error)) from None
    for old in (*resume_points(folder)[keep:], *folder.glob(".step_*.partial.pt")):  # the last: of killed processes
        with contextlib.suppress(OSError):
            old.unlink()


def set_aside_newer(folder: Path, step: int) -> None:
    """Rename resume points after a step, which could not be read, so that pruning never prefers them to good ones."""
    for path in resume_points(folder):
        if path.name > resume_point_path(folder, step).name:
            path.rename(path.with_name(f"{path.name}.damaged"))


def load_resume_point(folder: Path) -> tuple[dict[str, Any] | None, str | None]:
    """Load the newest readable resume point of a folder.

    Returns:
        The state, None if the folder has none; and a remark if the newest file could not be read.

    Raises:
        UserError: there are resume points but none can be read.
    """
    candidates = resume_points(folder)
    remark = None
    for path in candidates:
        try:
            state = read_resume_point(path)
            broken = first_non_finite(state["model"])
            if broken is None:
                return state, remark
            remark = remark or f"{path}: {broken} contains NaN or inf"
        except UserError as error:
            remark = remark or str(error)
    if candidates:
        raise UserError(f"{remark}; no other resume point is left. Delete {folder} to start again")
    return None, None
