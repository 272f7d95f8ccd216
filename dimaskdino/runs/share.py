"""Copying a run for sharing: weights in half precision, and the records of the training."""

import json
import shutil
from pathlib import Path
from typing import Any

from dimaskdino.checkpoints import load_checkpoint, save_model
from dimaskdino.config import dump_config
from dimaskdino.runs.folder import RunFolder
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.files import new_folder, read_json_object, write_text

DIGITS = 5  # of the numbers in the metrics, the largest part of the copy besides the weights


def copy_for_sharing(run: RunFolder, target: RunFolder) -> None:
    """Copy a finished run without its resume points, with weights in half precision.

    Rounding changes results slightly, so the evaluation is not copied: evaluate the target. Absolute paths in the
    recorded command are shortened to file names, and metrics are rounded to five digits.

    Args:
        run: a finished run.
        target: a folder that does not exist yet.

    Raises:
        UserError: the run is not finished, or the target exists or cannot be written.
    """
    if run.status()["state"] != "finished":
        raise UserError(f"{run.path} is not a finished run ({run.status().get('reason', 'still running')})")
    trained = load_checkpoint(run.path)
    versions = read_json_object(run.path / "versions.json")
    command = [str(word) for word in versions.get("command", ())]
    versions["command"] = [Path(word).name if Path(word).is_absolute() else word for word in command]
    records = [json.dumps(_rounded(record)) + "\n" for record in run.read_metrics()]
    with new_folder(target.path) as path:
        save_model(RunFolder(path).model, trained.detector, trained.config, trained.classes, trained.step, half=True)
        shutil.copyfile(run.path / "status.json", path / "status.json")
        write_text(path / "config.yaml", dump_config(trained.config))
        write_text(path / "metrics.jsonl", "".join(records))
        write_text(path / "versions.json", json.dumps(versions, indent=1))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
