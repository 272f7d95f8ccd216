"""Published state dicts: every key goes somewhere, aliases agree, unknown keys are an error."""

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import MODELS, detectron2_names, read, state_dict
from torchvision import models

from dimaskdino import config
from dimaskdino.checkpoints.published import architecture, convert_backbone, convert_state
from dimaskdino.modeling import Detector
from dimaskdino.modeling.backbone import build_backbone
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.serialization import read_state_dict


@pytest.mark.parametrize("case", ["di_small", "maskdino_4level", "maskdino_3s", "maskdino_5level"])
def test_every_key_is_accounted_for(case):
    published = state_dict(read(case))
    conversion = convert_state(published)
    assert set(conversion.renamed) | set(conversion.ignored) == set(published)
    assert set(conversion.ignored) <= {"criterion.empty_weight", "pixel_mean", "pixel_std"}
    shapes = {key: value.shape for key, value in Detector(MODELS[case]).state_dict().items()}
    assert {key: value.shape for key, value in conversion.state.items()} == shapes


def test_aliases_that_differ_are_an_error():
    published = state_dict(read("di_small"))
    published["sem_seg_head.predictor.decoder.norm.weight"] = torch.zeros(256)
    with pytest.raises(UserError, match=r"should be another name of the tensor heads\.norm\.weight"):
        convert_state(published)


def test_unknown_keys_are_an_error():
    with pytest.raises(UserError, match=r"1 keys are not known .* first sem_seg_head\.something"):
        convert_state({"sem_seg_head.something": torch.zeros(1)})


@pytest.mark.parametrize("case", ["di_r50", "maskdino_4level", "maskdino_3s", "maskdino_5level"])
def test_the_architecture_is_inferred_from_the_weights(case):
    state = convert_state(state_dict(read(case))).state
    assert architecture(state, Path("x.pth")) == MODELS[case]


def test_what_the_weights_do_not_tell_is_taken_as_published():
    found = architecture(convert_state(state_dict(read("di_small"))).state, Path("x.pth"))
    assert (found.classes, found.pixel_decoder.layers, found.pixel_decoder.ffn_dim) == (7, 2, 128)
    assert (found.decoder.layers, found.decoder.ffn_dim) == (3, 96)
    assert found.selection.k == (600, 300)


def swin_as_published(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    """timm's parameters under the names of the original Swin Transformer, where a stage ends with the downsampling."""
    state = {}
    for key, value in net.state_dict().items():
        name = re.sub(r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key)
        state["backbone." + name] = value
    for i, width in enumerate((96, 192, 384, 768)):
        state |= {f"backbone.norm{i}.weight": torch.rand(width), f"backbone.norm{i}.bias": torch.rand(width)}
    state["backbone.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
    return state


def test_a_published_swin_has_the_features_of_the_original():
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    settings = config.Backbone(name="swin_tiny_patch4_window7_224")
    ours = build_backbone(settings)
    original = timm.create_model("swin_tiny_patch4_window7_224", strict_img_size=False, num_classes=0).eval()
    published = swin_as_published(original)
    published = {key: value for key, value in published.items() if not key.startswith("backbone.norm.")}
    converted = convert_state(published)
    assert converted.ignored == ["backbone.layers.0.blocks.0.attn.relative_position_index"]
    ours.load_state_dict({key.removeprefix("backbone."): value for key, value in converted.state.items()})
    pixels = torch.rand(1, 3, 96, 160)
    with torch.no_grad():
        features = ours.eval()(pixels)
        expected = original.forward_intermediates(pixels, intermediates_only=True)
    for i, (stride, x) in enumerate(zip((4, 8, 16, 32), expected, strict=True)):
        assert features[stride].shape == (1, ours.channels[stride], 96 // stride, 160 // stride)
        norm = published[f"backbone.norm{i}.weight"], published[f"backbone.norm{i}.bias"]
        wanted = torch.nn.functional.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], *norm).permute(0, 3, 1, 2)
        torch.testing.assert_close(features[stride], wanted, atol=1e-5, rtol=1e-5)


def test_backbones_of_detectron2_and_torchvision(tmp_path):
    net = models.resnet18()
    content = {"model": detectron2_names(net.state_dict()), "__author__": "someone", "matching_heuristics": True}
    (tmp_path / "R-18.pkl").write_bytes(pickle.dumps(content))
    torch.save(net.state_dict(), tmp_path / "r18.pth")
    for file in ("R-18.pkl", "r18.pth"):
        name, count = convert_backbone(tmp_path / file, tmp_path / f"{file}.safetensors")
        assert name == "resnet18"
        assert count >= 100
        for source in (file, f"{file}.safetensors"):
            loaded = build_backbone(config.Backbone(name="resnet18", weights=str(tmp_path / source)))
            torch.testing.assert_close(loaded.stem[0].weight, net.conv1.weight)
            torch.testing.assert_close(loaded.stages[3][0].downsample[1].weight, net.layer4[0].downsample[1].weight)
            torch.testing.assert_close(loaded.stages[2][1].bn2.running_var, net.layer3[1].bn2.running_var)


class Harmful:
    def __reduce__(self):
        return (Path.touch, (Path("harm"),))


def test_pickles_that_would_run_code_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"model": Harmful()}))
    torch.save({"model": Harmful()}, tmp_path / "bad.pth")
    for name in ("bad.pkl", "bad.pth"):
        with pytest.raises(UserError, match=r"bad\.(pkl|pth) cannot be read as a .*holds? more than"):
            read_state_dict(tmp_path / name)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"conv1_w": np.zeros(1)}, "Caffe2 ResNet"),
        ({"anything": np.zeros(1)}, "neither a published checkpoint nor a ResNet"),
        ({"model": [1, 2]}, "holds no state dict"),
    ],
)
def test_files_that_are_no_backbone(content, message, tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=message):
        convert_backbone(tmp_path / "x.pkl", tmp_path / "y.safetensors")
