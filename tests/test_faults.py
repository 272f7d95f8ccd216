"""Faults injected into real short runs: nothing is lost, and the remedy that the message names works.

A training that was interrupted, and resumed by the same command, must end with the weights of an undisturbed one. Most
faults are marked slow, since a training in a process of its own takes a few seconds to start.
"""

import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import torch
from safetensors.torch import load_file
from scene import (
    LONG,
    RUN_60,
    Scene,
    assert_equal_models,
    children,
    fail,
    finish,
    kill,
    kit,
    process,
    wait_for_step,
    wait_until,
)
from small import FILE, overrides, shapes_folder, trained_file

from dimaskdino.cli.training import train
from dimaskdino.runs.folder import RunFolder
from dimaskdino.training.resume_points import load_resume_point, resume_points
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.signals import EXIT_STOPPED

slow = pytest.mark.slow
RARE = "train.checkpoint_every=1000"
NO_SPACE = "the disk is full; free some space"


@pytest.fixture
def scene(shapes_data, tmp_path) -> Scene:
    return Scene(shapes_data, tmp_path)


def reached(run: RunFolder) -> int:
    """The step of the newest resume point."""
    state, _ = load_resume_point(run.checkpoints)
    assert state is not None
    return state["step"]


# ---- killed and stopped


def test_sigkill_before_between_and_after_checkpoints(scene):
    for step in (1, 3, 5):
        trainer = scene.running(step)
        kill(trainer)
        assert scene.run.status()["state"] == "failed"
        assert "killed. Run the same command again to resume" in scene.run.status()["reason"]
    scene.resumed()
    assert [record["step"] for record in scene.run.read_metrics()] == [1, 2, 3, 4, 5, 6]


@slow
@pytest.mark.parametrize(("workers", "processes"), [(0, 1), (2, 1), (1, 2)])
def test_signals_at_random_moments(workers, processes, scene):
    """Moments are counted in steps: a fast machine must not finish before."""
    changes = ("schedule.steps=100", "train.checkpoint_every=3", f"data.workers={workers}")
    moments = random.Random(workers + 2 * processes)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        wanted = len(scene.run.read_metrics()) + moments.randint(1, 10)
        trainer = scene.start(*changes, processes=processes)
        wait_until(lambda wanted=wanted: len(scene.run.read_metrics()) >= wanted)
        time.sleep(moments.uniform(0, 0.1))
        trainer.send_signal(number)
        fail(trainer)
        wait_until(lambda: scene.run.status()["state"] in ("failed", "stopped"))
    scene.resumed(*changes, processes=processes)


