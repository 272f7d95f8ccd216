"""Running parameterised notebooks with papermill."""

import difflib
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from dimaskdino.config import load_config, parse_yaml
from dimaskdino.runs.folder import RunFolder
from dimaskdino.runs.live import NOTEBOOK_FOLDER
from dimaskdino.utils.errors import Stopped, UserError
from dimaskdino.utils.markdown import escape
from dimaskdino.utils.progress import PipedBars, can_overwrite, progress_bar
from dimaskdino.utils.signals import STOP_SECONDS, stop_signals_interrupt

POLL_SECONDS = 1.0


def notebook_parameters(notebook: Path) -> dict[str, dict[str, Any]]:
    """The parameters that a notebook's `parameters` cell declares: type, default and help by name.

    Raises:
        UserError: there is no such notebook, or the file is none.
    """
    with _no_grammar():
        import nbformat
        import papermill  # only for those who run notebooks

    if not notebook.exists():
        raise UserError(f"the notebook {notebook} does not exist")
    try:
        return papermill.inspect_notebook(str(notebook))
    except (ValueError, LookupError, AttributeError, nbformat.ValidationError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{notebook} is not a notebook of Jupyter: {reason}") from None


def parse_parameters(notebook: Path, assignments: Sequence[str]) -> dict[str, Any]:
    """`name=value` texts as parameters of a notebook; values are YAML.

    Raises:
        UserError: not of that form, a parameter that the notebook does not have, or a value of another type.
    """
    values = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"'{assignment}' is not of the form name=value")
        values[name] = _settings(text) or parse_yaml(text, f"the value of {name}")
    return check_parameters(notebook, values)


def _settings(text: str) -> list[str]:
    """The texts of a list of settings, such as `[a.b=[1, 2], c.d=3]`, which is no YAML; empty for anything else."""
    if not re.fullmatch(r"\[\s*[\w.]+=.*\]", text.strip(), re.DOTALL):
        return []
    settings, depth = [""], 0
    for letter in text.strip()[1:-1]:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth:
            settings.append("")
        else:
            settings[-1] += letter
    return [setting.strip() for setting in settings if setting.strip()]


