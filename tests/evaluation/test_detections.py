"""Detections on disk: nothing is lost, nothing is done twice, whoever does it and however often it is interrupted."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from small import trained_file

from dimaskdino import load
from dimaskdino.checkpoints import save_model
from dimaskdino.evaluation import detections, layerwise_ap
from dimaskdino.evaluation.detections import Detections, DetectionStore
from dimaskdino.evaluation.layerwise_ap import detect_layers, evaluate_layers, score_layers, truth_of
from dimaskdino.evaluation.upper_bounds import upper_bounds
from dimaskdino.utils.errors import UserError
from tools.benchmarks import coco_ap as coco_benchmark


@pytest.fixture(scope="module")
def model(shapes_data, tmp_path_factory):
    return load(trained_file(tmp_path_factory.mktemp("model") / "model.safetensors", shapes_data))


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        for field in vars(a[name]):
            np.testing.assert_array_equal(getattr(a[name], field), getattr(b[name], field), err_msg=f"{name} {field}")


def test_a_small_dataset_has_at_least_twenty_parts_and_a_large_one_parts_of_fifty_images(tmp_path):
    for images, parts in ((4, 4), (20, 20), (210, 21), (5000, 100)):
        store = DetectionStore(tmp_path / str(images), {}, images)
        assert len(store.parts) == parts
        assert [i for part in store.parts for i in store.images_of(part)] == list(range(images))


def test_an_interrupted_evaluation_goes_on(model, tmp_path, monkeypatch):
    whole = detect_layers(model)
    real, calls = layerwise_ap.detect_batch, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(layerwise_ap, "detect_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        detect_layers(model, folder=tmp_path / "d")
    assert len(list((tmp_path / "d").glob("*.safetensors"))) == 2
    assert_same(whole, detect_layers(model, folder=tmp_path / "d"))
    assert len(calls) == 3 + 2  # the two images that were missing, and no other


def test_several_processes_fill_one_folder(model, tmp_path):
    for rank in range(3):
        detect_layers(model, folder=tmp_path, shard=(rank, 3))
        assert len(list(tmp_path.glob("*.safetensors"))) == (2, 3, 4)[rank]
    assert_same(detect_layers(model), detect_layers(model, folder=tmp_path))


def test_detections_of_another_model_are_replaced(model, shapes_data, tmp_path):
    detect_layers(model, folder=tmp_path / "d")
    with torch.no_grad():
        model.detector.heads.label.bias += 1
    try:
        changed = detect_layers(model, folder=tmp_path / "d")
        assert_same(changed, detect_layers(model))
    finally:
        with torch.no_grad():
            model.detector.heads.label.bias -= 1


@pytest.mark.parametrize("change", ["model.selection.k=[20, 6]", "evaluation.detections=7", "data.resize.shortest=48"])
def test_detections_with_other_settings_are_replaced(change, model, shapes_data, tmp_path):
    """The weights are the same, so they alone do not tell the results apart."""
    file = tmp_path / "model.safetensors"
    save_model(file, model.detector, model.config, model.classes, 0)
    detect_layers(load(file), folder=tmp_path / "d")
    assert_same(
        detect_layers(load(file, overrides=[change]), folder=tmp_path / "d"),
        detect_layers(load(file, overrides=[change])),
    )


def test_settings_that_did_not_exist_when_detections_were_made_count_as_default_values(model, tmp_path):
    store = detect_layers(model, folder=tmp_path)
    about = json.loads((tmp_path / "about.json").read_text())
    for section in ("backbone", "selection", "bato"):
        del about["model"][section]["type"], about["model"][section]["options"]
    (tmp_path / "about.json").write_text(json.dumps(about))
    before = {part: (tmp_path / f"{part:06d}.safetensors").stat().st_mtime_ns for part in store.parts}
    detect_layers(model, folder=tmp_path)
    assert before == {part: (tmp_path / f"{part:06d}.safetensors").stat().st_mtime_ns for part in store.parts}


def test_damaged_parts_are_computed_again_and_other_files_are_left_alone(model, tmp_path):
    expected = detect_layers(model, folder=tmp_path / "d")
    (tmp_path / "d" / "notes.txt").write_text("mine")
    part = tmp_path / "d" / "000000.safetensors"
    part.write_bytes(part.read_bytes()[:100])
    assert_same(detect_layers(model, folder=tmp_path / "d"), detect_layers(model))
    expected.remove()
    assert [file.name for file in (tmp_path / "d").iterdir()] == ["notes.txt"]


def test_stages_are_read_one_by_one_and_damage_is_named(model, tmp_path):
    store = detect_layers(model, stages=["first_selection", "decoder.2"], folder=tmp_path)
    assert list(store) == ["first_selection", "decoder.2"]
    with pytest.raises(KeyError):
        store["decoder.1"]
    part = tmp_path / "000000.safetensors"
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"000000\.safetensors cannot be read .* delete it"):
        store["decoder.2"]


def test_an_unprepared_folder_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(detections, "START_SECONDS", 0.1)
    with pytest.raises(UserError, match="no process prepared"):
        DetectionStore(tmp_path, {}, 3, first=False)


def test_a_stage_without_masks_and_images_without_detections():
    empty = Detections(*(np.zeros(shape, np.int64) for shape in (0, 0, 0, (0, 4), 0, (0, 2), 0, 0)))
    boxes = Detections(
        *(np.array([5]), np.array([2]), np.array([0.5]), np.array([[1.0, 2, 4, 8]])),
        *(np.zeros(0, np.int64), np.zeros((0, 2), np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint8)),
    )
    joined = Detections.joined([empty, boxes, empty])
    assert not joined.has_masks
    assert joined.masks == []
    assert joined.boxes == [{"image_id": 5, "category_id": 2, "score": 0.5, "bbox": [1, 2, 3, 6]}]


@pytest.mark.slow
def test_two_processes_evaluate_as_one(shapes_data, tmp_path, monkeypatch):
    file = trained_file(tmp_path / "model.safetensors", shapes_data)
    command = [sys.executable, "-m", "dimaskdino", "evaluate", str(file), "--num-gpus", "2"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "evaluation" / "layers.json").read_text())
    evaluate_layers(load(file)).save(tmp_path / "one.json")
    assert two == json.loads((tmp_path / "one.json").read_text())
    assert not (tmp_path / "evaluation" / "detections").exists()


def test_the_measurement_at_the_size_of_coco_agrees_with_pycocotools():
    record = coco_benchmark.measure(images=20, stages=1, detections=20)
    for kind in ("box", "mask"):
        assert record["one_stage"][kind]["largest_difference"] < 1e-9
    assert 5 < record["ap"]["decoder.0"][0] < 95


def test_scoring_needs_no_model(model, tmp_path):
    store = detect_layers(model, folder=tmp_path)
    truth, source = truth_of(model)
    assert score_layers(store, truth, source, upper_bounds(truth, model.config)) == evaluate_layers(model)
