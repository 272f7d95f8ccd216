"""Bootstrap resamples against datasets that really hold copies of images."""

import json

import numpy as np
import pytest
from crowded import crowded_truth, detections

from dimaskdino.evaluation.bootstrap import (
    RECALLS,
    BootstrapAP,
    _recalls_reached,
    bootstrap,
    image_draws,
    resampled_ap,
)
from dimaskdino.evaluation.coco_ap import Truth, average_precision, read_truth
from dimaskdino.utils.errors import UserError


def with_copies(file, rows, weights):
    """The annotations and results with every image there as often as its weight says."""
    content = json.loads(file.read_text())
    images, annotations, copied = [], [], []
    for image, weight in zip(content["images"], weights, strict=True):
        for number in range(image["id"], image["id"] + weight):
            images.append(image | {"id": number})
            annotations += [a | {"image_id": number} for a in content["annotations"] if a["image_id"] == image["id"]]
            copied += [row | {"image_id": number} for row in rows if row["image_id"] == image["id"]]
    return Truth(content | {"images": images, "annotations": annotations}), copied


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_weights_are_copies_of_images(kind, tmp_path):
    file = crowded_truth(tmp_path)
    rows = detections(file).boxes if kind == "box" else detections(file).masks
    # of equal scores within an image, copies would come in another order
    rows = [row | {"score": row["score"] + 1e-5 * number} for number, row in enumerate(rows)]
    weights = np.concatenate([np.ones((30, 1), int), image_draws(30, 6)], axis=1)
    assert weights.max() > 2
    measured = resampled_ap(read_truth(file), rows, kind, weights)
    for column, ap in zip(weights.T, measured, strict=True):
        assert ap == pytest.approx(average_precision(*with_copies(file, rows, column), kind).AP, abs=1e-4)
    assert len(set(measured.round(3))) == 7


def test_recalls_are_reached_as_coco_compares_them():
    """At every fraction of up to 400 objects, among them those that are equal to a recall but for rounding."""
    for objects in range(1, 401):
        recall = np.arange(objects + 1)[:, None] / objects
        expected = np.searchsorted(RECALLS, recall.ravel(), side="right")
        assert (_recalls_reached(recall).ravel() == expected).all(), objects
    assert _recalls_reached(np.full((1, 1), np.nan)) == 0


@pytest.mark.parametrize("values", [1, 100, 1 << 24])
def test_resamples_in_parts(values, tmp_path, monkeypatch):
    file = crowded_truth(tmp_path)
    rows, weights = detections(file).masks, image_draws(30, 20)
    whole = resampled_ap(read_truth(file), rows, "mask", weights)
    monkeypatch.setattr("dimaskdino.evaluation.bootstrap.VALUES_AT_ONCE", values)
    np.testing.assert_allclose(resampled_ap(read_truth(file), rows, "mask", weights), whole, rtol=1e-12)


def test_draws_are_the_same_every_time_and_as_many_as_there_are_images():
    draws = image_draws(50, 20)
    assert draws.shape == (50, 20)
    assert (draws.sum(0) == 50).all()
    assert (draws == image_draws(50, 20)).all()


def test_nothing_detected_and_nothing_to_detect(tmp_path):
    file = crowded_truth(tmp_path)
    content = json.loads(file.read_text())
    with_objects = {a["image_id"] // 10 for a in content["annotations"] if not a["iscrowd"]}
    some, none = min(with_objects), min(set(range(30)) - with_objects)
    weights = np.eye(30, dtype=int)[:, [some, none]]
    found = detections(file).boxes
    one, undefined = resampled_ap(read_truth(file), found, "box", weights)
    assert one > 0
    assert np.isnan(undefined)
    missed = [row for row in found if row["image_id"] != 10 * some]
    assert resampled_ap(read_truth(file), missed, "box", weights)[0] == 0


def test_samples_come_back_from_a_file(tmp_path):
    file = crowded_truth(tmp_path)
    samples = bootstrap({"decoder.1": detections(file)}, read_truth(file), draws=5)
    samples.save(tmp_path / "bootstrap.npz")
    again = BootstrapAP.load(tmp_path / "bootstrap.npz")
    assert again.images == samples.images
    assert list(again.samples) == ["decoder.1/box", "decoder.1/mask"]
    for name, values in samples.samples.items():
        np.testing.assert_allclose(again.samples[name], values, rtol=1e-6)
    with pytest.raises(UserError, match="evaluate with --bootstrap first"):
        BootstrapAP.load(tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    with pytest.raises(UserError, match="holds no bootstrap samples"):
        BootstrapAP.load(tmp_path / "bad.npz")
