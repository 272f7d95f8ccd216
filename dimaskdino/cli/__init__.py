"""The command line: `dimaskdino COMMAND`. Each command calls functions that Python users can call too.

Commands import what they need when they run, so that help is fast.
"""

import sys
from collections.abc import Sequence

from tyro.extras import SubcommandApp

from dimaskdino.cli import config, data, models, notebooks, training
from dimaskdino.cli.options import PUBLISHED_KEY, SETTING
from dimaskdino.utils.errors import Stopped, UserError, explain_os_error
from dimaskdino.utils.signals import EXIT_STOPPED, end_with_parent

app = SubcommandApp()
for _function in (
    *(training.new, training.train, models.evaluate, models.predict),
    *(notebooks.run, notebooks.study, training.status, training.share, models.export, models.convert),
):
    app.command(_function)
_data = SubcommandApp()
for _function in (data.import_, data.check, data.shapes, data.bdd100k):
    _data.command(_function, name=_function.__name__.strip("_"))
app.command(_data, name="data", help="Generate the built-in data, check a dataset, or convert one.")
_config = SubcommandApp()
for _function in (config.show, config.keys, config.names):
    _config.command(_function, name={"names": "list"}.get(_function.__name__, _function.__name__))
app.command(_config, name="config", help="List configurations and settings, or show a configuration.")


def settings_first(arguments: Sequence[str]) -> list[str]:
    """The arguments with all settings before the first option, wherever they were written.

    Settings are `train.seed=1` and, in the form of the published code, `SOLVER.IMS_PER_BATCH 8`.
    """
    settings, others, is_value = [], [], False
    for argument in arguments:
        is_value = is_value and not argument.startswith("--")  # a key without a value is told later
        is_key = not is_value and bool(PUBLISHED_KEY.match(argument))
        (settings if is_value or is_key or SETTING.match(argument) else others).append(argument)
        is_value = is_key
    first_option = next((i for i, argument in enumerate(others) if argument.startswith("-")), len(others))
    return [*others[:first_option], *settings, *others[first_option:]]


def main() -> None:
    """Entry point of `dimaskdino`. Errors that a person can fix are one line, without a traceback."""
    try:
        end_with_parent()
        description = "DI-MaskDINO: joint object detection and instance segmentation."
        sys.exit(app.cli(prog="dimaskdino", description=description, args=settings_first(sys.argv[1:])))
    except UserError as error:
        print(f"dimaskdino: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.errno is None:
            raise
        print(f"dimaskdino: {error.filename or 'cannot write'}: {explain_os_error(error)}", file=sys.stderr)
        sys.exit(1)
    except Stopped as stopped:
        print(f"dimaskdino: {stopped}", file=sys.stderr)
        sys.exit(EXIT_STOPPED)
    except KeyboardInterrupt:
        print("dimaskdino: interrupted", file=sys.stderr)
        sys.exit(130)
