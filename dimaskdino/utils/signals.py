"""Stop signals, and stopping when the process that started this one ends."""

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
_PARENT = "DIMASKDINO_PARENT"  # environment variable: id of the process whose end stops this one


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return SIGTERM, SIGINT and, unless the system lacks it or nohup ignores it, SIGHUP."""
    names = ["SIGTERM", "SIGINT"]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        names.append("SIGHUP")
    return tuple(signal.Signals[name] for name in names)


class Interrupt(BaseException):
    """A stop signal came while `StopRequest.waiting`."""


class StopRequest:
    """Context manager that remembers a stop signal, so that a training can finish its step.

    Attributes:
        received: name of the first signal received, None before.
        is_waiting: whether a signal raises `Interrupt` at once, since nothing has to be finished.
    """

    received: str | None = None
    is_waiting = False

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Let a signal raise `Interrupt` inside the `with` block."""
        self.is_waiting = True
        try:
            yield
        finally:
            self.is_waiting = False

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._remember) for number in stop_signals()}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name
        if self.is_waiting:
            self.is_waiting = False
            raise Interrupt


@contextlib.contextmanager
def stop_signals_interrupt() -> Iterator[None]:
    """Raise `KeyboardInterrupt` at every stop signal. No-op outside the main thread, which alone receives signals."""
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
    """Keeps helper processes alive when a stop signal reaches all processes, so that their parent can finish its step.

    Create it in the parent and call it in the helper. The helper ends when its parent exits.
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
    """Return environment variables: a child can call `end_with_parent`, and imports nothing from its current folder."""
    return {_PARENT: str(os.getpid()), "PYTHONSAFEPATH": "1"}


def end_with_parent() -> None:
    """Stop this process, as SIGTERM does, when its parent ends in any way.

    The parent is the process that set `child_environment`, and torchrun for its workers. No-op without either.
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
    os._exit(EXIT_STOPPED)  # the main thread hangs, perhaps waiting for a process that has ended


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
