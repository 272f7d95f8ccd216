"""Write the numbers of README and docs from committed records: `python -m tools.records.records`, or `make figures`.

The text between `<!-- records: NAME ARGUMENT … -->` and `<!-- end -->` is what the function NAME of `BLOCKS` returns.
"""

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dimaskdino import LayerwiseAP
from dimaskdino.studies.comparison import Comparison, ComparisonResult, Quantity, compare
from dimaskdino.studies.report import StudyReport, paper_tables
from dimaskdino.studies.runs import read_archive
from dimaskdino.studies.study import find_study, load_study

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
ARCHIVES = ROOT / "notebooks" / "studies"
BOX_AP, IMBALANCE = "box AP, last layer", "imbalance, first layer"
STAGES = ("decoder.0", "decoder.1", "decoder.4")
LOW_AP = 10  # percent
PEERS = {"mask_rcnn": "Mask R-CNN (torchvision)", "mask2former": "Mask2Former (transformers)"}


def measured(name: str) -> Any:
    """A record of docs/measurements."""
    return json.loads((ROOT / "docs" / "measurements" / f"{name}.json").read_text())


def course_model(name: str) -> LayerwiseAP:
    """AP of every stage of a model that comes with the kit."""
    return LayerwiseAP.load(ROOT / "notebooks" / "models" / name / "evaluation" / "layers.json")


