"""What a run's notebook shows while it runs: a summary at its top, and the progress of a training."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dimaskdino.runs.folder import RunFolder
from dimaskdino.runs.processes import TrainingProcess, project_root
from dimaskdino.utils.errors import Stopped
from dimaskdino.utils.markdown import escape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOTEBOOK_FOLDER = "DIMASKDINO_NOTEBOOK_FOLDER"  # folder of the executed notebook, set by `run_notebook`


class Summary:
    """The top of a run's notebook: the state, the results and links, filled in when the cells below have run.

    Make it before changing the folder, since its links start from the notebook's folder. In a `with` statement it shows
    the error if the statements inside fail.

    Args:
        run: the run folder, relative to the project's folder.
    """

    def __init__(self, run: str) -> None:
        from IPython.display import display

        self._start = Path(os.environ.get(NOTEBOOK_FOLDER) or Path.cwd())
        self.folder = (project_root() / run).resolve()
        self._text = display({"text/plain": ""}, raw=True, display_id=True)
        self._figure = display({"text/plain": ""}, raw=True, display_id=True)
        self.show("running", [f"results will be in {escape(run)}"])

    def show(
        self,
        state: str,
        lines: Sequence[str],
        figure: "Figure | None" = None,
        links: Mapping[str, Path | str] | None = None,
    ) -> None:
        """Replace the content of the summary.

        Args:
            state: one word, such as finished.
            lines: paragraphs, Markdown; use `dimaskdino.utils.markdown.escape` for text that comes from data.
            figure: shown below the text.
            links: paths by their names; paths that do not exist are left out.
        """
        existing = {escape(name): project_root() / path for name, path in (links or {}).items()}
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
        if error is None:
            return
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        state = "failed"
        if isinstance(error, Stopped | KeyboardInterrupt):
            state, status = "stopped", RunFolder(self.folder).status()
            reason = status.get("reason", reason)
        self.show(state, [escape(reason)], links={"run folder": self.folder})


def show_training(
    training: TrainingProcess,
    steps: int,
    plot: "Callable[[Mapping[str, Sequence[dict[str, Any]]]], Figure]",
    refresh: float = 10,
) -> None:
    """Follow a training in a notebook: a line of progress and the loss curves, until it ends.

    Interrupting the cell stops the training after its current step, with a checkpoint.

    Args:
        training: the running process.
        steps: number of steps of the training.
        plot: draws the records of runs, by name: `dimaskdino.viz.plot_losses`.
        refresh: seconds between updates of the curves.

    Raises:
        UserError: the training failed; the message is its own.
    """
    from IPython.display import display

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
                curves.update(plot({training.folder.path.name: records}))
                drawn = time.monotonic()
    except KeyboardInterrupt:
        training.stop()
        line.update({"text/plain": f"interrupted: {training.folder.status().get('reason')}"}, raw=True)
        raise
    curves.update(plot({training.folder.path.name: records}))


def _progress(record: dict[str, Any], steps: int) -> str:
    minutes, seconds = divmod(round(record["remaining_seconds"]), 60)
    hours, minutes = divmod(minutes, 60)
    done = round(30 * record["step"] / steps)
    return (
        f"[{'#' * done}{'.' * (30 - done)}] step {record['step']}/{steps}, loss {record['loss']:.2f}, "
        f"{record['images_per_second']:.1f} images/s, {hours}:{minutes:02}:{seconds:02} left"
    )
