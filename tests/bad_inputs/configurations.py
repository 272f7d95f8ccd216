"""Settings and configuration files, given to `dimaskdino config show`."""

from small import FILE

from bad_inputs.table import bad


def setting(assignment: str, says: str) -> None:
    bad(f"setting: {assignment[:60]}", says, lambda place: ["config", "show", FILE, assignment])


def config_file(title: str, says: str, text: str | bytes) -> None:
    bad(f"configuration: {title}", rf"c\.yaml.*{says}", lambda place: ["config", "show", place.write("c.yaml", text)])


setting("train.batchsize=3", "unknown setting 'train.batchsize'; did you mean 'train.batch_size'")
setting("train.batch_size=0", "train.batch_size: input should be greater than 0")
setting("train.batch_size=-3", "train.batch_size: input should be greater than 0")
setting("train.batch_size=two", "train.batch_size: input should be a valid integer.*got 'two'")
setting("train.batch_size=1.5", "train.batch_size: input should be a valid integer")
setting("train.batch_size=", "train.batch_size: input should be a valid integer")
setting("train.seed=-1", "train.seed: input should be greater than or equal to 0")
setting("train.keep=0", "train.keep: input should be greater than 0")
setting("train.precision=fp8", "train.precision: input should be 'fp32'")
setting("optimizer.lr=.nan", "optimizer.lr: input should be a finite number")
setting("optimizer.lr=.inf", "optimizer.lr: input should be a finite number")
setting("optimizer.lr=-1", "optimizer.lr: input should be greater than")
setting("loss.cost.mask=.nan", "loss.cost.mask: input should be a finite number")
setting("schedule.steps=0", "schedule.steps: input should be greater than 0")
setting("model.selection.k=[300, 600]", "cannot keep more tokens than the previous one")
setting("model.selection.k=[]", "one, two or three selections")
setting("model.selection.k=many", "model.selection.k: input should be a valid tuple")
setting("model.pixel_decoder.levels=7", "model.pixel_decoder.levels")
setting("model=5", "model: input should be a valid")
setting("data.workers=-1", "data.workers: input should be greater than or equal to 0")
setting("=5", "unknown setting ''")
setting("train.batch_size=[1", "the value of train.batch_size is not valid YAML")
setting("train.batch_size={a: &x [*x]}", "the value of train.batch_size")
config_file("empty text", "must hold settings|", "hello")
config_file("a list", r"must hold settings \(key: value\), got list", "[1, 2]")
config_file("broken YAML", "is not valid YAML", "model: {")
config_file("a tab", "is not valid YAML", "model:\n\thidden_dim: 4")
config_file("UTF-16", "not in UTF-8", "model: {}".encode("utf-16"))
config_file("binary", "not in UTF-8", bytes(range(128, 256)))
config_file("an object of Python", "is not valid YAML", "model: !!python/object/apply:os.system ['true']")
config_file("extends a number", "extends must be the path", "extends: 5")
config_file("extends itself", "extends itself", "extends: c.yaml")
config_file("an impossible date", "is not valid YAML", "model: 2024-13-45")
config_file(
    "aliases that grow without bound",
    "holds more than 100,000 values",
    "\n".join(
        [
            "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]",
            *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)),
        ]
    ),
)
config_file(
    "published form, aliases that grow without bound",
    "holds more than 100,000 values",
    "\n".join(
        [
            "A0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]",
            *(f"A{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)),
        ]
    ),
)
config_file("an alias to itself", "refers to itself", "model: &m {backbone: *m}")
config_file("nested ten thousand deep", "nested too deeply|not valid YAML", "model: " + "[" * 10_000)
bad(
    "configuration: extends nothing",
    r"cannot read the configuration .*gone\.yaml",
    lambda place: ["config", "show", place.write("c.yaml", "extends: gone.yaml")],
)
bad(
    "configuration: extends a folder",
    "cannot read the configuration",
    lambda place: ["config", "show", place.write("c.yaml", "extends: .")],
)
bad("configuration: does not exist", "gone.yaml", lambda place: ["config", "show", "gone.yaml"])
bad("configuration: unknown name", "did you mean", lambda place: ["config", "show", "shapes/dimaskdino_r81"])
bad(
    "configuration: a folder",
    "no configuration .*give a YAML file",
    lambda place: ["config", "show", f"{place.folder}/"],
)
bad("configuration: neither form", "neither key=value", lambda place: ["config", "show", FILE, "batch_size"])
bad(
    "configuration: a published key without value",
    "needs a value",
    lambda place: ["config", "show", FILE, "SOLVER.BASE_LR"],
)
bad(
    "configuration: a published value out of range",
    "SOLVER.BASE_LR|optimizer.lr",
    lambda place: ["config", "show", FILE, "SOLVER.BASE_LR", "-1"],
)
