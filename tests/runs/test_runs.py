"""Run folders, training processes, and the run notebooks executed by papermill."""

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import papermill
import psutil
import pytest
from jupyter_client.manager import start_new_kernel
from small import FILE, overrides, settings, trained_file
from torch.distributed.run import parse_args as torchrun_arguments

from dimaskdino.cli.training import status
from dimaskdino.evaluation.layerwise_ap import LayerwiseAP
from dimaskdino.runs import RunFolder, TrainingProcess, distinct_names, processes
from dimaskdino.runs.notebooks import kernel_config, parse_parameters, run_notebook
from dimaskdino.training.resume_points import load_resume_point
from dimaskdino.utils.errors import Stopped, UserError
from dimaskdino.utils.signals import StopRequest

NOTEBOOKS = Path(__file__).parent.parent.parent / "notebooks" / "runs"


def test_status_after_success_and_failure(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert "holds no run" in folder.status()["reason"]
    with folder.running():
        assert folder.status()["state"] == "running"
    assert folder.status()["state"] == "finished"
    with pytest.raises(ZeroDivisionError), folder.running():
        1 / 0  # noqa: B018
    assert folder.status() | {"state": "failed", "reason": "division by zero"} == folder.status()


def test_status_does_not_import_pytorch(tmp_path):
    folder = RunFolder(tmp_path)
    with folder.running(), folder.metrics(0) as metrics:
        metrics.write({"step": 1, "loss": 2.0})
    code = (
        "import sys\nfrom pathlib import Path\nfrom dimaskdino.cli.training import status\n"
        "status(Path(sys.argv[1]))\nprint('torch' in sys.modules)"
    )
    seen = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "step 1, loss 2.00" in seen.stdout
    assert seen.stdout.endswith("False\n")


def running_elsewhere(folder, child: str = "") -> subprocess.Popen:
    """A process whose run in the folder has started."""
    code = (
        "from dimaskdino.runs.folder import RunFolder\nimport os, time\n"
        f"with RunFolder({str(folder)!r}).running():\n {child}\n print('started', flush=True)\n time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    return process


def test_a_killed_run_has_failed_unless_its_lock_cannot_be_checked(tmp_path):
    folder, file = RunFolder(tmp_path), tmp_path / "status.json"
    process = running_elsewhere(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert folder.status()["state"] == "running"
    folder.note_failure("another run is using the folder", time.time())  # from a notebook that was refused
    assert folder.status()["state"] == "running"
    process.kill()
    process.communicate()
    assert folder.status()["state"] == "failed"
    assert "killed. Run the same command again" in folder.status()["reason"]
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}  # status() writes nothing
    written = json.loads(file.read_text())
    for changes, state in (
        ({"host": "container"}, "failed"),  # another container on this machine: it sees the same lock
        ({"boot": "earlier"}, "failed"),  # this machine before it restarted
        ({"host": "node7", "boot": "theirs"}, "running"),  # another machine, whose locks may be invisible here
    ):
        file.write_text(json.dumps(written | changes))
        status = folder.status()
        assert status["state"] == state
        assert ("its lock cannot be checked from this machine" in status.get("note", "")) == (state == "running")


def test_a_forked_process_does_not_hold_the_lock(tmp_path):
    process = running_elsewhere(tmp_path, "os.fork() or (time.sleep(60), os._exit(0))")
    [helper] = psutil.Process(process.pid).children()
    try:
        process.kill()
        process.wait()
        assert RunFolder(tmp_path).status()["state"] == "failed"
        with RunFolder(tmp_path).running():
            assert RunFolder(tmp_path).status()["state"] == "running"
        assert helper.is_running()
    finally:
        helper.kill()
        process.stdout.close()


@pytest.mark.parametrize("content", ["", "{", "[]", '"running"', '{"state": 3}', "\x00\x00"])
def test_damaged_small_files_are_ignored(tmp_path, shapes_data, content):
    folder = RunFolder(tmp_path)
    config = settings(shapes_data)
    with folder.running():
        folder.write_config(config)
    for name in ("status.json", "metrics.jsonl", "config.yaml", "versions.json"):
        (tmp_path / name).write_text(content)
    assert folder.status()["state"] == "failed"
    assert "resume from the last checkpoint" in folder.status()["reason"]
    assert folder.read_metrics() == []
    with folder.running(), folder.metrics(0) as metrics:
        folder.write_config(config)
        metrics.write({"step": 1})
    assert folder.status()["state"] == "finished"
    assert [record["step"] for record in folder.read_metrics()] == [1]


def test_a_damaged_configuration_is_checked_against_the_checkpoints_copy(tmp_path, shapes_data):
    folder = RunFolder(tmp_path)
    trained_file(folder.model, shapes_data, "data.shapes=null")
    (tmp_path / "config.yaml").write_text("model: {")
    folder.check_config(settings(shapes_data))
    with pytest.raises(UserError, match=r"other settings \(model\.classes"):
        folder.check_config(settings(shapes_data, "model.classes=9"))


def test_a_refused_command_does_not_change_a_finished_run(tmp_path):
    folder = RunFolder(tmp_path)
    with folder.running():
        pass
    with pytest.raises(UserError), folder.running(keep_finished=True):
        raise UserError("other settings")
    assert folder.status()["state"] == "finished"
    with pytest.raises(UserError), folder.running(keep_finished=True), folder.metrics(0):  # the training changes it
        raise UserError("the disk is full")
    assert folder.status()["state"] == "failed"


BEFORE, LATER = -60, 2  # seconds from the end of the run to the start of the notebook


@pytest.mark.parametrize(
    ("error", "began", "state", "reason"),
    [
        (None, LATER, "finished", None),  # the notebook was refused: the earlier run stays finished
        (None, BEFORE, "failed", "a figure"),  # the training went well, a later cell did not
        (Stopped("stopped by SIGTERM"), BEFORE, "stopped", "stopped by SIGTERM"),
        (Stopped("stopped by SIGTERM"), LATER, "failed", "a figure"),  # an earlier stop explains nothing
        (UserError("the disk is full"), BEFORE, "failed", "the disk is full"),
        (UserError("the disk is full"), LATER, "failed", "a figure"),
    ],
)
def test_a_notebook_that_fails_leaves_the_reason_of_the_run(error, began, state, reason, tmp_path):
    folder = RunFolder(tmp_path)
    with contextlib.suppress(UserError, Stopped), folder.running():
        if error is not None:
            raise error
    folder.note_failure("a figure", time.time() + began)
    assert (folder.status()["state"], folder.status().get("reason")) == (state, reason)


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as request:
            signal.raise_signal(signal.SIGHUP)
            assert request.received is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOLCK, ""), "does not support this; choose a folder on a local disk"),
        (OSError(errno.ESTALE, ""), "lost the file; run the command again"),
        (OSError(errno.EROFS, ""), "is read-only; choose a folder on another disk"),
        (NotImplementedError(), "has no locks; choose a folder on a local disk"),
    ],
)
def test_file_systems_that_cannot_lock(error, advice, tmp_path, monkeypatch):
    def acquire(*_, **__):
        raise error

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    with pytest.raises(UserError, match=rf"cannot lock {tmp_path}: .*{advice}"), RunFolder(tmp_path).running():
        pass
    (tmp_path / "lock").touch()
    (tmp_path / "status.json").write_text('{"state": "running", "host": "node7"}')
    assert "written on node7" in RunFolder(tmp_path).status()["note"]


