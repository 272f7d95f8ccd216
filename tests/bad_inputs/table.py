"""The table of bad inputs, and the place where they are made."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Place:
    """Where an input is made.

    Attributes:
        folder: an empty folder.
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


@dataclass(frozen=True)
class BadInput:
    """An input.

    Attributes:
        make: makes it and returns the arguments of the command.
        says: pattern of the line that the command must write.
        code: exit status.
    """

    make: Callable[[Place], list[Any]]
    says: str
    code: int = 1


BAD_INPUTS: dict[str, BadInput] = {}


def bad(title: str, says: str, make: Callable[[Place], list[Any]], code: int = 1) -> None:
    assert title not in BAD_INPUTS, title
    BAD_INPUTS[title] = BadInput(make, says, code)
