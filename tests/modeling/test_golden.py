"""Predictions against recorded outputs of the published implementations (bars: tests/fixtures/golden/README.md)."""

import numpy as np
import pytest
import torch
from golden import FOLDER, detector, image, read
from scipy.optimize import linear_sum_assignment

from dimaskdino.modeling import ImageBatch, Predictions, postprocess

CASES = ["di_r50", "di_small", "maskdino_4level", "maskdino_3s", "maskdino_5level"]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[dict, dict[str, np.ndarray], ImageBatch, Predictions]:
    record = read(request.param)
    images = [image(i["height"], i["width"], i["image_seed"]) for i in record["images"]]
    batch = ImageBatch.from_images(images)
    with torch.no_grad():
        predictions = detector(request.param)(batch, trace=True)
    with np.load(FOLDER / f"{request.param}.npz") as recorded:
        return record, dict(recorded), batch, predictions


def recorded_stages(recorded: dict[str, np.ndarray]) -> list[str]:
    return [key.removesuffix(".pred_logits") for key in recorded if key.endswith(".pred_logits")]


def test_stages_are_the_recorded_ones(case):
    _, recorded, _, predictions = case
    assert list(predictions.stages) == recorded_stages(recorded)


def test_feature_tokens_and_mask_features(case):
    record, recorded, _, predictions = case
    if record["case"] == "maskdino_5level":
        pytest.skip("its record has predictions alone")
    T_i = predictions.trace.T_i
    # recorded in the encoder's order, which is the opposite of the decoder's
    for level, stride in enumerate(reversed(T_i.strides)):
        sample = T_i.map(stride)[:, ::16, ::2, ::2].numpy()
        np.testing.assert_allclose(sample, recorded[f"memory.{level}_sample"], atol=1e-4, rtol=0)
    sample = predictions.trace.mask_features[:, ::16, ::4, ::4].numpy()
    np.testing.assert_allclose(sample, recorded["mask_features_sample"], atol=1e-4, rtol=0)


def test_every_stage(case):
    record, recorded, _, predictions = case
    for name, stage in predictions.stages.items():
        assert stage.has_masks == (f"{name}.pred_masks" in recorded)
        for b in range(len(record["images"])):
            logits, boxes = stage.class_logits[b].numpy(), stage.boxes[b].numpy()
            wanted_logits, wanted_boxes = recorded[f"{name}.pred_logits"][b], recorded[f"{name}.pred_boxes"][b]
            # selection order may differ between scores closer than rounding: pair the nearest rows
            ours, theirs = np.hstack([logits, 10 * boxes]), np.hstack([wanted_logits, 10 * wanted_boxes])
            rows, columns = linear_sum_assignment(np.abs(ours[:, None] - theirs[None]).max(-1))
            np.testing.assert_allclose(logits[rows], wanted_logits[columns], atol=1e-4, rtol=0, err_msg=name)
            np.testing.assert_allclose(boxes[rows], wanted_boxes[columns], atol=1e-5, rtol=0, err_msg=name)
            if stage.has_masks:
                row_of = rows[np.argsort(columns)]
                masks = stage.mask_logits()[b, row_of[recorded[f"{name}.mask_rows"][b]]][:, ::2, ::2].numpy()
                np.testing.assert_allclose(masks, recorded[f"{name}.pred_masks"][b], atol=1e-3, rtol=0, err_msg=name)


def test_instances(case):
    record, recorded, batch, predictions = case
    sizes = [(i["output_height"], i["output_width"]) for i in record["images"]]
    detections = record["options"].get("TEST.DETECTIONS_PER_IMAGE", 100)
    results = postprocess(predictions.last, batch.sizes, batch.padded_size, sizes, detections)
    for b, instances in enumerate(results):
        wanted = {key: recorded[f"instances.{b}.{key}"] for key in ("boxes", "scores", "classes", "mask_area")}
        scale = np.array([sizes[b][1], sizes[b][0]] * 2)
        area = instances.masks.sum((1, 2)).numpy()
        ours = np.column_stack([instances.boxes.numpy() / scale, instances.scores, 10 * instances.labels])
        theirs = np.column_stack([wanted["boxes"] / scale, wanted["scores"], 10 * wanted["classes"]])
        rows, columns = linear_sum_assignment(np.abs(ours[:, None] - theirs[None]).max(-1))
        np.testing.assert_allclose(ours[rows, :4], theirs[columns, :4], atol=1e-5, rtol=0)
        np.testing.assert_allclose(ours[rows, 4:], theirs[columns, 4:], atol=1e-4, rtol=0)
        assert np.abs(area[rows] - wanted["mask_area"][columns]).max() <= 8  # a few pixels may flip sign
