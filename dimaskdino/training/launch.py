"""`python -m dimaskdino.training.launch CONFIG RUN [key=value …]`, alone or under torchrun: one training process."""

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import ms_deform_attn

from dimaskdino.checkpoints.published_settings import PublishedConfig, load_settings
from dimaskdino.config import Config
from dimaskdino.runs.folder import RunFolder
from dimaskdino.training.trainer import train
from dimaskdino.utils.errors import Stopped, UserError, explain_os_error
from dimaskdino.utils.signals import EXIT_STOPPED, end_with_parent


def _starting_from(settings: PublishedConfig) -> Config:
    """The configuration, with `train.weights` set to the model that `MODEL.WEIGHTS` names."""
    if settings.weights is None:
        return settings.config
    train = settings.config.train.model_copy(update={"weights": settings.weights})
    return settings.config.model_copy(update={"train": train})


def main(config_file: str, run: str, overrides: list[str]) -> int:
    folder = RunFolder(Path(run))
    first = int(os.environ.get("RANK", 0)) == 0
    try:
        with folder.running(keep_finished=True) if first else nullcontext():
            settings = load_settings(config_file, overrides)
            config = _starting_from(settings)
            if first:
                for line in settings.notes():
                    print(f"note: {line}")
                folder.write_config(config)
                print(ms_deform_attn.status())
            train(config, folder)
        if first:
            print(f"finished: {folder.path}; next: dimaskdino evaluate {folder.path}")
    except Stopped as stopped:
        print(stopped)
        return EXIT_STOPPED
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno is None:
            raise
        print(f"error: {error.filename or folder.path}: {explain_os_error(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
