"""Rendered scenes: intersections against marching along the ray, masks, light, and the same scene each time."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dimaskdino.config import SOLIDS, Shapes
from dimaskdino.data import solids
from dimaskdino.data.coco import CocoDataset
from dimaskdino.data.shapes import generate, scene

SETTINGS = Shapes(size=48, kinds=SOLIDS)


def grey(points):
    return np.full((len(points), 3), 0.5)


def inside(solid: solids.Solid, p: np.ndarray) -> np.ndarray:
    """Whether points (n, 3) in the solid's own frame are inside it, by its definition."""
    x, y, z = p.T
    across, between = np.hypot(x, y), (z > 0) & (z < solid.height)
    if solid.kind == "ball":
        return x**2 + y**2 + (z - solid.radius) ** 2 < solid.radius**2
    if solid.kind == "block":
        return between & (np.abs(x) < solid.radius) & (np.abs(y) < solid.narrow * solid.radius)
    if solid.kind == "cone":
        return between & (across < solid.radius * (1 - z / solid.height))
    hole = solids.INNER * solid.radius if solid.kind == "hoop" else -1
    return between & (across < solid.radius) & (across > hole)


@pytest.mark.parametrize("kind", SOLIDS)
def test_hits_are_where_marching_along_the_ray_enters_the_solid(kind):
    random = np.random.default_rng(0)
    solid = solids.Solid(kind, (0.3, -0.2), 0.6, 1.2 if kind == "ball" else 0.9, 0.7, 0.5, grey, 0.0)
    origins = np.column_stack([random.normal(size=(400, 2)) * 1.5, random.uniform(1.5, 5, 400)])  # above the table
    aims = np.array([0.3, -0.2, 0.4]) + random.uniform(-0.8, 0.8, (400, 3))
    directions = (aims - origins) / np.linalg.norm(aims - origins, axis=1, keepdims=True)
    t, normals, points = solid.hit(origins, directions)
    places = np.arange(0, 9, 0.004)
    for o, d, distance, normal, own in zip(origins, directions, t, normals, points, strict=True):
        walk = o + places[:, None] * d
        local = solid.inwards(walk)
        within = inside(solid, local) & (walk[:, 2] > 0)
        if not within.any():
            # a graze between two steps is the only hit that marching may miss
            assert distance == solids.FAR or not inside(solid, own[None] - 0.02 * normal).any() or distance > 0
            continue
        assert distance == pytest.approx(places[within.argmax()], abs=0.02)
        assert np.linalg.norm(normal) == pytest.approx(1, abs=1e-6)
        assert normal @ d < 0.1  # it faces the ray
    assert 100 < (t < solids.FAR).sum() < 400


def test_noise_is_smooth_and_repeats_itself():
    random = np.random.default_rng(0)
    points = random.uniform(-5, 5, (2000, 3))
    values = solids.noise(points, 3)
    assert np.array_equal(values, solids.noise(points, 3))
    assert not np.array_equal(values, solids.noise(points, 4))
    assert 0 <= values.min() < 0.2
    assert 0.8 < values.max() <= 1
    assert np.abs(solids.noise(points + 1e-3, 3) - values).max() < 0.01


def test_a_scene_is_a_function_of_its_arguments_and_its_masks_do_not_overlap():
    image, labels, masks = scene(SETTINGS, "train", 3)
    again = scene(SETTINGS, "train", 3)
    assert np.array_equal(image, again[0])
    assert labels == again[1]
    assert not np.array_equal(image, scene(SETTINGS, "train", 4)[0])
    assert not np.array_equal(image, scene(SETTINGS, "val", 3)[0])
    assert image.shape == (48, 48, 3)
    assert len(labels) == len(masks) >= 1
    assert np.sum(masks, axis=0).max() == 1
    assert min(mask.sum() for mask in masks) >= solids.LEAST_PIXELS
    # an object differs from what surrounds it somewhere
    assert (
        image[masks[0].astype(bool)].std() + np.abs(image[masks[0] > 0].mean(0) - image[masks[0] == 0].mean(0)).sum()
        > 5
    )


def test_what_stands_in_the_lamps_way_is_darker():
    random = np.random.default_rng(1)
    ball = solids.Solid("ball", (0.0, 0.0), 0.6, 1.2, 0.0, 1.0, grey, 0.0)
    grid = np.stack(np.meshgrid(np.linspace(-3, 3, 60), np.linspace(-3, 3, 60)), -1).reshape(-1, 2)
    points = np.column_stack([grid, np.zeros(len(grid))])
    normals = np.broadcast_to(np.array([0.0, 0.0, 1.0]), points.shape)
    outside = np.hypot(*grid.T) > 0.7
    light, _ = solids._light(random, [ball], points, normals, -normals, outside)
    assert light[outside].min() < 0.5 * np.median(light[outside])
    assert 0.005 < (light[outside] < 0.6 * np.median(light[outside])).mean() < 0.3


def test_rendered_data_are_a_dataset_like_the_drawn_ones(tmp_path):
    generate(tmp_path / "data", Shapes(train=2, val=1, size=48, kinds=SOLIDS), processes=0)
    data = CocoDataset(tmp_path / "data", "train")
    assert data.classes == list(SOLIDS)
    assert len(data) == 2
    assert len(data[0].labels) >= 1
    with pytest.raises(ValueError, match="all drawn or all solids"):
        Shapes(kinds=("disk", "ball"))


def test_the_scenes_of_the_chapters_are_those_of_their_command(tmp_path):
    shipped = Path(__file__).parents[2] / "notebooks" / "scenes"
    generate(tmp_path / "made", Shapes(kinds=SOLIDS, train=1, val=2, size=160, seed=1), processes=0)
    for number in range(2):
        made, kept = (folder / "images" / "val" / f"{number:06}.jpg" for folder in (tmp_path / "made", shipped))
        with Image.open(made) as a, Image.open(kept) as b:
            assert np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() < 1  # other processors round differently
    contents = [
        json.loads((folder / "annotations" / "val.json").read_text()) for folder in (tmp_path / "made", shipped)
    ]
    found, kept = ([x["category_id"] for x in content["annotations"] if x["image_id"] < 2] for content in contents)
    assert found == kept
    assert len(contents[1]["images"]) == 16
