"""Export of a run for sharing: weights in half precision, and the records of the training."""

import json
import shutil
from pathlib import Path
from typing import Any

from dimaskdino.checkpoints import load_checkpoint, save_model
from dimaskdino.errors import UserError
from dimaskdino.runs.folder import RunFolder

DIGITS = 5  # of the numbers in the metrics, which are most of what is written besides the weights


def export(run: RunFolder, target: RunFolder) -> None:
    """Copy a finished run without its resume points, the weights in half precision.

    Rounding changes results slightly, so the evaluation is not copied: evaluate the target. Absolute paths in the
    recorded command are shortened to file names, and metrics to five digits.

    Args:
        run: a finished run.
        target: a folder that does not exist.

    Raises:
        UserError: the run is not finished, or the target exists or cannot be written.
    """
    if run.status()["state"] != "finished":
        raise UserError(f"{run.path} is not a finished run ({run.status().get('reason', 'still running')})")
    if target.path.exists():
        raise UserError(f"{target.path} exists already; choose another folder or delete it")
    trained = load_checkpoint(run.path)
    save_model(target.model, trained.detector, trained.config, trained.classes, trained.step, half=True)
    try:
        for name in ("config.yaml", "status.json"):
            shutil.copyfile(run.path / name, target.path / name)
        records = [json.dumps(_rounded(record)) + "\n" for record in run.read_metrics()]
        (target.path / "metrics.jsonl").write_text("".join(records))
        versions = json.loads((run.path / "versions.json").read_text())
        versions["command"] = [Path(word).name if Path(word).is_absolute() else word for word in versions["command"]]
        (target.path / "versions.json").write_text(json.dumps(versions, indent=1))
    except OSError as error:
        raise UserError(f"cannot copy the records of {run.path} to {target.path}: {error.strerror}") from None


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
