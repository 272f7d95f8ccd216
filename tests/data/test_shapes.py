"""The built-in data."""

import subprocess
import sys

import numpy as np
import pytest

from dimaskdino.config import Shapes
from dimaskdino.data.coco import CocoDataset
from dimaskdino.data.shapes import scene

# of the masks in the first validation scenes, from annotations of version 0.1
AREAS = [[344], [775, 681, 314, 1031, 1225], [779, 851, 317, 371, 2093]]
KINDS = ("disk", "rectangle", "triangle", "star", "ring", "frame", "cross", "gear", "crescent")


def test_processes_that_need_the_data_at_once_share_them(tmp_path):
    """Two runs of a study start together, and the data do not exist yet."""
    program = (
        "import sys; from dimaskdino.config import load_config; from dimaskdino.data.shapes import ensure\n"
        "changes = [f'data.root={sys.argv[1]}', 'data.shapes={train: 60, val: 2}']\n"
        "ensure(load_config('shapes/dimaskdino_r18', changes).data)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "shapes")]
    started = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
    assert len(CocoDataset(tmp_path / "shapes", "train")) == 60
    assert sorted(file.name for file in tmp_path.iterdir()) == ["shapes"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_drawn_alone(kind):
    """Solid shapes have no hole; the others have one or are not convex: they fill less of their box's disk."""
    settings = Shapes(size=128, kinds=(kind,), smallest=0.3, largest=0.3)
    alone = [m[0] for i in range(40) if len(m := scene(settings, "train", i)[2]) == 1]
    assert alone
    assert all(mask.any() for mask in alone)
    with_hole = [mask for mask in alone if _holes(mask)]
    assert bool(with_hole) == (kind in ("ring", "frame", "gear"))


def _holes(mask):
    """Whether background is enclosed: it cannot be reached from the border."""
    outside = np.zeros(tuple(side + 2 for side in mask.shape), bool)
    free = np.pad(mask == 0, 1, constant_values=True)
    outside[0] = True
    while True:
        grown = outside.copy()
        grown[1:] |= outside[:-1]
        grown[:-1] |= outside[1:]
        grown[:, 1:] |= outside[:, :-1]
        grown[:, :-1] |= outside[:, 1:]
        grown &= free
        if (grown == outside).all():
            return bool((free & ~outside).sum() > 20)
        outside = grown


def test_sizes_and_bars():
    """Larger radii give larger shapes. A bar covers shapes and is no object; without bars the scene is what it was."""
    small, large = (Shapes(smallest=r, largest=r, kinds=("disk",)) for r in (0.1, 0.3))
    areas = [np.mean([m.sum() for i in range(20) for m in scene(s, "val", i)[2]]) for s in (small, large)]
    assert areas[1] > 4 * areas[0]
    plain, barred = (scene(Shapes(bars=bars), "val", 3) for bars in (0, 3))
    assert plain[1] == barred[1]
    covered = sum(int(((a == 1) & (b == 0)).sum()) for a, b in zip(plain[2], barred[2], strict=True))
    assert covered > 0
    assert not any(((b == 1) & (a == 0)).any() for a, b in zip(plain[2], barred[2], strict=True))


def test_the_default_scenes_are_those_that_the_records_were_made_with():
    found = [[int(m.sum()) for m in scene(Shapes(), "val", i)[2]] for i in range(3)]
    assert found == AREAS


def test_impossible_settings_are_named():
    with pytest.raises(ValueError, match="smallest must not exceed largest"):
        Shapes(smallest=0.4, largest=0.3)
    with pytest.raises(ValueError, match="kinds"):
        Shapes(kinds=("blob",))
