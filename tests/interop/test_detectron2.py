"""The bridge to detectron2: its own tools work with the model, and its datasets with the kit."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import detector, read, state_dict
from small import MODEL

from dimaskdino.cli.data import import_
from dimaskdino.data.coco import CocoDataset
from dimaskdino.data.importing import import_splits
from dimaskdino.data.shapes import CLASSES as SHAPES
from dimaskdino.modeling import ImageBatch, postprocess
from dimaskdino.utils.errors import UserError

HERE = importlib.util.find_spec("detectron2") is not None
needs_detectron2 = pytest.mark.skipif(not HERE, reason="detectron2 is not installed (it is not on PyPI)")
pytestmark = pytest.mark.filterwarnings("ignore")  # detectron2's own


@pytest.mark.skipif(HERE, reason="detectron2 is installed")
def test_without_detectron2_one_line_says_how_to_install_it():
    with pytest.raises(UserError, match="pip install --no-build-isolation") as raised:
        import_(Path("detectron2:some_dataset"), Path("folder"))
    assert "\n" not in str(raised.value)


@pytest.fixture
def registered(shapes_data):
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances

    name = "shapes_for_detectron2"
    register_coco_instances(
        name, {}, str(shapes_data / "annotations" / "train.json"), str(shapes_data / "images" / "train")
    )
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def configuration(*pairs: object):
    from detectron2.config import get_cfg

    from dimaskdino.interop.detectron2 import add_config

    cfg = get_cfg()
    add_config(cfg)
    cfg.merge_from_list(["MODEL.META_ARCHITECTURE", "DIMaskDINO", "MODEL.DEVICE", "cpu", *pairs])
    return cfg


@needs_detectron2
def test_a_published_checkpoint_gives_the_recorded_outputs(tmp_path):
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model

    options = [part for pair in read("di_small")["options"].items() for part in pair]
    model = build_model(configuration(*options, "MODEL.MaskDINO.DN_NUM", 30, "INPUT.FORMAT", "BGR")).eval()
    torch.save({"model": state_dict(read("di_small"))}, tmp_path / "published.pth")
    DetectionCheckpointer(model).load(str(tmp_path / "published.pth"))
    reference = detector("di_small")
    for key, value in reference.state_dict().items():
        assert torch.equal(model.detector.state_dict()[key], value), key

    image = torch.randint(0, 256, (3, 96, 128), generator=torch.Generator().manual_seed(0))
    (found,) = model([{"image": image.flip(0).float(), "height": 192, "width": 256}])  # blue first
    images = ImageBatch.from_images([image])
    with torch.no_grad():
        wanted = postprocess(reference(images).last, images.sizes, images.padded_size, [(192, 256)], 25)[0]
    instances = found["instances"]
    assert len(instances) == 25
    torch.testing.assert_close(instances.pred_boxes.tensor, wanted.boxes)
    torch.testing.assert_close(instances.scores, wanted.scores)
    assert torch.equal(instances.pred_classes, wanted.labels)
    assert torch.equal(instances.pred_masks, wanted.masks)
    DetectionCheckpointer(model, str(tmp_path)).save("again")
    other = build_model(configuration(*options, "MODEL.MaskDINO.DN_NUM", 30))
    DetectionCheckpointer(other).load(str(tmp_path / "again.pth"))
    assert torch.equal(other.detector.heads.label.weight, reference.heads.label.weight)
    stored = {
        key.replace("detector.bato.", "detector.token_optimization."): value
        for key, value in torch.load(tmp_path / "again.pth")["model"].items()
    }
    assert stored.keys() != other.state_dict().keys()
    another = build_model(configuration(*options, "MODEL.MaskDINO.DN_NUM", 30))
    another.load_state_dict(stored)  # names of version 0.2
    torch.testing.assert_close(another.state_dict(), other.state_dict(), rtol=0, atol=0)


@needs_detectron2
def test_a_backbone_of_its_model_zoo_loads(tmp_path):
    import pickle

    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model
    from golden import detectron2_names
    from torchvision import models

    net = models.resnet50()
    content = {"model": detectron2_names(net.state_dict()), "__author__": "someone", "matching_heuristics": True}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content))
    model = build_model(configuration())
    DetectionCheckpointer(model).load(str(tmp_path / "R-50.pkl"))
    torch.testing.assert_close(model.detector.backbone.stages[3][2].conv3.weight, net.layer4[2].conv3.weight)
    torch.testing.assert_close(model.detector.backbone.stem[0].weight, net.conv1.weight)


@needs_detectron2
def test_its_trainer_evaluator_and_visualizer_work(registered, tmp_path):
    from detectron2.data import MetadataCatalog
    from detectron2.utils.visualizer import Visualizer

    from dimaskdino.interop.detectron2 import DIMaskDINOTrainer

    small = [*MODEL, "loss.points=64", "model.backbone.name=resnet18", "model.backbone.norm=batch"]
    cfg = configuration(
        *("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 5, "MODEL.DIMASKDINO.OVERRIDES", small, "MODEL.WEIGHTS", ""),
        *("DATASETS.TRAIN", (registered,), "DATASETS.TEST", (registered,), "DATALOADER.NUM_WORKERS", 0),
        *("INPUT.IMAGE_SIZE", 64, "INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 64, "INPUT.FORMAT", "RGB"),
        *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 3, "SOLVER.BASE_LR", 1e-3, "SOLVER.STEPS", (2,)),
        *("TEST.EVAL_PERIOD", 3, "OUTPUT_DIR", str(tmp_path)),
    )
    trainer = DIMaskDINOTrainer(cfg)
    before = trainer.model.detector.heads.label.weight.clone()
    trainer.train()
    results = trainer.test(cfg, trainer.model)
    assert set(results) == {"bbox", "segm"}
    assert (tmp_path / "model_final.pth").exists()
    assert not torch.equal(trainer.model.detector.heads.label.weight, before)
    trainer.model.eval()
    picture = np.zeros((64, 64, 3), np.uint8)
    (found,) = trainer.model([{"image": torch.from_numpy(picture).permute(2, 0, 1)}])
    drawn = Visualizer(picture, MetadataCatalog.get(registered)).draw_instance_predictions(found["instances"][:3])
    assert drawn.get_image().any()


@needs_detectron2
def test_its_loader_jitters_and_leaves_out_objects_outside_the_crop(registered, shapes_data):
    from dimaskdino.interop.detectron2 import DIMaskDINOTrainer

    cfg = configuration(
        *("DATASETS.TRAIN", (registered,), "DATALOADER.NUM_WORKERS", 0, "SOLVER.IMS_PER_BATCH", 12),
        *("INPUT.IMAGE_SIZE", 64, "INPUT.MIN_SCALE", 2.0, "INPUT.MAX_SCALE", 4.0),
    )
    batch = next(iter(DIMaskDINOTrainer.build_train_loader(cfg)))
    objects = {Path(sample.file).name: len(sample.labels) for sample in CocoDataset(shapes_data, "train")}
    for x in batch:
        assert x["image"].shape == (3, 64, 64)
        assert x["instances"].gt_masks.tensor.flatten(1).any(1).all()
    assert sum(len(x["instances"]) for x in batch) < sum(objects[Path(x["file_name"]).name] for x in batch)


@needs_detectron2
def test_losses_need_no_objects_and_know_polygons():
    from detectron2.modeling import build_model
    from detectron2.structures import Instances, PolygonMasks

    small = [*MODEL, "loss.points=64", "model.backbone.name=resnet18"]
    model = build_model(configuration("MODEL.DIMASKDINO.OVERRIDES", small)).train()
    nothing, one = Instances((64, 64)), Instances((64, 64))
    nothing.gt_classes = torch.zeros(0, dtype=torch.int64)
    one.gt_classes = torch.tensor([3])
    one.gt_masks = PolygonMasks([[np.array([4.0, 4, 40, 4, 40, 30, 4, 30])]])
    picture = torch.randint(0, 256, (3, 64, 64))
    inputs = [{"image": picture, "instances": nothing}, {"image": picture, "instances": one}]
    losses = model(inputs)
    assert "decoder.1/giou" in losses
    assert all(value.isfinite() for value in losses.values())
    sum(losses.values()).backward()


@needs_detectron2
def test_settings_of_another_model_are_refused():
    from dimaskdino.interop.detectron2 import model_config

    config, remarks = model_config(configuration("MODEL.MaskDINO.DEC_LAYERS", 3))
    assert config.model.decoder.layers == 3
    assert remarks == ()
    with pytest.raises(UserError, match=r"DROPOUT = 0.5 is an unsupported value"):
        model_config(configuration("MODEL.MaskDINO.DROPOUT", 0.5))


@needs_detectron2
def test_a_registered_dataset_is_imported(registered, shapes_data, tmp_path):
    from dimaskdino.interop.detectron2 import exported_split

    done = import_splits([exported_split(registered)], registered, "datasets of detectron2", tmp_path / "folder")
    assert {split: images for split, (images, _) in done.counts.items()} == {"train": 9, "val": 3}
    original = {Path(sample.file).name: sample for sample in CocoDataset(shapes_data, "train")}
    for split in ("train", "val"):
        ours = CocoDataset(tmp_path / "folder", split)
        for mine in ours:
            theirs = original.pop(Path(mine.file).name)
            assert [ours.classes[i] for i in mine.labels] == [SHAPES[i] for i in theirs.labels]
            assert torch.equal(mine.masks, theirs.masks)
    assert not original
    with pytest.raises(UserError, match="detectron2 knows no dataset 'nothing'"):
        exported_split("nothing")


@needs_detectron2
def test_a_module_registers_what_the_command_imports(shapes_data, tmp_path):
    parts = [(split, shapes_data / "annotations" / f"{split}.json") for split in ("train", "val")]
    lines = [
        f"register_coco_instances('mine_{split}', {{}}, {str(file)!r}, {str(shapes_data / 'images' / split)!r})"
        for split, file in parts
    ]
    imports = "from detectron2.data.datasets import register_coco_instances"
    (tmp_path / "mine.py").write_text("\n".join([imports, *lines]))
    command = [sys.executable, "-m", "dimaskdino", "data", "import", "detectron2:mine_train,mine_val", "folder"]
    done = subprocess.run([*command, "--register", "mine"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "train: 12 images" in done.stdout
    assert "val: 4 images" in done.stdout
