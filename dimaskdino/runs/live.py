"""Live progress of a training inside a notebook."""

import time
from typing import Any

from dimaskdino.runs.launch import TrainingProcess


def show_training(training: TrainingProcess, steps: int, refresh: float = 10) -> None:
    """Follow a training: a line of progress and the loss curves, until it ends.

    Interrupting stops the training after its current step, with a checkpoint.

    Args:
        training: the running process.
        steps: how many it has to do.
        refresh: seconds between updates of the curves.

    Raises:
        UserError: the training failed; the message is its own.
    """
    # needs a notebook, and matplotlib, which the training processes themselves do without
    from IPython.display import display

    from dimaskdino.viz import loss_curves

    line = display({"text/plain": f"starting; details in {training.folder.log}"}, raw=True, display_id=True)
    curves = display({"text/plain": ""}, raw=True, display_id=True)
    drawn = time.monotonic()
    records: list[dict[str, Any]] = []
    try:
        for records in training.follow():
            latest = next((record for record in reversed(records) if "loss" in record), None)
            if latest is None:
                continue
            line.update({"text/plain": _progress(latest, steps)}, raw=True)
            if time.monotonic() - drawn >= refresh:
                curves.update(loss_curves({training.folder.path.name: records}))
                drawn = time.monotonic()
    except KeyboardInterrupt:
        training.stop()
        line.update({"text/plain": f"interrupted: {training.folder.status().get('reason')}"}, raw=True)
        raise
    curves.update(loss_curves({training.folder.path.name: records}))


def _progress(record: dict[str, Any], steps: int) -> str:
    minutes, seconds = divmod(round(record["remaining_seconds"]), 60)
    hours, minutes = divmod(minutes, 60)
    done = round(30 * record["step"] / steps)
    return (
        f"[{'#' * done}{'.' * (30 - done)}] step {record['step']}/{steps}, loss {record['loss']:.2f}, "
        f"{record['images_per_second']:.1f} images/s, {hours}:{minutes:02}:{seconds:02} left"
    )
