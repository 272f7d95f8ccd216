"""Settings: files that extend others, overrides, and errors that name the key."""

import contextlib
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dimaskdino.config import Config, describe_settings, dump_config, keys_of, load_config, parse_config
from dimaskdino.utils.errors import UserError

CONFIGS = Path(__file__).parent.parent / "configs"
COCO = CONFIGS / "coco" / "instance-segmentation"


def write(folder: Path, text: str, name: str = "settings.yaml") -> Path:
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize(
    "file", sorted(set(CONFIGS.rglob("*.yaml")) - set(CONFIGS.rglob("ablations/**/*.yaml"))), ids=lambda p: p.stem
)
def test_every_file_loads_and_survives_a_round_trip(file, tmp_path):
    config = load_config(file)
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_published_schedules():
    steps = {12: (88500, (81125,)), 24: (177000, (147500,)), 50: (368750, (327778, 355092))}
    for epochs, (length, drops) in steps.items():
        config = load_config(COCO / f"dimaskdino_r50_4scale_bs16_{epochs}ep.yaml")
        assert (config.schedule.steps, config.schedule.drops) == (length, drops)
        assert (config.train.batch_size, config.optimizer.lr, config.optimizer.weight_decay) == (16, 1e-4, 0.05)
        assert config.model.selection.k == (600, 300)


def test_baseline_is_without_both_modules():
    model = load_config(COCO / "maskdino_r50_4scale_bs16_12ep.yaml").model
    assert model.selection.k == (300,)
    assert not model.bato.enabled


def test_a_file_holds_only_what_differs_from_its_base(tmp_path):
    write(tmp_path, "train: {batch_size: 4, seed: 3}\nmodel: {classes: 7}", "base.yaml")
    config = load_config(write(tmp_path, "extends: base.yaml\ntrain: {seed: 5}"))
    assert (config.train.batch_size, config.train.seed, config.model.classes) == (4, 5, 7)


def test_overrides(tmp_path):
    file = write(tmp_path, "{}")
    config = load_config(file, ["optimizer.lr=2e-4", "model.selection.k=[90, 60, 40]", "data.root=some/where"])
    assert config.optimizer.lr == 2e-4
    assert config.model.selection.k == (90, 60, 40)
    assert config.data.root == Path("some/where")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batchsize=4", "did you mean 'train.batch_size'"),
        ("model.bato.guidence=Q_bal", "did you mean 'model.bato.guidance'"),
        ("train.batch_size=many", "train.batch_size.*integer.*'many'"),
        ("train.batch_size=0", "train.batch_size.*greater than 0"),
        ("model.selection.k=[300, 600]", "cannot keep more tokens"),
        ("model.selection.k=[4, 3, 2, 1]", "one, two or three"),
        ("model.selection.k=[300]", "guidance=T_i"),
        ("model.bato.guidance=T_i", "selection.k=\\[300\\]"),
        ("model.bato.after=[2, 1]", "must ascend, as in \\[1, 2, 3\\], got \\[2, 1\\]"),
        ("model.bato.after=[1, 6]", "needs a decoder layer after the last of these, got decoder.layers=6"),
        ("model.hidden_dim=100", "multiple of 32"),
        ("train.seed", "key=value"),
        ("train.seed={", "not valid YAML"),
        ("train.seed=-1", "train.seed.*greater than or equal to 0"),
        ("loss.cost.mask=.nan", "loss.cost.mask.*finite number"),
        ("optimizer.lr=.inf", "optimizer.lr.*finite number"),
    ],
)
def test_wrong_overrides_name_the_key_and_the_way_out(override, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_config(write(tmp_path, "{}"), [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [", "not valid YAML"),
        ("- 3", "must hold settings"),
        ("extends: nowhere.yaml", "nowhere.yaml: No such file"),
        ("extends: settings.yaml", "extends itself"),
        ("modle: {classes: 3}", "unknown setting 'modle'"),
    ],
)
def test_wrong_files(text, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_config(write(tmp_path, text))


def test_settings_are_listed_with_default_type_and_meaning():
    lines = describe_settings()
    assert {line.partition("=")[0] for line in lines} == {*keys_of(), "data.shapes"}
    assert "model.denoising.label_noise=0.2  (float >= 0 and <= 1)  # probability of a random class" in lines
    assert (
        "model.backbone.norm=frozen  (one of frozen, batch)  # frozen batch norm, or trained, for training"
        in "\n".join(lines)
    )
    listed = [line.partition("  (")[0] for line in lines if "shapes" not in line]
    assert parse_config({}, listed, "the list") == Config()


@pytest.mark.parametrize(
    "changes",
    [
        ["loss.weights.l1=0.5", "loss.weights.giou=0.2"],
        ["model.decoder.random_positions=true"],
        ["model.decoder.layers=3", "model.bato.enabled=false"],
        ["model.selection.k=[300]", "model.bato.guidance=T_i"],
        ["model.bato.guidance=T_s1"],
        ["model.bato.guidance=T_s2"],
        ["model.bato.generation=false"],
        ["model.selection.k=[600, 450, 300]"],
        ["model.selection.k=[300, 300]"],
        ["model.decoder.layers=9"],
    ],
)
def test_every_ablation_of_the_paper_is_a_setting(changes):
    changed = load_config(COCO / "dimaskdino_r50_4scale_bs16_12ep.yaml", changes)
    assert changed != load_config(COCO / "dimaskdino_r50_4scale_bs16_12ep.yaml")


def test_files_in_another_encoding_and_odd_bases_are_named(tmp_path):
    (tmp_path / "utf16.yaml").write_text("train: {seed: 1}", encoding="utf-16")
    with pytest.raises(UserError, match=r"utf16.yaml is not in UTF-8"):
        load_config(tmp_path / "utf16.yaml")
    (tmp_path / "number.yaml").write_text("extends: 5")
    with pytest.raises(UserError, match=r"number.yaml: extends must be the path of a YAML file, got 5"):
        load_config(tmp_path / "number.yaml")


plain = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
keys = st.sampled_from(keys_of()) | st.sampled_from(["model", "data", "train", "loss.cost"]) | st.text(max_size=12)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(assignments=st.lists(st.tuples(keys, values), max_size=4))
def test_any_setting_is_refused_with_a_message_or_survives_a_round_trip(assignments, tmp_path):
    overrides = [f"{key}={json.dumps(value)}" for key, value in assignments]
    try:
        config = load_config(CONFIGS / "shapes" / "dimaskdino_r18.yaml", overrides)
    except UserError:  # any other error fails
        return
    assert load_config(write(tmp_path, dump_config(config))) == config


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=st.dictionaries(st.sampled_from([*Config.model_fields, "extends", "MODEL", "x"]), values, max_size=4))
def test_any_file_is_refused_with_a_message_or_is_a_configuration(tree, tmp_path):
    try:
        config = load_config(write(tmp_path, yaml.safe_dump(tree)))
    except UserError:  # any other error fails
        return
    assert isinstance(config, Config)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=60) | st.binary(max_size=60).map(lambda raw: raw.decode("latin1")))
def test_any_text_is_refused_with_a_message_or_is_a_configuration(text, tmp_path):
    (tmp_path / "any.yaml").write_text(text, encoding="utf-8", errors="surrogateescape")
    with contextlib.suppress(UserError):  # any other error fails
        assert isinstance(load_config(tmp_path / "any.yaml"), Config)