def terminate_all(trainer: subprocess.Popen) -> None:
    """Loader processes first."""
    for running in [*children(trainer), psutil.Process(trainer.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            running.terminate()


FORTY, SIXTY = ("schedule.steps=40", RARE), ("schedule.steps=60", RARE)
AGAIN = "run the same command again to resume"
INTERRUPTIONS = [
    # settings, processes, interruption, exit status, state, messages
    (FORTY, 1, lambda run: run.send_signal(signal.SIGTERM), EXIT_STOPPED, "stopped", ("stopped by SIGTERM", AGAIN)),
    (FORTY, 1, lambda run: run.send_signal(signal.SIGINT), EXIT_STOPPED, "stopped", ("stopped by SIGINT", AGAIN)),
    (FORTY, 1, lambda run: run.send_signal(signal.SIGHUP), EXIT_STOPPED, "stopped", ("stopped by SIGHUP", AGAIN)),
    ((*SIXTY, "data.workers=2"), 1, terminate_all, EXIT_STOPPED, "stopped", ("stopped by SIGTERM", AGAIN)),
    (
        ("data.workers=2", *RUN_60),
        1,
        lambda run: children(run)[0].kill(),
        1,
        "failed",
        ("a loader process died", "try a smaller data.workers"),
    ),
    (RUN_60, 2, lambda run: children(run, "dimaskdino train")[1].kill(), None, "failed", ()),
]


@slow
@pytest.mark.parametrize(
    ("changes", "processes", "interrupt", "code", "state", "messages"),
    INTERRUPTIONS,
    ids=["SIGTERM", "Ctrl-C", "closed terminal", "SIGTERM to all", "dead loader", "dead process among two"],
)
def test_interruptions(changes, processes, interrupt, code, state, messages, scene):
    outside = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup trainings would inherit that it is ignored
    try:
        trainer = scene.running(3, *changes, processes=processes)
        interrupt(trainer)
        fail(trainer, *messages, code=code)
    finally:
        signal.signal(signal.SIGHUP, outside)
    status = scene.run.status()
    assert status["state"] == state
    assert all(message in status["reason"] for message in messages[:1])
    assert reached(scene.run) >= 2
    scene.resumed(*changes, processes=processes)


@slow
def test_sigterm_to_the_run_of_a_notebook_which_says_so(scene):
    changes = ("schedule.steps=60", RARE, "data.workers=1")
    settings = json.dumps(overrides(scene.data, *changes))
    command = ("run", "train", scene.run.path, f"config={FILE}", f"overrides={settings}")
    running = kit(*command)
    wait_for_step(scene.run, 2)
    terminate_all(running)
    fail(running, code=EXIT_STOPPED)
    assert scene.run.status()["state"] == "stopped"
    shown = []
    for cell in nbformat.read(scene.run.path / "train.ipynb", as_version=4).cells:
        shown += [output["data"].get("text/markdown", "") for output in cell.get("outputs", []) if "data" in output]
    assert shown[0].startswith("**stopped**"), shown
    finish(kit(*command))
    assert_equal_models(scene.run.model, scene.undisturbed(*changes))


@slow
def test_sigkill_to_the_kernel_of_a_notebook_saves_and_ends_the_training(scene):
    settings = json.dumps(overrides(scene.data, *LONG))
    running = kit("run", "train", scene.run.path, f"config={FILE}", f"overrides={settings}")
    wait_for_step(scene.run, 2)
    trainer = children(running, "dimaskdino train")[0]
    children(running, "ipykernel")[0].kill()
    fail(running, code=EXIT_STOPPED)
    wait_until(lambda: not trainer.is_running() or trainer.status() == psutil.STATUS_ZOMBIE)
    assert scene.run.status()["state"] == "stopped"
    assert reached(scene.run) >= 2


@slow
def test_sigkill_to_torchrun_saves_and_ends_its_processes(scene):
    changes = ("schedule.steps=120", RARE)
    trainer = scene.running(2, *changes, processes=2)
    workers = children(trainer, "dimaskdino train")
    kill(trainer)
    wait_until(lambda: not any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers), 60)
    assert scene.run.status()["state"] == "stopped"
    scene.resumed(*changes, processes=2)


@slow
def test_a_dead_process_among_two_that_torchrun_starts_again(scene):
    trainer = scene.running(3, *RUN_60, processes=2, restarts=1)
    children(trainer, "dimaskdino train")[0].kill()
    finish(trainer)
    assert scene.run.status()["state"] == "finished"
    assert_equal_models(scene.run.model, scene.undisturbed(*RUN_60, processes=2))


@slow
def test_another_number_of_processes_after_the_interruption(scene):
    changes = ("schedule.steps=60", RARE, "model.backbone.norm=frozen")
    trainer = scene.running(2, *changes, processes=2)
    trainer.send_signal(signal.SIGTERM)
    fail(trainer)
    interrupted = reached(scene.run)
    twin = RunFolder(scene.folder / "twin")
    shutil.copytree(scene.run.path, twin.path)
    finish(process(twin.path, scene.data, *changes, processes=2))
    finish(scene.start(*changes, "train.accumulate=2"))  # one process that takes the pieces of the two
    one = [record for record in scene.run.read_metrics() if "loss" in record]
    two = [record for record in twin.read_metrics() if "loss" in record]
    assert [record["step"] for record in one] == [record["step"] for record in two] == list(range(1, 61))
    # From the same weights; after a step the rounding of another number of threads has grown.
    for step, rounding in ((interrupted, 1e-4), (interrupted + 1, 1e-2)):
        ours, theirs = one[step]["loss"], two[step]["loss"]
        assert abs(ours - theirs) < rounding * theirs, (step, ours, theirs)


@slow
def test_nobody_outside_can_connect(scene):
    """One process listens nowhere, two on the loopback address alone."""
    for processes in (1, 2):
        run = RunFolder(scene.folder / str(processes))
        trainer = process(run.path, scene.data, *LONG, processes=processes)
        wait_for_step(run, 2)
        addresses = set()
        for running in [psutil.Process(trainer.pid), *children(trainer)]:
            listening = [c for c in running.net_connections() if c.status == psutil.CONN_LISTEN]
            addresses |= {connection.laddr.ip for connection in listening}
        trainer.terminate()
        fail(trainer)
        assert addresses == (set() if processes == 1 else {"127.0.0.1"})


# ---- disks


def test_a_disk_that_fills_up_during_a_training(scene):
    with scene.disk() as disk:
        run = RunFolder(disk.path / "run")
        trainer = process(run.path, scene.data, *RUN_60)
        wait_for_step(run, 3)
        with disk.full():
            fail(trainer, f"{NO_SPACE} and run the command again", code=1)
            assert run.status()["state"] == "failed"
            assert "the disk is full" in run.status()["reason"]
            assert reached(run) >= 2
        finish(process(run.path, scene.data, *RUN_60))
        assert_equal_models(run.model, scene.undisturbed(*RUN_60))


@slow
def test_a_disk_with_room_for_metrics_and_none_for_a_checkpoint(scene):
    changes = ("schedule.steps=20", "train.checkpoint_every=10")
    with scene.disk() as disk:
        run = RunFolder(disk.path / "run")
        with disk.full(left=500_000):
            fail(process(run.path, scene.data, *changes), f"step_0000010.pt: {NO_SPACE}", code=1)
            assert "step_0000010.pt: the disk is full" in run.status()["reason"]
            assert list(run.checkpoints.iterdir()) == []
        finish(process(run.path, scene.data, *changes))
        assert_equal_models(run.model, scene.undisturbed(*changes))


@slow
def test_a_disk_that_is_full_before_the_start(scene):
    with scene.disk() as disk:
        run = RunFolder(disk.path / "run")
        with disk.full():
            fail(process(run.path, scene.data), f"{NO_SPACE} and run the command again", code=1)
        finish(process(run.path, scene.data))


@slow
@pytest.mark.parametrize(
    ("command", "left", "written"),
    [
        ("share", 100_000, "out/checkpoints/model.safetensors"),
        ("predict", 20_000, "out/predictions.json"),
        ("evaluate", 20_000, "out/layers.json"),
    ],
)
def test_a_full_disk_during_other_commands(command, left, written, scene):
    if command == "share":
        finish(scene.start())
    model = trained_file(scene.folder / "model.safetensors", scene.data)

    def start(output: Path) -> subprocess.Popen:
        if command == "share":
            return kit("share", scene.run.path, output)
        images = [scene.data / "images" / "val"] if command == "predict" else []
        return kit(command, model, *images, "--output", output, "--device", "cpu")

    with scene.disk() as disk:
        output = disk.path / "out"
        with disk.full(left):
            fail(start(output), str(output), NO_SPACE, code=1)
            assert not (disk.path / written).exists()
        finish(start(output))
        finish(start(scene.folder / "out"))
        if command == "share":  # safetensors orders the metadata at random
            assert_equal_models(disk.path / written, scene.folder / written)
        else:
            assert (disk.path / written).read_bytes() == (scene.folder / written).read_bytes()
        assert len(list(output.rglob("*"))) == len(list((scene.folder / "out").rglob("*")))


@slow
def test_a_full_disk_while_the_built_in_data_are_generated(scene):
    with scene.disk(1) as disk:
        fail(kit("data", "shapes", disk.path / "shapes", "--train", 2000, "--val", 2), "the disk is full", code=1)
        assert list(disk.path.iterdir()) == []
        finish(kit("data", "shapes", disk.path / "shapes", "--train", 20, "--val", 2))


@slow
def test_a_read_only_disk(scene):
    model = trained_file(scene.folder / "model.safetensors", scene.data)
    advice = "the disk is read-only; choose a folder on another disk"
    with scene.disk() as disk:
        on_disk = Path(shutil.copyfile(model, disk.path / "model.safetensors"))
        with disk.read_only():
            fail(process(disk.path / "run", scene.data), f"{disk.path / 'run'}: {advice}", code=1)
            for command in (
                ("predict", model, scene.data / "images" / "val", "--output", disk.path / "out"),
                ("evaluate", on_disk),
                ("data", "shapes", disk.path / "shapes", "--train", 2, "--val", 2),
            ):
                fail(kit(*command), f"cannot write {disk.path}", advice, code=1)
            finish(kit("evaluate", on_disk, "--output", scene.folder / "out"))


@slow
def test_a_run_on_a_read_only_disk_can_be_looked_at(scene):
    with scene.disk() as disk:
        run = RunFolder(disk.path / "run")
        finish(process(run.path, scene.data))
        with disk.read_only():
            assert "state finished" in finish(kit("status", run.path))
            finish(kit("share", run.path, scene.folder / "exported"))


# ---- damaged files


@pytest.fixture
def killed(scene) -> Scene:
    """A run that was killed after a few checkpoints, and is resumed when the test has damaged something."""
    trainer = scene.running(6, *RUN_60)
    kill(trainer)
    return scene


def cut_off(run: RunFolder) -> None:
    newest = resume_points(run.checkpoints)[0]
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])


