"""The public interface: load every format, predict on every kind of image, results that convert."""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import FOLDER, read, state_dict
from PIL import Image
from pycocotools import mask as coco_mask
from small import settings, trained_file
from torchvision.ops import clip_boxes_to_image

import dimaskdino
from dimaskdino import UserError
from dimaskdino.cli.predict_files import predict_files
from dimaskdino.data.coco import CocoDataset
from dimaskdino.data.images import to_image_tensor
from dimaskdino.data.painting import paint_instances
from dimaskdino.evaluation.layerwise_ap import LayerwiseAP
from dimaskdino.evaluation.predict import predict_images
from dimaskdino.modeling import CroppedMasks, Instances
from dimaskdino.utils.resources import shipped_models


@pytest.fixture(scope="module")
def model(shapes_data, tmp_path_factory) -> dimaskdino.Model:
    return dimaskdino.load(trained_file(tmp_path_factory.mktemp("model") / "model.safetensors", shapes_data))


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (48, 72, 3), dtype=np.uint8)


def same(a: dimaskdino.Result, b: dimaskdino.Result) -> bool:
    return torch.equal(a.boxes, b.boxes) and torch.equal(a.scores, b.scores) and torch.equal(a.masks, b.masks)


def test_public_names_exist():
    for name in dimaskdino.__all__:
        assert getattr(dimaskdino, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        dimaskdino.lode  # noqa: B018


def test_every_kind_of_image_gives_the_same_result(model, pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    kinds = [
        str(tmp_path / "photo.png"),
        tmp_path / "photo.png",
        Image.fromarray(pixels),
        pixels,
        tensor,
        tensor.float() / 255,
        pixels.astype(np.int64),
    ]
    assert all(torch.equal(to_image_tensor(kind), tensor) for kind in kinds)
    first = model.predict(pixels, threshold=0)
    assert len(first) == 60  # 12 queries, 5 classes
    for kind in kinds[:3]:
        assert same(first, model.predict(kind, threshold=0))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((3, 40, 40), np.uint8), r"an array \(h, w, 3\)"),
        (torch.zeros(40, 40, 3), r"a tensor \(3, h, w\)"),
        (torch.full((3, 4, 4), 255.0), "values from 0 to 1, got 255"),
        (torch.full((3, 4, 4), float("nan")), "values from 0 to 1, got nan"),
        (np.full((4, 4, 3), 300), "values from 0 to 255, got 300"),
        (np.zeros((0, 4, 3), np.uint8), "got the shape"),
        (7, "got int"),
        ("nowhere.jpg", "does not exist"),
    ],
)
def test_invalid_images_are_refused(model, image, message):
    with pytest.raises(UserError, match=message):
        model.predict(image)


def test_orientation_and_grey_images(tmp_path):
    grey = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    assert torch.equal(to_image_tensor(grey), torch.arange(12, dtype=torch.uint8).view(1, 3, 4).expand(3, -1, -1))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    grey.save(tmp_path / "rotated.png", exif=exif)
    assert to_image_tensor(tmp_path / "rotated.png").shape == (3, 4, 3)


def test_a_result_does_not_depend_on_its_batch(model, pixels):
    images = [pixels, pixels[:32, :40], pixels[::-1].copy(), pixels[:, :50], pixels]
    together = model.predict(images, threshold=0, batch_size=2)
    for image, result in zip(images, together, strict=True):
        alone = model.predict(image, threshold=0)
        torch.testing.assert_close(result.scores, alone.scores, atol=1e-5, rtol=0)
        assert result.image.shape[1:] == image.shape[:2]
    assert model.predict([]) == []


def test_attributes_of_a_result(model, shapes_data):
    sample = CocoDataset(shapes_data, "val")[0]
    result = model.predict(sample.image, threshold=0)
    assert result.masks.shape == (60, 64, 64)
    assert result.masks.dtype == torch.bool
    assert result.scores.tolist() == sorted(result.scores.tolist(), reverse=True)
    assert result.class_names == [model.classes[label] for label in result.labels.tolist()]
    few = model.predict(sample.image, threshold=float(result.scores[9]))
    assert len(few) == 10
    assert torch.equal(few.masks, result.masks[:10])
    assert repr(few).startswith(f"<Result: 10 detections at decoder.2 in 64x64: {few.class_names[0]}")


