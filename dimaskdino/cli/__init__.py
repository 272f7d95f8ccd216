"""The command line: `dimaskdino COMMAND`. Each command calls functions that Python users can call too.

Commands import their modules when they run, so that help is fast.
"""

import sys

from tyro.extras import SubcommandApp

from dimaskdino.cli import config, data, models, notebooks, training
from dimaskdino.cli.options import settings_first
from dimaskdino.utils.errors import Stopped, UserError, explain_os_error
from dimaskdino.utils.signals import EXIT_STOPPED, end_with_parent

app = SubcommandApp()
for _function in (
    *(training.new, training.train, models.evaluate, models.predict),
    *(notebooks.run, notebooks.study, training.status, training.share, models.export, models.convert),
):
    app.command(_function)
_data = SubcommandApp()
for _name, _function in {
    "import": data.import_,
    "check": data.check,
    "shapes": data.shapes,
    "bdd100k": data.bdd100k,
}.items():
    _data.command(_function, name=_name)
app.command(_data, name="data", help="Generate the built-in data, check a dataset, or convert one.")
_config = SubcommandApp()
for _name, _function in {"show": config.show, "keys": config.keys, "list": config.names}.items():
    _config.command(_function, name=_name)
app.command(_config, name="config", help="List configurations and settings, or show a configuration.")


def main() -> None:
    """Run `dimaskdino`. Errors that a user can fix are printed in one line, without a traceback."""
    try:
        end_with_parent()
        description = "DI-MaskDINO: joint object detection and instance segmentation."
        sys.exit(app.cli(prog="dimaskdino", description=description, args=settings_first(sys.argv[1:])))
    except UserError as error:
        message, code = str(error), 1
    except OSError as error:
        if error.errno is None:
            raise
        message, code = f"{error.filename or 'cannot write'}: {explain_os_error(error)}", 1
    except Stopped as stopped:
        message, code = str(stopped), EXIT_STOPPED
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    print(f"dimaskdino: {message}", file=sys.stderr)
    sys.exit(code)
