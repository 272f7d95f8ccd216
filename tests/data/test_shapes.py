"""The built-in data."""

import multiprocessing

import numpy as np
import pytest
from scipy.ndimage import binary_fill_holes

from dimaskdino.config import Data, Shapes
from dimaskdino.data.coco import CocoDataset
from dimaskdino.data.shapes import ensure, scene

# of the masks in the first validation scenes, from annotations of version 0.1
AREAS = [[344], [775, 681, 314, 1031, 1225], [779, 851, 317, 371, 2093]]
KINDS = ("disk", "rectangle", "triangle", "star", "ring", "frame", "cross", "gear", "crescent")


def test_processes_that_need_the_data_at_once_share_them(tmp_path):
    """Two runs of a study start together, and the data do not exist yet."""
    data = Data(root=tmp_path / "shapes", shapes=Shapes(train=60, val=2, size=64))
    started = [multiprocessing.get_context("fork").Process(target=ensure, args=(data,)) for _ in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0, 0]
    assert len(CocoDataset(tmp_path / "shapes", "train")) == 60
    assert sorted(file.name for file in tmp_path.iterdir()) == ["shapes"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_drawn_alone(kind):
    """Rings, frames and gears have a hole, and the others none."""
    settings = Shapes(size=64, kinds=(kind,), smallest=0.3, largest=0.3)
    scenes = [scene(settings, "train", i)[2] for i in range(40)]
    alone = [masks[0] for masks in scenes if len(masks) == 1]
    assert alone
    assert all(mask.any() for mask in alone)
    with_hole = [mask for mask in alone if (binary_fill_holes(mask) ^ mask.astype(bool)).sum() > 10]
    assert bool(with_hole) == (kind in ("ring", "frame", "gear"))


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