def zeros(run: RunFolder) -> None:
    newest = resume_points(run.checkpoints)[0]
    newest.write_bytes(bytes(newest.stat().st_size))


def nan(run: RunFolder) -> None:
    newest = resume_points(run.checkpoints)[0]
    state = torch.load(newest, weights_only=True)
    state["model"]["heads.label.bias"].fill_(torch.nan)
    torch.save(state, newest)


def half_written(run: RunFolder) -> None:
    checkpoints = ("checkpoints/step_0000060.pt", "checkpoints/model.safetensors")
    for name in ("status.json", "metrics.jsonl", "config.yaml", *checkpoints):
        (run.path / f"{name}.partial").write_bytes(b"half")


GARBLED = b'\x00\x00\xff{"step": 1}\n{"step": 2, "lo\n[]\n{"step": "x"}\n'
PREVIOUS = "resuming from the previous one"
DAMAGES = {
    "checkpoint cut off": (cut_off, ("cannot be read", PREVIOUS)),
    "checkpoint of zeros, as after a power failure": (zeros, ("cannot be read", PREVIOUS)),
    "checkpoint with NaN": (nan, ("heads.label.bias contains NaN or inf", PREVIOUS)),
    "status.json empty": (lambda run: (run.path / "status.json").write_bytes(b""), ()),
    "status.json of zeros": (lambda run: (run.path / "status.json").write_bytes(bytes(200)), ()),
    "metrics.jsonl garbled": (lambda run: (run.path / "metrics.jsonl").write_bytes(GARBLED), ()),
    "config.yaml empty": (lambda run: (run.path / "config.yaml").write_bytes(b""), ()),
    "config.yaml garbled": (lambda run: (run.path / "config.yaml").write_bytes(b"model: {\x00\xff"), ()),
    "files that a kill left half-written": (half_written, ()),
}


