"""Faults, each injected into a real short training: nothing may be lost, and the message must say what to do.

    python tests/faults.py --output docs/measurements/faults.json

`test_faults.py` runs the same functions.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psutil
import torch
import tyro
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from small import FILE, overrides, shapes_folder, trained_file

from dimaskdino.runs.folder import RunFolder, environment
from dimaskdino.training.resume_points import load_resume_point

STOPPED = 75
LONG = ("schedule.steps=5000", "schedule.drops=[4999]", "train.checkpoint_every=5000")


def process(folder: Path, data: Path, *changes: str, processes: int = 1, restarts: int = 0) -> subprocess.Popen:
    """A training in a process of its own, or in several under torchrun."""
    arguments = ["dimaskdino.training.launch", str(FILE), str(folder), *overrides(data, *changes)]
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
    return subprocess.Popen(
        [sys.executable, "-m", *([*launcher, "-m"] if processes > 1 else []), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads() if processes == 1 else 1)},
    )


def finish(trainer: subprocess.Popen) -> str:
    """What a training says that must end well."""
    output, _ = trainer.communicate(timeout=400)
    assert trainer.returncode == 0, output
    return output


def fail(trainer: subprocess.Popen, *wanted: str, code: int | None = None) -> str:
    """What a training says that must end badly, with these words in it."""
    output, _ = trainer.communicate(timeout=400)
    assert trainer.returncode != 0, output
    assert code is None or trainer.returncode == code, (trainer.returncode, output)
    for words in wanted:
        assert words in output, output
    return output


def wait_for_step(run: RunFolder, step: int, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if any(record["step"] >= step for record in run.read_metrics()):
            return
        time.sleep(0.05)
    raise TimeoutError(f"step {step} was not reached")


def assert_equal_models(a: Path, b: Path) -> None:
    left, right = load_file(a), load_file(b)
    assert left.keys() == right.keys()
    different = [key for key in left if not torch.equal(left[key], right[key])]
    assert different == []


def children(trainer: subprocess.Popen, word: str = "") -> list[psutil.Process]:
    """A training's own processes, without the one that watches over it."""
    found = psutil.Process(trainer.pid).children(recursive=True)
    return [child for child in found if "runs.watch" not in (line := " ".join(child.cmdline())) and word in line]


@dataclass
class Scene:
    """Where a fault happens.

    Attributes:
        data: the small shapes data; not to be changed.
        folder: an empty folder.
    """

    data: Path
    folder: Path

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.folder / "run")

    def start(self, *changes: str, processes: int = 1, restarts: int = 0) -> subprocess.Popen:
        return process(self.run.path, self.data, *changes, processes=processes, restarts=restarts)

    def undisturbed(self, *changes: str, processes: int = 1) -> Path:
        """The model that the same training ends with when nothing happens to it."""
        run = RunFolder(self.folder / "undisturbed")
        finish(process(run.path, self.data, *changes, processes=processes))
        return run.model


FAULTS: dict[str, Callable[[Scene], None]] = {}


def fault(title: str) -> Callable[[Callable[[Scene], None]], Callable[[Scene], None]]:
    """Register a fault under a title for people."""

    def registered(function: Callable[[Scene], None]) -> Callable[[Scene], None]:
        FAULTS[title] = function
        return function

    return registered


@fault("SIGKILL before, between and after checkpoints")
def killed(scene: Scene) -> None:
    for reached in (1, 3, 5):
        trainer = scene.start("data.workers=1")
        wait_for_step(scene.run, reached)
        trainer.kill()
        trainer.communicate()
        assert scene.run.status()["state"] == "failed"
        assert "killed. Run the same command again to resume" in scene.run.status()["reason"]
    finish(scene.start("data.workers=1"))
    assert_equal_models(scene.run.model, scene.undisturbed())
    assert [record["step"] for record in scene.run.read_metrics()] == [1, 2, 3, 4, 5, 6]


def stopped_by(number: signal.Signals, scene: Scene) -> None:
    changes = ("schedule.steps=40", "train.checkpoint_every=1000")
    trainer = scene.start(*changes)
    wait_for_step(scene.run, 2)
    trainer.send_signal(number)
    fail(trainer, f"stopped by {number.name} at step", "run the same command again to resume", code=STOPPED)
    assert number.name in scene.run.status()["reason"]
    state, _ = load_resume_point(scene.run.checkpoints)
    assert state is not None
    assert state["step"] >= 2
    finish(scene.start(*changes))
    assert_equal_models(scene.run.model, scene.undisturbed(*changes))


@fault("SIGTERM, as before a pre-emption: a checkpoint and an exit code that says resume")
def terminated(scene: Scene) -> None:
    stopped_by(signal.SIGTERM, scene)


@fault("Ctrl-C")
def interrupted(scene: Scene) -> None:
    stopped_by(signal.SIGINT, scene)


@fault("a full disk while a checkpoint is written")
def full_disk(scene: Scene) -> None:
    changes = ("schedule.steps=60", "train.checkpoint_every=2")
    trainer = scene.start(*changes)
    wait_for_step(scene.run, 3)
    partial = scene.run.checkpoints / "last.pt.partial"
    while not partial.is_symlink():
        with contextlib.suppress(FileExistsError):  # a checkpoint is being written at this moment
            partial.symlink_to("/dev/full")  # fails every write as a full disk does
    fail(trainer, "Is the disk full? Free some space and resume", "written before are untouched", code=1)
    assert "disk full" in scene.run.status()["reason"]
    state, remark = load_resume_point(scene.run.checkpoints)
    assert state is not None
    assert remark is None
    finish(scene.start(*changes))
    assert_equal_models(scene.run.model, scene.undisturbed(*changes))


