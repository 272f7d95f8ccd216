"""Runs end as they are told: when a loader hangs, and where shared memory is small."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from small import FILE, overrides

from dimaskdino.checkpoints.model_files import resume_points
from dimaskdino.runs.folder import RunFolder
from dimaskdino.utils.signals import EXIT_STOPPED

HANG = """
import os, time, torch

def hang(sample):
    if os.path.exists("hang"):
        open("hangs", "w").close()
        time.sleep(1000)
    time.sleep(0.05)
    return sample
"""


def training(folder, data, *changes):
    arguments = [*overrides(data, *changes), "--config", str(FILE), "--run", "run", "--plugin", "hang"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "dimaskdino", "train", *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=-1, stderr=subprocess.STDOUT, text=True)


def wait_for(condition, running):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        assert running.poll() is None, running.communicate()[0]
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_loader_that_hangs_does_not_keep_a_run_from_stopping(shapes_data, tmp_path, number):
    (tmp_path / "hang.py").write_text(HANG)
    changes = ("data.workers=1", "schedule.steps=1000", "data.transforms=[{type: 'hang:hang'}]")
    running = training(tmp_path, shapes_data, *changes, "train.checkpoint_every=1000")
    run = RunFolder(tmp_path / "run")
    wait_for(lambda: len(run.read_metrics()) > 1, running)
    (tmp_path / "hang").touch()
    wait_for((tmp_path / "hangs").exists, running)
    steps = -1
    while steps != len(run.read_metrics()):  # what was loaded before is used up
        steps = len(run.read_metrics())
        time.sleep(1)
    started = time.monotonic()
    running.send_signal(number)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == EXIT_STOPPED, output
    assert time.monotonic() - started < 30
    assert f"stopped by {number.name} at step {steps}" in output
    assert resume_points(run.checkpoints)[0].name == f"step_{steps:07d}.pt"


def test_a_small_shared_memory_is_noticed(shapes_data, tmp_path):
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    mount = "mount -t tmpfs -o size=64m tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this process may not mount a disk")
    arguments = [*overrides(shapes_data, "data.workers=2", "schedule.steps=2"), "--config", str(FILE), "--run", "run"]
    command = [sys.executable, "-P", "-m", "dimaskdino", "train", *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    inside = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", *command]
    done = subprocess.run(inside, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "images are loaded without loader processes" in done.stderr
    assert "/dev/shm has (64 MiB); in Docker: --shm-size=2g" in done.stderr
