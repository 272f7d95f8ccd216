"""The benchmark beside other programs: its load, and one measurement."""

import subprocess
import sys
import time

import psutil

from dimaskdino.benchmarks import company


def test_busy_programs_are_busy_and_end():
    with company.busy_programs(2, 5):
        end = time.monotonic() + 60
        busy: list[psutil.Process] = []
        while len(busy) < 2 and time.monotonic() < end:  # a new process still has its parent's command line
            mine = psutil.Process().children(recursive=True)
            busy = [child for child in mine if "while True" in " ".join(child.cmdline())]
        assert len(busy) == 2
        # they are polite: beside the other tests it can take them a while to get their share
        while any(child.cpu_times().user < 0.2 for child in busy):
            assert time.monotonic() < end, [child.cpu_times() for child in busy]
            time.sleep(0.1)
        assert {child.nice() - psutil.Process().nice() for child in busy} == {5}
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in busy)


def test_a_measurement_in_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(company, "SECONDS", 0.1)
    assert 0.05 < company.measure("training step of the demo", adaptive=True) < 60


def test_threads_are_set_before_torch_starts():
    program = "import torch; print(torch.get_num_threads())"
    found = subprocess.run(
        [sys.executable, "-c", program], env=company.WAYS["one thread"], capture_output=True, text=True
    )
    assert found.stdout.strip() == "1"
