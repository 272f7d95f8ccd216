"""What trainings on photographs gave, from measurements/photographs.json."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dimaskdino.studies.report import show_p
from tools.benchmarks.detectors import LABELS
from tools.records.formats import counted, number, signed
from tools.records.sources import measured
from tools.records.study_blocks import VERDICTS


def mean_ap(runs: list[dict[str, Any]], stage: str, kind: str) -> str:
    """Mean ± standard deviation of an AP over trainings."""
    values = [run["stages"][stage][kind] for run in runs if run["stages"].get(stage, {}).get(kind) is not None]
    if not values:
        return "–"
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def photographs() -> str:
    """Trainings on photographs: beside other models, the registered comparison, and AP at every stage."""
    parts = []
    for name, record in measured("photographs.json").items():
        train, val = record["train"], record["val"]
        groups = {f"{model}, as compared": runs for model, runs in record["rows"].items()}
        if record["recipe"]:
            groups = {"DI-MaskDINO, as `dimaskdino new` starts it": record["recipe"], **groups}
        about = (
            f"**{name}**: {train['images']} images with {train['objects']:,} objects of "
            f"{counted(train['classes'], 'class', 'classes')}, "
            f"and {val['images']} for validation ({record['source']}). {record['backbone']}, {record['size']} pixels, "
            f"{record['batch']} images per step; AP of the last layer, mean ± standard deviation over trainings."
        )
        tables = (_beside_other_models(record, groups), _probes(record), _registered(record), _stages_of(groups))
        parts += [about, *filter(None, tables)]
    return "\n\n".join(parts)


def _beside_other_models(record: dict[str, Any], groups: Mapping[str, list[dict[str, Any]]]) -> str:
    head = ["", "trainings", "parameters", "steps", "seconds per step", "memory", "box AP", "mask AP", "typed"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    times = record["times"]

    def cost(model: str) -> list[str]:
        if model not in times.get("seconds", {}):
            return ["–", "–"]
        return [f"{times['seconds'][model]:.2f}", f"{times['peak_memory'][model] / 2**30:.1f} GiB"]

    for label, runs in groups.items():
        last = list(runs[0]["stages"])[-1]
        cells = [label, len(runs), f"{runs[0]['parameters'] / 1e6:.1f} M", f"{record['steps']:,}"]
        cells += cost("kit" if label.startswith("DI-MaskDINO") else label)
        cells += [mean_ap(runs, last, "box"), mean_ap(runs, last, "mask"), "four commands"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for peer in record["peers"]:
        cells = [LABELS[peer["model"]], 1, f"{peer['parameters'] / 1e6:.1f} M", f"{peer['steps']:,}"]
        cells += [*cost(peer["model"]), number(peer["box"]), number(peer["mask"]), f"{peer['lines']} lines of Python"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if times:
        lines += ["", "Seconds and memory are those of training steps on an otherwise idle machine, models in turns."]
    else:
        runs = [run for group in groups.values() for run in group]
        minutes = " and ".join(f"{run['minutes']:.0f}" for run in runs)
        lines += ["", f"Training took {minutes} minutes on {runs[0]['threads']} cores."]
    return "\n".join(lines)


def _probes(record: dict[str, Any]) -> str:
    """Short trainings of the peers with other rates."""
    lines = ["| short training | rate | steps | box AP | mask AP |", "|---|---|---|---|---|"]
    for one in sorted(record["probes"], key=lambda one: (one["model"], one["lr"])):
        cells = [LABELS[one["model"]], f"{one['lr']:g}", str(one["steps"]), number(one["box"]), number(one["mask"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if record["probes"] else ""


def _registered(record: dict[str, Any]) -> str:
    """The comparison of the two models, or what it still lacks."""
    if not record["rows"]:
        return ""
    counts = {model: len(runs) for model, runs in record["rows"].items()}
    if len(counts) < 2 or min(counts.values()) < record["registered"]:
        done = " and ".join(f"{count} of {model}" for model, count in counts.items()) or "none"
        return f"Registered are {record['registered']} trainings of each model; {done} are done: no verdict yet."
    lines = ["| | difference | 95 % interval | adjusted p | trainings | verdict |", "|---" * 6 + "|"]
    for found in record["comparisons"]:
        interval = f"{signed(found['joint']['low'])} to {signed(found['joint']['high'])}"
        cells = [found["label"], signed(found["difference"]), interval, show_p(found["adjusted_p"])]
        cells += [" / ".join(map(str, found["runs"].values())), VERDICTS[found["verdict"]]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _stages_of(groups: Mapping[str, list[dict[str, Any]]]) -> str:
    lines = [f"| stage | {' | '.join(f'{label}: box | mask' for label in groups)} |"]
    lines.append("|---" * (1 + 2 * len(groups)) + "|")
    for stage in max((list(runs[0]["stages"]) for runs in groups.values()), key=len):
        cells = [mean_ap(runs, stage, kind) for runs in groups.values() for kind in ("box", "mask")]
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    return "\n".join(lines)
