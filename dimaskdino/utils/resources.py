"""Files that come with the kit: configurations, models, run notebooks, and the data of the course.

A checkout has them in `configs/` and `notebooks/`, an installed wheel in the package.
"""

import difflib
from pathlib import Path

from dimaskdino.utils.errors import UserError

_PACKAGE = Path(__file__).parents[1]
_IN_CHECKOUT = {
    "configs": "configs",
    "measurements": "docs/measurements",
    "models": "notebooks/models",
    "notebooks": "notebooks/runs",
    "scenes": "notebooks/scenes",
    "studies": "notebooks/studies",
}
_MODELS = {"dimaskdino-shapes": "dimaskdino", "maskdino-shapes": "maskdino", "dimaskdino-solids": "solids"}


def _folder(kind: str) -> Path:
    installed = _PACKAGE / "_data" / kind
    return installed if installed.is_dir() else _PACKAGE.parent / _IN_CHECKOUT[kind]


def configs_folder() -> Path:
    """Return the folder of the configurations."""
    return _folder("configs")


def find_config(name: str | Path) -> Path:
    """Find the file of a configuration.

    Args:
        name: a YAML file, a run folder, or the name of one of the kit's configurations, such as
            `shapes/dimaskdino_r18`.

    Raises:
        UserError: it is none of these.
    """
    path = Path(name)
    if (path / "config.yaml").is_file():
        return path / "config.yaml"
    if path.suffix in (".yaml", ".yml"):
        if path.exists() or path.is_absolute() or not (configs_folder().parent / path).exists():
            return path
        return configs_folder().parent / path
    known = config_names()
    if str(name) in known:
        return configs_folder() / f"{name}.yaml"
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise UserError(f"no configuration '{name}': give a YAML file, or a name that 'dimaskdino config list' shows{hint}")


def config_names() -> list[str]:
    """List the names of the kit's configurations, without the studies."""
    folder = configs_folder()
    names = (file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))
    return sorted(name for name in names if not name.startswith("ablations/"))


def find_data(source: str | Path) -> Path:
    """Find a folder or file by its name among those that come with the kit, or by its path.

    Args:
        source: `scenes`, images of rendered solids; archived results of studies, such as `studies/shapes`;
            `measurements/photographs.json`; or a path.
    """
    kind, _, rest = str(source).partition("/")
    return _folder(kind) / rest if kind in ("measurements", "scenes", "studies") else Path(source)


def shipped_models() -> dict[str, Path]:
    """Run folders of the models that ship with the kit, by the name that `dimaskdino.load` takes."""
    return {name: _folder("models") / folder for name, folder in _MODELS.items()}


def is_kit_notebook(path: Path) -> bool:
    """Whether a notebook is one of the kit's run notebooks."""
    return path.resolve().parent == _folder("notebooks").resolve()


def find_notebook(name: str | Path) -> Path:
    """Find a notebook by the name of a run notebook such as `train`, or by a path that ends in `.ipynb`.

    Raises:
        UserError: it is neither.
    """
    if Path(name).suffix == ".ipynb":
        return Path(name)
    known = sorted(file.stem for file in _folder("notebooks").glob("*.ipynb"))
    if str(name) in known:
        return _folder("notebooks") / f"{name}.ipynb"
    raise UserError(f"no notebook '{name}': give a path that ends in .ipynb, or one of {', '.join(known)}")