@slow
@pytest.mark.parametrize(("damage", "messages"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_files(damage, messages, scene):
    """A damaged newest checkpoint is left out for the one before; small files are written anew."""
    kill(scene.running(6, *RUN_60))
    damage(scene.run)
    assert scene.run.status()["state"] == "failed"
    assert "Traceback" not in kit("status", scene.run.path).communicate()[0]
    output = scene.resumed(*RUN_60)
    assert all(message in output for message in messages)


@slow
def test_all_checkpoints_damaged(scene):
    kill(scene.running(6, *RUN_60))
    for file in resume_points(scene.run.checkpoints):
        file.write_bytes(b"")
    fail(scene.start(*RUN_60), "no other resume point is left. Delete", code=1)
    shutil.rmtree(scene.run.checkpoints)
    scene.resumed(*RUN_60)


# ---- data and settings


@slow
def test_images_that_disappear_during_a_training(scene):
    data = Path(shutil.copytree(scene.data, scene.folder / "data"))
    trainer = process(scene.run.path, data, *LONG)
    wait_for_step(scene.run, 3)
    images = data / "images" / "train"
    images.rename(data / "elsewhere")
    fail(trainer, "does not exist", "data.skip_bad_images=true", code=1)
    saved = reached(scene.run)
    assert saved >= 3  # saved before it stopped
    (data / "elsewhere").rename(images)
    trainer = process(scene.run.path, data, *LONG)
    wait_for_step(scene.run, saved + 2)
    trainer.terminate()
    fail(trainer, code=EXIT_STOPPED)


@slow
def test_a_dataset_folder_that_has_moved(scene):
    here, there = scene.folder / "here", scene.folder / "there"
    shutil.copytree(scene.data, here)
    trainer = process(scene.run.path, here, *LONG)
    wait_for_step(scene.run, 2)
    trainer.send_signal(signal.SIGTERM)
    fail(trainer, code=EXIT_STOPPED)
    here.rename(there)
    fail(process(scene.run.path, here, *LONG), "here does not exist", "data.root", code=1)
    before = reached(scene.run)
    trainer = process(scene.run.path, there, *LONG)
    wait_for_step(scene.run, before + 2)
    trainer.send_signal(signal.SIGTERM)
    fail(trainer, code=EXIT_STOPPED)
    assert reached(scene.run) > before


@slow
def test_a_second_run_in_the_same_folder_is_refused(scene):
    first = scene.start("schedule.steps=60")
    wait_for_step(scene.run, 2)
    first.send_signal(signal.SIGSTOP)  # else a fast machine finishes it before the second one starts
    try:
        fail(scene.start("schedule.steps=60"), "another run is using", "choose another folder", code=1)
        assert scene.run.status()["state"] == "running"
    finally:
        first.send_signal(signal.SIGCONT)
    finish(first)
    assert_equal_models(scene.run.model, scene.undisturbed("schedule.steps=60"))


def test_other_settings_in_the_folder_of_a_run_are_refused(scene):
    run = str(scene.run.path)
    train(overrides(scene.data), str(FILE), run)
    before = scene.run.model.read_bytes()
    with pytest.raises(UserError, match=r"holds a run with other settings \(train.seed.*Use another folder"):
        train(overrides(scene.data, "train.seed=5"), str(FILE), run)
    assert scene.run.model.read_bytes() == before


def test_a_damaged_image_is_named_and_replaced_on_request(scene):
    data = Path(shutil.copytree(scene.data, scene.folder / "data"))
    image = sorted((data / "images" / "train").iterdir())[5]
    image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(UserError, match=f"{image.name}.*data.skip_bad_images=true"):
        train(overrides(data), str(FILE), str(scene.run.path))
    train(overrides(data, "data.skip_bad_images=true"), str(FILE), str(scene.run.path))
    assert any(image.name in record.get("skipped", "") for record in scene.run.read_metrics())


@slow
def test_a_learning_rate_that_breaks_the_numbers(scene):
    changes = ("schedule.steps=30", "train.checkpoint_every=2", "optimizer.clip_norm=1e30")
    finish(scene.start("schedule.steps=2", "optimizer.clip_norm=1e30"))
    fail(scene.start(*changes, "optimizer.lr=1e30"), "not finite", "lower optimizer.lr", code=1)
    assert "not finite" in scene.run.status()["reason"]
    # the step before has ruined the weights already, as the second message knows
    ruined = resume_points(scene.run.checkpoints)[0]
    advice = f"delete {ruined} to go back to the resume point before it"
    fail(scene.start(*changes, "optimizer.lr=1e-4"), advice, code=1)
    ruined.unlink()
    finish(scene.start(*changes, "optimizer.lr=1e-4"))
    assert scene.run.status()["state"] == "finished"


@slow
def test_sigkill_during_an_evaluation_which_resumes(scene):
    data = shapes_folder(scene.folder / "shapes", val=150)
    model = trained_file(scene.folder / "model.safetensors", data, "data.workers=0", "evaluation.batch_size=1")
    command = [sys.executable, "-m", "dimaskdino", "evaluate", str(model), "--device", "cpu"]
    result, parts = scene.folder / "evaluation" / "layers.json", scene.folder / "evaluation" / "detections"
    evaluation = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(parts.glob("*.safetensors")):
        assert evaluation.poll() is None
        time.sleep(0.01)
    evaluation.kill()
    evaluation.wait()
    kept = {part.name: part.stat().st_mtime_ns for part in parts.glob("*.safetensors")}
    assert len(kept) < 3
    subprocess.run([*command, "--keep-detections"], check=True, capture_output=True)
    assert kept.items() <= {part.name: part.stat().st_mtime_ns for part in parts.glob("*.safetensors")}.items()
    interrupted = json.loads(result.read_text())
    shutil.rmtree(scene.folder / "evaluation")
    subprocess.run(command, check=True, capture_output=True)
    assert interrupted == json.loads(result.read_text())


@slow
def test_a_damaged_part_of_an_evaluation_is_computed_again(scene):
    model = trained_file(scene.folder / "model.safetensors", scene.data, "data.workers=0")
    command = ("evaluate", model, "--device", "cpu", "--keep-detections")
    finish(kit(*command))
    result = (scene.folder / "evaluation" / "layers.json").read_text()
    part = scene.folder / "evaluation" / "detections" / "000000.safetensors"
    part.write_bytes(part.read_bytes()[:100])
    finish(kit(*command))
    assert (scene.folder / "evaluation" / "layers.json").read_text() == result


@slow
def test_evaluations_with_other_settings_in_the_same_folder_are_not_mixed(scene):
    model = trained_file(scene.folder / "model.safetensors", scene.data, "data.workers=0")
    results = {}
    for k, output in (("[20, 12]", "a"), ("[20, 6]", "a"), ("[20, 6]", "b")):
        folder = scene.folder / output
        settings = (f"model.selection.k={k}", "--output", folder, "--device", "cpu", "--keep-detections")
        finish(kit("evaluate", model, *settings))
        results[k, output] = load_file(folder / "detections" / "000000.safetensors")["decoder.2/scores"].tolist()
    assert results["[20, 6]", "a"] == results["[20, 6]", "b"] != results["[20, 12]", "a"]


@slow
def test_times_seed_settings_and_versions_are_on_record(scene):
    def seconds(text: str) -> float:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S%z"))

    finish(scene.start("train.seed=7"))
    status, versions = scene.run.status(), json.loads((scene.run.path / "versions.json").read_text())
    times = [seconds(record["time"]) for record in scene.run.read_metrics()]
    assert seconds(status["started"]) <= times[0] <= times[-1] <= seconds(status["ended"]) <= time.time() + 1
    assert "seed: 7" in (scene.run.path / "config.yaml").read_text()
    assert versions["packages"]["torch"] == torch.__version__
