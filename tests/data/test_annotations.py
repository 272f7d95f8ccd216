"""The schema of annotations: what is repaired is counted, what cannot be used is named, nothing else comes through."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from test_coco import SQUARE, rle

from dimaskdino.data.annotations import check_run_lengths, inspect_annotations, read_annotations, run_lengths
from dimaskdino.evaluation.coco_ap import average_precision, read_truth
from dimaskdino.utils.errors import UserError

OBJECT = {"image_id": 7, "category_id": 3, "segmentation": [SQUARE], "bbox": [4, 3, 8, 6], "area": 48, "iscrowd": 0}


def written(folder: Path, annotations: list, images: list | None = None, categories: list | None = None) -> Path:
    content = {
        "images": images or [{"id": 7, "file_name": "a.png", "height": 20, "width": 24}],
        "annotations": annotations,
        "categories": categories or [{"id": 3, "name": "cup"}],
    }
    file = folder / "annotations.json"
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize(
    ("change", "field", "value", "told"),
    [
        ({"iscrowd": "0"}, "iscrowd", 0, "iscrowd given as text"),
        ({"iscrowd": "1"}, "iscrowd", 1, "iscrowd given as text"),
        ({"iscrowd": None}, "iscrowd", 0, "iscrowd given as text or empty"),
        ({"image_id": "7", "category_id": "3"}, "image_id", 7, "numbers given as text"),
        ({"image_id": 7.0}, "image_id", 7, ""),
        ({"bbox": [math.nan, 0, 1, 1]}, "bbox", [4, 3, 8, 6], "'bbox' missing or unusable"),
        ({"bbox": [0, 0, math.inf, 1]}, "bbox", [4, 3, 8, 6], "'bbox' missing or unusable"),
        ({"bbox": [0, 0, -3, 1]}, "bbox", [4, 3, 8, 6], "'bbox' missing or unusable"),
        ({"bbox": [1, 2]}, "bbox", [4, 3, 8, 6], "'bbox' missing or unusable"),
        ({"bbox": ["1", "2", "3", "4"]}, "bbox", [4, 3, 8, 6], "'bbox' missing or unusable"),
        ({"bbox": None}, "bbox", [4, 3, 8, 6], "'bbox' missing or unusable"),
        ({"area": None}, "area", 48, "'area' missing or unusable"),
        ({"area": "48"}, "area", 48, "'area' missing or unusable"),
        ({"area": -1}, "area", 48, "'area' missing or unusable"),
        ({"area": math.nan}, "area", 48, "'area' missing or unusable"),
        ({"segmentation": [SQUARE, [1, 2]]}, "segmentation", [SQUARE], "outlines of fewer than three points"),
        ({"iscrowd": 1, "segmentation": None}, "segmentation", [[4, 3, 12, 3, 12, 9, 4, 9]], "crowds without a mask"),
    ],
)
def test_what_can_be_repaired_is_repaired_and_told(change, field, value, told, tmp_path):
    found = read_annotations(written(tmp_path, [{"id": 1} | OBJECT | change]))
    (annotation,) = found.annotations
    assert annotation[field] == value
    assert any(told in remark for remark in found.remarks) if told else not found.remarks


def test_missing_fields_are_computed_from_the_mask(tmp_path):
    mask = np.zeros((20, 24), bool)
    mask[3:9, 4:12] = True
    for segmentation in ([SQUARE], rle(mask, True), rle(mask, False)):
        bare = {"image_id": 7, "category_id": 3, "segmentation": segmentation}
        (annotation,) = read_annotations(written(tmp_path, [bare])).annotations
        assert annotation["bbox"] == [4, 3, 8, 6]
        assert annotation["area"] == 48
        assert annotation["iscrowd"] == 0


@pytest.mark.parametrize("ids", [(None, None), (5, 5), (0, 1), ("a", "b"), (1, None), (1.5, 2), (2**70, 1)])
def test_annotations_without_ids_of_their_own_are_numbered(ids, tmp_path):
    """Scoring matches by id: with equal ones, perfect detections would not score 100."""
    boxes = ([4, 3, 8, 6], [14, 10, 6, 8])
    outlines = ([[x, y, x + w, y, x + w, y + h, x, y + h]] for x, y, w, h in boxes)
    annotations = [
        OBJECT | {"segmentation": outline, "bbox": box, "area": box[2] * box[3]} | ({} if i is None else {"id": i})
        for i, box, outline in zip(ids, boxes, outlines, strict=True)
    ]
    file = written(tmp_path, annotations)
    assert [annotation["id"] for annotation in read_annotations(file).annotations] == [1, 2]
    perfect = [{"image_id": 7, "category_id": 3, "bbox": box, "score": 0.9} for box in boxes]
    assert pytest.approx(100) == average_precision(read_truth(file), perfect, "box").AP


def test_ids_that_are_unique_are_kept(tmp_path):
    found = read_annotations(written(tmp_path, [OBJECT | {"id": 900}, OBJECT | {"id": 4}]))
    assert [annotation["id"] for annotation in found.annotations] == [900, 4]
    assert found.remarks == []


def test_a_byte_order_mark_is_no_problem(tmp_path):
    file = written(tmp_path, [OBJECT | {"id": 1}])
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(read_annotations(file).annotations) == 1


def test_all_problems_are_collected_and_the_first_is_raised(tmp_path):
    broken = [OBJECT | {"id": 1, "category_id": 4}, OBJECT | {"id": 2}, OBJECT | {"id": 3, "segmentation": 5}, 17]
    file = written(tmp_path, broken)
    found = inspect_annotations(file)
    assert [annotation["id"] for annotation in found.annotations] == [2]
    assert len(found.problems) == 3
    assert any("annotation number 4 is 17, expected an object" in problem for problem in found.problems)
    with pytest.raises(UserError, match=r"annotations.json: annotation 3 of image 7: .*, and 2 more entries .*check"):
        read_annotations(file)


def test_an_unusable_image_is_reported_once(tmp_path):
    images = [{"id": 7, "file_name": "a.png", "height": 20, "width": 24}, {"id": 8, "height": 20, "width": 24}]
    found = inspect_annotations(written(tmp_path, [OBJECT | {"id": i, "image_id": 8} for i in range(1, 5)], images))
    assert [problem.partition("json: ")[2] for problem in found.problems] == [
        "image 8 has no 'file_name'; add it or remove the image"
    ]


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)
numbers = st.floats(-100, 100) | st.floats() | st.integers(-(10**9), 10**9)
counts = st.text(max_size=12) | st.lists(st.integers(-5, 500), max_size=6) | anything
segmentations = (
    st.just([SQUARE])
    | st.lists(st.lists(numbers, max_size=9), max_size=3)
    | st.fixed_dictionaries({"size": st.just([20, 24]) | anything, "counts": counts})
    | anything
)
records = st.fixed_dictionaries(
    {},
    optional={
        "id": st.integers(0, 3) | anything,
        "image_id": st.just(7) | anything,
        "category_id": st.just(3) | anything,
        "bbox": st.lists(numbers, min_size=4, max_size=4) | anything,
        "area": numbers | anything,
        "iscrowd": st.sampled_from([0, 1, "0", "1"]) | anything,
        "segmentation": segmentations,
    },
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(annotations=st.lists(records | anything, max_size=4))
def test_whatever_is_accepted_can_be_drawn_and_scored(annotations, tmp_path):
    """Any json is either refused in words, or its records are complete: masks, boxes and AP can be computed."""
    file = written(tmp_path, annotations)
    found = inspect_annotations(file)
    assert len(found.annotations) <= len(annotations)
    for problem in found.problems:
        assert str(file) in problem
    content = {"images": found.images, "categories": found.categories, "annotations": found.annotations}
    file.write_text(json.dumps(content))
    again = read_annotations(file)
    assert again.annotations == found.annotations
    assert again.repaired == {}
    detections = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.5}
        for a in found.annotations
    ]
    ap = average_precision(read_truth(file), detections, "box").AP
    assert ap is None or 0 <= ap <= 100.0001


@settings(max_examples=300, deadline=None)
@given(mask=st.lists(st.lists(st.booleans(), min_size=1, max_size=7), min_size=1, max_size=7))
def test_run_lengths_of_any_mask(mask):
    width = min(map(len, mask))
    array = np.asfortranarray([row[:width] for row in mask], dtype=np.uint8)
    encoded = coco_mask.encode(array)
    check_run_lengths(encoded, array.shape)
    lengths = run_lengths(encoded["counts"])
    values = np.repeat(np.arange(len(lengths)) % 2, lengths)
    assert np.array_equal(values.reshape(array.shape, order="F"), array)


@settings(max_examples=500, deadline=None)
@given(counts=st.text(alphabet=[chr(c) for c in range(40, 125)], max_size=30) | st.lists(st.integers(), max_size=8))
def test_run_lengths_that_pass_the_check_decode_to_zeros_and_ones(counts):
    encoded = {"size": [4, 5], "counts": counts}
    try:
        check_run_lengths(encoded, (4, 5))
    except ValueError:
        return
    compressed = coco_mask.frPyObjects(encoded, 4, 5) if isinstance(counts, list) else encoded
    mask = coco_mask.decode(compressed)
    assert mask.shape == (4, 5)
    assert set(np.unique(mask)) <= {0, 1}
