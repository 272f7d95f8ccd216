"""Published YAML files and KEY VALUE pairs: every key sets something, has the only supported value, or is reported."""

import json
from pathlib import Path

import pytest
import yaml
from golden import FOLDER, MODELS, read

from dimaskdino.checkpoints.published_settings import known_keys, load_settings, translate_pairs
from dimaskdino.cli.options import PUBLISHED_KEY
from dimaskdino.config import load_config
from dimaskdino.utils.errors import UserError

COCO = Path(__file__).parents[2] / "configs" / "coco" / "instance-segmentation"
RECIPE = COCO / "dimaskdino_r50_4scale_bs16_12ep.yaml"

BASE = """
MODEL:
  BACKBONE: {FREEZE_AT: 0, NAME: build_resnet_backbone}
  WEIGHTS: detectron2://ImageNetPretrained/torchvision/R-50.pkl
  PIXEL_MEAN: [123.675, 116.280, 103.530]
  RESNETS: {DEPTH: 50, STEM_TYPE: basic, STRIDE_IN_1X1: False, OUT_FEATURES: [res2, res3, res4, res5]}
DATASETS:
  TRAIN: ("coco_2017_train",)
  TEST: ("coco_2017_val",)
SOLVER:
  IMS_PER_BATCH: 16
  BASE_LR: 0.0001
  STEPS: (327778, 355092)
  MAX_ITER: 368750
  WARMUP_FACTOR: 1.0
  WARMUP_ITERS: 10
  WEIGHT_DECAY: 0.05
  CLIP_GRADIENTS: {ENABLED: True, CLIP_TYPE: full_model, CLIP_VALUE: 0.01, NORM_TYPE: 2.0}
  AMP: {ENABLED: True}
INPUT: {IMAGE_SIZE: 1024, MIN_SCALE: 0.1, MAX_SCALE: 2.0, FORMAT: RGB, DATASET_MAPPER_NAME: coco_instance_lsj}
TEST: {EVAL_PERIOD: 5000}
VERSION: 2
"""
CHILD = """
_BASE_: base.yaml
MODEL:
  META_ARCHITECTURE: Whatever
  SEM_SEG_HEAD: {NUM_CLASSES: 80, TOTAL_NUM_FEATURE_LEVELS: 4, DIM_FEEDFORWARD: 2048, IGNORE_VALUE: 255}
  MaskDINO:
    DEC_LAYERS: 6
    NUM_OBJECT_QUERIES: 300
    FIRST_SELECTED_QUERIES: 600
    NUM_GUIDING_TOKENS: 50
    CLASS_WEIGHT: 4.0
    COST_BOX_WEIGHT: 5.0
    DROPOUT: 0.0
    INITIALIZE_BOX_TYPE: mask2box
SOLVER: {STEPS: "(81125,)", MAX_ITER: 88500}
"""


@pytest.fixture
def published(tmp_path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "child.yaml").write_text(CHILD)
    return tmp_path / "child.yaml"


def test_a_published_file_is_the_same_recipe(published):
    settings = load_settings(published)
    # a warm-up that starts at the full rate is none
    assert settings.config == load_config(RECIPE, ["schedule.warmup=0"])
    assert set(settings.remarks) == {
        "SOLVER.AMP.ENABLED = True is train.precision=bf16 here; detectron2 uses fp16 (train.precision=fp16)",
        "child.yaml is read as DI-MaskDINO",
    }
    assert set(settings.without_effect) == {"MODEL.SEM_SEG_HEAD.IGNORE_VALUE", "TEST.EVAL_PERIOD", "VERSION"}


def test_arguments_of_both_forms(published):
    pairs = [
        "SOLVER.IMS_PER_BATCH",
        "8",
        "OUTPUT_DIR",
        "out",
        "SOLVER.STEPS",
        "(60000, 70000)",
        "MODEL.WEIGHTS",
        "a.pth",
    ]
    for file in (published, RECIPE):
        settings = load_settings(file, [*pairs, "schedule.drop_factor=0.2"])
        assert settings.config.train.batch_size == 8
        assert settings.config.schedule.drops == (60000, 70000)
        assert settings.config.schedule.drop_factor == 0.2
        assert (settings.output, settings.weights) == (Path("out"), Path("a.pth"))
    assert load_settings(RECIPE, ["MODEL.MaskDINO.NUM_OBJECT_QUERIES", "200"]).config.model.selection.k == (600, 200)
    baseline = COCO / "maskdino_r50_4scale_bs16_12ep.yaml"
    assert load_settings(baseline, ["MODEL.MaskDINO.NUM_OBJECT_QUERIES", "200"]).config.model.selection.k == (200,)
    changes, told = translate_pairs(["TEST.DETECTIONS_PER_IMAGE", "300", "MODEL.WEIGHTS", "b.pth", "data.root=x"])
    assert changes == ["evaluation.detections=300", "data.root=x"]
    assert told.weights == Path("b.pth")


