"""`python -m dimaskdino.runs.watch FOLDER PID`: wait for a process to end, then make its status say so."""

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
    # late, so that a reader of a folder without torch at hand is not slowed down while it waits
    from dimaskdino.runs.folder import RunFolder

    if folder.exists():
        RunFolder(folder).status()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