def test_stages(model, pixels):
    assert model.stages == [
        "first_selection",
        *(f"token_interaction.{i}" for i in (0, 1)),
        *(f"decoder.{i}" for i in range(3)),
    ]
    everything = predict_images(model, [to_image_tensor(pixels)])[0]
    assert list(everything) == model.stages
    for stage in model.stages:
        assert torch.equal(model.predict(pixels, stage=stage, threshold=0).scores, everything[stage].scores)
    no_masks = model.predict(pixels, stage="token_interaction.0", threshold=0)
    with pytest.raises(ValueError, match="no masks"):
        no_masks.masks  # noqa: B018
    assert "segmentation" not in no_masks.to_coco()[0]
    with pytest.raises(UserError, match=r"no stage 'decoder.9'; it has first_selection"):
        model.predict(pixels, stage="decoder.9")


def test_coco_annotations_are_the_masks_and_boxes(model, pixels):
    result = model.predict(pixels, threshold=0)
    records = json.loads(json.dumps(result.to_coco(7, category_ids=[10, 20, 30, 40, 50])))
    decoded = np.stack([coco_mask.decode(record["segmentation"]) for record in records])
    np.testing.assert_array_equal(decoded, result.masks.numpy())
    boxes = np.array([record["bbox"] for record in records])
    np.testing.assert_allclose(boxes[:, :2] + boxes[:, 2:], result.boxes[:, 2:].numpy(), atol=1e-4)
    assert {record["image_id"] for record in records} == {7}
    assert [record["category_id"] for record in records] == [10 * (label + 1) for label in result.labels.tolist()]