def check_parameters(notebook: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Check that a notebook has these parameters and that the values have the types it declares."""
    declared = notebook_parameters(notebook)
    for name, value in values.items():
        if name not in declared:
            near = difflib.get_close_matches(name, declared, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else "."
            raise UserError(f"{notebook.name} has no parameter '{name}'{hint} It has {', '.join(declared)}")
        wanted = declared[name]["inferred_type_name"].split("[")[0]
        types = {"str": str, "int": int, "float": (int, float), "bool": bool, "list": list, "dict": dict}
        right = isinstance(value, types.get(wanted, object)) and not (wanted == "int" and isinstance(value, bool))
        if not right:
            raise UserError(f"{notebook.name}: parameter '{name}' must be of type {wanted}, got {value!r}")
    return dict(values)


def kernel_config() -> Any:
    """Settings of notebook kernels.

    Messages are encrypted, without which a kernel warns at every start. A kernel logs nothing: an interrupt is part of
    how it is shut down, and it would call that an error. What a cell raises is in the notebook all the same.
    """
    import zmq
    from traitlets.config import Config

    settings: dict[str, Any] = {"NotebookClient": {"extra_arguments": [f"--IPKernelApp.log_level={logging.CRITICAL}"]}}
    if zmq.has("curve"):
        settings["KernelManager"] = {"transport_encryption": "auto"}
    return Config(settings)


def run_notebook(notebook: Path, folder: Path, parameters: Mapping[str, Any], echo: bool = False) -> Path:
    """Execute a notebook with parameters; the executed copy goes into the folder.

    Args:
        notebook: the notebook.
        folder: folder for the executed copy.
        parameters: values of its parameters; the others keep their defaults.
        echo: show in the terminal what it writes to standard error, and the progress of a training in the folder.

    Returns:
        The executed notebook.

    Raises:
        UserError: unknown parameters, or the notebook failed. The message is the notebook's own, and the status of the
            folder has it too.
        Stopped: a signal asked to stop, and the training in the folder has saved its state.
    """
    with _no_grammar():
        import papermill
        from nbclient.exceptions import DeadKernelError

    output = folder / notebook.name
    values = check_parameters(notebook, parameters)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.time()
    os.environ[NOTEBOOK_FOLDER] = str(folder.resolve())
    try:
        with _TrainingProgress(folder, echo), _shown_errors(echo) as errors, stop_signals_interrupt():
            papermill.execute_notebook(
                *(str(notebook), str(output), values),
                progress_bar=not echo,
                stderr_file=errors,
                kernel_name="python3",
                config=kernel_config(),
            )
    except papermill.PapermillExecutionError as error:
        reason = f"{error.ename}: {error.evalue}" if error.ename not in ("UserError", "Stopped") else error.evalue
        interrupted = error.ename in ("KeyboardInterrupt", "Stopped")
        status = RunFolder(folder).status()
    except DeadKernelError:
        reason, interrupted = "the notebook's kernel died, perhaps because memory ran out", False
        status = _final_status(RunFolder(folder))
    except KeyboardInterrupt:
        reason, interrupted = "interrupted", True
        status = _final_status(RunFolder(folder))
    else:
        return output
    where = f"the notebook as far as it got: {output}"
    if status["state"] == "stopped" and RunFolder(folder).ended_since(started):
        _finish_summary(output, "stopped", status["reason"])
        raise Stopped(f"{status['reason']}\n{where}")
    _finish_summary(output, "interrupted" if interrupted else "failed", reason)
    if interrupted:
        raise KeyboardInterrupt
    RunFolder(folder).note_failure(reason, started)
    raise UserError(f"{reason}\n{where}")


@contextmanager
def _no_grammar() -> Iterator[None]:
    """Import jsonschema, which nbformat needs, without its checks of IRIs, which notebooks do not have.

    The package for these, optional for jsonschema, builds the grammar of IRIs at its import. That takes three quarters
    of the time that papermill's import takes.
    """
    name = "rfc3987_syntax"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # its import raises ImportError
    try:
        yield
    finally:
        del sys.modules[name]


@contextmanager
def _shown_errors(echo: bool) -> Iterator[TextIO | PipedBars | None]:
    """Where to show what a notebook writes to standard error."""
    if not echo or can_overwrite(sys.stderr):
        yield sys.stderr if echo else None
        return
    with closing(PipedBars(sys.stderr)) as lines:
        yield lines


def _final_status(folder: RunFolder) -> dict[str, Any]:
    """The status once the run has ended: a training whose notebook died saves its state first."""
    end = time.monotonic() + STOP_SECONDS
    while (status := folder.status())["state"] == "running" and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
    return status


def _finish_summary(notebook: Path, state: str, reason: str) -> None:
    """Correct the summary at the top of a notebook that had no time to do so."""
    import nbformat

    content = nbformat.read(notebook, as_version=4)
    for output in (output for cell in content.cells for output in cell.get("outputs", [])):
        text = output.get("data", {}).get("text/markdown", "")
        if text.startswith("**running**"):
            output.data["text/markdown"] = output.data["text/plain"] = f"**{state}**\n\n{escape(reason)}\n\n"
            nbformat.write(content, notebook)
            return


class _TrainingProgress:
    """Shows the training that a notebook starts in a folder as a progress bar in the terminal.

    A notebook shows its own progress to those who look at it; those who started it from a terminal see this bar. It
    reads the folder's metrics, so it works whatever process trains.
    """

    def __init__(self, folder: Path, enabled: bool) -> None:
        self._folder, self._enabled = RunFolder(folder), enabled
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        if self._enabled:
            self._seen = len(self._folder.read_metrics())
            self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._enabled:
            self._ended.set()
            self._thread.join()

    def _follow(self) -> None:
        bar = None
        while True:
            ended = self._ended.wait(POLL_SECONDS)
            records = [record for record in self._folder.read_metrics()[self._seen :] if "loss" in record]
            if records and bar is None:
                steps = load_config(self._folder.path / "config.yaml").schedule.steps
                bar = progress_bar(description="training", total=steps, initial=records[0]["step"], unit="step")
            if records and bar is not None and records[-1]["step"] > bar.n:
                bar.set_postfix(loss=f"{records[-1]['loss']:.2f}", refresh=False)
                bar.update(records[-1]["step"] - bar.n)
            finished = bar is not None and bar.n >= (bar.total or 0)
            if ended or finished:
                break
        if bar is not None:
            bar.close()