def test_recorded_options_give_the_recorded_models():
    for case in ("di_small", "maskdino_4level", "maskdino_5level"):
        pairs = [str(part) for pair in read(case)["options"].items() for part in pair]
        base = RECIPE if case == "di_small" else COCO / "maskdino_r50_4scale_bs16_12ep.yaml"
        extra = ["model.backbone.weights=null"]
        extra += ["model.denoising.queries=30"] if case == "di_small" else []
        assert load_settings(base, [*pairs, *extra]).config.model == MODELS[case]


def test_the_baseline_is_recognised(tmp_path):
    (tmp_path / "maskdino.yaml").write_text("MODEL: {MaskDINO: {NUM_OBJECT_QUERIES: 100, DEC_LAYERS: 9}}")
    model = load_settings(tmp_path / "maskdino.yaml").config.model
    assert (model.selection.k, model.bato.enabled, model.decoder.layers) == ((100,), False, 9)
    (tmp_path / "dimaskdino_r50.yaml").write_text("MODEL: {MaskDINO: {DEC_LAYERS: 6}}")
    assert load_settings(tmp_path / "dimaskdino_r50.yaml").config.model.bato.enabled


@pytest.mark.parametrize(
    ("pairs", "remark"),
    [
        (["DATASETS.TRAIN", "('mine_train',)"], "name a folder with data.root"),
        (["MODEL.WEIGHTS", "https://somewhere/x.pth"], "download the file"),
        (["CUDNN_BENCHMARK", "True"], "not a setting of the published files"),
    ],
)
def test_what_this_kit_does_not_do_is_told(pairs, remark):
    (told,) = load_settings(RECIPE, pairs).remarks
    assert remark in told


