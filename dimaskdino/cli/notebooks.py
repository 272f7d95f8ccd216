"""The commands that run notebooks: run, demo, study."""

import importlib.util
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from dimaskdino.cli.options import Overrides, Plugins
from dimaskdino.utils import plugins
from dimaskdino.utils.errors import UserError


def run(
    notebook: Positional[Path],
    folder: Positional[Path],
    parameters: Positional[Annotated[tuple[str, ...], arg(metavar="NAME=VALUE")]] = (),
    plugin: Plugins = (),
) -> int:
    """Run a notebook with parameters, and write the executed notebook to a folder.

    For example: dimaskdino run train runs/mine config=shapes/dimaskdino_r18

    Args:
        notebook: A notebook, or the name of one of the kit's: train, evaluate, compare, demo, study,
            diagnostics.
            'papermill --help-notebook NOTEBOOK' lists its parameters.
        folder: Run folder; also the value of the notebook's parameter `run`.
        parameters: Parameters of the notebook; values are YAML, such as 'overrides=[train.seed=1, train.keep=2]'.
        plugin: Modules of your own that the configuration names and that may run (docs/extend.md).
    """
    plugins.allow(plugin)
    from dimaskdino.runs.notebooks import parse_parameters, run_notebook
    from dimaskdino.runs.processes import project_root
    from dimaskdino.utils.resources import find_notebook

    file = find_notebook(notebook)
    # notebooks resolve relative paths from the project's folder, wherever they are started
    values = {"run": os.path.relpath(folder, project_root())} | parse_parameters(parameters)
    print(f"written: {run_notebook(file, folder, values, echo=True)}")
    return 0


def demo(overrides: Positional[Overrides] = (), folder: Path = Path("runs/demo"), open: bool = False) -> int:
    """Show the effect of De-Imbalance and BATO: two trained models, and a training that adds both modules to one.

    For example: dimaskdino demo

    It takes about five minutes on two cores. Run the same command again to resume it.

    Args:
        overrides: Settings of the training that differ from shapes/demo.
        folder: Folder for the results: demo.ipynb, figures, and the training.
        open: Open the result in JupyterLab at the end.
    """
    from dimaskdino.config import load_config
    from dimaskdino.runs.folder import RunFolder

    if open and importlib.util.find_spec("jupyterlab") is None:
        raise UserError("--open needs jupyterlab: pip install 'dimaskdino[notebooks]'")
    settings = load_config("shapes/demo", overrides)
    training, figures, notebook = RunFolder(folder / "training"), folder / "figures", folder / "demo.ipynb"
    if (training.path / "config.yaml").exists():
        training.check_config(settings, same_result=True)
    changes = f"overrides={json.dumps(list(overrides))}"
    two, three = figures / "two_models.png", figures / "three_models.png"
    evaluation = training.path / "evaluation"
    try:
        if not two.exists():
            print("1 of 4: two trained models, evaluated", file=sys.stderr)
            run(Path("demo"), folder, ("train=false", changes))
        if not training.model.exists():
            print("2 of 4: De-Imbalance and BATO added, trained", file=sys.stderr)
            run(Path("train"), training.path, ("config=shapes/demo", changes))
        if not (evaluation / "layers.json").exists():
            print("3 of 4: the new model, evaluated", file=sys.stderr)
            run(Path("evaluate"), evaluation, (f"model={training.path.resolve()}",))
        if not three.exists():
            print("4 of 4: all three compared", file=sys.stderr)
            run(Path("demo"), folder, (changes,))
            with RunFolder(folder).running():  # its status becomes finished
                pass
    except KeyboardInterrupt:
        print("run the same command again to resume", file=sys.stderr)
        raise
    print(f"finished: {notebook}\nfigure: {three}")
    command = [sys.executable, "-m", "jupyter", "lab", str(notebook)]
    if open:
        os.execv(sys.executable, command)
    print(f"to open it: {shlex.join(command)}")
    return 0


def study(
    name: Positional[str],
    folder: Positional[Path | None] = None,
    overrides: Positional[Overrides] = (),
    scale: str = "shapes",
    seeds: tuple[int, ...] = (),
    parallel: int | None = None,
    plan: bool = False,
    archive: bool = False,
    plugin: Plugins = (),
) -> int:
    """Train and evaluate the variants of a study, such as a table of the paper, with several seeds, and compare them.

    For example: dimaskdino study table_4

    Runs with a result are not repeated, so the same command resumes an interrupted study, and studies with a common
    variant use the same runs. A run that fails does not stop the others. FOLDER/NAME receives the executed notebook
    study.ipynb, table.md, table.json and figures; FOLDER/runs receives the runs.

    Args:
        name: A study of configs/ablations (table_3 to table_9, figure_1, …) or a YAML file.
        folder: Folder of the runs and reports; runs/studies/SCALE by default.
        overrides: Settings for every variant, applied after its own.
        scale: One of the study's scales; shapes takes about ten minutes per run on one core, coco days on eight GPUs.
        seeds: Seeds of the training; the study's by default.
        parallel: Number of simultaneous runs; by default one per GPU, and one without any.
        plan: Only show the missing runs, their cost and the minimum detectable effects.
        archive: Also write the results of all runs to FOLDER/runs.jsonl and FOLDER/bootstrap.npz. In another folder,
            copies of these two files replace the runs.
        plugin: Modules of your own that the study or its configurations name and that may run (docs/extend.md).
    """
    plugins.allow(plugin)
    from dimaskdino.runs.notebooks import run_notebook
    from dimaskdino.runs.processes import project_root
    from dimaskdino.studies.runner import plan_study
    from dimaskdino.studies.runs import archive_runs
    from dimaskdino.studies.study import find_study, load_study
    from dimaskdino.utils.resources import find_notebook

    file = find_study(name)
    target = folder or Path("runs", "studies", scale)
    planned = plan_study(load_study(file), scale, seeds, target, overrides, parallel)
    print(planned.describe())
    if plan:
        return 0
    report = target / file.stem
    parameters = {
        "study": os.path.relpath(file, project_root()),
        "run": os.path.relpath(report, project_root()),
        "scale": scale,
        "seeds": list(seeds),
        "changes": list(overrides),
        "parallel": parallel or 0,
    }
    print(f"written: {run_notebook(find_notebook('study'), report, parameters, echo=True)}")
    print((report / "table.md").read_text(encoding="utf-8"))
    if archive:
        print(f"written: {archive_runs(target)}")
    return 0
