"""Notebooks of runs: the summary and the progress that they show, and their execution with papermill."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from dimaskdino.config import parse_yaml
from dimaskdino.runs.folder import RunFolder
from dimaskdino.runs.processes import TrainingProcess, project_root
from dimaskdino.utils.errors import Stopped, UserError, first_line, writing
from dimaskdino.utils.files import read_json_object
from dimaskdino.utils.markdown import escape
from dimaskdino.utils.progress import PIPED, progress_bar
from dimaskdino.utils.resources import is_kit_notebook
from dimaskdino.utils.signals import STOP_SECONDS, stop_signals_interrupt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POLL_SECONDS = 1.0
NOTEBOOK_FOLDER = "DIMASKDINO_NOTEBOOK_FOLDER"  # environment variable: folder of the executed notebook
# Python types of the values that a notebook's parameter accepts, by the type that papermill infers for it
_TYPES: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "bool": bool,
    "list": list,
    "dict": dict,
}


class Summary:
    """The top of a run's notebook: state, results and links, which the cells below fill in.

    Create it before changing the working folder, since its links are relative to the notebook's folder. As a context
    manager it shows the error if the statements inside fail.

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
            lines: paragraphs in Markdown; use `dimaskdino.utils.markdown.escape` for text that comes from data.
            figure: shown below the text.
            links: paths by their names; paths that do not exist are left out.
        """
        shown = []
        for name, path in (links or {}).items():
            target = project_root() / path
            if target.exists():
                relative = os.path.relpath(target.resolve(), self._start.resolve()).replace(os.sep, "/")
                shown.append(f"[{escape(name)}]({quote(relative)})")
        text = "\n\n".join([f"**{state}**", *lines, " · ".join(shown)])
        self._text.update({"text/markdown": text, "text/plain": text}, raw=True)
        if figure is not None:
            self._figure.update(figure)

    def __enter__(self) -> "Summary":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            return
        state, reason = "failed", first_line(error)
        if isinstance(error, Stopped | KeyboardInterrupt):
            state, reason = "stopped", RunFolder(self.folder).status().get("reason", reason)
        self.show(state, [escape(reason)], links={"run folder": self.folder})


def show_training(
    training: TrainingProcess,
    steps: int,
    plot: "Callable[[Mapping[str, Sequence[dict[str, Any]]]], Figure]",
    refresh: float = 10,
) -> None:
    """Show a progress bar and the loss curves of a training in a notebook, until it ends.

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

    records = training.folder.read_metrics()
    before = records[-1]["step"] if records else 0  # of a training that is resumed
    bar = progress_bar(description="training", total=steps, initial=before, unit="step")
    curves = display({"text/plain": ""}, raw=True, display_id=True)
    drawn = time.monotonic()
    try:
        for records in training.follow():
            latest = next((record for record in reversed(records) if "loss" in record), None)
            if latest is None or latest["step"] <= bar.n:
                continue
            bar.set_postfix(loss=f"{latest['loss']:.2f}", refresh=False)
            bar.update(latest["step"] - bar.n)
            if time.monotonic() - drawn >= refresh:
                curves.update(plot({training.folder.path.name: records}))
                drawn = time.monotonic()
    except KeyboardInterrupt:
        training.stop()
        raise
    finally:
        bar.close()
    curves.update(plot({training.folder.path.name: records}))


def parse_parameters(assignments: Sequence[str]) -> dict[str, Any]:
    """Parse `name=value` texts, whose values are YAML.

    Raises:
        UserError: a text is not of that form.
    """
    values = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"'{assignment}' is not of the form name=value")
        values[name] = parse_yaml(text, f"the value of {name}")
    return values


def _check_parameters(notebook: Path, values: Mapping[str, Any]) -> None:
    """Check that a notebook declares these parameters with these types; papermill only warns."""
    import nbformat
    import papermill  # imported here, since only notebooks need it

    if not notebook.exists():
        raise UserError(f"the notebook {notebook} does not exist")
    try:
        declared = papermill.inspect_notebook(str(notebook))
    except (ValueError, LookupError, AttributeError, nbformat.ValidationError) as error:
        raise UserError(f"{notebook} is not a notebook of Jupyter: {first_line(error)}") from None
    for name, value in values.items():
        if name not in declared:
            raise UserError(f"{notebook.name} has no parameter '{name}'; it has {', '.join(declared)}")
        wanted = declared[name]["inferred_type_name"].split("[")[0]
        is_bool_for_number = isinstance(value, bool) and wanted in ("int", "float")
        if is_bool_for_number or not isinstance(value, _TYPES.get(wanted, object)):
            raise UserError(f"{notebook.name}: parameter '{name}' must be of type {wanted}, got {value!r}")


