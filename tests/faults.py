"""Faults, each injected into a real short run: nothing is lost, and the remedy that the message names works.

    python tests/faults.py --output docs/measurements/faults.json

`test_faults.py` runs the same functions.
"""

import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nbformat
import psutil
import torch
import tyro
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from scene import (
    LONG,
    RUN_60,
    NotPossible,
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

from dimaskdino.runs.folder import RunFolder, environment
from dimaskdino.training.resume_points import load_resume_point, resume_points
from dimaskdino.utils.signals import EXIT_STOPPED

FAULTS: dict[str, Callable[[Scene], None]] = {}


def fault(title: str) -> Callable[[Callable[[Scene], None]], Callable[[Scene], None]]:
    """Register a fault under a title for people."""

    def registered(function: Callable[[Scene], None]) -> Callable[[Scene], None]:
        FAULTS[title] = function
        return function

    return registered


# ---------------------------------------------------------------- killed and stopped


@fault("SIGKILL before, between and after checkpoints")
def killed(scene: Scene) -> None:
    for reached in (1, 3, 5):
        trainer = scene.start("data.workers=1")
        wait_for_step(scene.run, reached)
        kill(trainer)
        assert scene.run.status()["state"] == "failed"
        assert "killed. Run the same command again to resume" in scene.run.status()["reason"]
    scene.resumed("data.workers=1")
    assert [record["step"] for record in scene.run.read_metrics()] == [1, 2, 3, 4, 5, 6]


def signals_at_random(scene: Scene, workers: int, processes: int) -> None:
    """Signals of three kinds at random moments, counted in steps: a fast machine must not finish before."""
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


@fault("SIGKILL, SIGTERM and SIGINT at random moments, no loader processes")
def random_signals(scene: Scene) -> None:
    signals_at_random(scene, 0, 1)


@fault("SIGKILL, SIGTERM and SIGINT at random moments, two loader processes")
def random_signals_with_loaders(scene: Scene) -> None:
    signals_at_random(scene, 2, 1)


@fault("SIGKILL, SIGTERM and SIGINT at random moments, two processes with a loader process each")
def random_signals_to_two(scene: Scene) -> None:
    signals_at_random(scene, 1, 2)


def stopped_by(number: signal.Signals, scene: Scene) -> None:
    changes = ("schedule.steps=40", "train.checkpoint_every=1000")
    trainer = scene.start(*changes)
    wait_for_step(scene.run, 2)
    trainer.send_signal(number)
    fail(trainer, f"stopped by {number.name} at step", "run the same command again to resume", code=EXIT_STOPPED)
    assert scene.run.status()["state"] == "stopped"
    assert number.name in scene.run.status()["reason"]
    state, _ = load_resume_point(scene.run.checkpoints)
    assert state is not None
    assert state["step"] >= 2
    scene.resumed(*changes)


@fault("SIGTERM, as before a pre-emption")
def terminated(scene: Scene) -> None:
    stopped_by(signal.SIGTERM, scene)


@fault("Ctrl-C")
def interrupted(scene: Scene) -> None:
    stopped_by(signal.SIGINT, scene)


@fault("SIGHUP, as when a terminal is closed")
def hung_up(scene: Scene) -> None:
    outside = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup trainings would inherit that it is ignored
    try:
        stopped_by(signal.SIGHUP, scene)
    finally:
        signal.signal(signal.SIGHUP, outside)


@fault("SIGTERM to all processes at once, loader processes first")
def all_terminated(scene: Scene) -> None:
    changes = ("schedule.steps=60", "train.checkpoint_every=1000", "data.workers=2")
    trainer = scene.start(*changes)
    wait_for_step(scene.run, 2)
    for child in [*children(trainer), psutil.Process(trainer.pid)]:
        child.terminate()
    fail(trainer, "stopped by SIGTERM at step", code=EXIT_STOPPED)
    assert scene.run.status()["state"] == "stopped"
    scene.resumed(*changes)


@fault("SIGTERM to a notebook's run: it saves, and the notebook says that it was stopped")
def notebook_terminated(scene: Scene) -> None:
    settings = json.dumps(overrides(scene.data, "schedule.steps=60", "train.checkpoint_every=1000", "data.workers=1"))
    command = ("run", "train", scene.run.path, f"config={FILE}", f"overrides={settings}")
    running = kit(*command)
    wait_for_step(scene.run, 2)
    for child in [*children(running), psutil.Process(running.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.terminate()
    fail(running, code=EXIT_STOPPED)
    assert scene.run.status()["state"] == "stopped"
    cells = nbformat.read(scene.run.path / "train.ipynb", as_version=4).cells
    shown = [o["data"].get("text/markdown", "") for cell in cells for o in cell.get("outputs", []) if "data" in o]
    assert shown[0].startswith("**stopped**"), shown
    finish(kit(*command))
    changes = ("schedule.steps=60", "train.checkpoint_every=1000", "data.workers=1")
    assert_equal_models(scene.run.model, scene.undisturbed(*changes))


@fault("SIGKILL to a notebook's kernel: the training saves and ends")
def kernel_killed(scene: Scene) -> None:
    settings = json.dumps(overrides(scene.data, *LONG))
    running = kit("run", "train", scene.run.path, f"config={FILE}", f"overrides={settings}")
    wait_for_step(scene.run, 2)
    trainer = children(running, "training.launch")[0]
    children(running, "ipykernel")[0].kill()
    fail(running, code=EXIT_STOPPED)
    wait_until(lambda: not trainer.is_running() or trainer.status() == psutil.STATUS_ZOMBIE)
    assert scene.run.status()["state"] == "stopped"
    assert load_resume_point(scene.run.checkpoints)[0]["step"] >= 2  # type: ignore[index]


@fault("SIGKILL to torchrun: its processes save and end")
def torchrun_killed(scene: Scene) -> None:
    changes = ("schedule.steps=120", "train.checkpoint_every=1000")
    trainer = scene.start(*changes, processes=2)
    wait_for_step(scene.run, 2)
    workers = children(trainer, "training.launch")
    kill(trainer)
    wait_until(lambda: not any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers), 60)
    assert scene.run.status()["state"] == "stopped"
    scene.resumed(*changes, processes=2)


@fault("a dead process among two, started again by hand")
def dead_rank(scene: Scene) -> None:
    trainer = scene.start(*RUN_60, processes=2)
    wait_for_step(scene.run, 3)
    children(trainer, "training.launch")[1].kill()
    fail(trainer)
    assert scene.run.status()["state"] == "failed"
    scene.resumed(*RUN_60, processes=2)


@fault("a dead process among two, started again by torchrun --max-restarts")
def elastic_restart(scene: Scene) -> None:
    trainer = scene.start(*RUN_60, processes=2, restarts=1)
    wait_for_step(scene.run, 3)
    children(trainer, "training.launch")[0].kill()
    finish(trainer)
    assert scene.run.status()["state"] == "finished"
    assert_equal_models(scene.run.model, scene.undisturbed(*RUN_60, processes=2))


@fault("a dead data loader process")
def dead_loader(scene: Scene) -> None:
    changes = ("data.workers=2", *RUN_60)
    trainer = scene.start(*changes)
    wait_for_step(scene.run, 3)
    children(trainer)[0].kill()
    fail(trainer, "a loader process died", "try a smaller data.workers", code=1)
    assert "loader process died" in scene.run.status()["reason"]
    scene.resumed(*changes)


@fault("another number of processes after the interruption")
def changed_world_size(scene: Scene) -> None:
    changes = ("schedule.steps=60", "train.checkpoint_every=1000", "model.backbone.norm=frozen")
    trainer = scene.start(*changes, processes=2)
    wait_for_step(scene.run, 2)
    trainer.send_signal(signal.SIGTERM)
    fail(trainer)
    reached = load_resume_point(scene.run.checkpoints)[0]["step"]  # type: ignore[index]
    twin = RunFolder(scene.folder / "twin")
    shutil.copytree(scene.run.path, twin.path)
    finish(process(twin.path, scene.data, *changes, processes=2))
    finish(scene.start(*changes, "train.accumulate=2"))  # one process that takes the pieces of the two
    one, two = ([r for r in run.read_metrics() if "loss" in r] for run in (scene.run, twin))
    assert [record["step"] for record in one] == [record["step"] for record in two] == list(range(1, 61))
    # From the same weights; after a step the rounding of another number of threads has grown.
    for step, rounding in ((reached, 1e-4), (reached + 1, 1e-2)):
        ours, theirs = one[step]["loss"], two[step]["loss"]
        assert abs(ours - theirs) < rounding * theirs, (step, ours, theirs)


@fault("another process may connect: one process listens nowhere, two on the loopback address alone")
def listening(scene: Scene) -> None:
    for processes in (1, 2):
        run = RunFolder(scene.folder / str(processes))
        trainer = process(run.path, scene.data, *LONG, processes=processes)
        wait_for_step(run, 2)
        everyone = [psutil.Process(trainer.pid), *children(trainer)]
        addresses = {c.laddr.ip for p in everyone for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
        trainer.terminate()
        fail(trainer)
        assert addresses == (set() if processes == 1 else {"127.0.0.1"})


# ---------------------------------------------------------------- disks


@fault("a disk that fills up during a training")
def full_disk(scene: Scene) -> None:
    changes = RUN_60
    with scene.disk() as disk:
        run = RunFolder(disk.path / "run")
        trainer = process(run.path, scene.data, *changes)
        wait_for_step(run, 3)
        with disk.full():
            fail(trainer, "the disk is full; free some space and run the command again", code=1)
            assert run.status()["state"] == "failed"
            assert "the disk is full" in run.status()["reason"]
            assert load_resume_point(run.checkpoints)[0] is not None
        finish(process(run.path, scene.data, *changes))
        assert_equal_models(run.model, scene.undisturbed(*changes))


@fault("a disk with room for records and none for a checkpoint")
def full_at_checkpoint(scene: Scene) -> None:
    changes = ("schedule.steps=20", "train.checkpoint_every=10")
    with scene.disk() as disk:
        run = RunFolder(disk.path / "run")
        with disk.full(left=500_000):
            fail(process(run.path, scene.data, *changes), "step_0000010.pt: the disk is full; free some space", code=1)
            assert "step_0000010.pt: the disk is full" in run.status()["reason"]
            assert list(run.checkpoints.iterdir()) == []
        finish(process(run.path, scene.data, *changes))
        assert_equal_models(run.model, scene.undisturbed(*changes))


@fault("a disk that is full before the start")
def full_at_start(scene: Scene) -> None:
    with scene.disk() as disk:
        run = RunFolder(disk.path / "run")
        with disk.full():
            fail(process(run.path, scene.data), "the disk is full; free some space and run the command again", code=1)
        finish(process(run.path, scene.data))


@fault("a full disk while a model is exported")
def full_export(scene: Scene) -> None:
    finish(scene.start())
    with scene.disk() as disk:
        target = disk.path / "exported"
        with disk.full(left=100_000):
            fail(kit("share", scene.run.path, target), "the disk is full; free some space", code=1)
            assert not target.exists()
        finish(kit("share", scene.run.path, target))
        assert RunFolder(target).model.exists()


@fault("a full disk while pictures are drawn")
def full_predict(scene: Scene) -> None:
    model = trained_file(scene.folder / "model.safetensors", scene.data)
    with scene.disk() as disk:
        command = ("predict", model, scene.data / "images" / "val", "--output", disk.path / "out", "--device", "cpu")
        with disk.full(left=20_000):
            fail(kit(*command), f"{disk.path / 'out'}", "the disk is full; free some space", code=1)
        finish(kit(*command))
        assert len(list((disk.path / "out").glob("*.png"))) == 4


@fault("a full disk during an evaluation")
def full_evaluation(scene: Scene) -> None:
    model = trained_file(scene.folder / "model.safetensors", scene.data)
    with scene.disk() as disk:
        command = ("evaluate", model, "--output", disk.path / "out", "--device", "cpu")
        with disk.full(left=20_000):
            fail(kit(*command), f"{disk.path / 'out'}", "the disk is full; free some space", code=1)
            assert not (disk.path / "out" / "layers.json").exists()
        finish(kit(*command))
        finish(kit("evaluate", model, "--output", scene.folder / "out", "--device", "cpu"))
        results = [json.loads((folder / "out" / "layers.json").read_text()) for folder in (disk.path, scene.folder)]
        assert results[0] == results[1]


@fault("a full disk while the built-in data are generated")
def full_shapes(scene: Scene) -> None:
    with scene.disk(1) as disk:
        fail(kit("data", "shapes", disk.path / "shapes", "--train", 2000, "--val", 2), "the disk is full", code=1)
        assert list(disk.path.iterdir()) == []
        finish(kit("data", "shapes", disk.path / "shapes", "--train", 20, "--val", 2))


@fault("a read-only disk")
def read_only_disk(scene: Scene) -> None:
    model = trained_file(scene.folder / "model.safetensors", scene.data)
    with scene.disk() as disk:
        shutil.copyfile(model, disk.path / "model.safetensors")
        with disk.read_only():
            advice = "the disk is read-only; choose a folder on another disk"
            fail(process(disk.path / "run", scene.data), f"{disk.path / 'run'}: {advice}", code=1)
            commands = (
                ("predict", model, scene.data / "images" / "val", "--output", disk.path / "out"),
                ("evaluate", disk.path / "model.safetensors"),
                ("data", "shapes", disk.path / "shapes", "--train", 2, "--val", 2),
            )
            for command in commands:
                fail(kit(*command), f"cannot write {disk.path}", advice, code=1)
            finish(kit("evaluate", disk.path / "model.safetensors", "--output", scene.folder / "out"))


@fault("a run on a read-only disk is looked at")
def read_only_run(scene: Scene) -> None:
    with scene.disk() as disk:
        run = RunFolder(disk.path / "run")
        finish(process(run.path, scene.data))
        with disk.read_only():
            assert "state finished" in finish(kit("status", run.path))
            finish(kit("share", run.path, scene.folder / "exported"))


# ---------------------------------------------------------------- damaged files


@fault("a newest checkpoint that was cut off: the one before is taken")
def corrupt_checkpoint(scene: Scene) -> None:
    trainer = scene.start(*RUN_60)
    wait_for_step(scene.run, 6)
    kill(trainer)
    newest = resume_points(scene.run.checkpoints)[0]
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    output = scene.resumed(*RUN_60)
    assert f"{newest.name} cannot be read" in output
    assert "resuming from the previous one" in output


@fault("a newest checkpoint of zeros, as after a power failure")
def zero_checkpoint(scene: Scene) -> None:
    trainer = scene.start(*RUN_60)
    wait_for_step(scene.run, 6)
    kill(trainer)
    newest = resume_points(scene.run.checkpoints)[0]
    newest.write_bytes(bytes(newest.stat().st_size))
    assert "resuming from the previous one" in scene.resumed(*RUN_60)


@fault("a newest checkpoint with weights that are NaN: the one before is taken")
def nan_checkpoint(scene: Scene) -> None:
    trainer = scene.start(*RUN_60)
    wait_for_step(scene.run, 6)
    kill(trainer)
    newest = resume_points(scene.run.checkpoints)[0]
    state = torch.load(newest, weights_only=True)
    state["model"]["heads.label.bias"].fill_(torch.nan)
    torch.save(state, newest)
    output = scene.resumed(*RUN_60)
    assert "heads.label.bias is not finite" in output
    assert "resuming from the previous one" in output


@fault("all checkpoints damaged: the message's remedy starts again")
def all_corrupt(scene: Scene) -> None:
    trainer = scene.start(*RUN_60)
    wait_for_step(scene.run, 6)
    kill(trainer)
    for file in resume_points(scene.run.checkpoints):
        file.write_bytes(b"")
    fail(scene.start(*RUN_60), "no other resume point is left. Delete", code=1)
    shutil.rmtree(scene.run.checkpoints)
    scene.resumed(*RUN_60)


def small_file_damaged(scene: Scene, name: str, content: bytes) -> None:
    trainer = scene.start(*RUN_60)
    wait_for_step(scene.run, 5)
    kill(trainer)
    (scene.run.path / name).write_bytes(content)
    assert scene.run.status()["state"] == "failed"
    shown = kit("status", scene.run.path)
    assert "Traceback" not in shown.communicate()[0]
    scene.resumed(*RUN_60)


@fault("an empty status.json, as after a power failure")
def empty_status(scene: Scene) -> None:
    small_file_damaged(scene, "status.json", b"")


@fault("a status.json of zeros")
def zero_status(scene: Scene) -> None:
    small_file_damaged(scene, "status.json", bytes(200))


@fault("metrics.jsonl with damaged lines")
def garbled_metrics(scene: Scene) -> None:
    small_file_damaged(scene, "metrics.jsonl", b'\x00\x00\xff{"step": 1}\n{"step": 2, "lo\n[]\n{"step": "x"}\n')


@fault("an empty config.yaml")
def empty_config(scene: Scene) -> None:
    small_file_damaged(scene, "config.yaml", b"")


@fault("a config.yaml that is not YAML")
def garbled_config(scene: Scene) -> None:
    small_file_damaged(scene, "config.yaml", b"model: {\x00\xff")


@fault("half-written files that a kill left behind")
def partial_files(scene: Scene) -> None:
    trainer = scene.start(*RUN_60)
    wait_for_step(scene.run, 5)
    kill(trainer)
    for name in (
        "status.json",
        "metrics.jsonl",
        "config.yaml",
        "checkpoints/step_0000060.pt",
        "checkpoints/model.safetensors",
    ):
        (scene.run.path / f"{name}.partial").write_bytes(b"half")
    scene.resumed(*RUN_60)


# ---------------------------------------------------------------- data and settings


@fault("an image that disappears during a training")
def vanished_image(scene: Scene) -> None:
    data = Path(shutil.copytree(scene.data, scene.folder / "data"))
    trainer = process(scene.run.path, data, *LONG)
    wait_for_step(scene.run, 3)
    images = data / "images" / "train"
    images.rename(data / "elsewhere")
    fail(trainer, "does not exist", "data.skip_bad_images=true", code=1)
    reached = load_resume_point(scene.run.checkpoints)[0]["step"]  # type: ignore[index]
    assert reached >= 3  # saved before it stopped
    (data / "elsewhere").rename(images)
    trainer = process(scene.run.path, data, *LONG)
    wait_for_step(scene.run, reached + 2)
    trainer.terminate()
    fail(trainer, code=EXIT_STOPPED)


@fault("a dataset folder that has moved")
def moved_data(scene: Scene) -> None:
    here, there = scene.folder / "here", scene.folder / "there"
    shutil.copytree(scene.data, here)
    run = scene.run
    trainer = process(run.path, here, *LONG)
    wait_for_step(run, 2)
    trainer.send_signal(signal.SIGTERM)
    fail(trainer, code=EXIT_STOPPED)
    here.rename(there)
    fail(process(run.path, here, *LONG), "here does not exist", "data.root", code=1)
    before = load_resume_point(run.checkpoints)[0]["step"]  # type: ignore[index]
    trainer = process(run.path, there, *LONG)
    wait_for_step(run, before + 2)
    trainer.send_signal(signal.SIGTERM)
    fail(trainer, code=EXIT_STOPPED)
    assert load_resume_point(run.checkpoints)[0]["step"] > before  # type: ignore[index]


@fault("two runs in one folder: the second is refused, the first not disturbed")
def second_run(scene: Scene) -> None:
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


@fault("other settings in the folder of a run: refused")
def other_settings(scene: Scene) -> None:
    finish(scene.start())
    before = scene.run.model.read_bytes()
    fail(scene.start("train.seed=5"), "holds a run with other settings (train.seed", "Use another folder", code=1)
    assert scene.run.model.read_bytes() == before


@fault("a damaged image: named, and replaced on request, in the same folder")
def damaged_image(scene: Scene) -> None:
    data = Path(shutil.copytree(scene.data, scene.folder / "data"))
    image = sorted((data / "images" / "train").iterdir())[5]
    image.write_bytes(image.read_bytes()[:60])
    fail(process(scene.run.path, data), image.name, "data.skip_bad_images=true", code=1)
    finish(process(scene.run.path, data, "data.skip_bad_images=true"))
    assert any(image.name in record.get("skipped", "") for record in scene.run.read_metrics())


@fault("a learning rate that breaks the numbers: a lower one resumes in the same folder")
def exploding(scene: Scene) -> None:
    changes = ("schedule.steps=30", "train.checkpoint_every=2", "optimizer.clip_norm=1e30")
    finish(scene.start("schedule.steps=2", "optimizer.clip_norm=1e30"))
    fail(scene.start(*changes, "optimizer.lr=1e30"), "not finite", "lower optimizer.lr", code=1)
    assert "not finite" in scene.run.status()["reason"]
    # the step before has ruined the weights already, as the second message knows
    ruined = resume_points(scene.run.checkpoints)[0]
    fail(
        scene.start(*changes, "optimizer.lr=1e-4"), f"delete {ruined} to go back to the resume point before it", code=1
    )
    ruined.unlink()
    finish(scene.start(*changes, "optimizer.lr=1e-4"))
    assert scene.run.status()["state"] == "finished"


@fault("SIGKILL during an evaluation: it resumes")
def killed_evaluation(scene: Scene) -> None:
    data = shapes_folder(scene.folder / "shapes", val=150)
    model = trained_file(scene.folder / "model.safetensors", data, "data.workers=0", "evaluation.batch_size=1")
    command = [sys.executable, "-m", "dimaskdino", "evaluate", str(model), "--device", "cpu"]
    parts = scene.folder / "evaluation" / "detections"
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
    interrupted = json.loads((scene.folder / "evaluation" / "layers.json").read_text())
    shutil.rmtree(scene.folder / "evaluation")
    subprocess.run(command, check=True, capture_output=True)
    assert interrupted == json.loads((scene.folder / "evaluation" / "layers.json").read_text())


@fault("a damaged part of an evaluation: computed again")
def damaged_part(scene: Scene) -> None:
    model = trained_file(scene.folder / "model.safetensors", scene.data, "data.workers=0")
    command = ("evaluate", model, "--device", "cpu", "--keep-detections")
    finish(kit(*command))
    result = (scene.folder / "evaluation" / "layers.json").read_text()
    part = scene.folder / "evaluation" / "detections" / "000000.safetensors"
    part.write_bytes(part.read_bytes()[:100])
    finish(kit(*command))
    assert (scene.folder / "evaluation" / "layers.json").read_text() == result


@fault("an evaluation with other settings in the same folder: nothing is mixed")
def other_evaluation(scene: Scene) -> None:
    model = trained_file(scene.folder / "model.safetensors", scene.data, "data.workers=0")
    results = {}
    for k, output in (("[20, 12]", "a"), ("[20, 6]", "a"), ("[20, 6]", "b")):
        folder = scene.folder / output
        settings = (f"model.selection.k={k}", "--output", folder, "--device", "cpu", "--keep-detections")
        finish(kit("evaluate", model, *settings))
        results[k, output] = load_file(folder / "detections" / "000000.safetensors")["decoder.2/scores"].tolist()
    assert results["[20, 6]", "a"] == results["[20, 6]", "b"] != results["[20, 12]", "a"]


@fault("clock, seed, settings and versions are on record")
def on_record(scene: Scene) -> None:
    finish(scene.start("train.seed=7"))
    status, noted = scene.run.status(), json.loads((scene.run.path / "versions.json").read_text())
    started, ended = (time.mktime(time.strptime(status[key], "%Y-%m-%dT%H:%M:%S%z")) for key in ("started", "ended"))
    times = [time.mktime(time.strptime(r["time"], "%Y-%m-%dT%H:%M:%S%z")) for r in scene.run.read_metrics()]
    assert started <= times[0] <= times[-1] <= ended <= time.time() + 1
    assert "seed: 7" in (scene.run.path / "config.yaml").read_text()
    assert noted["packages"]["torch"] == torch.__version__


@dataclass
class _Shared:
    folder: Path

    @cached_property
    def data(self) -> Path:
        return shapes_folder(self.folder / "shapes")


def main(output: Path | None = None) -> None:
    """Inject every fault and say which were survived. With a result file, the faults it has as survived are left out.

    Args:
        output: File for the result, json.
    """
    results: dict[str, str] = {}
    if output and output.exists():
        earlier = json.loads(output.read_text())["faults"]
        results = {title: earlier[title] for title in FAULTS if earlier.get(title) == "survived"}
    with tempfile.TemporaryDirectory() as folder:
        shared = _Shared(Path(folder))
        for number, (title, function) in enumerate(FAULTS.items()):
            if title in results:
                continue
            place = Path(folder) / str(number)
            place.mkdir()
            started_at = time.perf_counter()
            try:
                function(Scene(shared.data, place))
                results[title] = "survived"
            except NotPossible as error:
                results[title] = f"not possible here: {error}"
            except (AssertionError, TimeoutError, subprocess.TimeoutExpired):
                results[title] = f"FAILED: {traceback.format_exc()}"
            print(f"{results[title].split(':')[0]:>9} {time.perf_counter() - started_at:5.0f} s  {title}", flush=True)
            if output:
                ordered = {name: results[name] for name in FAULTS if name in results}
                output.write_text(json.dumps({"faults": ordered, "versions": environment()}, indent=1) + "\n")
    survived = sum(result == "survived" for result in results.values())
    print(f"{survived} of {len(results)} faults survived")
    sys.exit(any(result.startswith("FAILED") for result in results.values()))


if __name__ == "__main__":
    tyro.cli(main)
