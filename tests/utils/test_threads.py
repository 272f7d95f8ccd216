"""The number of computing threads follows the load of the machine."""

import os
import subprocess
import sys
import time

import pytest
import torch
from small import trained_file

from dimaskdino import load
from dimaskdino.evaluation import layerwise_ap, predict, upper_bounds
from dimaskdino.utils.threads import INTERVAL, ThreadControl, adaptive_threads, thread_count

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


def test_all_of_an_evaluation_and_a_prediction_uses_the_free_cores(shapes_data, tmp_path, monkeypatch):
    """Not only the forward pass: postprocessing beside a busy program once took four times as long as on one thread."""
    control = adaptive_threads.__self__
    monkeypatch.setattr(control, "fixed", False)
    monkeypatch.setattr(control, "most", 2)
    monkeypatch.setattr(control, "choose", lambda: 1)
    seen = {}

    def watched(module, name):
        original = getattr(module, name)

        def call(*arguments, **options):
            seen.setdefault(f"{module.__name__}.{name}", set()).add(torch.get_num_threads())
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    for module in (layerwise_ap, predict, upper_bounds):
        watched(module, "postprocess")
    watched(predict, "resize_image")
    watched(upper_bounds, "true_stage")
    model = load(trained_file(tmp_path / "model.safetensors", shapes_data), device="cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        layerwise_ap.evaluate_layers(model)
        model.predict(torch.zeros(3, 64, 64, dtype=torch.uint8))
    finally:
        torch.set_num_threads(before)
    assert len(seen) == 5
    assert set.union(*seen.values()) == {1}
