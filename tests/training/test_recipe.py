"""The configuration that `dimaskdino new` writes: the rules on small and large sets, the trial, the file."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from small import FILE, overrides, settings

from dimaskdino.cli.training import new, train
from dimaskdino.config import load_config
from dimaskdino.runs.folder import RunFolder
from dimaskdino.training.recipe import Machine, Recipe, propose, try_out
from dimaskdino.utils.errors import UserError

LAPTOP = Machine("cpu", "4 CPU cores", 4, 2**34, bf16=False)
SERVER = Machine("cuda", "a GPU", 16, 2**36, bf16=True)


@pytest.fixture(scope="module")
def finished(shapes_data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = RunFolder(tmp_path_factory.mktemp("finished") / "run")
    train(overrides(shapes_data, "schedule.steps=2", "schedule.drops=[1]"), str(FILE), str(folder.path))
    return folder


def dataset(root: Path, images: int, per_image: int = 2, side: float = 0.3, classes: int = 3) -> Path:
    """Annotations of square objects of a side relative to the image's; the images themselves are not needed."""
    for split, count in (("train", images), ("val", max(1, images // 5))):
        (root / "images" / split).mkdir(parents=True)
        (root / "annotations").mkdir(exist_ok=True)
        edge = 640 * side
        square = [0, 0, edge, 0, edge, edge, 0, edge]
        content = {
            "images": [{"id": i, "file_name": f"{i}.jpg", "height": 640, "width": 640} for i in range(count)],
            "annotations": [
                {"id": per_image * i + k + 1, "image_id": i, "category_id": k % classes, "segmentation": [square]}
                | {"bbox": [0, 0, edge, edge], "area": edge**2, "iscrowd": 0}
                for i in range(count)
                for k in range(per_image)
            ],
            "categories": [{"id": i, "name": f"class {i}"} for i in range(classes)],
        }
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return root


def test_twenty_images_and_two_thousand(tmp_path):
    few = propose(dataset(tmp_path / "few", 20), LAPTOP).config
    many = propose(dataset(tmp_path / "many", 2000), LAPTOP).config
    assert few.model.classes == many.model.classes == 3
    assert (few.schedule.steps, many.schedule.steps) == (1000, 10000)  # 200 and 20 passes, four images a step
    for config in (few, many):
        assert config.schedule.drops == (0.75 * config.schedule.steps, 0.9 * config.schedule.steps)
        assert config.schedule.warmup == 100
        assert (config.data.train, config.data.val) == ("train", "val")
        assert config.train.precision == "fp32"
        assert config.data.jitter.size == config.data.resize.shortest == 160
        assert str(config.train.weights) == "dimaskdino-shapes"
        assert "backbone" not in config.train.weights_of


@pytest.mark.parametrize(
    ("side", "machine", "size"),
    [(0.3, LAPTOP, 160), (0.06, LAPTOP, 192), (0.01, LAPTOP, 320), (0.01, SERVER, 1024), (0.03, SERVER, 384)],
)
def test_the_image_size_follows_the_objects_size_and_the_device(side, machine, size, tmp_path):
    recipe = propose(dataset(tmp_path, 20, side=side), machine)
    assert recipe.config.data.jitter.size == size
    assert f"smaller than {side:.1%} of the image" in recipe.reasons["data.jitter.size"]
    assert recipe.config.train.precision == ("bf16" if machine is SERVER else "fp32")


@pytest.mark.parametrize(
    ("per_image", "k", "detections"), [(5, (80, 40), 100), (90, (220, 110), 110), (400, (600, 300), 480)]
)
def test_tokens_and_detections_follow_the_most_crowded_image(per_image, k, detections, tmp_path):
    recipe = propose(dataset(tmp_path, 20, per_image), LAPTOP)
    assert recipe.config.model.selection.k == k
    assert recipe.config.evaluation.detections == detections
    assert ("model.selection.k" in recipe.reasons) == (k != (80, 40))


def test_a_model_to_start_from_keeps_its_architecture(finished, tmp_path):
    data = dataset(tmp_path / "data", 20)
    recipe = propose(data, LAPTOP, str(finished.path))
    own = load_config(finished.path / "config.yaml")
    expected = own.model.model_dump() | {"classes": 3}
    found = recipe.config.model.model_dump()
    for model in (expected, found):
        model["backbone"].pop("weights")
        model["selection"].pop("k")  # grows with the data
    assert found == expected
    assert recipe.config.train.weights == finished.path
    assert recipe.config.train.weights_of == ()
    shipped = propose(data, LAPTOP, "dimaskdino-shapes").config
    assert shipped.model.backbone.width == 32
    assert (shipped.data.jitter.min_scale, shipped.data.jitter.max_scale) == (0.7, 1.5)  # its own data needed none
    assert shipped.train.weights == Path("dimaskdino-shapes")


def test_the_file_says_the_same_and_why(tmp_path):
    recipe = propose(dataset(tmp_path / "data", 20), LAPTOP)
    (tmp_path / "config.yaml").write_text(recipe.text())
    assert load_config(tmp_path / "config.yaml") == recipe.config
    lines = recipe.text().splitlines()
    assert sum("# * " in line for line in lines) == len(recipe.reasons)
    assert "  classes: 3  # * class 0, class 1, class 2" in lines
    assert any(line.startswith("    box_noise: 0.4  # relative to") for line in lines)
    assert "model.classes=3  (class 0, class 1, class 2)" in recipe.summary()


def small_recipe(data: Path, *changes: str) -> Recipe:
    return Recipe(settings(data, "train.batch_size=4", "schedule.steps=1000", *changes), {})


def test_the_length_follows_the_time_that_is_there(shapes_data):
    recipe, cost = try_out(small_recipe(shapes_data), LAPTOP)
    assert recipe.config.schedule.steps == 1000
    assert "1,000 steps in" in cost
    seconds = float(cost.partition("about ")[2].split()[0])
    shorter, cost = try_out(small_recipe(shapes_data), LAPTOP, minutes=500 * seconds / 60)
    # two measurements, so that they agree roughly
    assert 100 <= shorter.config.schedule.steps <= 1000
    assert "minutes allow at" in shorter.reasons["schedule.steps"]
    assert shorter.config.schedule.drops[1] < shorter.config.schedule.steps


def test_a_batch_that_does_not_fit_the_memory_is_split_or_refused(shapes_data):
    with pytest.raises(UserError, match=r"one image of \d+ pixels needs .* GiB, more than 70%"):
        try_out(small_recipe(shapes_data), replace(LAPTOP, memory=2**20))


def test_data_that_cannot_be_trained_on(tmp_path):
    data = dataset(tmp_path / "data", 20)
    (data / "annotations" / "val.json").unlink()
    with pytest.raises(UserError, match="has no validation split, only train; 'dimaskdino data import"):
        propose(data, LAPTOP)
    with pytest.raises(UserError, match=r"the dataset folder .*nothing does not exist"):
        propose(tmp_path / "nothing", LAPTOP)
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="has no training split, only none"):
        propose(tmp_path / "bare", LAPTOP)
    with pytest.raises(UserError, match="no objects to learn from"):
        propose(dataset(tmp_path / "empty", 20, per_image=0), LAPTOP)


def test_new_and_train(shapes_data, finished, tmp_path, capsys):
    run = tmp_path / "run"
    assert new(shapes_data, run, weights=str(finished.path), minutes=0.2) == 0
    printed = capsys.readouterr().out
    assert "model.classes=5  (" in printed
    assert f"next: dimaskdino train --run {run}" in printed
    assert "note: the drops" not in printed  # those of the steps that are tried
    written = (run / "config.yaml").read_text()
    train(["schedule.steps=2", "schedule.drops=[1]"], run=str(run))
    assert RunFolder(run).status()["state"] == "finished"
    # the settings changed, so the file did; a run with the file's own settings keeps its comments
    assert (run / "config.yaml").read_text() != written
    again = tmp_path / "again"
    again.mkdir()
    (again / "config.yaml").write_text(written)
    RunFolder(again).write_config(load_config(again))
    assert (again / "config.yaml").read_text() == written
    with pytest.raises(UserError, match="exists already"):
        new(shapes_data, run)
    with pytest.raises(UserError, match="--minutes must be positive"):
        new(shapes_data, tmp_path / "other", minutes=0)
