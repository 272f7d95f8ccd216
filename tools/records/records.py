"""The numbers of README and docs, written from the committed records: `make figures`.

A block of Markdown between `<!-- records: NAME -->` and `<!-- end -->` is the text that the function NAME returns.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dimaskdino.evaluation.layerwise_ap import LayerwiseAP
from dimaskdino.studies.report import paper_tables
from tools.records import miniature_blocks, study_blocks
from tools.records.claims import CLAIMS, Claim, claims
from tools.records.formats import counted, number, signed
from tools.records.photograph_blocks import mean_ap, photographs
from tools.records.sources import MEASUREMENTS, MODELS, ROOT, course_models, measured

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def first_and_last_layers() -> dict[str, dict[str, Mapping[str, Mapping[str, float]]]]:
    """Box and mask AP of the first and the last decoder layer, in the paper and of the course's models."""
    published = paper_tables()["figure_1_layer_ap_bdd100k"]
    return {
        "Paper, BDD100K": {name: published[key] for name, key in MODELS.items()},
        "This kit, shapes": {name: ap.first_and_last() for name, ap in course_models().items()},  # type: ignore[misc]
    }


def _lag(layers: Mapping[str, Mapping[str, float]], layer: str = "first") -> str:
    return number(layers[layer]["mask"] - layers[layer]["box"])


def start() -> str:
    """The two commands, with what they took: records of a fresh clone (durations.json)."""
    record = measured("durations.json")
    demo, test, size = (math.ceil(record[key]) for key in ("demo_minutes", "test_minutes", "environment_gb"))
    return "\n".join(
        [
            "```",
            f"make demo    # train on the built-in data, evaluate every layer: {demo} minutes on two CPU cores",
            f"make test    # run the tests: {test} minutes",
            "```",
            "",
            f"Each command does its own set-up in `.venv/`: {size} GB with the CUDA build of PyTorch that PyPI has",
            "for Linux, less with a CPU build (`TORCH_INDEX=URL make demo` names a package index for it; without an",
            "NVIDIA driver PyTorch's own CPU index is used where it can be reached).",
        ]
    )


def claim() -> str:
    """Caption of the first figure."""
    paper, kit = first_and_last_layers().values()
    lags = [_lag(layers[name]) for name in MODELS for layers in (paper, kit)]
    return (
        "*Box and mask AP at the first and the last decoder layer. At the first layer MaskDINO's boxes lag "
        f"{lags[0]} points\nbehind its masks in the paper and {lags[1]} here, DI-MaskDINO's {lags[2]} and {lags[3]}. "
        "Here: the two models that come with the kit,\non synthetic shapes, one training each.*"
    )


def objects() -> str:
    """Caption of the figure of single objects."""
    record = measured("objects_figure.json")
    means = {stage: {k: sum(v) / len(v) for k, v in ious.items()} for stage, ious in record["stages"].items()}
    first, layer = means["first_selection"], means["decoder.1"]
    return (
        "*A rendered scene that shows the lag, and the DI-MaskDINO that ships for them, one colour per object: at the\n"
        f"first selection the masks fit (mean IoU {first['mask_iou']:.2f}), the boxes not yet "
        f"({first['box_iou']:.2f});\n"
        f"after the first layer both do ({layer['mask_iou']:.2f} and {layer['box_iou']:.2f}).*"
    )


def headlines() -> str:
    """The results at the top of the README."""
    golden = measured("golden.json")
    logits, boxes = (max(case[key] for case in golden.values()) for key in ("class_logits", "boxes"))
    kit = first_and_last_layers()["This kit, shapes"]
    last = {name: layers["last"] for name, layers in kit.items()}
    seeds = len(miniature_blocks.study_named("box_formula").seeds)
    modules = "; ".join(_claim(claim) for claim in CLAIMS if claim.study == "table_4" and claim.as_published)
    formula = study_blocks.share_of_the_formula()
    animals = measured("photographs.json")["animals"]
    recipe = animals["recipe"]
    minutes = max(run["minutes"] for run in recipe)
    survived = sum(outcome == "survived" for outcome in measured("faults.json")["faults"].values())
    return "\n".join(
        [
            f"* **Equal to the published implementation**: on {len(golden)} recorded cases the class logits differ by "
            f"at most {logits:.1e}, the boxes by {boxes:.1e} of the image.",
            f"* **The shipped models** (synthetic shapes, one training each): DI-MaskDINO reaches "
            f"{last['DI-MaskDINO']['box']:.1f} box and {last['DI-MaskDINO']['mask']:.1f} mask AP, MaskDINO "
            f"{last['MaskDINO']['box']:.1f} and {last['MaskDINO']['mask']:.1f}.",
            f"* **On photographs**: {mean_ap(recipe, 'decoder.4', 'box')} box and "
            f"{mean_ap(recipe, 'decoder.4', 'mask')} mask AP on {animals['val']['images']} images of animals, after at "
            f"most {minutes:.0f} minutes of training on {recipe[0]['threads']} cores "
            f"({counted(len(recipe), 'training')}).",
            f"* **Nothing is lost**: {survived} faults injected into real runs, from SIGKILL to a full disk, are "
            f"survived; {sum(measured('bad_inputs.json').values())} bad inputs are answered in one clear line each.",
            f"* **Part of the lag is arithmetic**: {formula:.0f} % of the baseline's lag at its decoder's input comes "
            "from the published formula that makes boxes of masks ([study](docs/study.md)).",
            f"* **The modules in miniature** ({seeds} seeds, 95 % intervals): {modules} "
            "([study](docs/study.md#results)).",
        ]
    )


