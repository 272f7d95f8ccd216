"""`python -m dimaskdino.runs.watch FOLDER PID`: wait for a process to end, then update its status."""

import sys
import time
from pathlib import Path

import psutil

POLL_SECONDS = 1.0


def main(folder: Path, pid: int) -> None:
    try:
        process = psutil.Process(pid)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(POLL_SECONDS)
    except psutil.NoSuchProcess:
        pass
    # imported late: it imports torch, which waiting does not need
    from dimaskdino.runs.folder import RunFolder

    if folder.exists():
        RunFolder(folder).status()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