def number(value: float | None, sign: str = "") -> str:
    """A number with one decimal and a true minus, with its sign if `sign` is "+"; a dash for None."""
    return "–" if value is None else f"{value:{sign}.1f}".replace("-", "−")


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean ± standard deviation; the value alone if there is one."""
    mean = number(statistics.mean(values), sign)
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = []
    for cells in (head, ["---"] * len(head), *rows):
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table(file: str, part: str = "") -> str:
    """A Markdown file, or one of its tables: `variants` is the first, `differences` the last."""
    text = (ROOT / file).read_text().strip()
    tables = [paragraph for paragraph in text.split("\n\n") if paragraph.startswith("|")]
    return {"": text, "variants": tables[0], "differences": tables[-1]}[part]


def comparison(study: str, label: str, quantity: str = BOX_AP) -> dict[str, str]:
    """The cells of a comparison by column, from the table of differences that a study has written."""
    text = table(f"notebooks/studies/{study}/table.md", "differences")
    head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    for cells in lines:
        if cells[:2] == [label, quantity]:
            return {column: cell.replace("-", "−") for column, cell in zip(head, cells, strict=True)}
    raise KeyError(f"{study} has no comparison '{label}' of {quantity}")


def difference(found: Mapping[str, str]) -> str:
    """A difference with its 95 % interval."""
    return f"{found['difference']} ({found['95 % interval']})"


def verdict(found: Mapping[str, str], published: str) -> str:
    """Whether a comparison of a study with all its registered seeds has the published sign."""
    if float(found["p"].removeprefix("< ")) >= 0.05:
        return "inconclusive"
    return "supported" if found["difference"][0] == published[0] else "contradicted"


def study_report(name: str, folder: str) -> StudyReport:
    """The report of a study from a folder of archived runs.

    The exploratory study on the shapes counts all seeds that were run, the others those that their files register.
    """
    study = load_study(find_study(name))
    scale = "miniature" if folder == "follow_up" else folder
    report = StudyReport.of(study, scale, ARCHIVES / folder)
    if folder == "shapes":
        return report
    registered = {}
    for variant, runs in report.measured.items():
        registered[variant] = {seed: run for seed, run in runs.items() if seed in study.seeds}
    return replace(report, measured=registered)


def last_layer(runs: Sequence[Mapping[str, Any]], kind: str) -> str:
    """Box or mask AP of trainings on photographs at the last layer."""
    return spread([run["stages"]["decoder.4"][kind] for run in runs])


def registered_difference(found: Mapping[str, Any]) -> str:
    """A difference between trainings on photographs with its 95 % interval."""
    interval = f"{number(found['joint']['low'], '+')} to {number(found['joint']['high'], '+')}"
    return f"{number(found['difference'], '+')} ({interval})"


def headlines() -> str:
    """The results in the README."""
    ours = course_model("dimaskdino").stages["decoder.4"]
    baseline = course_model("maskdino").stages["decoder.4"]
    animals = measured("photographs")["animals"]
    minutes = max(run["minutes"] for run in animals["recipe"])
    registered = animals["comparisons"][0]
    study = "miniature/box_formula"
    published = comparison(study, "De-Imbalance, published formula")
    predicted = comparison(study, "De-Imbalance, predicted boxes")
    bato = comparison(study, "BATO, published formula")
    results = {
        "Reference implementation": (
            "The kit matches recorded outputs of 5 cases with synthetic weights; the largest difference is 1.1e-05 in "
            "class logits and 2.0e-06 of the image in boxes.",
            "The official checkpoints have not been run here, and nothing was trained on COCO or BDD100K.",
        ),
        "Synthetic shapes": (
            f"At the last layer DI-MaskDINO has {number(ours.box.AP)} box and {number(ours.mask.AP)} mask AP, MaskDINO "
            f"{number(baseline.box.AP)} and {number(baseline.mask.AP)}.",
            "This is one training each; how much the difference varies between trainings is unknown.",
        ),
        "Photographs": (
            f"{last_layer(animals['recipe'], 'box')} box and {last_layer(animals['recipe'], 'mask')} mask AP on "
            f"{animals['val']['images']} photographs of animals, after {minutes:.0f} minutes of training on 2 cores.",
            f"A registered comparison with MaskDINO is {registered['verdict']}: {registered_difference(registered)} "
            "box AP.",
        ),
        "The paper's modules": (
            "In small models on shapes (8 seeds, 95 % intervals) De-Imbalance changes box AP by "
            f"{difference(published)}, BATO by {difference(bato)}.",
            "If the decoder starts from predicted boxes instead of boxes around masks, De-Imbalance's gain is "
            f"{difference(predicted)}. Large models may differ ([study](docs/study.md)).",
        ),
    }
    return "\n".join(f"* **{title}.** {shown} *{limits}*" for title, (shown, limits) in results.items())


def models() -> str:
    """AP of every stage of the models that come with the kit."""
    columns = {"MaskDINO": "maskdino", "DI-MaskDINO": "dimaskdino", "DI-MaskDINO, rendered scenes": "solids"}
    head, found = ["stage"], []
    for label, name in columns.items():
        head += [f"{label}: box AP", "mask AP", "imbalance"]
        found.append(course_model(name).stages)
    rows = []
    for stage in found[-1]:
        row = [f"`{stage}`"]
        for stages in found:
            ap = stages.get(stage)
            row += [number(ap and ap.box.AP), number(ap and ap.mask and ap.mask.AP), number(ap and ap.imbalance, "+")]
        rows.append(row)
    return markdown_table(head, rows)


def diagnostics() -> str:
    """What `dimaskdino run diagnostics` measures on the two models of the shapes."""
    stages = ("first_selection", "decoder.0", "decoder.1")
    columns = []
    for found in measured("diagnostics").values():
        column = {}
        for kind in ("box", "mask"):
            for stage in stages:
                iou = found["matched_queries"][stage][f"{kind}_iou"]
                column[f"{kind} IoU of the matched queries, `{stage}`"] = f"{iou:.2f}"
        changed = 1 - found["query_stability"]["decoder.1"]
        column["objects whose query changes in the first layer"] = f"{changed:.0%}"
        for size, by_stage in found["imbalance_by_size"].items():
            for stage in stages[1:]:
                column[f"imbalance of {size} objects, `{stage}`"] = number(by_stage[stage], "+")
        recall = found["selection_recall"]
        column["objects with a token in `T_s1`"] = f"{recall['T_s1']:.1%}"
        column["objects with a token in `T_s2`"] = f"{recall['T_s2']:.1%}" if "T_s2" in recall else "–"
        column["effective rank of BATO's attention"] = number(found["guidance_rank"])
        columns.append(column)
    ours, baseline = columns
    rows = [[name, baseline[name], value] for name, value in ours.items()]
    return markdown_table(["", "MaskDINO", "DI-MaskDINO"], rows)


def photographs() -> str:
    """Trainings on photographs beside other models, and the registered comparison."""
    rows = []
    for data, record in measured("photographs").items():
        for label, runs in {"DI-MaskDINO, `dimaskdino new`": record["recipe"], **record["rows"]}.items():
            row = [f"{data}, {label}", str(len(runs)), f"{record['steps']:,}"]
            row += [last_layer(runs, "box"), last_layer(runs, "mask")]
            for stage in ("decoder.0", "decoder.1"):
                row.append(spread([run["stages"][stage]["mask"] - run["stages"][stage]["box"] for run in runs], "+"))
            rows.append(row)
        for peer in record["peers"]:
            row = [f"{data}, {PEERS[peer['model']]}", "1", f"{peer['steps']:,}"]
            rows.append([*row, number(peer["box"]), number(peer["mask"]), "–", "–"])
    head = ["", "trainings", "steps", "box AP", "mask AP", "imbalance, `decoder.0`", "imbalance, `decoder.1`"]
    lines = [markdown_table(head, rows), ""]
    for found in measured("photographs")["animals"]["comparisons"]:
        effect = f"minimum detectable effect ±{found['mde']:.1f}"
        lines.append(f"* {found['label']}: {registered_difference(found)}, {found['verdict']}; {effect}")
    return "\n".join(lines)


def claims() -> str:
    """Claims of the paper, published and in both studies on the shapes, with the verdict of the second."""
    formulas, both = "miniature/box_formula", "DI-MaskDINO − MaskDINO"
    claimed = {  # the dataset of the published difference; the comparison in the first and in the second study
        "De-Imbalance raises box AP": (
            "COCO",
            comparison("shapes/table_4", "De-Imbalance − neither (MaskDINO)"),
            comparison(formulas, "De-Imbalance, published formula"),
        ),
        "BATO raises box AP": (
            "COCO",
            comparison("shapes/table_4", "BATO − neither (MaskDINO)"),
            comparison(formulas, "BATO, published formula"),
        ),
        "both raise box AP": (
            "COCO",
            comparison("shapes/table_4", "both (DI-MaskDINO) − neither (MaskDINO)"),
            comparison("miniature/figure_1", both),
        ),
        "both narrow the imbalance at `decoder.1`": (
            "BDD100K",
            comparison("shapes/figure_1", both, IMBALANCE),
            comparison("miniature/figure_1", both, IMBALANCE),
        ),
    }
    rows = []
    for claim, (dataset, first, second) in claimed.items():
        published = first[dataset]
        rows.append([claim, f"{published} ({dataset})", difference(first), difference(second)])
        rows[-1].append(verdict(second, published))
    at_input = _exploratory(
        study_report("box_formula", "miniature"), ("di_bato_mask2box",), ("neither_mask2box",), "decoder.0.imbalance"
    )
    rows.append([f"the same at `{STAGES[0]}`", rows[-1][1], "–", _over_trainings(at_input), "not registered"])
    return markdown_table(["claim", "paper", "first study, exploratory", "second study", "verdict"], rows)


def _by_stage(rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A table of box AP and imbalance at the decoder's input, first and last layer."""
    head, lines = ["boxes that enter the decoder"], []
    for stage in STAGES:
        head += [f"`{stage}`: box AP", "imbalance"]
    for label, stages in rows.items():
        line = [label]
        for stage in STAGES:
            box, mask = stages[stage]["box"], stages[stage]["mask"]
            line += [number(box), number(mask - box, "+")]
        lines.append(line)
    return markdown_table(head, lines)


