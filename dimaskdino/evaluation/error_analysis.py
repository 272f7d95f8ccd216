"""Error analysis of detections by hotcoco: kinds of errors (TIDE), confusions of classes, the worst images."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from dimaskdino.evaluation.coco_ap import Kind, Truth
from dimaskdino.evaluation.detections import Detections
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.files import write_text

# TIDE's kinds (Bolya et al. 2020, arXiv 2008.08115), in the order in which they are shown
KINDS = {
    "Cls": "wrong class",
    "Loc": "wrong place",
    "Both": "wrong class and place",
    "Dupe": "duplicate",
    "Bkg": "background",
    "Miss": "missed object",
}
MATCH_IOU = 0.5


@dataclass(frozen=True)
class TideAnalysis:
    """TIDE's analysis of the boxes or masks of one stage.

    Attributes:
        ap: AP at IoU 0.5 in percent, mean over the classes.
        lost: points of that AP that a model would gain if all errors of a kind (`KINDS`) were corrected, one kind at a
            time. Since one correction can make another useless, they need not add up to 100 − ap.
        counts: number of errors of each kind.
    """

    ap: float
    lost: dict[str, float]
    counts: dict[str, int]


@dataclass(frozen=True)
class Confusion:
    """Confusion matrix of the classes, from the detections with at least a given score.

    Attributes:
        classes: names.
        matrix: (K + 1, K + 1). Rows are true classes, columns predicted ones; the last row counts detections without
            an object, the last column objects without a detection.
        threshold: the lowest score.
    """

    classes: list[str]
    matrix: Int[np.ndarray, "k k"]
    threshold: float


def tide_analysis(truth: Truth, detections: Detections, kind: Kind) -> TideAnalysis:
    """Count the errors of one stage's detections by kind, at IoU 0.5, and measure the AP that each kind costs.

    Args:
        truth: the annotations, from `read_truth`.
        detections: of all images.
        kind: box or mask.

    Raises:
        UserError: hotcoco cannot be used. The other functions of this module raise it too.
    """
    found = _evaluated(truth, detections, kind).tide_errors(pos_thr=MATCH_IOU)
    return TideAnalysis(
        ap=100 * found["ap_base"],
        lost={name: 100 * found["delta_ap"][name] for name in KINDS},
        counts={name: found["counts"][name] for name in KINDS},
    )


def confusion(truth: Truth, detections: Detections, kind: Kind, threshold: float) -> Confusion:
    """Confusions between classes at IoU 0.5, among the detections with a score of at least `threshold`."""
    found = _evaluated(truth, detections, kind).confusion_matrix(iou_thr=MATCH_IOU, min_score=threshold)
    return Confusion(list(found["cat_names"]), np.asarray(found["matrix"]).astype(np.int64), threshold)


def worst_images(truth: Truth, detections: Detections, kind: Kind, threshold: float, count: int) -> dict[int, float]:
    """The images with the lowest F1 score at IoU 0.5, worst first; of equal ones those with more errors first.

    Returns:
        F1 by image id.
    """
    evaluation = _evaluated(truth, detections.above(threshold), kind)
    found = evaluation.image_diagnostics(iou_thr=MATCH_IOU, score_thr=threshold)["img_summary"]
    ordered = sorted(found, key=lambda image: (found[image]["f1"], -found[image]["fp"] - found[image]["fn"], image))
    return {image: found[image]["f1"] for image in ordered[:count]}


def save_analysis(path: Path, stages: Mapping[str, Mapping[Kind, TideAnalysis]], confused: Confusion) -> None:
    """Write the analysis of the stages, and the confusion of classes, as json.

    Raises:
        UserError: the file cannot be written.
    """
    by_stage = {}
    for name, kinds in stages.items():
        by_stage[name] = {kind: asdict(analysis) for kind, analysis in kinds.items()}
    matrix = asdict(confused) | {"matrix": confused.matrix.tolist()}
    write_text(path, json.dumps({"stages": by_stage, "confusion": matrix}, indent=1))


def _evaluated(truth: Truth, detections: Detections, kind: Kind) -> Any:
    """Hotcoco's evaluation."""
    if truth.library.name != "hotcoco":
        raise UserError("the error analysis needs hotcoco, which cannot be used here: pip install 'hotcoco>=1.3,<2'")
    return truth.evaluate(detections.results(kind), kind)
