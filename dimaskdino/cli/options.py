"""Options that several commands have, and settings on the command line."""

import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from tyro.conf import UseAppendAction, arg

from dimaskdino.utils.terminal import print_lines

if TYPE_CHECKING:
    from dimaskdino.checkpoints.published_settings import PublishedConfig

SETTING = re.compile(r"[a-z]\w*(\.\w+)+=")  # the beginning of an argument such as train.seed=1
PUBLISHED_KEY = re.compile(  # a key of the published configurations; the next argument is its value
    r"(MODEL|INPUT|DATASETS|DATALOADER|SOLVER|TEST|GLOBAL)(\.\w+)+$|(OUTPUT_DIR|SEED|CUDNN_BENCHMARK|VIS_PERIOD|VERSION)$"
)

Overrides = Annotated[
    tuple[str, ...],
    arg(metavar="KEY=VALUE", help="Settings that differ from the file, such as train.batch_size=8 data.root=my/data."),
]
SettingsArguments = Annotated[
    tuple[str, ...],
    arg(
        metavar="KEY=VALUE",
        help="Settings that differ from the file, such as train.batch_size=8; also in the form of the published code, "
        "SOLVER.IMS_PER_BATCH 8.",
    ),
]
Device = Annotated[str, arg(help="cpu, cuda, cuda:1, mps, or auto: a GPU if there is one.")]
PrecisionOption = Annotated[
    str,
    arg(
        help="Precision of the forward pass: fp32, tf32 (NVIDIA GPUs), bf16, fp16, or auto: bf16 where the device is "
        "faster with it."
    ),
]
ModelSource = Annotated[
    str,
    arg(
        metavar="MODEL",
        help="Run folder, model.safetensors, resume point, published .pth, a name that 'dimaskdino models' lists, or "
        "owner/name on the Hugging Face Hub.",
    ),
]
TrainingConfig = Annotated[
    str | None,
    arg(
        aliases=["--config-file"],
        metavar="CONFIG",
        help="Name of a configuration ('dimaskdino config list'), or a YAML file of this kit or of the published code; "
        "by default config.yaml in the run folder, as 'dimaskdino new' writes it.",
    ),
]
OptionalConfigPath = Annotated[
    str | None,
    arg(
        aliases=["--config-file"],
        metavar="CONFIG",
        help="Configuration that a published checkpoint was trained with; inferred from the weights by default.",
    ),
]
ProcessCount = Annotated[
    int,
    arg(
        aliases=["--num-gpus"], help="Number of processes on this machine, one per GPU. For several machines: torchrun."
    ),
]
Plugins = Annotated[
    tuple[str, ...],
    UseAppendAction,  # one value per option, so that it does not take the arguments that follow
    arg(
        metavar="MODULE",
        help="A Python module of your own that the configuration names and that may run, such as my_project.gates. "
        "Repeat the option for several.",
    ),
]


def settings_first(arguments: Sequence[str]) -> list[str]:
    """Move all settings before the first option, since tyro reads positional arguments from one place only.

    Settings are `train.seed=1` and, in the form of the published code, `SOLVER.IMS_PER_BATCH 8`.
    """
    settings: list[str] = []
    others: list[str] = []
    key_before = False
    for argument in arguments:
        is_value = key_before and not argument.startswith("--")  # a key without a value is reported later
        key_before = not is_value and bool(PUBLISHED_KEY.match(argument))
        if is_value or key_before or SETTING.match(argument):
            settings.append(argument)
        else:
            others.append(argument)
    first_option = next((i for i, argument in enumerate(others) if argument.startswith("-")), len(others))
    return [*others[:first_option], *settings, *others[first_option:]]


def relaunch_distributed(count: int) -> None:
    """Replace this process by torchrun with `count` processes of this command. No-op for one or inside torchrun."""
    from dimaskdino.utils.errors import UserError

    if count < 1:
        raise UserError(f"--processes must be at least 1, got {count}")
    if count > 1 and "RANK" not in os.environ:
        from dimaskdino.runs.processes import launch_command

        command, environment = launch_command(sys.argv[1:], count)
        os.execve(sys.executable, command, os.environ | environment)  # signals then reach torchrun directly


def print_remarks(settings: "PublishedConfig") -> None:
    """Print how this kit differs from a published configuration, and which of its keys have no effect."""
    for line in settings.notes():
        print_lines(f"note: {line}", file=sys.stderr)