def formula_at_test_time() -> str:
    """AP of the course's MaskDINO with each formula for the boxes that enter its decoder, changed at test time."""
    return _by_stage({f"`{formula}`": found for formula, found in measured("formula_at_test_time").items()})


def formula_in_training() -> str:
    """Means over seeds of models trained with each formula, in the second study."""
    report = study_report("box_formula", "miniature")
    rows = {}
    for suffix, formula in {"_mask2box": "mask2box", "": "bitmask", "_no": "no"}.items():
        for name, label in {"neither": "MaskDINO", "di": "De-Imbalance", "di_bato": "DI-MaskDINO"}.items():
            stages: dict[str, dict[str, float]] = {}
            for stage in STAGES:
                stages[stage] = {}
                for kind in ("box", "mask"):
                    values = report.values(name + suffix, Quantity.parse(f"{stage}.{kind}"))
                    stages[stage][kind] = statistics.mean(values.values())
            rows[f"`{formula}`, {label}"] = stages
    return _by_stage(rows)


def _exploratory(report: StudyReport, plus: tuple[str, ...], minus: tuple[str, ...], quantity: str) -> ComparisonResult:
    """A comparison that no study registers, in pairs of the same seed."""
    asked = Comparison("", plus, minus, Quantity.parse(quantity))
    return compare([asked], report.measured, len(report.study.seeds), paired=True)[0]


def _over_trainings(found: ComparisonResult, times: float = 1) -> str:
    low, high = found.over_trainings.low * times, found.over_trainings.high * times
    return f"{number(found.difference * times, '+')} ({number(low, '+')} to {number(high, '+')})"


