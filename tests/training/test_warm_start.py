"""De-Imbalance and BATO added to a trained MaskDINO."""

import pytest
import torch

from dimaskdino import UserError
from dimaskdino.checkpoints import load_checkpoint
from dimaskdino.checkpoints.model_files import initialize_from
from dimaskdino.config import load_config
from dimaskdino.data.shapes import scene
from dimaskdino.modeling import Detector, ImageBatch
from dimaskdino.training.optimizer import build_optimizer


@pytest.fixture(scope="module")
def maskdino():
    return load_checkpoint("maskdino-shapes")


@pytest.fixture(scope="module")
def images():
    scenes = [scene(load_config("shapes/demo").data.shapes, "val", index)[0] for index in range(4)]
    pixels = [torch.from_numpy(image).permute(2, 0, 1) for image in scenes]
    return ImageBatch.from_images(pixels, torch.device("cpu"))


def started(maskdino, *changes):
    torch.manual_seed(0)
    detector = Detector(load_config("shapes/demo", changes).model).eval()
    _, lacking = initialize_from(detector, maskdino.detector.state_dict(), "maskdino-shapes", classes=range(5))
    return detector, lacking


def best_scores(detector, images):
    """Highest score of each class in each image at each decoder layer: (layers, images, classes)."""
    with torch.no_grad():
        stages = detector.eval()(images).stages.items()
    return torch.stack([stage.class_logits.sigmoid().amax(1) for name, stage in stages if name.startswith("decoder.")])


def test_the_trained_modules_work_as_before(maskdino, images):
    expected = best_scores(maskdino.detector, images)
    detector, lacking = started(maskdino)
    assert lacking == ["de_imbalance.second_selections", "bato"]
    random = Detector(load_config("shapes/demo").model)
    random.load_state_dict(random.state_dict() | maskdino.detector.state_dict())
    error, error_of_random = ((best_scores(each, images) - expected).abs().mean((1, 2)) for each in (detector, random))
    # the further selections normalise once more than the heads learnt, so the first two stages differ
    assert error[2:].max() < 0.04
    assert (error[2:] < error_of_random[2:] / 2).all()


def test_modules_that_the_trained_model_has_are_kept(maskdino):
    detector, _ = started(maskdino, "model.bato.enabled=false")
    for parameter in detector.de_imbalance.second_selections.parameters():
        torch.nn.init.normal_(parameter)
    both = Detector(load_config("shapes/demo").model)
    _, lacking = initialize_from(both, detector.state_dict(), "di", classes=range(5))
    assert lacking == ["bato"]
    kept = both.de_imbalance.second_selections.state_dict()
    for name, value in detector.de_imbalance.second_selections.state_dict().items():
        assert torch.equal(kept[name], value)


def test_a_module_has_its_own_rate(maskdino):
    config = load_config("shapes/demo")
    detector, _ = started(maskdino)
    rates = {}
    for group in build_optimizer(detector, config.optimizer).param_groups:
        rates |= dict.fromkeys(group["param_names"], group["lr"])
    assert rates["bato.ffn.linear1.weight"] == pytest.approx(5e-4)
    assert rates["de_imbalance.second_selections.0.norm.bias"] == pytest.approx(5e-4)
    assert rates["de_imbalance.first_selection.norm.bias"] == pytest.approx(1e-4)
    wrong = config.optimizer.model_copy(update={"lr_factors": {"bat": 5.0}})
    with pytest.raises(UserError, match="the model has no module 'bat'"):
        build_optimizer(detector, wrong)
