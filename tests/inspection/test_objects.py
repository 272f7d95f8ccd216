"""Objects through the stages, on a case worked out by hand."""

from types import SimpleNamespace

import pytest
import torch

from dimaskdino.data.coco import Sample
from dimaskdino.inspection.objects import box_owners, mask_iou, token_owners, track_objects
from dimaskdino.modeling import CroppedMasks, Instances
from dimaskdino.modeling.structures import FeatureLevels, SelectedTokens


def rectangle(x0, y0, x1, y1):
    mask = torch.zeros(8, 8, dtype=torch.uint8)
    mask[y0:y1, x0:x1] = 1
    return mask


# object 0: class 0, 4 x 4 pixels; object 1: class 1, 2 x 2 pixels inside it
SAMPLE = Sample(
    torch.zeros(3, 8, 8, dtype=torch.uint8),
    torch.tensor([0, 1]),
    torch.stack([rectangle(0, 0, 4, 4), rectangle(2, 2, 4, 4)]),
    1,
    "made.png",
    (8, 8),
)


def look(instances, trace=None):
    return SimpleNamespace(
        sample=SAMPLE,
        predictions=SimpleNamespace(stages={"a": None}),
        instances=lambda stage: instances,
        trace=trace,
        pixels=lambda points: points * 8,
    )


def test_boxes_around_masks_count_the_last_pixel_in():
    assert SAMPLE.boxes.tolist() == [[0, 0, 4, 4], [2, 2, 4, 4]]


def test_mask_iou_counts_pixels():
    a, b = rectangle(0, 0, 4, 4).bool()[None], rectangle(2, 0, 6, 4).bool()[None]
    assert mask_iou(a, b).item() == pytest.approx(8 / 24)
    assert mask_iou(a[:0], b).shape == (0, 1)
    assert mask_iou(torch.zeros(1, 8, 8, dtype=torch.bool), torch.zeros(1, 8, 8, dtype=torch.bool)).item() == 0


def test_the_best_detection_of_the_right_class_counts():
    found = Instances(
        boxes=torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 2], [0, 0, 4, 4]]),
        scores=torch.tensor([0.9, 0.8, 0.1]),
        labels=torch.tensor([1, 0, 0]),
        query_masks=CroppedMasks.of(torch.stack([rectangle(0, 0, 4, 4), rectangle(0, 0, 4, 1)]).bool()),
        mask_index=torch.tensor([0, 1, 0]),
    )
    track = track_objects(look(found), threshold=0.5)
    # object 0: row 1, half of the box, a quarter of the mask; the perfect row 2 scores too low
    # object 1: row 0 covers 16 pixels, 4 of them its own
    assert track.detection.tolist() == [[1, 0]]
    assert track.box_iou.tolist() == [[0.5, 0.25]]
    assert track.mask_iou.tolist() == [[0.25, 0.25]]
    assert track_objects(look(found)).detection.tolist() == [[2, 0]]
    nothing = track_objects(look(found), threshold=0.95)
    assert nothing.detection.tolist() == [[-1, -1]]
    assert nothing.box_iou.tolist() == [[0, 0]]


def test_a_stage_without_masks_is_judged_by_boxes():
    found = Instances(
        torch.tensor([[0.0, 0, 4, 2]]), torch.tensor([0.9]), torch.tensor([0]), None, torch.zeros(1, dtype=torch.long)
    )
    track = track_objects(look(found))
    assert track.box_iou.tolist() == [[0.5, 0]]
    assert track.mask_iou.isnan().tolist() == [[True, False]]


def test_tokens_belong_to_the_smaller_object_below_them():
    levels = FeatureLevels(torch.zeros(1, 16, 1), ((4, 4),), (2,))  # cells of 2 x 2 pixels
    tokens = SelectedTokens(torch.zeros(1, 3, 1), torch.zeros(1, 3, 4), torch.tensor([[0, 5, 15]]), torch.zeros(1, 3))
    # cell 0 centres at pixel (1, 1), cell 5 at (3, 3), cell 15 at (7, 7)
    assert token_owners(look(None, SimpleNamespace(T_i=levels)), tokens).tolist() == [0, 1, -1]


def test_boxes_belong_to_the_object_that_they_overlap_most():
    boxes = torch.tensor(
        [[0.25, 0.25, 0.5, 0.5], [0.375, 0.375, 0.25, 0.3], [0.9, 0.9, 0.1, 0.1], [0.25, 0.125, 0.5, 0.2]]
    )
    assert box_owners(look(None), boxes).tolist() == [0, 1, -1, -1]
