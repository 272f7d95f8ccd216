"""Settings and configuration files that cannot be used, given to `dimaskdino config show`."""

import pytest
from small import FILE

SETTINGS = [
    ("train.batchsize=3", "unknown setting 'train.batchsize'; did you mean 'train.batch_size'"),
    ("train.batch_size=0", "train.batch_size: input should be greater than 0"),
    ("train.batch_size=-3", "train.batch_size: input should be greater than 0"),
    ("train.batch_size=two", "train.batch_size: input should be a valid integer.*got 'two'"),
    ("train.batch_size=1.5", "train.batch_size: input should be a valid integer"),
    ("train.batch_size=", "train.batch_size: input should be a valid integer"),
    ("train.seed=-1", "train.seed: input should be greater than or equal to 0"),
    ("train.keep=0", "train.keep: input should be greater than 0"),
    ("train.precision=fp8", "train.precision: input should be 'fp32'"),
    ("optimizer.lr=.nan", "optimizer.lr: input should be a finite number"),
    ("optimizer.lr=.inf", "optimizer.lr: input should be a finite number"),
    ("optimizer.lr=-1", "optimizer.lr: input should be greater than"),
    ("loss.cost.mask=.nan", "loss.cost.mask: input should be a finite number"),
    ("schedule.steps=0", "schedule.steps: input should be greater than 0"),
    ("model.selection.k=[300, 600]", "cannot keep more tokens than the previous one"),
    ("model.selection.k=[]", "one, two or three selections"),
    ("model.selection.k=many", "model.selection.k: input should be a valid tuple"),
    ("model.pixel_decoder.levels=7", "model.pixel_decoder.levels"),
    ("model=5", "model: input should be a valid"),
    ("data.workers=-1", "data.workers: input should be greater than or equal to 0"),
    ("=5", "unknown setting ''"),
    ("train.batch_size=[1", "the value of train.batch_size is not valid YAML"),
    ("train.batch_size={a: &x [*x]}", "the value of train.batch_size"),
    ("batch_size", "neither key=value"),
    ("SOLVER.BASE_LR", "needs a value"),
    ("SOLVER.BASE_LR -1", "SOLVER.BASE_LR|optimizer.lr"),
]


def growing(letter: str) -> str:
    """Nine billion values by nine levels of aliases."""
    lines = [f"{letter}0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    for i in range(1, 9):
        lines.append(f"{letter}{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]")
    return "\n".join(lines)


FILES = {
    "empty text": ("hello", "must hold settings|"),
    "a list": ("[1, 2]", r"must hold settings \(key: value\), got list"),
    "broken YAML": ("model: {", "is not valid YAML"),
    "a tab": ("model:\n\thidden_dim: 4", "is not valid YAML"),
    "UTF-16": ("model: {}".encode("utf-16"), "not in UTF-8"),
    "binary": (bytes(range(128, 256)), "not in UTF-8"),
    "an object of Python": ("model: !!python/object/apply:os.system ['touch pwned']", "is not valid YAML"),
    "extends a number": ("extends: 5", "extends must be the path"),
    "extends itself": ("extends: c.yaml", "extends itself"),
    "an impossible date": ("model: 2024-13-45", "is not valid YAML"),
    "aliases that grow without bound": (growing("a"), "holds more than 100,000 values"),
    "published form, aliases that grow without bound": (growing("A"), "holds more than 100,000 values"),
    "an alias to itself": ("model: &m {backbone: *m}", "refers to itself"),
    "nested ten thousand deep": ("model: " + "[" * 10_000, "nested too deeply|not valid YAML"),
}


@pytest.mark.parametrize(("setting", "says"), SETTINGS, ids=[setting for setting, _ in SETTINGS])
def test_settings(setting, says, refused):
    refused(says, "config", "show", FILE, *(setting.split() if setting.startswith("SOLVER") else [setting]))


@pytest.mark.parametrize(("content", "says"), FILES.values(), ids=FILES)
def test_files(content, says, place, refused):
    refused(rf"c\.yaml.*{says}", "config", "show", place.write("c.yaml", content))


@pytest.mark.parametrize("base", ["gone.yaml", "."])
def test_a_file_that_extends_another(base, place, refused):
    refused(rf"cannot read the configuration .*{base}", "config", "show", place.write("c.yaml", f"extends: {base}"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gone.yaml", "gone.yaml"),
        ("shapes/dimaskdino_r81", "did you mean"),
        ("./", "no configuration .*give a YAML file"),
    ],
)
def test_names(name, says, refused):
    refused(says, "config", "show", name)
