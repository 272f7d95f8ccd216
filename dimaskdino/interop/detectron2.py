"""The model as a meta-architecture of detectron2, and detectron2's datasets for `data import`.

    cfg = detectron2.config.get_cfg()
    add_config(cfg)
    cfg.merge_from_file("dimaskdino_r50_4scale_bs16_12ep.yaml")  # published, or any of detectron2's form
    cfg.MODEL.META_ARCHITECTURE = "DIMaskDINO"
    model = build_model(cfg)

Importing this module registers the meta-architecture. detectron2's trainers, checkpointer, evaluators and visualiser
then work as with its own models; `DIMaskDINOTrainer` adds the paper's optimizer and augmentation.
"""

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from dimaskdino.checkpoints.model_files import current_name
from dimaskdino.checkpoints.published import convert_state, is_published, our_name
from dimaskdino.checkpoints.published_settings import flatten, known_keys, translate_changes
from dimaskdino.config import Config, parse_config
from dimaskdino.data.coco import Sample, without_empty
from dimaskdino.data.dataloader import collate
from dimaskdino.data.exports import ExportedSplit, split_in
from dimaskdino.data.transforms import PADDING
from dimaskdino.modeling import Detector, ImageBatch, postprocess
from dimaskdino.training.criterion import criterion
from dimaskdino.training.optimizer import build_optimizer
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.terminal import print_lines

try:
    from detectron2.config import CfgNode, get_cfg
    from detectron2.data import (
        DatasetCatalog,
        DatasetMapper,
        MetadataCatalog,
        build_detection_train_loader,
        transforms,
    )
    from detectron2.engine import DefaultTrainer
    from detectron2.evaluation import COCOEvaluator
    from detectron2.modeling import META_ARCH_REGISTRY
    from detectron2.structures import BitMasks, Boxes, Instances
except ImportError as error:
    raise UserError(
        f"detectron2 cannot be imported ({error}). It is not on PyPI; install it from conda-forge, 'conda install -c "
        "conda-forge detectron2', or build it against the PyTorch at hand: pip install --no-build-isolation "
        "'git+https://github.com/facebookresearch/detectron2'"
    ) from None


_NOT_TRANSLATED = ("MODEL.META_ARCHITECTURE", "MODEL.DEVICE", "MODEL.WEIGHTS", "MODEL.DIMASKDINO.OVERRIDES")


def add_config(cfg: CfgNode) -> None:
    """Add the published settings with their published values, and `MODEL.DIMASKDINO.OVERRIDES`.

    The overrides are settings of this kit, such as `["model.bato.enabled=false", "model.selection.k=[300]"]`, and take
    precedence. Keys that neither detectron2 nor this kit knows are accepted; `model_config` reports them.
    """
    for key, value in known_keys().items():
        *nodes, last = key.split(".")
        if not nodes:
            continue
        place = cfg
        for name in nodes:
            if name not in place:
                place[name] = CfgNode(new_allowed=True)
            place = place[name]
        # keys of detectron2 keep their value, except those of the head, which mean another architecture there
        if last not in place or key.startswith("MODEL.SEM_SEG_HEAD."):
            place[last] = value
    cfg.MODEL.DIMASKDINO = CfgNode({"OVERRIDES": []})
    cfg.set_new_allowed(True)


def model_config(cfg: CfgNode) -> tuple[Config, tuple[str, ...]]:
    """This kit's settings for a detectron2 configuration, and remarks on differences.

    Raises:
        UserError: `add_config` was not called, or a value cannot be used.
    """
    if "DIMASKDINO" not in cfg.MODEL:
        raise UserError("call dimaskdino.interop.detectron2.add_config(cfg) before merging files")
    start = get_cfg()
    add_config(start)
    before = flatten(start)
    changed = {}
    for key, value in flatten(cfg).items():
        if key not in _NOT_TRANSLATED and (key not in before or before[key] != value):
            changed[key] = value
    changes, remarks = translate_changes(changed)
    # the checkpointer loads MODEL.WEIGHTS
    overrides = [*changes, "model.backbone.weights=null", *cfg.MODEL.DIMASKDINO.OVERRIDES]
    config = parse_config(Config().model_dump(mode="json"), overrides, "the configuration")
    return config, tuple(remark for remark in remarks if remark.startswith("MODEL."))


