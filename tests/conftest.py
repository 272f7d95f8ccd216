import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("MPLBACKEND", "agg")

from small import shapes_folder


@pytest.fixture(scope="session")
def shapes_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small shapes data; tests must not change it."""
    return shapes_folder(tmp_path_factory.mktemp("data") / "shapes")
