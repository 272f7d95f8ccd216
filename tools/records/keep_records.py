"""Keep the records of a study's runs: `python tools/records/keep_records.py runs/study notebooks/studies/miniature`.

Of each evaluated run its configuration, versions, evaluation, and of the metrics the validations and every hundredth
step. Weights and resume points stay where they are. Copied into a study folder, the records stand for the runs, so that
a study can be continued on another machine: seed by seed, since all rows of a seed have one start.
"""

import argparse
import json
import shutil
from pathlib import Path

from dimaskdino.runs.folder import RunFolder

FILES = ("config.yaml", "evaluation/layers.json", "evaluation/bootstrap.npz")
EVERY = 100  # steps


def keep(run: Path, folder: Path) -> None:
    """Copy the records of a run to a folder of that name."""
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run / name, folder / name)
    versions = json.loads((run / "versions.json").read_text())
    versions.pop("command", None)  # it has paths of one machine; absent where a record stands for a run
    (folder / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")
    kept = [r for r in RunFolder(run).read_metrics() if "validation" in r or r["step"] % EVERY == 0]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path, help="folder of a study, as 'dimaskdino study' makes it")
    parser.add_argument("records", type=Path, help="folder of its records")
    arguments = parser.parse_args()
    evaluated = sorted(file.parents[1] for file in (arguments.study / "runs").glob("*/evaluation/layers.json"))
    for run in evaluated:
        keep(run, arguments.records / "runs" / run.name)
    print(f"kept: {len(evaluated)} runs in {arguments.records}")
