"""Each bad input is given to the command line: one clear line, no traceback, nothing lost, no code run."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from small import FILE, overrides

from dimaskdino import cli
from dimaskdino.cli.training import train


@dataclass(frozen=True)
class Place:
    """Where an input is made.

    Attributes:
        folder: an empty folder, and the current one.
        data: the small shapes data; not to be changed.
        run: a finished run; not to be changed.
    """

    folder: Path
    data: Path
    run: Path

    @property
    def model(self) -> Path:
        return self.run / "checkpoints" / "model.safetensors"

    @property
    def photo(self) -> Path:
        return next((self.data / "images" / "val").iterdir())

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def kept(self) -> dict[Path, tuple[int, int]]:
        """The files that no command may change, with their times and sizes."""
        files = {}
        for path in [*self.run.rglob("*"), *self.data.rglob("*")]:
            if path.is_file() and path.name not in ("lock", "status.json", "train.log"):
                files[path] = (path.stat().st_mtime_ns, path.stat().st_size)
        return files


@pytest.fixture(scope="session")
def finished_run(shapes_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run") / "finished"
    train(overrides(shapes_data), str(FILE), str(run))
    return run


@pytest.fixture
def place(shapes_data, finished_run, tmp_path, monkeypatch) -> Place:
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, shapes_data, finished_run)


@pytest.fixture(scope="session")
def children() -> Iterator[Callable[[Path, list[list[str]]], list[tuple[int, str]]]]:
    """Run command lines in a folder, in a child process with limits of time and memory: codes and outputs."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(Path(__file__).with_name("child.py"))]
    with subprocess.Popen(command, env=environment, stdin=-1, stdout=-1, text=True) as server:
        assert server.stdin
        assert server.stdout

        def run(folder: Path, commands: list[list[str]]) -> list[tuple[int, str]]:
            server.stdin.write(json.dumps([str(folder), commands]) + "\n")
            server.stdin.flush()
            return [(code, output) for code, output in json.loads(server.stdout.readline())]

        yield run
        server.stdin.write("\n")  # the end of the pipe alone may not come: a process of another test can hold it open
        server.stdin.close()


@pytest.fixture(scope="session")
def child(children) -> Callable[..., tuple[int, str]]:
    """Run one command line as `children`."""
    return lambda folder, *arguments: children(folder, [list(map(str, arguments))])[0]


@pytest.fixture
def refused(place, capfd, monkeypatch) -> Callable[..., list[str]]:
    """Give arguments to the command line, which must answer in lines of this pattern, and return these lines."""

    def check(says: str, *arguments: object) -> list[str]:
        kept = place.kept()
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["dimaskdino", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output = "".join(capfd.readouterr())
        said = [line for line in output.splitlines() if re.search(says, line)]
        assert said, output
        assert ended.value.code == 1, output
        assert "Traceback" not in output
        assert len(said[0]) < 1000
        assert not (place.folder / "pwned").exists()
        assert place.kept() == kept
        return said

    return check
