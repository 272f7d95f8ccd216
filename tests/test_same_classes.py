"""Ids, classes and records that are valid and would give wrong numbers without a word."""

import json
import shutil

import numpy as np
import pytest
import torch
from small import FILE, MODEL, RUN, settings

from dimaskdino import UserError, evaluate_layers, load
from dimaskdino.checkpoints import TrainedModel
from dimaskdino.config import load_config
from dimaskdino.data.annotations import read_annotations
from dimaskdino.data.check import record_faults
from dimaskdino.data.coco import CocoDataset
from dimaskdino.data.importing import import_dataset
from dimaskdino.data.shapes import CLASSES
from dimaskdino.evaluation.coco_ap import average_precision, read_truth
from dimaskdino.evaluation.layerwise_ap import LayerwiseAP, score_layers
from dimaskdino.modeling import Detector
from dimaskdino.runs.folder import RunFolder
from dimaskdino.training.trainer import train


def changed(data, folder, change, *splits):
    """A copy of the data whose annotations were changed."""
    shutil.copytree(data, folder)
    for split in splits or ("train", "val"):
        file = folder / "annotations" / f"{split}.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
    return folder


def reversed_ids(content):
    for category in content["categories"]:
        category["id"] = 6 - category["id"]
    for annotation in content["annotations"]:
        annotation["category_id"] = 6 - annotation["category_id"]


def renamed(content):
    for category in content["categories"]:
        category["name"] = category["name"].upper()


def trained_on(data):
    torch.manual_seed(0)
    config = load_config(FILE, [*MODEL, *RUN, f"data.root={data}"])
    return TrainedModel(Detector(config.model).eval(), config, list(CLASSES), 0)


def with_data(model, *changes):
    config = load_config(FILE, [*MODEL, *RUN, *changes])
    return TrainedModel(model.detector, config, model.classes, 0)


def true_results(truth, kind):
    rows = []
    for annotation in truth.dataset["annotations"]:
        value = {"bbox": annotation["bbox"]} if kind == "box" else {"segmentation": annotation["segmentation"]}
        rows.append({"image_id": annotation["image_id"], "category_id": annotation["category_id"], "score": 1} | value)
    return rows


def as_table(rows):
    return np.array([[row["image_id"], *row["bbox"], row["score"], row["category_id"]] for row in rows], float)


# ids


def test_ids_of_64_bits_give_the_same_ap(shapes_data, tmp_path):
    def lengthen(content):
        for image in content["images"]:
            image["id"] += 2**62
        for category in content["categories"]:
            category["id"] += 2**53
        for annotation in content["annotations"]:
            annotation["image_id"] += 2**62
            annotation["category_id"] += 2**53

    model = trained_on(shapes_data)
    root = changed(shapes_data, tmp_path / "long", lengthen)
    expected = evaluate_layers(model).to_json()["stages"]
    assert evaluate_layers(with_data(model, f"data.root={root}")).to_json()["stages"] == expected
    truth = read_truth(root / "annotations" / "val.json")
    assert pytest.approx(100) == average_precision(truth, as_table(true_results(truth, "box")), "box").AP
    assert sum("numbered anew in their order" in line for line in CocoDataset(root, "val").annotations.remarks) == 2


def test_other_ids_stay(shapes_data):
    found = read_annotations(shapes_data / "annotations" / "val.json")
    assert [image["id"] for image in found.images] == [0, 1, 2, 3]


# classes


def test_classes_of_the_same_names_are_matched_in_an_evaluation(shapes_data, tmp_path, capsys):
    model = trained_on(shapes_data)
    root = changed(shapes_data, tmp_path / "reversed", reversed_ids)
    expected = evaluate_layers(model)
    assert capsys.readouterr().out == ""
    found = evaluate_layers(with_data(model, f"data.root={root}"))
    assert "classes are matched by name" in capsys.readouterr().out
    assert found.last.mask.per_class == expected.last.mask.per_class
    assert pytest.approx(expected.last.box.AP) == found.last.box.AP


def test_other_names_are_refused_unless_they_are_mapped_or_taken_by_order(shapes_data, tmp_path):
    model = trained_on(shapes_data)
    root = changed(shapes_data, tmp_path / "renamed", renamed)
    with pytest.raises(UserError, match=r"has other classes \(DISK, .*data\.class_map=.*data\.by_order=true"):
        evaluate_layers(with_data(model, f"data.root={root}"))
    expected = evaluate_layers(model).last.box.AP
    mapped = "{" + ", ".join(f"{name.upper()}: {name}" for name in CLASSES) + "}"
    for change in ("data.by_order=true", f"data.class_map={mapped}"):
        assert expected == evaluate_layers(with_data(model, f"data.root={root}", change)).last.box.AP