def kernel_config(imports_from_folder: bool = False) -> Any:
    """Return the configuration of notebook kernels.

    Messages are encrypted, since a kernel otherwise warns at every start. A kernel logs nothing, since it would log
    its own interrupt at shutdown as an error; errors of cells stand in the notebook.

    Args:
        imports_from_folder: let the notebook import modules from the current folder, after all installed ones.
    """
    import zmq
    from traitlets.config import Config

    arguments = [f"--IPKernelApp.log_level={logging.CRITICAL}", "--IPKernelApp.ignore_cwd=True"]
    if imports_from_folder:
        restored = f"os.environ['PYTHONSAFEPATH'] = {os.environ.get('PYTHONSAFEPATH', '')!r}"  # for its own processes
        arguments.append(f"--IPKernelApp.exec_lines=import os, sys; sys.path.append(''); {restored}")
    settings: dict[str, Any] = {"NotebookClient": {"extra_arguments": arguments}}
    if zmq.has("curve"):
        settings["KernelManager"] = {"transport_encryption": "auto"}
    return Config(settings)


def run_notebook(notebook: Path, folder: Path, parameters: Mapping[str, Any], echo: bool = False) -> Path:
    """Execute a notebook with parameters, and write the executed copy to a folder.

    Args:
        notebook: the notebook.
        folder: folder for the executed copy.
        parameters: values of its parameters; the others keep their defaults.
        echo: show the notebook's standard error, which has the progress bars, in the terminal.

    Returns:
        The executed notebook.

    Raises:
        UserError: a parameter is unknown or has the wrong type, or the notebook failed. The message is the notebook's
            own, and the status of the folder has it too.
        Stopped: a signal asked to stop, and the training in the folder has saved its state.
    """
    try:
        import ipykernel  # noqa: F401  # the kernel needs it
        import papermill
        from nbclient.exceptions import DeadKernelError
    except ImportError as error:
        raise UserError(f"notebooks need {error.name}: pip install 'dimaskdino[notebooks]'") from None

    output = folder / notebook.name
    _check_parameters(notebook, parameters)
    if os.path.lexists(output):
        was_run = "papermill" in read_json_object(output).get("metadata", {})
        if not was_run or output.resolve() == notebook.resolve():
            raise UserError(f"{output} would be replaced, and is no result of an earlier run; choose another folder")
        output.unlink()  # papermill would write through a link
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    started = time.time()
    os.environ[NOTEBOOK_FOLDER] = str(folder.resolve())
    in_kernel = type(sys.stderr).__module__.startswith("ipykernel")  # whose terminal is that of the outer command
    if echo and not in_kernel and not sys.stderr.isatty():
        os.environ[PIPED] = "1"
    run = RunFolder(folder)
    config = kernel_config(imports_from_folder=not is_kit_notebook(notebook))
    try:
        with stop_signals_interrupt(), _safe_path():
            papermill.execute_notebook(
                str(notebook),
                str(output),
                dict(parameters),
                progress_bar=not echo,
                stderr_file=sys.stderr if echo else None,
                kernel_name="python3",
                config=config,
            )
    except papermill.PapermillExecutionError as error:
        reason = error.evalue if error.ename in ("UserError", "Stopped") else f"{error.ename}: {error.evalue}"
        interrupted = error.ename in ("KeyboardInterrupt", "Stopped")
        status = run.status()
    except DeadKernelError:
        reason, interrupted = "the notebook's kernel died, perhaps because memory ran out", False
        status = _final_status(run)
    except KeyboardInterrupt:
        # asyncio would log that nobody waited for the interrupted cell
        logging.getLogger("asyncio").disabled = True
        reason, interrupted = "interrupted", True
        status = _final_status(run)
    else:
        return output
    where = f"the notebook as far as it got: {output}"
    if status["state"] == "stopped" and run.ended_since(started):
        _finish_summary(output, "stopped", status["reason"])
        raise Stopped(status["reason"], where)
    _finish_summary(output, "interrupted" if interrupted else "failed", reason)
    if interrupted:
        raise KeyboardInterrupt
    run.note_failure(reason, started)
    raise UserError(*reason.splitlines(), where)


@contextlib.contextmanager
def _safe_path() -> Iterator[None]:
    """Let a kernel that is started meanwhile import nothing from the current folder before its notebook runs."""
    before = os.environ.get("PYTHONSAFEPATH", "")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        os.environ["PYTHONSAFEPATH"] = before  # none if empty


def _final_status(run: RunFolder) -> dict[str, Any]:
    """Wait for the end of a run whose notebook died, since its training saves its state first."""
    end = time.monotonic() + STOP_SECONDS
    while (status := run.status())["state"] == "running" and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
    return status


def _finish_summary(notebook: Path, state: str, reason: str) -> None:
    """Correct the summary at the top of a notebook that was stopped before it could do so."""
    import nbformat

    content = nbformat.read(notebook, as_version=4)
    for cell in content.cells:
        for output in cell.get("outputs", []):
            if output.get("data", {}).get("text/markdown", "").startswith("**running**"):
                text = f"**{state}**\n\n{escape(reason)}\n\n"
                output.data["text/markdown"] = output.data["text/plain"] = text
                nbformat.write(content, notebook)
                return
