"""The keys of the published configuration files, and what each means here."""

from typing import Any

MODEL, HEAD, DINO = "MODEL", "MODEL.SEM_SEG_HEAD", "MODEL.MaskDINO"

# the same value under another name
SAME = {
    f"{HEAD}.NUM_CLASSES": "model.classes",
    f"{HEAD}.TRANSFORMER_ENC_LAYERS": "model.pixel_decoder.layers",
    f"{HEAD}.DIM_FEEDFORWARD": "model.pixel_decoder.ffn_dim",
    f"{DINO}.HIDDEN_DIM": "model.hidden_dim",
    f"{DINO}.NHEADS": "model.heads",
    f"{DINO}.DEC_LAYERS": "model.decoder.layers",
    f"{DINO}.DIM_FEEDFORWARD": "model.decoder.ffn_dim",
    f"{DINO}.NUM_GUIDING_TOKENS": "model.bato.guiding_tokens",
    f"{DINO}.INITIALIZE_BOX_TYPE": "model.selection.mask_to_box",
    f"{DINO}.TI_LAYERS": "model.selection.token_interaction_layers",
    f"{DINO}.DN_NUM": "model.denoising.queries",
    f"{DINO}.TRAIN_NUM_POINTS": "loss.points",
    f"{DINO}.OVERSAMPLE_RATIO": "loss.oversample",
    f"{DINO}.IMPORTANCE_SAMPLE_RATIO": "loss.uncertain_fraction",
    **{
        f"{DINO}.{prefix}{theirs}_WEIGHT": f"loss.{section}.{ours}"
        for prefix, section in (("", "weights"), ("COST_", "cost"))
        for theirs, ours in (("CLASS", "label"), ("MASK", "mask"), ("DICE", "dice"), ("BOX", "l1"), ("GIOU", "giou"))
    },
    "INPUT.IMAGE_SIZE": "data.jitter.size",
    "INPUT.MIN_SCALE": "data.jitter.min_scale",
    "INPUT.MAX_SCALE": "data.jitter.max_scale",
    "INPUT.MIN_SIZE_TEST": "data.resize.shortest",
    "INPUT.MAX_SIZE_TEST": "data.resize.longest",
    "DATALOADER.NUM_WORKERS": "data.workers",
    "SOLVER.BASE_LR": "optimizer.lr",
    "SOLVER.BACKBONE_MULTIPLIER": "optimizer.backbone_lr_factor",
    "SOLVER.WEIGHT_DECAY": "optimizer.weight_decay",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": "optimizer.clip_norm",
    "SOLVER.IMS_PER_BATCH": "train.batch_size",
    "SOLVER.MAX_ITER": "schedule.steps",
    "SOLVER.STEPS": "schedule.drops",
    "SOLVER.GAMMA": "schedule.drop_factor",
    "SOLVER.CHECKPOINT_PERIOD": "train.checkpoint_every",
    "TEST.DETECTIONS_PER_IMAGE": "evaluation.detections",
}

# what this kit always does, whatever the file says
ALWAYS: dict[str, Any] = {
    f"{MODEL}.PIXEL_MEAN": [123.675, 116.28, 103.53],
    f"{MODEL}.PIXEL_STD": [58.395, 57.12, 57.375],
    f"{MODEL}.RESNETS.STEM_TYPE": "basic",
    f"{MODEL}.RESNETS.STEM_OUT_CHANNELS": 64,
    f"{MODEL}.RESNETS.STRIDE_IN_1X1": False,
    f"{MODEL}.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    f"{MODEL}.SWIN.APE": False,
    f"{MODEL}.SWIN.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    f"{HEAD}.CONVS_DIM": 256,
    f"{HEAD}.MASK_DIM": 256,
    f"{HEAD}.NORM": "GN",
    f"{HEAD}.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    f"{HEAD}.COMMON_STRIDE": 4,
    f"{DINO}.DEEP_SUPERVISION": True,
    f"{DINO}.DROPOUT": 0.0,
    f"{DINO}.ENC_LAYERS": 0,
    f"{DINO}.PRE_NORM": False,
    f"{DINO}.ENFORCE_INPUT_PROJ": False,
    f"{DINO}.SIZE_DIVISIBILITY": 32,
    f"{DINO}.INITIAL_PRED": True,
    f"{DINO}.TWO_STAGE": True,
    f"{DINO}.LEARN_TGT": False,
    f"{DINO}.DN": "seg",
    f"{DINO}.TEST.SEMANTIC_ON": False,
    f"{DINO}.TEST.INSTANCE_ON": True,
    f"{DINO}.TEST.PANOPTIC_ON": False,
    "INPUT.FORMAT": "RGB",
    "SOLVER.OPTIMIZER": "ADAMW",
    "SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR",
    "SOLVER.WEIGHT_DECAY_NORM": 0.0,
    "SOLVER.WEIGHT_DECAY_EMBED": 0.0,
    "SOLVER.CLIP_GRADIENTS.ENABLED": True,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "full_model",
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": 2.0,
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": True,
}

# what does not change the model, and why
NO_EFFECT = {
    f"{MODEL}.RESNETS.RES5_MULTI_GRID": "used by DeepLab's ResNets alone",
    f"{HEAD}.IGNORE_VALUE": "used by semantic segmentation alone",
    f"{HEAD}.LOSS_WEIGHT": "not used by the published loss",
    f"{DINO}.NO_OBJECT_WEIGHT": "not used by the focal loss, which the published models are trained with",
    f"{DINO}.EVAL_FLAG": "not used at inference",
    f"{DINO}.TEST.OBJECT_MASK_THRESHOLD": "used by panoptic segmentation alone",
    f"{DINO}.TEST.OVERLAP_THRESHOLD": "used by panoptic segmentation alone",
    "TEST.EVAL_PERIOD": "does not change the model; evaluate with 'dimaskdino evaluate'",
    "VERSION": "the version of the file's format",
}

# names of classes in the published code; which model they mean is read from other keys
NAMES = (
    f"{MODEL}.META_ARCHITECTURE",
    f"{HEAD}.NAME",
    f"{HEAD}.PIXEL_DECODER_NAME",
    f"{DINO}.TRANSFORMER_DECODER_NAME",
)

SWIN = {  # (EMBED_DIM, WINDOW_SIZE) -> timm's name
    (96, 7): "swin_tiny_patch4_window7_224",
    (128, 12): "swin_base_patch4_window12_384",
    (192, 12): "swin_large_patch4_window12_384",
}
RESNET_WEIGHTS = "ImageNetPretrained/torchvision/"  # detectron2's copies of torchvision's first ImageNet weights
DATASETS = {  # names registered in detectron2 -> folder and split
    f"coco_{year}_{split}": ("coco", f"{split}{year}") for year in (2014, 2017) for split in ("train", "val")
}
