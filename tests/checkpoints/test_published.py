"""Published state dicts: every key goes somewhere, aliases agree, unknown keys are an error."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import FOLDER, MODELS, detectron2_names, image, read, state_dict
from torchvision import models

from dimaskdino import config
from dimaskdino.checkpoints.published import architecture, convert_backbone, convert_state, load_published, not_compared
from dimaskdino.modeling import Detector, ImageBatch
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


SWINS = {"swin_t_backbone": "swin_tiny_patch4_window7_224", "swin_l_backbone": "swin_large_patch4_window12_384"}


@pytest.mark.parametrize("case", ["swin_t_backbone", pytest.param("swin_l_backbone", marks=pytest.mark.slow)])
def test_a_published_swin_has_the_recorded_features(case):
    """Images whose maps are no multiples of the window, or smaller than it."""
    pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    record, recorded = read(case), np.load(FOLDER / f"{case}.npz")
    conversion = convert_state(state_dict(record))
    assert all(key.endswith("relative_position_index") for key in conversion.ignored)
    backbone = build_backbone(config.Backbone(name=SWINS[case])).eval()
    backbone.load_state_dict({key.removeprefix("backbone."): value for key, value in conversion.state.items()})
    for number, entry in enumerate(record["images"]):
        pixels = image(entry["height"], entry["width"], entry["image_seed"])
        batch = ImageBatch.from_images([pixels.byte()], torch.device("cpu"))
        with torch.no_grad():
            features = backbone(batch.pixels)
        for stride, x in features.items():
            sampled = x[0, ::8, ::2, ::2] if stride <= 8 else x[0, ::8]
            expected = torch.from_numpy(recorded[f"{number}.stride_{stride}"])
            assert (sampled - expected.view_as(sampled)).abs().max() < 1e-4, (number, stride)


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


def test_architectures_without_a_recorded_case_are_named(tmp_path, capsys):
    assert [not_compared(MODELS[case]) for case in ("di_r50", "di_small", "maskdino_3s", "maskdino_5level")] == [[]] * 4
    swin = MODELS["maskdino_5level"].model_copy(update={"backbone": config.Backbone(name=SWINS["swin_l_backbone"])})
    assert not_compared(swin)[0].startswith("swin_large_patch4_window12_384 in a whole model")
    assert not_compared(config.Model(backbone=config.Backbone(name="resnet101"))) == ["the backbone resnet101"]
    torch.save({"model": state_dict(read("di_small"))}, tmp_path / "published.pth")
    load_published(tmp_path / "published.pth")
    assert capsys.readouterr().err == ""
    load_published(tmp_path / "published.pth", ["model.selection.mask_to_box=no"])
    assert "note: not compared with outputs of the published code: 4 levels from res3 with mask_to_box=no" in (
        capsys.readouterr().err
    )