def both_stages() -> str:
    """DI-MaskDINO − MaskDINO at the decoder's input and after its first layer, under each formula."""
    report, paper = study_report("box_formula", "miniature"), paper_tables()["figure_1_layer_ap_bdd100k"]
    rows = []
    for suffix, formula in {"_mask2box": "`mask2box`", "": "`bitmask`", "_no": "`no`"}.items():
        for stage in STAGES[:2]:
            row = [formula, f"`{stage}`"]
            for kind in ("box", "mask", "imbalance"):
                found = _exploratory(report, (f"di_bato{suffix}",), (f"neither{suffix}",), f"{stage}.{kind}")
                row.append(_over_trainings(found))
            rows.append(row)
    before, after = paper["maskdino"]["first"], paper["dimaskdino"]["first"]
    box, mask = after["box"] - before["box"], after["mask"] - before["mask"]
    rows.append(["paper, BDD100K", '"0-th layer"', *(number(x, "+") for x in (box, mask, mask - box))])
    return markdown_table(["boxes that enter the decoder", "stage", "box AP", "mask AP", "imbalance"], rows)


def degradation() -> str:
    """How much less box AP De-Imbalance loses when a shallow decoder's training is made harder (table 3)."""
    report = study_report("table_3", "follow_up")
    standard, rows = difference_of_means(report, "shallow"), []
    for name, label in {"shallow_weights": "box losses times 0.1", "shallow_positions": "random positions"}.items():
        plus, minus = (f"di_{name}", "neither_shallow"), (f"neither_{name}", "di_shallow")
        # a comparison takes means of both pairs of variants, a difference of differences their sums
        found = _exploratory(report, plus, minus, "last.box")
        published = difference_of_means(report, name) - standard
        rows.append([label, _over_trainings(found, times=2), number(published, "+")])
    return markdown_table(
        ["De-Imbalance's gain in box AP compared with standard losses", "here", "paper, BDD100K"], rows
    )


def disclosures() -> str:
    """Facts about the second study that its tables do not show."""
    report = study_report("box_formula", "miniature")
    lines = []
    for folder in ("miniature", "follow_up"):
        runs = read_archive(ARCHIVES / folder).values()
        low = sum(run["layers"]["stages"]["first_selection"]["box"]["AP"] < LOW_AP for run in runs)
        lines.append(f"In {low} of the {len(runs)} runs of `{folder}` box AP of `first_selection` is below {LOW_AP}.")
    predicted = statistics.mean(report.values("neither_no", Quantity.parse("first.imbalance")).values())
    change = _exploratory(report, ("di_no",), ("neither_no",), "first.imbalance")
    lines.append(
        f"With predicted boxes MaskDINO's imbalance at `{STAGES[1]}` is {number(predicted, '+')}, and De-Imbalance "
        f"changes it by {_over_trainings(change)}."
    )
    gain = _exploratory(report, ("di", "neither_no"), ("neither", "di_no"), "last.box")
    lines.append(
        f"De-Imbalance's gain in box AP is larger with `bitmask` than with predicted boxes by "
        f"{_over_trainings(gain, times=2)}."
    )
    return "\n".join(f"* {line}" for line in lines)


def difference_of_means(report: StudyReport, name: str) -> float:
    """The published gain in box AP of De-Imbalance in table 3."""
    published = report.published["BDD100K"]
    return published[f"di_{name}"]["last.box"] - published[f"neither_{name}"]["last.box"]


BLOCKS = (
    *(table, headlines, models, diagnostics, photographs),
    *(claims, formula_at_test_time, formula_in_training, both_stages, degradation, disclosures),
)
_BLOCK = re.compile(r"(<!-- records: (.+?) -->\n)((?:(?!<!--).*\n)*)(<!-- end -->)")


def rewritten(text: str) -> str:
    """A page with every block written anew."""
    blocks = {function.__name__: function for function in BLOCKS}

    def block(match: re.Match[str]) -> str:
        name, *arguments = match[2].split()
        return f"{match[1]}{blocks[name](*arguments)}\n{match[4]}"

    return _BLOCK.sub(block, text)


def write_all() -> None:
    """Write the blocks of all pages."""
    for page in PAGES:
        before = page.read_text()
        after = rewritten(before)
        if after != before:
            page.write_text(after)
            print(f"written: {page}")


if __name__ == "__main__":
    write_all()
