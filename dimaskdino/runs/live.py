"""What a run's notebook shows while it runs: a summary at its top, and the progress of a training."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dimaskdino.runs.launch import TrainingProcess, project_root

if TYPE_CHECKING:  # the training processes themselves do without
    from matplotlib.figure import Figure

NOTEBOOK_FOLDER = "DIMASKDINO_NOTEBOOK_FOLDER"  # where the executed notebook will lie, set by `run_notebook`


class Summary:
    """The top of a run's notebook: what came of the run, filled in when the cells below have done their work.

    Make it before changing the folder, since its links start from where the notebook lies. Used in a `with` statement,
    it says what went wrong if the statements inside fail.

    Args:
        run: the run folder, from the project's folder.
    """

    def __init__(self, run: str) -> None:
        from IPython.display import display

        self._start = Path(os.environ.get(NOTEBOOK_FOLDER) or Path.cwd())
        self.folder = (project_root() / run).resolve()
        self._text = display({"text/plain": ""}, raw=True, display_id=True)
        self._figure = display({"text/plain": ""}, raw=True, display_id=True)
        self.show("running", [f"results will be in `{run}`"])

    def show(
        self,
        state: str,
        lines: Sequence[str],
        figure: "Figure | None" = None,
        links: Mapping[str, Path | str] | None = None,
    ) -> None:
        """Fill it in.

        Args:
            state: one word, such as finished.
            lines: what there is to say, Markdown.
            figure: shown below.
            links: paths by their names; those that do not exist are left out.
        """
        existing = {name: project_root() / path for name, path in (links or {}).items()}
        shown = [f"[{name}]({self._link(path)})" for name, path in existing.items() if path.exists()]
        text = "\n\n".join([f"**{state}**", *lines, " · ".join(shown)])
        self._text.update({"text/markdown": text, "text/plain": text}, raw=True)
        if figure is not None:
            self._figure.update(figure)

    def _link(self, path: Path) -> str:
        return os.path.relpath(path.resolve(), self._start.resolve()).replace(os.sep, "/")

    def __enter__(self) -> "Summary":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.show("failed", [reason], links={"run folder": self.folder})


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
