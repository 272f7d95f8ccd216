"""Evaluated runs of a study, read from run folders and from the archive of a study folder.

An archive is two files that replace the run folders, in a repository or on another machine:

runs.jsonl      a line per run: variant, seed, configuration, versions, AP of every stage and class, validations
bootstrap.npz   a float32 array (samples, resamples) per run, by VARIANT_SEED; the line of the run names the samples
"""

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dimaskdino.config import read_tree
from dimaskdino.evaluation.bootstrap import BootstrapAP
from dimaskdino.evaluation.layerwise_ap import LayerwiseAP
from dimaskdino.runs.folder import RunFolder
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.files import parse_json_object, read_json_object, write_atomically, write_text

RUNS, SAMPLES = "runs.jsonl", "bootstrap.npz"


@dataclass(frozen=True)
class EvaluatedRun:
    """The evaluation of one trained model.

    Attributes:
        result: AP at every stage.
        samples: AP on resampled images, if the run was evaluated with `--bootstrap`.
        validations: box and mask AP in percent, None if undefined, of the stages that each validation scored, in the
            order of training: `{"decoder.1": {"box": 21.0, "mask": 21.3}, …}`.
    """

    result: LayerwiseAP
    samples: BootstrapAP | None = None
    validations: tuple[Mapping[str, Mapping[str, float | None]], ...] = ()

    @classmethod
    def load(cls, run: Path) -> "EvaluatedRun":
        """Read a run folder.

        Raises:
            UserError: the run was not evaluated, or its files are damaged.
        """
        result = LayerwiseAP.load(run / "evaluation" / "layers.json")
        samples = run / "evaluation" / SAMPLES
        loaded = BootstrapAP.load(samples) if samples.exists() else None
        return cls(result, loaded, _by_stage(_validations(run), result))


def load_runs(folder: Path, variants: Sequence[str]) -> dict[str, dict[int, EvaluatedRun]]:
    """Evaluated runs of a study folder, from `runs/VARIANT_SEED` and from its archive. Run folders take precedence.

    Args:
        folder: the study folder.
        variants: names of the variants.

    Returns:
        Runs by variant, in the given order, and seed; variants without any are left out.

    Raises:
        UserError: a file is damaged.
    """
    runs: dict[str, dict[int, EvaluatedRun]] = {variant: {} for variant in variants}
    archived = read_archive(folder)
    samples = _read_samples(folder) if archived else {}
    for name, line in archived.items():
        if line["variant"] in runs:
            runs[line["variant"]][line["seed"]] = _from_archive(folder, line, samples.get(name))
    for variant, seed, run in _run_folders(folder):
        if variant in runs:
            runs[variant][seed] = EvaluatedRun.load(run)
    return {variant: dict(sorted(by_seed.items())) for variant, by_seed in runs.items() if by_seed}


def archive_runs(folder: Path) -> Path:
    """Write all evaluated runs of a study folder to its archive. Runs that only the archive has are kept.

    Returns:
        `runs.jsonl`; `bootstrap.npz` is beside it.

    Raises:
        UserError: a run cannot be read, or the archive cannot be written.
    """
    lines = read_archive(folder)
    samples: dict[str, Any] = _read_samples(folder)
    for variant, seed, run in _run_folders(folder):
        evaluated = EvaluatedRun.load(run)
        versions = read_json_object(run / "versions.json")
        versions.pop("command", None)  # it has paths of this machine
        bootstrap = None
        samples.pop(run.name, None)
        if evaluated.samples is not None:
            arrays = evaluated.samples.samples
            bootstrap = {"images": evaluated.samples.images, "samples": list(arrays)}
            samples[run.name] = np.stack(list(arrays.values())).astype(np.float32)
        lines[run.name] = {
            "variant": variant,
            "seed": seed,
            "config": read_tree(run / "config.yaml"),
            "versions": versions,
            "layers": evaluated.result.to_json(),
            "validations": _validations(run),
            "bootstrap": bootstrap,
        }
    write_atomically(folder / SAMPLES, lambda partial: np.savez(partial, **samples))
    text = [json.dumps(lines[name], separators=(",", ":")) for name in sorted(lines)]
    write_text(folder / RUNS, "\n".join([*text, ""]))
    return folder / RUNS


def read_archive(folder: Path) -> dict[str, dict[str, Any]]:
    """Lines of the archive of a study folder by VARIANT_SEED; empty without an archive.

    Raises:
        UserError: a line is damaged.
    """
    file = folder / RUNS
    if not file.exists():
        return {}
    lines = {}
    for number, text in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        line = parse_json_object(text)
        if not {"variant", "seed", "config", "layers"} <= line.keys():
            raise UserError(f"{file}, line {number}: not a run of a study; copy the file again")
        lines[f"{line['variant']}_{line['seed']}"] = line
    return lines


def _run_folders(folder: Path) -> list[tuple[str, int, Path]]:
    """Variant, seed and path of every run folder with an evaluation, by name."""
    found = []
    for file in sorted((folder / "runs").glob("*/evaluation/layers.json")):
        run = file.parents[1]
        variant, _, seed = run.name.rpartition("_")
        if seed.isdigit():
            found.append((variant, int(seed), run))
    return found


def _validations(run: Path) -> list[dict[str, Any]]:
    """The validations of a run folder's training, with their steps."""
    records = RunFolder(run).read_metrics()
    return [{"step": record["step"], **record["validation"]} for record in records if "validation" in record]


def _by_stage(validations: Sequence[dict[str, Any]], result: LayerwiseAP) -> tuple[dict[str, Any], ...]:
    """Box and mask AP of each validation by stage; its own values are those of the last stage."""
    last = next(reversed(result.stages))
    found = []
    for validation in validations:
        of_last = {"box": validation["box_AP"], "mask": validation["mask_AP"]}
        found.append(validation.get("stages", {}) | {last: of_last})
    return tuple(found)


def _from_archive(folder: Path, line: dict[str, Any], samples: np.ndarray | None) -> EvaluatedRun:
    """The run of a line, with its array of samples."""
    try:
        result = LayerwiseAP.from_json(line["layers"])
        validations = _by_stage(line["validations"], result)
        bootstrap = None
        if line["bootstrap"] is not None:
            arrays = dict(zip(line["bootstrap"]["samples"], np.asarray(samples, np.float64), strict=True))
            bootstrap = BootstrapAP(line["bootstrap"]["images"], arrays)
        return EvaluatedRun(result, bootstrap, validations)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        name = f"{line['variant']}_{line['seed']}"
        raise UserError(f"{folder / RUNS}, {name}: damaged ({error!r}); copy it and {SAMPLES} again") from None


def _read_samples(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of an archive by VARIANT_SEED; empty without the file."""
    file = folder / SAMPLES
    if not file.exists():
        return {}
    try:
        # NumPy leaves a damaged file open that it opened itself
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
            return dict(content)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} is damaged ({error}); copy it again") from None