def test_a_training_validates_and_resumes_by_name(shapes_data, tmp_path, capsys):
    runs = {}
    for name, splits in (("plain", ()), ("val", ("val",))):
        root = changed(shapes_data, tmp_path / name, reversed_ids, *splits) if splits else shapes_data
        run, config = (
            RunFolder(tmp_path / f"run_{name}"),
            settings(root, "train.validation.every=2", "schedule.steps=2"),
        )
        train(config, run)
        runs[name] = next(record["validation"] for record in run.read_metrics() if "validation" in record)
    assert runs["val"]["mask_AP"] == pytest.approx(runs["plain"]["mask_AP"])
    root = changed(shapes_data, tmp_path / "both", reversed_ids)
    capsys.readouterr()
    train(settings(root, "train.validation.every=2", "schedule.steps=3"), RunFolder(tmp_path / "run_plain"))
    assert "classes are matched by name" in capsys.readouterr().out
    assert load(tmp_path / "run_plain", device="cpu").classes == list(CLASSES)


def test_fine_tuning_knows_classes_by_their_names(shapes_data, tmp_path, capsys):
    run = RunFolder(tmp_path / "run")
    train(settings(shapes_data, "schedule.steps=1"), run)
    before = load(run.path, device="cpu").detector.state_dict()["heads.label.weight"]
    for change, rows in ((reversed_ids, [4, 3, 2, 1, 0]), (renamed, None)):
        root = changed(shapes_data, tmp_path / change.__name__, change)
        start = RunFolder(tmp_path / f"from_{change.__name__}")
        frozen = ("optimizer.lr=1e-12", "schedule.steps=1", f"train.weights={run.path}")
        train(settings(root, *frozen), start)
        after = load(start.path, device="cpu").detector.state_dict()["heads.label.weight"]
        said = "re-initialised for these classes or this backbone: denoising.labels" in capsys.readouterr().out
        assert said == (rows is None)
        assert (rows is not None) == torch.allclose(after, before[[4, 3, 2, 1, 0]], atol=1e-6)


# records


def corners(content):
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        annotation["bbox"] = [x, y, x + width, y + height]


def flat(content):
    outlines = ([[]], [[5, 5, 20, 20, 40, 40]], [[7, 7, 7, 7, 7, 7]])
    for annotation, outline in zip(content["annotations"], outlines, strict=False):
        annotation["segmentation"] = outline


def no_area(content):
    for annotation in content["annotations"]:
        annotation["area"] = 1


def listed_twice(content):
    content["images"].append(content["images"][0] | {"id": 99})


def two_of_one_name(content):
    content["categories"][0]["name"] = content["categories"][1]["name"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (corners, "boxes are x0, y0, x1, y1"),
        (flat, "3 objects have no mask or none that covers a pixel"),
        (no_area, "areas are 0 or 1"),
        (listed_twice, "1 images are listed more than once"),
        (two_of_one_name, "1 categories have the name of another one"),
    ],
)
def test_records_that_do_not_mean_what_they_say(shapes_data, tmp_path, change, text, capsys):
    root = changed(shapes_data, tmp_path / "data", change, "val")
    found = read_annotations(root / "annotations" / "val.json")
    (line,) = record_faults(found)
    assert text in line
    assert "such as" in line
    assert not record_faults(read_annotations(shapes_data / "annotations" / "val.json"))
    if change is not two_of_one_name:
        evaluate_layers(with_data(trained_on(shapes_data), f"data.root={root}"))
        assert text in capsys.readouterr().err
    if change in (corners, flat, no_area):
        import_dataset(root, tmp_path / "imported")
        assert not record_faults(read_annotations(tmp_path / "imported" / "annotations" / "val.json"))


def test_more_objects_than_coco_counts_are_scored_as_well(tmp_path):
    boxes = [[x * 4, y * 4, 3, 3] for x in range(20) for y in range(15)]
    annotations = []
    for number, (x, y, w, h) in enumerate(boxes, start=1):
        outline = [x, y, x + w, y, x + w, y + h, x, y + h]
        annotations.append({"id": number, "image_id": 1, "category_id": 1, "bbox": [x, y, w, h], "area": 9})
        annotations[-1] |= {"segmentation": [outline], "iscrowd": 0}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 80, "width": 80}],
        "categories": [{"id": 1, "name": "seed"}],
        "annotations": annotations,
    }
    file = tmp_path / "a.json"
    file.write_text(json.dumps(content))
    truth = read_truth(file)

    class Perfect:
        has_masks = True

        def __len__(self):
            return len(boxes)

        def results(self, kind):
            rows = true_results(truth, kind)
            return as_table(rows) if kind == "box" else rows

    result = score_layers({"decoder.2": Perfect()}, truth, "test")
    assert pytest.approx(33.7, abs=0.1) == result.last.box.AP  # COCO's
    assert result.all_detections == {"box": pytest.approx(100), "mask": pytest.approx(100)}
    (remark,) = result.remarks
    assert "counts 100 detections per image and class" in remark
    assert "box AP is 100.0, mask AP 100.0" in remark
    result.save(tmp_path / "layers.json")
    assert LayerwiseAP.load(tmp_path / "layers.json") == result
