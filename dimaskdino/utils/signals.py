"""Signals that ask a process to stop, and the death of the process that started it, which counts as one."""

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType

import psutil

EXIT_STOPPED = 75  # EX_TEMPFAIL: run the same command again to resume
POLL_SECONDS = 0.5
STOP_SECONDS = 120  # a step of a large model on a CPU, and writing its checkpoint
_PARENT = "DIMASKDINO_PARENT"  # id of a process whose end ends this one


def stop_signals() -> tuple[signal.Signals, ...]:
    """SIGTERM and SIGINT, and SIGHUP where there is one and nobody asked to ignore it, as nohup does."""
    names = ["SIGTERM", "SIGINT"]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        names.append("SIGHUP")
    return tuple(signal.Signals[name] for name in names)


class StopRequest:
    """Remembers a stop signal, instead of dying in the middle of a step. A context manager.

    Attributes:
        received: name of the first signal received, None before.
    """

    received: str | None = None

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._remember) for number in stop_signals()}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name


@contextlib.contextmanager
def stop_signals_interrupt() -> Iterator[None]:
    """Let every stop signal do what Ctrl-C does: raise `KeyboardInterrupt`. Only the main thread receives signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.default_int_handler) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class HelperSignals:
    """Makes helper processes outlive a stop signal to all processes, so that their parent can finish what it does.

    Make it in the parent and call it in the helper. The helper ends with its parent, which asks it to when it exits.
    """

    def __init__(self) -> None:
        self._exiting = multiprocessing.Event()
        atexit.register(self._exiting.set)  # runs before multiprocessing terminates the helpers that are left

    def __call__(self) -> None:
        for number in stop_signals():
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._exiting.is_set():
            os._exit(0)


def child_environment() -> dict[str, str]:
    """Environment variable that makes a child end with this process, if it calls `end_with_parent`."""
    return {_PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """Stop this process, as SIGTERM does, when the process that it works for ends, however that ends.

    That is the process that set `child_environment`, and torchrun for its workers. Without either, nothing happens.
    """
    numbers = {int(os.environ[_PARENT])} if _PARENT in os.environ else set()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        numbers.add(os.getppid())
    parents: list[psutil.Process] = []
    for number in numbers:
        try:
            parents.append(psutil.Process(number))
        except psutil.NoSuchProcess:
            print("stopped before the first step: the process that started this one has ended", file=sys.stderr)
            sys.exit(EXIT_STOPPED)
    if parents:
        threading.Thread(target=_stop_after, args=(parents,), daemon=True).start()


def _stop_after(parents: Sequence[psutil.Process]) -> None:
    while all(_lives(parent) for parent in parents):
        time.sleep(POLL_SECONDS)
    if sys.platform == "win32":
        signal.raise_signal(signal.SIGTERM)
    else:
        os.kill(os.getpid(), signal.SIGTERM)  # unlike raise_signal it interrupts a wait of the main thread
    time.sleep(STOP_SECONDS)
    os._exit(EXIT_STOPPED)  # it hangs, perhaps waiting for a process that is gone


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