@fault("a last checkpoint that was cut off: the one before is taken")
def corrupt_checkpoint(scene: Scene) -> None:
    trainer = scene.start("schedule.steps=60", "train.checkpoint_every=2")
    wait_for_step(scene.run, 6)
    trainer.kill()
    trainer.communicate()
    last = scene.run.checkpoints / "last.pt"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    output = finish(scene.start("schedule.steps=60", "train.checkpoint_every=2"))
    assert "last.pt cannot be read" in output
    assert "going on from the one before" in output
    assert_equal_models(scene.run.model, scene.undisturbed("schedule.steps=60", "train.checkpoint_every=2"))


@fault("a dead data loader process")
def dead_loader(scene: Scene) -> None:
    changes = ("data.workers=2", "schedule.steps=60", "train.checkpoint_every=2")
    trainer = scene.start(*changes)
    wait_for_step(scene.run, 3)
    children(trainer)[0].kill()
    fail(trainer, "a loader process died", "try a smaller data.workers", code=1)
    assert "loader process died" in scene.run.status()["reason"]
    finish(scene.start(*changes))
    assert_equal_models(scene.run.model, scene.undisturbed(*changes))


@fault("a dead process among two, started again by hand")
def dead_rank(scene: Scene) -> None:
    changes = ("schedule.steps=60", "train.checkpoint_every=2")
    trainer = scene.start(*changes, processes=2)
    wait_for_step(scene.run, 3)
    children(trainer, "dimaskdino.training.launch")[1].kill()
    fail(trainer)
    assert scene.run.status()["state"] == "failed"
    finish(scene.start(*changes, processes=2))
    assert_equal_models(scene.run.model, scene.undisturbed(*changes, processes=2))


@fault("a dead process among two, started again by torchrun --max-restarts")
def elastic_restart(scene: Scene) -> None:
    changes = ("schedule.steps=60", "train.checkpoint_every=2")
    trainer = scene.start(*changes, processes=2, restarts=1)
    wait_for_step(scene.run, 3)
    children(trainer, "dimaskdino.training.launch")[0].kill()
    finish(trainer)
    assert scene.run.status()["state"] == "finished"
    assert_equal_models(scene.run.model, scene.undisturbed(*changes, processes=2))


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
    one, two = (run.read_metrics() for run in (scene.run, twin))
    assert [record["step"] for record in one] == [record["step"] for record in two] == list(range(1, 61))
    # From the same weights; after a step the rounding of another number of threads has grown.
    for step, rounding in ((reached, 1e-4), (reached + 1, 1e-2)):
        ours, theirs = one[step]["loss"], two[step]["loss"]
        assert abs(ours - theirs) < rounding * theirs, (step, ours, theirs)


@fault("a dataset folder that has moved")
def moved_data(scene: Scene) -> None:
    here, there = scene.folder / "here", scene.folder / "there"
    shutil.copytree(scene.data, here)
    run = scene.run
    trainer = process(run.path, here, *LONG)
    wait_for_step(run, 2)
    trainer.send_signal(signal.SIGTERM)
    fail(trainer, code=STOPPED)
    here.rename(there)
    fail(process(run.path, here, *LONG), "here does not exist", "data.root", code=1)
    before = load_resume_point(run.checkpoints)[0]["step"]  # type: ignore[index]
    trainer = process(run.path, there, *LONG)
    wait_for_step(run, before + 2)
    trainer.send_signal(signal.SIGTERM)
    fail(trainer, code=STOPPED)
    assert load_resume_point(run.checkpoints)[0]["step"] > before  # type: ignore[index]


@fault("two runs in one folder: the second is refused, the first not disturbed")
def second_run(scene: Scene) -> None:
    first = scene.start("schedule.steps=60")
    wait_for_step(scene.run, 2)
    fail(scene.start("schedule.steps=60"), "another run is using", "choose another folder", code=1)
    assert scene.run.status()["state"] == "running"
    finish(first)
    assert_equal_models(scene.run.model, scene.undisturbed("schedule.steps=60"))


@fault("other settings in the folder of a run: refused")
def other_settings(scene: Scene) -> None:
    finish(scene.start())
    before = scene.run.model.read_bytes()
    fail(scene.start("train.seed=5"), "holds a run with other settings (train.seed", "Use another folder", code=1)
    assert scene.run.model.read_bytes() == before


@fault("a damaged image: named, and left out on request")
def damaged_image(scene: Scene) -> None:
    data = Path(shutil.copytree(scene.data, scene.folder / "data"))
    image = sorted((data / "images" / "train").iterdir())[5]
    image.write_bytes(image.read_bytes()[:60])
    fail(process(scene.run.path, data), image.name, "data.skip_bad_images=true", code=1)
    other = RunFolder(scene.folder / "other")
    finish(process(other.path, data, "data.skip_bad_images=true"))
    assert any(image.name in record.get("skipped", "") for record in other.read_metrics())


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
    """Inject every fault and say which were survived.

    Args:
        output: File for the result, json.
    """
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        shared = _Shared(Path(folder))
        for number, (title, function) in enumerate(FAULTS.items()):
            place = Path(folder) / str(number)
            place.mkdir()
            started = time.perf_counter()
            try:
                function(Scene(shared.data, place))
                results[title] = "survived"
            except AssertionError as error:
                results[title] = f"FAILED: {error}"
            print(f"{results[title].split(':')[0]:>9} {time.perf_counter() - started:5.0f} s  {title}", flush=True)
    survived = sum(result == "survived" for result in results.values())
    print(f"{survived} of {len(results)} faults survived")
    if output:
        output.write_text(json.dumps({"faults": results, "versions": environment()}, indent=1) + "\n")
    sys.exit(survived < len(results))


if __name__ == "__main__":
    tyro.cli(main)