class DIMaskDINO(nn.Module):
    """The detector with the interface of detectron2: dictionaries in, losses or instances out.

    Published checkpoints, whole or of a ResNet alone, load under their own names.

    Args:
        cfg: a configuration that `add_config` was applied to.

    Raises:
        UserError: a setting has a value that this kit does not implement.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.config, remarks = model_config(cfg)
        for remark in remarks:
            print_lines(f"note: {remark}")
        self.bgr = cfg.INPUT.FORMAT == "BGR"
        self.detector = Detector(self.config.model)
        self.register_load_state_dict_pre_hook(_rename)
        self.to(cfg.MODEL.DEVICE)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """Losses by name in training mode, else `[{"instances": …}]` at the `height` and `width` of each input.

        Args:
            batched_inputs: `image` (3, h, w), 0 to 255, in the colour order of `INPUT.FORMAT`; for training
                `instances` with `gt_classes` and `gt_masks`; for testing optionally `height` and `width`.
        """
        pictures, output_sizes = [], []
        for x in batched_inputs:
            picture = x["image"].flip(0) if self.bgr else x["image"]
            pictures.append(picture)
            output_sizes.append((x.get("height", picture.shape[-2]), x.get("width", picture.shape[-1])))
        if self.training:
            return self._losses(pictures, [x["instances"] for x in batched_inputs])
        images = ImageBatch.from_images(pictures, self.device)
        count = self.config.evaluation.detections
        with torch.no_grad():
            last = self.detector(images).last
            found = postprocess(last, images.sizes, images.padded_size, output_sizes, count)
        results = []
        for size, detections in zip(output_sizes, found, strict=True):
            instances = Instances(size)
            instances.pred_boxes = Boxes(detections.boxes)
            instances.scores = detections.scores
            instances.pred_classes = detections.labels
            instances.pred_masks = detections.masks
            results.append({"instances": instances})
        return results

    def _losses(self, pictures: list[Tensor], objects: list[Instances]) -> dict[str, Tensor]:
        batch = collate(list(map(_sample, pictures, objects)))
        targets = batch.targets.to(self.device)
        count = torch.tensor(float(sum(batch.targets.counts)), device=self.device)
        if distributed.is_initialized():
            distributed.all_reduce(count)
            count = count / distributed.get_world_size()
        predictions = self.detector(ImageBatch.from_images(pictures, self.device), targets)
        return criterion(predictions, targets, self.config.loss, count).terms


def _sample(picture: Tensor, objects: Instances) -> Sample:
    height, width = picture.shape[-2:]
    if not objects.has("gt_masks"):
        masks = torch.zeros(0, height, width, dtype=torch.uint8)
    elif isinstance(objects.gt_masks, BitMasks):
        masks = objects.gt_masks.tensor.to(torch.uint8)
    else:
        masks = BitMasks.from_polygon_masks(objects.gt_masks, height, width).tensor.to(torch.uint8)
    labels = objects.gt_classes if len(masks) else torch.zeros(0, dtype=torch.int64)
    return without_empty(Sample(picture.cpu(), labels.cpu(), masks.cpu(), 0, "", (height, width)))


def _rename(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Rename published parameters, and those of earlier versions of this kit, in place."""
    own = f"{prefix}detector."
    renamed = {}
    if is_published(state):
        renamed = convert_state(state).state
    elif any(key.startswith("stem.conv1.") for key in state):
        for key, value in state.items():
            name = None if key.startswith(("stem.fc.", "linear.")) else our_name(f"backbone.{key}")
            if name is not None:
                renamed[name] = value
    else:
        for key in list(state):
            if key.startswith(own):
                state[own + current_name(key.removeprefix(own))] = state.pop(key)
        return
    state.clear()
    for name, value in renamed.items():
        state[own + name] = value


for _name in ("DIMaskDINO", "MaskDINO"):  # the second as in the published files of the baseline
    if _name not in META_ARCH_REGISTRY:
        META_ARCH_REGISTRY._do_register(_name, DIMaskDINO)


class DIMaskDINOTrainer(DefaultTrainer):
    """detectron2's trainer with the paper's AdamW, clipping over the whole model, and large-scale jitter."""

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        solver = cfg.SOLVER
        rates = {
            "lr": solver.BASE_LR,
            "weight_decay": solver.WEIGHT_DECAY,
            "backbone_lr_factor": solver.BACKBONE_MULTIPLIER,
        }
        own = model.module if isinstance(model, DistributedDataParallel) else model
        detector = cast(Detector, own.detector)
        optimizer = build_optimizer(detector, Config().optimizer.model_copy(update=rates))
        if solver.CLIP_GRADIENTS.ENABLED:
            parameters, norm = list(detector.parameters()), solver.CLIP_GRADIENTS.CLIP_VALUE

            def clip(*_: Any) -> None:
                nn.utils.clip_grad_norm_(parameters, norm)

            optimizer.register_step_pre_hook(clip)
        return optimizer

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        side = cfg.INPUT.IMAGE_SIZE
        mapper = DatasetMapper(  # leaves out the objects outside the crop
            is_train=True,
            augmentations=[
                transforms.RandomFlip(horizontal=True),
                transforms.ResizeScale(cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE, side, side),
                transforms.FixedSizeCrop((side, side), pad_value=PADDING),
            ],
            image_format=cfg.INPUT.FORMAT,
            use_instance_mask=True,
            instance_mask_format="bitmask",
        )
        return build_detection_train_loader(cfg, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        return COCOEvaluator(dataset_name, output_dir=str(Path(cfg.OUTPUT_DIR) / "inference"))


def exported_split(name: str) -> ExportedSplit:
    """A registered dataset as `data.importing` takes it: the split that its name mentions.

    Args:
        name: as registered in `DatasetCatalog`.

    Raises:
        UserError: there is no such dataset, or it has no class names.
    """
    if name not in DatasetCatalog.list():
        raise UserError(f"detectron2 knows no dataset '{name}', only {', '.join(sorted(DatasetCatalog.list()))}")
    records = DatasetCatalog.get(name)
    classes = MetadataCatalog.get(name).get("thing_classes")  # some register the names while they load
    if classes is None:
        raise UserError(f"{name} has no class names; set MetadataCatalog.get('{name}').thing_classes")
    split = ExportedSplit(split_in(name), list(classes))
    for record in records:
        path, size = Path(record["file_name"]).resolve(), (int(record["height"]), int(record["width"]))
        image = split.add_image(path, size)
        for annotation in record.get("annotations", ()):
            label, crowd = int(annotation["category_id"]), int(annotation.get("iscrowd", 0))
            split.add_object(image, label, _segmentation(annotation.get("segmentation")), crowd)
    return split


def _segmentation(value: Any) -> list[list[float]] | dict[str, Any] | None:
    """Outlines or run lengths in plain values, which json can write."""
    if isinstance(value, dict):
        counts = value["counts"]
        return {"size": list(value["size"]), "counts": counts.decode() if isinstance(counts, bytes) else counts}
    return [np.asarray(outline, dtype=float).ravel().tolist() for outline in value or ()]