@pytest.mark.parametrize(
    ("pairs", "changed"),
    [
        (["MODEL.BACKBONE.NAME", "D2SwinTransformer", "MODEL.SWIN.EMBED_DIM", "192", "MODEL.SWIN.WINDOW_SIZE", "12"],
         {"model.backbone.name": "swin_large_patch4_window12_384"}),
        (["MODEL.RESNETS.DEPTH", "101", "MODEL.RESNETS.NORM", "BN"], {"model.backbone.name": "resnet101"}),
        (["SOLVER.AMP.ENABLED", "False"], {"train.precision": "fp32"}),
        (["MODEL.WEIGHTS", "R-50.pkl"], {"model.backbone.weights": "R-50.pkl"}),
        (["MODEL.MaskDINO.DN_NOISE_SCALE", "0.6"], {"model.denoising.label_noise": 0.3}),
        (["SOLVER.WARMUP_FACTOR", "0.001", "SOLVER.WARMUP_ITERS", "500"], {"schedule.warmup": 500}),
        (["DATASETS.TEST", "('coco_2014_val',)"], {"data.val": "val2014"}),
        (["MODEL.BACKBONE.FREEZE_AT", "3"], {"model.backbone.freeze": 2}),
        (["SEED", "7"], {"train.seed": 7}),
        (["SEED", "-1"], {"train.seed": 0}),
    ],
)  # fmt: skip
def test_keys_that_mean_something_else_here(pairs, changed):
    settings = load_settings(RECIPE, pairs)
    for key, value in changed.items():
        found = settings.config
        for name in key.split("."):
            found = getattr(found, name)
        assert found == value
    assert settings.remarks == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["SOLVER.BASE_LR"], "SOLVER.BASE_LR needs a value after it"),
        (["lr", "5"], "'lr' is neither key=value"),
        (["SOLVER.BASE_LR", "much"], r"optimizer\.lr"),
        (["SOLVER.IMS_PER_BATCH", "0"], r"train\.batch_size"),
        (["MODEL.MaskDINO.DROPOUT", "0.1"], r"DROPOUT = 0.1 is an unsupported value; this kit implements only 0.0"),
        (["MODEL.RESNETS.NORM", "SyncBN"], "SyncBN: this kit has FrozenBN and BN"),
        (["MODEL.BACKBONE.FREEZE_AT", "1"], "freezes the stem only together with res2"),
        (["INPUT.RANDOM_FLIP", "vertical"], "flips horizontally or not at all"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        load_settings(RECIPE, arguments)


def test_architecture_without_a_configuration_is_a_mistake():
    with pytest.raises(UserError, match=r"name its configuration with --config"):
        translate_pairs(["MODEL.MaskDINO.NUM_OBJECT_QUERIES", "100"])


PUBLISHED = json.loads((FOLDER / "published_settings.json").read_text())
# what each published file differs in from the kit's default model: levels, finest, FFN of the encoder, boxes, layers
SHAPES = {
    "dimaskdino_r50_4scale_bs16_12ep.yaml": (4, "res3", 2048, "mask2box", 6),
    "maskdino_R50_bs16_50ep_3s.yaml": (3, "res3", 1024, "bitmask", 9),
    "maskdino_R50_bs16_50ep_3s_dowsample1_2048.yaml": (4, "res3", 2048, "mask2box", 9),
    "maskdino_R50_bs16_50ep_3s_dowsample1_2048_bitmask.yaml": (4, "res3", 2048, "bitmask", 9),
    "instance-segmentation/maskdino_R50_bs16_50ep_4s_dowsample1_2048.yaml": (4, "res2", 2048, "no", 9),
    "swin/maskdino_R50_bs16_50ep_4s_dowsample1_1024.yaml": (5, "res2", 1024, "bitmask", 9),
    "swin/maskdino_R50_bs16_50ep_4s_dowsample1_2048.yaml": (5, "res2", 2048, "bitmask", 9),
    "swin/maskdino_R50_bs16_50ep_4s_dowsample1_2048_no_maskEnhance.yaml": (5, "res2", 2048, "no", 9),
}


def test_every_published_key_is_one_on_the_command_line():
    keys = {*known_keys(), *(key for settings in PUBLISHED.values() for key in settings)}
    assert [key for key in keys if not PUBLISHED_KEY.match(key)] == []


def written(file: str, folder: Path) -> Path:
    """A published file with the recorded settings, nested again."""
    tree: dict = {}
    for key, value in PUBLISHED[file].items():
        *names, last = key.split(".")
        node = tree
        for name in names:
            node = node.setdefault(name, {})
        node[last] = value
    path = folder / Path(file).name
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize("file", [f for f in PUBLISHED if "dowsample2.yaml" not in f])
def test_every_setting_of_every_published_file_is_accounted_for(file, tmp_path):
    settings = load_settings(written(file, tmp_path))
    # nothing is unknown; what has no effect is in the list of such keys, the rest sets something or agrees
    assert not [remark for remark in settings.remarks if "not a setting" in remark]
    known = set(known_keys()) | set(settings.without_effect)
    for key, value in PUBLISHED[file].items():
        if key in settings.without_effect or key in known:
            continue
        # changing the value changes the configuration, is refused, or names something else
        try:
            changed = load_settings(RECIPE, [key, str(value)])
        except UserError:
            continue
        assert not changed.without_effect, key


@pytest.mark.parametrize(("end", "shape"), SHAPES.items())
def test_published_files_give_the_published_models(end, shape, tmp_path):
    (file,) = [name for name in PUBLISHED if name.endswith(end)]
    model = load_settings(written(file, tmp_path)).config.model
    decoder = model.pixel_decoder
    found = (decoder.levels, decoder.finest, decoder.ffn_dim, model.selection.mask_to_box, model.decoder.layers)
    assert found == shape
    assert model.backbone.name == ("swin_large_patch4_window12_384" if "/swin/" in file else "resnet50")
    assert model.bato.enabled == ("dimaskdino" in end)


def test_two_extra_levels_are_refused_with_the_reason(tmp_path):
    (file,) = [name for name in PUBLISHED if name.endswith("dowsample2.yaml")]
    with pytest.raises(UserError, match="means 2 extra levels; this kit's models have at most one"):
        load_settings(written(file, tmp_path))


def test_token_interaction_layers_are_a_setting():
    model = load_settings(RECIPE, ["MODEL.MaskDINO.TI_LAYERS", "3"]).config.model
    assert model.selection.token_interaction_layers == 3


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["MODEL.SEM_SEG_HEAD.FEATURE_ORDER", "high2low", "MODEL.SEM_SEG_HEAD.TOTAL_NUM_FEATURE_LEVELS", "4"],
         "more finest first"),
        (["MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES", "['res4', 'res5']"], "encoder reads"),
        (["MODEL.SWIN.MLP_RATIO", "3.0"], "unsupported value"),
    ],
)  # fmt: skip
def test_other_models_are_refused(pairs, message):
    with pytest.raises(UserError, match=message):
        load_settings(RECIPE, pairs)
