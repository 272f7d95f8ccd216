"""The command line: `dimaskdino COMMAND`. Each command calls functions that Python users can call too.

Commands import their modules when they run, so that help is fast.
"""

import re
import sys
from collections.abc import Callable

from tyro.extras import SubcommandApp

from dimaskdino.cli import config, data, models, notebooks, training
from dimaskdino.cli.options import settings_first
from dimaskdino.utils.errors import Stopped, UserError, explain_os_error, first_line
from dimaskdino.utils.signals import EXIT_STOPPED, end_with_parent
from dimaskdino.utils.terminal import accept_all_text, printable

LONGEST = 1000  # characters of a message


def _group(**commands: Callable[..., int]) -> SubcommandApp:
    """Group commands; the names end in an underscore where Python has them as keywords."""
    group = SubcommandApp()
    for name, function in commands.items():
        group.command(name=name.rstrip("_"))(function)
    return group


app = _group(
    new=training.new,
    train=training.train,
    evaluate=models.evaluate,
    predict=models.predict,
    demo=notebooks.demo,
    run=notebooks.run,
    study=notebooks.study,
    status=training.status,
    share=training.share,
    export=models.export,
    convert=models.convert,
    models=models.list_models,
)
_data = _group(import_=data.import_, check=data.check, shapes=data.shapes, bdd100k=data.bdd100k)
_config = _group(show=config.show, keys=config.keys, list=config.names)
app.command(_data, name="data", help="Generate the built-in data, check a dataset, or convert one.")
app.command(_config, name="config", help="List configurations and settings, or show a configuration.")


def main() -> None:
    """Run `dimaskdino`. Errors that a user can fix are printed in one line, without a traceback."""
    accept_all_text()
    try:
        end_with_parent()
        description = "DI-MaskDINO: joint object detection and instance segmentation."
        sys.exit(app.cli(prog="dimaskdino", description=description, args=settings_first(sys.argv[1:])))
    except UserError as error:
        message, code = str(error), 1
    except OSError as error:
        if error.errno is None:
            raise
        message, code = printable(f"{error.filename or 'cannot write'}: {explain_os_error(error)}"), 1
    except Stopped as stopped:
        message, code = str(stopped), EXIT_STOPPED
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except (MemoryError, RuntimeError) as error:
        # PyTorch's allocator on the CPU has no exception of its own
        if not isinstance(error, MemoryError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        message, code = f"the memory does not suffice ({first_line(error)}); choose smaller sizes or batches", 1
    if len(message) > LONGEST:  # it quotes a file, or a value
        message = f"{message[: LONGEST // 2]} … {message[-LONGEST // 2 :]}"
    print(f"dimaskdino: {message}", file=sys.stderr)
    sys.exit(code)