def _claim(claim: Claim) -> str:
    """A claim about a module with its difference under the published formula, and the verdict."""
    found = claim.found_in(claim.as_published)
    return f"{claim.text}: {signed(found.difference)} ({study_blocks.interval(found)}), {claim.verdict}"


def golden() -> str:
    """Largest differences to the recorded outputs."""
    cases = measured("golden.json")
    lines = ["| case | class logits | mask logits | boxes |", "|---|---|---|---|"]
    for name, case in cases.items():
        cells = [f"{case[key]:.1e}" for key in ("class_logits", "mask_logits", "boxes")]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def shipped() -> str:
    """AP of every stage of the two shipped models of the shapes."""
    return _stages(course_models())


def solids() -> str:
    """AP of every stage of the shipped model of the rendered scenes."""
    return _stages({"DI-MaskDINO": LayerwiseAP.load(ROOT / "notebooks/models/solids/evaluation/layers.json")})


def _stages(models: Mapping[str, LayerwiseAP]) -> str:
    """A table of box and mask AP of some models at the stages of DI-MaskDINO."""
    head = "| stage | " + " | ".join(f"{name} box | mask | mask − box" for name in models) + " |"
    lines = [head, "|---" * (1 + 3 * len(models)) + "|"]
    for stage in models["DI-MaskDINO"].stages:
        cells = []
        for ap in models.values():
            found = ap.stages.get(stage)
            values = [found.box.AP, found.mask and found.mask.AP, found.imbalance] if found else [None] * 3
            cells += [number(values[0]), number(values[1]), signed(values[2])]
        lines.append(f"| `{stage}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def demo() -> str:
    """AP of every stage of the demo's model."""
    return LayerwiseAP.load(MEASUREMENTS / "demo_layers.json").markdown()


def faults() -> str:
    """What was injected, and what became of it."""
    record = measured("faults.json")["faults"]
    lines = ["| fault | |", "|---|---|", *(f"| {title} | {outcome} |" for title, outcome in record.items())]
    return "\n".join(lines)


def bad_inputs() -> str:
    """How many bad inputs of each kind are tested."""
    counts = measured("bad_inputs.json")
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    return f"{sum(counts.values())} bad inputs: {kinds}."


def runtimes() -> str:
    """Seconds per image of an exported model in each runtime."""
    record = measured("runtimes.json")
    images, versions = record["images"], record["packages"]
    lines = [
        f"{record['backbone']}, {record['shortest']} to {record['longest']} pixels, {record['threads']} threads, "
        f"{images} images one at a time, in turns; ONNX Runtime {versions['onnxruntime']}, OpenVINO "
        f"{versions['openvino'].split('-')[0]}, PyTorch {record['versions']['packages']['torch']}:",
        "",
        "| | median | fastest to slowest | images with equal scores |",
        "|---|---|---|---|",
    ]
    for name, row in record["runtimes"].items():
        span = f"{1000 * row['low']:.0f} to {1000 * row['high']:.0f} ms"
        lines.append(f"| {name} | {1000 * row['seconds']:.0f} ms | {span} | {row['equal']} of {images} |")
    return "\n".join(lines)


def diagnostics() -> str:
    """What the diagnostics say of the two shipped models."""
    both = measured("diagnostics.json")
    lines = ["| | MaskDINO | DI-MaskDINO |", "|---|---|---|"]

    def row(what: str, value: Any) -> None:
        cells = [value(both[key]) for key in MODELS.values()]
        lines.append(f"| {what} | {' | '.join('–' if cell is None else cell for cell in cells)} |")

    for stage in ("first_selection", "decoder.0", "decoder.1"):
        row(
            f"box IoU of the matched queries, `{stage}`", lambda m, s=stage: f"{m['matched_queries'][s]['box_iou']:.2f}"
        )
    for stage in ("first_selection", "decoder.0", "decoder.1"):
        row(f"mask IoU, `{stage}`", lambda m, s=stage: f"{m['matched_queries'][s]['mask_iou']:.2f}")
    row(
        "objects that change their query in the first layer",
        lambda m: f"{100 - 100 * m['query_stability']['decoder.1']:.0f} %",
    )
    for size in ("small", "medium"):
        row(
            f"lag of {size} objects at the first layer",
            lambda m, s=size: f"{m['imbalance_by_size'][s]['decoder.1']:+.1f}",
        )
    row("objects with a token in T_s1", lambda m: f"{100 * m['selection_recall']['T_s1']:.1f} %")
    row(
        "objects with a token in T_s2",
        lambda m: f"{100 * m['selection_recall']['T_s2']:.1f} %" if "T_s2" in m["selection_recall"] else None,
    )
    row("effective rank of BATO's attention", lambda m: f"{m['guidance_rank']:.1f}" if m["guidance_rank"] else None)
    return "\n".join(lines)


BLOCKS = {
    f.__name__: f
    for f in (
        start,
        claim,
        objects,
        headlines,
        golden,
        shipped,
        solids,
        demo,
        faults,
        bad_inputs,
        photographs,
        runtimes,
        diagnostics,
        *study_blocks.BLOCKS,
        *miniature_blocks.BLOCKS,
        claims,
    )
}
_BLOCK = re.compile(r"(<!-- records: (\w+) -->\n)((?:(?!<!--).*\n)*)(<!-- end -->)")


def rewritten(text: str) -> str:
    """A page with every block written anew."""
    return _BLOCK.sub(lambda match: f"{match[1]}{BLOCKS[match[2]]()}\n{match[4]}", text)


def write_all() -> Iterator[Path]:
    """Write the blocks of all pages; yields the pages that changed."""
    for page in PAGES:
        before = page.read_text()
        after = rewritten(before)
        if after != before:
            page.write_text(after)
            yield page


if __name__ == "__main__":
    for page in write_all():
        print(f"written: {page}")