def test_pictures(model, pixels, tmp_path):
    result = model.predict(pixels, threshold=0)
    for name in ("a/out.png", "out.jpg", "out.pdf"):
        result.save(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    with Image.open(tmp_path / "a" / "out.png") as drawn:
        assert drawn.size == (pixels.shape[1], pixels.shape[0])
    data, metadata = result._repr_png_()
    assert data.startswith(b"\x89PNG")
    assert "60 detections" in metadata["alt"]
    with pytest.raises(UserError, match="cannot write"):
        result.save(tmp_path / "out.unknown")


def test_drawn_detections_have_the_colour_of_their_class():
    boxes = torch.tensor([[10.0, 30, 40, 60], [50, 30, 80, 60], [10, 70, 40, 95]])
    masks = torch.zeros(3, 100, 100, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    labels = torch.tensor([1, 0, 1])
    instances = Instances(boxes, torch.tensor([0.9, 0.8, 0.7]), labels, CroppedMasks.of(masks), torch.arange(3))
    canvas = paint_instances(torch.zeros(3, 100, 100, dtype=torch.uint8), instances, ["a", "b"])
    assert canvas.shape == (100, 100, 3)
    inside = [tuple(canvas[50, 25]), tuple(canvas[50, 65]), tuple(canvas[90, 25])]
    assert inside[0] == inside[2] != inside[1]
    assert tuple(canvas[98, 98]) == (0, 0, 0)


def test_boxes_end_where_the_image_does(model, pixels):
    boxes = model.predict(pixels, threshold=0).boxes
    assert boxes.min() >= 0
    assert boxes[:, 2].max() <= pixels.shape[1]
    assert boxes[:, 3].max() <= pixels.shape[0]
    raw = predict_images(model, [torch.from_numpy(pixels).permute(2, 0, 1)], [model.stages[-1]])[0][model.stages[-1]]
    torch.testing.assert_close(boxes, clip_boxes_to_image(raw.boxes, pixels.shape[:2]))


def test_supervision(model, pixels):
    supervision = pytest.importorskip("supervision", reason="pip install supervision")
    result = model.predict(pixels, threshold=0)
    detections = result.to_supervision()
    assert isinstance(detections, supervision.Detections)
    assert len(detections) == 60
    np.testing.assert_array_equal(detections.mask, result.masks.numpy())
    assert list(detections["class_name"]) == result.class_names


def test_without_the_package_the_extra_is_named(model, pixels, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match=r"dimaskdino\[supervision\]"):
        model.predict(pixels).to_supervision()


def test_inspect_has_every_stage_and_the_papers_intermediates(model, shapes_data):
    sample = CocoDataset(shapes_data, "val")[0]
    seen = model.inspect(sample)
    assert list(seen.predictions.stages) == model.stages
    assert seen.trace.T_s1.indices.shape == (1, 20)
    assert seen.trace.T_s2.indices.shape == (1, 12)
    assert set(seen.trace.T_s2.indices[0].tolist()) <= set(seen.trace.T_s1.indices[0].tolist())
    N = seen.trace.T_i.tokens.shape[1]
    assert seen.trace.guidance_attention.shape == (1, N, 4)
    assert seen.trace.T_bal.tokens.shape == seen.trace.T_i.tokens.shape
    assert len(seen.trace.references) == len(seen.trace.sampling) == 2
    result = model.predict(sample.image, threshold=0)
    # attention that returns its weights is computed in another order
    torch.testing.assert_close(seen.instances("decoder.2").scores, result.scores, atol=1e-5, rtol=0)
    assert len(model.inspect(sample.image.permute(1, 2, 0).numpy()).sample.labels) == 0


def test_the_courses_models_load_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in shipped_models():
        model = dimaskdino.load(name)
        assert model.step == (8_000 if name == "dimaskdino-solids" else 10_000)
        assert not model.detector.training
    with pytest.raises(UserError, match="neither a path nor one of dimaskdino-shapes"):
        dimaskdino.load("dimaskdino")


def test_published_checkpoints_load_like_any_other(tmp_path):
    torch.save({"model": state_dict(read("di_small"))}, tmp_path / "published.pth")
    changes = ["evaluation.detections=5", "data.resize.shortest=256", "data.resize.longest=256"]
    model = dimaskdino.load(tmp_path / "published.pth", overrides=changes)
    assert model.config.model.selection.k == (600, 300)
    assert model.classes == [f"class {i}" for i in range(1, 8)]
    assert len(model.predict(np.zeros((64, 64, 3), np.uint8), threshold=0)) == 5
    assert (FOLDER / "di_small.json").exists()


def test_saved_models_come_back_with_a_card(model, pixels, tmp_path):
    result = LayerwiseAP.load(Path(__file__).parents[1] / "notebooks/models/dimaskdino/evaluation/layers.json")
    model.save(tmp_path / "saved", result)
    assert {p.name for p in (tmp_path / "saved").iterdir()} == {
        "model.safetensors",
        "config.json",
        "layers.json",
        "README.md",
    }
    again = dimaskdino.load(tmp_path / "saved")
    assert same(again.predict(pixels, threshold=0), model.predict(pixels, threshold=0))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: dimaskdino\n")
    assert "| decoder.4 | 69.4 | 72.6 | +3.2 |" in card
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["classes"] == model.classes


def test_models_from_the_hub_come_from_its_cache_without_a_network(model, pixels, tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants", reason="pip install huggingface_hub")
    # the cache's own layout, as a download leaves it
    cache, commit = tmp_path / "cache", "0" * 40
    repo = cache / "models--owner--name"
    model.save(repo / "snapshots" / commit)
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = dimaskdino.load("owner/name")
        with pytest.raises(UserError, match="'owner/other' is not a local path and cannot be downloaded"):
            dimaskdino.load("owner/other")
    assert same(loaded.predict(pixels, threshold=0), model.predict(pixels, threshold=0))


def test_devices_and_precisions(shapes_data, tmp_path, pixels):
    file = trained_file(tmp_path / "model.safetensors", shapes_data)
    exact = dimaskdino.load(file, device="cpu").predict(pixels, threshold=0)
    half = dimaskdino.load(file, device="cpu", precision="bf16").predict(pixels, threshold=0)
    assert not torch.equal(exact.scores, half.scores)
    assert float((exact.scores - half.scores).abs().max()) < 0.05
    with pytest.raises(UserError, match="one of auto, fp32, tf32, bf16, fp16, got 'half'"):
        dimaskdino.load(file, precision="half")
    with pytest.raises(UserError, match="the device 'gpu' cannot be used here"):
        dimaskdino.load(file, device="gpu")


@pytest.mark.parametrize(
    ("known", "expected"),
    [({}, "fp32"), ({"avx512_f": True, "avx512_bf16": False}, "fp32"), ({"amx_bf16": True}, "bf16")],
)
def test_automatic_precision_follows_the_processor(known, expected, monkeypatch, shapes_data, tmp_path):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)  # PyTorch 2.10 has none
    file = trained_file(tmp_path / "model.safetensors", shapes_data)
    assert dimaskdino.load(file, device="cpu", precision="auto").precision == expected


def test_an_apple_gpu_that_is_not_there():
    if torch.backends.mps.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match="'mps' cannot be used here: PyTorch finds no Apple GPU"):
        dimaskdino.load("dimaskdino-shapes", device="mps")


# --- files ------------------------------------------------------------------------------------------------------------


def photo(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
    return path


def test_the_output_mirrors_the_input(model, tmp_path):
    photos = [photo(tmp_path / "in" / name, i) for i, name in enumerate(("a/x.png", "a/x.jpg", "b/x.jpg", "y.bmp"))]
    report = predict_files(model, [tmp_path / "in"], tmp_path / "out", threshold=0, batch_size=3)
    drawn = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.png"))
    assert drawn == ["a/x.jpg.png", "a/x.png.png", "b/x.png", "y.png"]
    assert sorted(report.pictures) == sorted(tmp_path / "out" / name for name in drawn)
    written = json.loads(report.json.read_text())
    assert [image["file_name"] for image in written["images"]] == sorted(map(str, photos))
    assert len(written["annotations"]) == report.detections == 240
    for annotation in written["annotations"][:5]:
        assert annotation["area"] == coco_mask.area(annotation["segmentation"])
    assert [c["name"] for c in written["categories"]] == model.classes


def test_inputs_are_never_overwritten(model, tmp_path):
    file = photo(tmp_path / "in" / "x.png")
    before = file.read_bytes()
    with pytest.raises(UserError, match=r"x\.png is an input and would be overwritten"):
        predict_files(model, [tmp_path / "in"], tmp_path / "in")
    assert file.read_bytes() == before
    photo(tmp_path / "other" / "x.png")
    with pytest.raises(UserError, match="would both be written to"):
        predict_files(model, [file, tmp_path / "other" / "x.png"], tmp_path / "out")
    report = predict_files(model, [tmp_path / "in", tmp_path / "other"], tmp_path / "out")
    assert sorted(p.parent.name for p in report.pictures) == ["in", "other"]


def test_unreadable_images_are_skipped_and_named(model, tmp_path):
    photo(tmp_path / "in" / "good.png")
    (tmp_path / "in" / "bad.png").write_bytes(b"no image")
    report = predict_files(model, [tmp_path / "in"], tmp_path / "out")
    assert [p.name for p in report.pictures] == ["good.png"]
    assert "bad.png cannot be read" in report.skipped[0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no file of the types"):
        predict_files(model, [tmp_path / "empty"], tmp_path / "out")


def test_videos(model, tmp_path):
    av = pytest.importorskip("av", reason="pip install av")
    rng = np.random.default_rng(0)
    with av.open(str(tmp_path / "in.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(4):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    report = predict_files(model, [tmp_path / "in.mp4"], tmp_path / "out", threshold=0)
    with av.open(str(report.pictures[0])) as written:
        frames = [frame.to_ndarray(format="rgb24").shape for frame in written.decode(video=0)]
    assert frames == [(48, 64, 3)] * 4
    names = [image["file_name"] for image in json.loads(report.json.read_text())["images"]]
    assert names == [f"{tmp_path / 'in.mp4'}#{i}" for i in range(4)]


def test_settings_are_those_of_the_training(model, shapes_data):
    assert model.config.model == settings(shapes_data).model


def test_models_and_results_say_what_they_were_trained_on(capsys, tmp_path):
    model = dimaskdino.load("dimaskdino-shapes", device="cpu")
    assert model.trained_on == "synthetic drawn shapes: 5 classes"
    assert repr(model) == (
        "<Model: DI-MaskDINO, resnet18, trained on synthetic drawn shapes: 5 classes (disk, rectangle, triangle, star, "
        "ring), step 10,000>"
    )
    assert dimaskdino.load("dimaskdino-solids", device="cpu").trained_on == "synthetic rendered solids: 5 classes"
    result = model.predict(torch.zeros(3, 128, 128, dtype=torch.uint8))
    assert repr(result).endswith("; trained on synthetic drawn shapes: 5 classes>")
    assert "note" not in capsys.readouterr().err
    model.save(tmp_path)
    assert "Trained on synthetic drawn shapes: 5 classes, for 10,000 steps." in (tmp_path / "README.md").read_text()


def test_a_photograph_for_a_model_of_drawings_is_noted_once(capsys):
    dimaskdino.model._note.cache_clear()
    model = dimaskdino.load("dimaskdino-shapes", device="cpu")
    for _ in range(2):
        model.predict(torch.zeros(3, 90, 120, dtype=torch.uint8))
    said = capsys.readouterr().err
    assert said.count("note: this model was trained on synthetic drawn shapes: 5 classes (disk, ") == 1
    assert 'dimaskdino.load("dimaskdino-r50-coco-12ep")' in said