def test_runs_of_the_same_name_get_distinct_names(tmp_path):
    assert distinct_names(["runs/a", "runs/b"]) == ["a", "b"]
    assert distinct_names(["x/runs/a", "y/runs/a", "b"]) == [
        "x/runs/a",
        "y/runs/a",
        f"{Path.cwd().parts[-2]}/{Path.cwd().name}/b",
    ]
    assert distinct_names([]) == []
    with pytest.raises(UserError, match="listed twice"):
        distinct_names(["runs/a", Path("runs/a")])


def wait_until(condition, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_metrics_after_the_resume_point_are_dropped(tmp_path):
    folder = RunFolder(tmp_path)
    with folder.metrics(0) as metrics:
        for step in (1, 2, 3):
            metrics.write({"step": step, "loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a line
    with folder.metrics(2) as metrics:
        metrics.write({"step": 3, "loss": 2.0})
    assert [(r["step"], r["loss"]) for r in folder.read_metrics()] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_leaving_a_training_early_stops_it_with_a_checkpoint(shapes_data, tmp_path):
    changes = overrides(shapes_data, "schedule.steps=5000", "train.checkpoint_every=5000")
    with TrainingProcess(str(FILE), tmp_path, changes) as training:
        for records in training.follow():
            if records:
                break
    assert "SIGTERM" in RunFolder(tmp_path).status()["reason"]
    assert load_resume_point(tmp_path / "checkpoints")[0]["step"] >= 1


def test_a_training_that_fails_says_why(tmp_path, monkeypatch):
    code = (
        "import sys\nfrom dimaskdino.runs.folder import RunFolder\nfrom dimaskdino.utils.errors import UserError\n"
        "print('the last line')\nwith RunFolder(sys.argv[-1]).running():\n raise UserError('the disk is full')"
    )
    # a process that fails at once, without importing PyTorch
    command = [sys.executable, "-c", code]
    monkeypatch.setattr(processes, "launch_command", lambda arguments, count: ([*command, *arguments], {}))
    with (
        TrainingProcess("any.yaml", tmp_path) as training,
        pytest.raises(UserError, match=r"did not finish: the disk is full\nend of train.log:\nthe last line"),
    ):
        list(training.follow())


def test_a_run_that_ends_during_status_has_not_vanished(tmp_path):
    inside = threading.Event()

    def run() -> None:
        with contextlib.suppress(Stopped), RunFolder(tmp_path).running():
            inside.set()
            time.sleep(0.1)  # the reader below waits for the lock by then
            raise Stopped("stopped by a test")

    thread = threading.Thread(target=run)
    thread.start()
    assert inside.wait(10)
    states = [RunFolder(tmp_path).status()["state"]]
    while states[-1] == "running":
        states.append(RunFolder(tmp_path).status()["state"])
    thread.join()
    assert set(states) <= {"running", "stopped"}


@pytest.mark.slow
def test_interrupting_the_cell_stops_the_training_with_a_checkpoint(shapes_data, tmp_path):
    changes = overrides(shapes_data, "schedule.steps=5000", "train.checkpoint_every=5000")
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        client.execute(
            "from dimaskdino.runs import TrainingProcess, show_training\n"
            "from dimaskdino.viz import plot_losses\n"
            f"with TrainingProcess({str(FILE)!r}, {str(tmp_path)!r}, {changes!r}) as training:\n"
            "    show_training(training, 5000, plot_losses)"
        )
        folder = RunFolder(tmp_path)
        wait_until(lambda: bool(folder.read_metrics()))
        manager.interrupt_kernel()
        wait_until(lambda: folder.status()["state"] != "running")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert folder.status()["state"] == "stopped"
    assert "SIGTERM" in folder.status()["reason"]
    assert load_resume_point(folder.checkpoints)[0]["step"] >= 1


def test_parameters_that_a_notebook_does_not_have(tmp_path):
    notebook = NOTEBOOKS / "train.ipynb"
    with pytest.raises(UserError, match="no parameter 'confg'; it has config, run"):
        run_notebook(notebook, tmp_path, {"confg": "x"})
    with pytest.raises(UserError, match="'processes' must be of type int, got 'two'"):
        run_notebook(notebook, tmp_path, parse_parameters(["processes=two"]))
    with pytest.raises(UserError, match="does not exist"):
        run_notebook(NOTEBOOKS / "none.ipynb", tmp_path, {})
    with pytest.raises(UserError, match="not of the form name=value"):
        parse_parameters(["processes"])
    parsed = parse_parameters(["processes=2", "overrides=[a=1, 'k=[80, 40]']"])
    assert parsed == {"processes": 2, "overrides": ["a=1", "k=[80, 40]"]}


@pytest.mark.parametrize("notebook", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebooks_are_stored_without_outputs(notebook):
    content = nbformat.read(notebook, as_version=4)
    nbformat.validate(content)
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in content.cells)
    assert any("parameters" in cell.metadata.get("tags", []) for cell in content.cells)


def summary_of(notebook):
    """Text of the summary, which is the first output of a run's notebook."""
    cells = nbformat.read(notebook, as_version=4).cells
    output = next(output for cell in cells for output in cell.get("outputs", []) if output.output_type != "stream")
    return output["data"]["text/markdown"]


@pytest.mark.slow
def test_train_evaluate_and_compare_notebooks(shapes_data, tmp_path):
    run = tmp_path / "mine"
    parameters = {"config": str(FILE), "run": str(run), "overrides": overrides(shapes_data)}
    run_notebook(NOTEBOOKS / "train.ipynb", run, parameters)
    assert RunFolder(run).status()["state"] == "finished"
    evaluation = run / "evaluation"
    run_notebook(NOTEBOOKS / "evaluate.ipynb", evaluation, {"model": str(run), "run": str(evaluation)})
    assert RunFolder(evaluation).status()["state"] == "finished"
    result = LayerwiseAP.load(evaluation / "layers.json")
    assert list(result.stages) == [
        *("first_selection", "token_interaction.0", "token_interaction.1"),
        *("decoder.0", "decoder.1", "decoder.2"),
    ]
    assert result.images == 4
    compare = {"runs": [str(run)], "run": str(tmp_path / "compare")}
    executed = run_notebook(NOTEBOOKS / "compare.ipynb", tmp_path / "compare", compare)
    figures = [*run.rglob("*.png"), *(tmp_path / "compare").rglob("*.png")]
    assert len(figures) == 4
    inside = {"models": [str(run)], "run": str(tmp_path / "inside"), "images": 2}
    diagnostics = run_notebook(NOTEBOOKS / "diagnostics.ipynb", tmp_path / "inside", inside)
    assert json.loads((tmp_path / "inside" / "diagnostics.json").read_text())["mine"]["objects"] > 0
    for notebook, words in (
        (run / "train.ipynb", "step 6 of 6"),
        (evaluation / "evaluate.ipynb", "imbalance of the first decoder layer:"),
        (executed, "mine: box AP"),
        (diagnostics, "objects with a token"),
    ):
        text = summary_of(notebook)
        assert text.startswith("**finished**")
        assert words in text
        links = re.findall(r"\]\(([^)]+)\)", text)
        assert links
        assert all((notebook.parent / link).exists() for link in links)
    outputs = [o for cell in nbformat.read(executed, as_version=4).cells for o in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
def test_a_notebook_that_fails_says_why_and_keeps_what_it_did(shapes_data, tmp_path, capfd):
    parameters = {"config": str(FILE), "run": str(tmp_path), "overrides": ["train.batchsize=3"]}
    with pytest.raises(UserError, match=r"did you mean 'train.batch_size'.*\n.*as far as it got"):
        run_notebook(NOTEBOOKS / "train.ipynb", tmp_path, parameters)
    assert "encryption" not in capfd.readouterr().err  # the kernel's warning about plain text
    assert "train.batch_size" in RunFolder(tmp_path).status()["reason"]
    text = summary_of(tmp_path / "train.ipynb")
    assert text.startswith("**failed**")
    assert r"train.batch\_size" in text


def test_a_notebook_that_ends_well_logs_no_errors(tmp_path, capfd):
    """A kernel is interrupted before it is shut down, and some kernels log that as an error."""
    cell = nbformat.v4.new_code_cell("import torch, dimaskdino\nprint('done')")
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel}), tmp_path / "x.ipynb")
    done = papermill.execute_notebook(str(tmp_path / "x.ipynb"), None, progress_bar=False, config=kernel_config())
    assert done.cells[0].outputs[0].text == "done\n"
    assert "ERROR" not in capfd.readouterr().err


def test_torchrun_passes_every_option_on():
    arguments = ["train", "--config", "c", "--run", "runs/a", "--processes", "2", "train.seed=1"]
    command, _ = processes.launch_command(arguments, 2)
    parsed = torchrun_arguments(command[command.index("torch.distributed.run") + 1 :])
    assert (parsed.training_script, parsed.training_script_args) == ("dimaskdino", arguments)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no process groups with signals")
def test_ctrl_c_during_a_notebook_prints_one_line(tmp_path):
    cells = [nbformat.v4.new_code_cell("run = ''", metadata={"tags": ["parameters"]})]
    cells.append(nbformat.v4.new_code_cell("import sys, time\nprint('here', file=sys.stderr)\ntime.sleep(60)"))
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "slow.ipynb")
    command = [sys.executable, "-m", "dimaskdino", "run", "slow.ipynb", "out"]
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert running.stderr is not None
    while "here" not in running.stderr.readline():
        assert running.poll() is None
    os.killpg(running.pid, signal.SIGINT)
    rest = running.communicate(timeout=60)[1]
    assert running.returncode == 130
    assert rest.splitlines() == ["dimaskdino: interrupted"]


def test_paths_are_relative_to_the_current_folder_outside_a_clone(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    assert processes.project_root() == tmp_path / "project"
    monkeypatch.chdir(FILE.parent)
    assert processes.project_root() == FILE.parents[2]


def test_a_run_that_was_only_configured_has_not_failed(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(FILE.read_text())
    assert status(tmp_path) == 0
    assert f"not started, reason start it with 'dimaskdino train --run {tmp_path}'" in capsys.readouterr().out
