"""The number of computing threads follows the load of the machine."""

import os
import subprocess
import sys
import time

import pytest
import torch

from dimaskdino.utils.threads import INTERVAL, ThreadControl, thread_count

BUSY = [sys.executable, "-c", "while True: pass"]


@pytest.mark.parametrize(
    ("cores", "others", "most", "expected"),
    [
        (2, 0.0, 2, 2),
        (2, 0.3, 2, 2),
        (2, 1.0, 2, 1),
        (2, 4.0, 2, 1),  # never below one
        (8, 2.9, 8, 5),
        (64, 10.0, 4, 4),  # never above PyTorch's default
    ],
)
def test_free_cores(cores, others, most, expected):
    assert thread_count(cores, others, most) == expected


@pytest.fixture
def busy():
    """As many busy programs as there are cores."""
    programs = [subprocess.Popen(BUSY) for _ in range(os.cpu_count())]
    yield
    for program in programs:
        program.kill()
        program.wait()


@pytest.fixture
def most():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield 4
    torch.set_num_threads(before)


def test_beside_busy_programs_one_thread_computes(busy, most):
    control = ThreadControl(fixed=False)
    time.sleep(3 * INTERVAL)
    with control.adaptive_threads():
        # a busy program for each core leaves half of them at most, if this process wants to run
        assert torch.get_num_threads() <= max(1, os.cpu_count() // 2)
    assert torch.get_num_threads() == most


def test_own_work_is_no_load(most):
    """A process that uses a core itself does not take it for another program's."""
    control = ThreadControl(fixed=False)
    before = control._last
    started = time.process_time()  # other programs may have the core meanwhile
    while time.process_time() - started < 1.5 * INTERVAL:
        pass
    control.choose()
    assert control._last.own - before.own > INTERVAL  # seen, and subtracted from what is busy


def test_a_number_that_the_user_chose_stays(busy, most):
    fixed = ThreadControl(fixed=True)
    adapted = ThreadControl(fixed=False)
    torch.set_num_threads(3)
    time.sleep(3 * INTERVAL)
    for control in (fixed, adapted):  # by OMP_NUM_THREADS, by torch.set_num_threads
        with control.adaptive_threads():
            assert torch.get_num_threads() == 3


def test_the_environment_fixes_the_number(monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert not ThreadControl().fixed
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert ThreadControl().fixed
