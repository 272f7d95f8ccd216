"""The commands for configurations: `dimaskdino config …`."""

from tyro.conf import Positional

from dimaskdino.cli.options import SettingsArguments, print_remarks


def show(config: Positional[str], overrides: Positional[SettingsArguments] = ()) -> int:
    """Print a configuration with everything it extends and every default filled in.

    For example: dimaskdino config show shapes/dimaskdino_r18

    A file of the published code is shown as this kit's settings, and the differences are listed.

    Args:
        config: Name of a configuration, or a YAML file.
        overrides: Settings that differ from it.
    """
    from dimaskdino.checkpoints.published_settings import load_settings
    from dimaskdino.config import dump_config

    settings = load_settings(config, overrides)
    print_remarks(settings)
    print(dump_config(settings.config), end="")
    return 0


def keys() -> int:
    """List every setting: its key, default, type and meaning.

    For example: dimaskdino config keys | grep selection
    """
    from dimaskdino.config import describe_settings

    print("\n".join(describe_settings()))
    return 0


def names() -> int:
    """List the configurations that come with the kit.

    For example: dimaskdino config list
    """
    from dimaskdino.utils.resources import config_names

    print("\n".join(config_names()))
    return 0
