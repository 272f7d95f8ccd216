"""Bootstrap of AP: its uncertainty from the choice of images.

Images are resampled with replacement. The resamples depend on the number of images alone, so those of two models are
paired, and the spread of their differences is that of a paired bootstrap (Efron and Tibshirani, An Introduction to the
Bootstrap, 1993, chapter 8).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from dimaskdino.evaluation.coco_ap import Kind, Matches, Results, Truth, match_classes
from dimaskdino.evaluation.detections import Detections
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.files import write_atomically
from dimaskdino.utils.progress import progress_bar

DRAWS = 1000
CONFIDENCE = 0.95
RECALLS = np.linspace(0, 1, 101)  # at which COCO reads the precision
VALUES_AT_ONCE = 1 << 24
_SEED = 0


@dataclass(frozen=True)
class BootstrapAP:
    """AP of some stages on resampled images.

    Attributes:
        images: digest of the image ids; only samples of the same images can be compared.
        samples: by `stage/kind`, such as `decoder.6/mask`, the AP in percent of each resample.
    """

    images: str
    samples: dict[str, Float[np.ndarray, " draws"]]

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Central interval of the resamples by `stage/kind`, with the confidence `CONFIDENCE`."""
        tail = 100 * (1 - CONFIDENCE) / 2
        return {name: tuple(np.nanpercentile(s, [tail, 100 - tail]).tolist()) for name, s in self.samples.items()}

    def save(self, path: Path) -> None:
        """Write as npz; `BootstrapAP.load` reads it.

        Raises:
            UserError: the file cannot be written.
        """
        arrays: dict[str, Any] = {name: values.astype(np.float32) for name, values in self.samples.items()}
        write_atomically(path, lambda partial: np.savez(partial, images=np.array(self.images), **arrays))

    @classmethod
    def load(cls, path: Path) -> "BootstrapAP":
        """Read what `save` wrote.

        Raises:
            UserError: the file is missing or is something else.
        """
        try:
            with np.load(path, allow_pickle=False) as content:
                samples = {name: content[name].astype(np.float64) for name in content.files if name != "images"}
                return cls(str(content["images"]), samples)
        except OSError as error:
            raise UserError(f"no bootstrap samples at {path} ({error}); evaluate with --bootstrap first") from None
        except (ValueError, KeyError) as error:
            raise UserError(f"{path} holds no bootstrap samples of this kit ({error})") from None


def bootstrap(by_stage: Mapping[str, Detections], truth: Truth, draws: int = DRAWS) -> BootstrapAP:
    """AP on resampled images, for every stage and kind.

    Args:
        by_stage: detections by stage name.
        truth: the annotations, from `read_truth`.
        draws: number of bootstrap resamples.
    """
    ids = sorted(image["id"] for image in truth.dataset["images"])
    weights = image_draws(len(ids), draws)
    samples = {}
    for name in progress_bar(by_stage, "bootstrap"):
        detections = by_stage[name]
        for kind in detections.kinds:
            samples[f"{name}/{kind}"] = resampled_ap(truth, detections.results(kind), kind, weights)
    return BootstrapAP(hashlib.sha256(repr(ids).encode()).hexdigest(), samples)


def image_draws(images: int, draws: int) -> Int[np.ndarray, "images draws"]:
    """Count of each image in each resample with replacement; always the same resamples."""
    return np.random.default_rng(_SEED).multinomial(images, np.full(images, 1 / images), size=draws).T


def resampled_ap(
    truth: Truth, detections: Results, kind: Kind, weights: Int[np.ndarray, "images draws"]
) -> Float[np.ndarray, " draws"]:
    """AP in percent of datasets in which each image occurs `weights` times.

    Args:
        truth: the annotations; the rows of `weights` follow the order of the image ids.
        detections: in COCO's result format, boxes also as `Detections.box_table`.
        kind: boxes or masks.
        weights: number of copies of each image, one column per dataset.

    Returns:
        The AP of each dataset, NaN without objects. It equals COCO's evaluation on a dataset with copies of the images,
        up to the order of equal scores in one image.
    """
    total, defined = np.zeros(weights.shape[1]), np.zeros(weights.shape[1])
    as_float = weights.astype(np.float32)  # counts stay far below 2²⁴, so sums are exact
    for matches in match_classes(truth, detections, kind):
        objects = matches.objects @ weights
        total += np.where(objects > 0, _mean_precision(matches, as_float, objects), 0)
        defined += objects > 0
    with np.errstate(invalid="ignore"):
        return 100 * total / defined


def _mean_precision(
    matches: Matches, weights: Float[np.ndarray, "images draws"], objects: Int[np.ndarray, " draws"]
) -> Float[np.ndarray, " draws"]:
    """Precision averaged over the recalls 0, 0.01, … 1 and the IoU thresholds, per resample.

    Copies of an image add copies of its detections with the same score. Recall rises only at right detections, and the
    best precision from there on is reached after the last copy, so the counts after each of them suffice.
    """
    best_first = np.argsort(-matches.score, kind="stable")
    right, ignored = matches.right[:, best_first], matches.ignored[:, best_first]
    hits = np.flatnonzero(right.any(0))
    if not len(hits):
        return np.zeros(weights.shape[1])
    n = hits[-1] + 1  # the detections after the last right one change nothing
    image = matches.image[best_first[:n]]
    width = max(1, VALUES_AT_ONCE // n)
    parts = []
    for start in range(0, weights.shape[1], width):
        part = slice(start, start + width)
        copies = weights[image, part]
        seen = copies.cumsum(0)  # number of detections up to and including each one
        by_threshold = []
        for right_here, ignored_here in zip(right[:, :n], ignored[:, :n], strict=True):
            by_threshold.append(_at_threshold(right_here, ignored_here, copies, seen, objects[part]))
        parts.append(np.mean(by_threshold, axis=0))
    return np.concatenate(parts)


def _at_threshold(
    right: Bool[np.ndarray, " n"],
    ignored: Bool[np.ndarray, " n"],
    copies: Float[np.ndarray, "n draws"],
    seen: Float[np.ndarray, "n draws"],
    objects: Int[np.ndarray, " draws"],
) -> Float[np.ndarray, " draws"]:
    """Mean precision at one IoU threshold."""
    hits = np.flatnonzero(right)
    counted = seen[hits]
    if ignored.any():
        counted = counted - (copies * ignored[:, None]).cumsum(0)[hits]
    true = copies[hits].cumsum(0).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.nan_to_num(true / counted)
        recall = true / objects
    best = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    reached = _recalls_reached(recall)
    newly = np.diff(reached, axis=0, prepend=0)  # number of recalls that each hit is the first to reach
    return np.einsum("hd,hd->d", best, newly) / len(RECALLS)


def _recalls_reached(recall: Float[np.ndarray, "hits draws"]) -> Int[np.ndarray, "hits draws"]:
    """How many of COCO's recalls a recall reaches, compared as floating-point numbers like COCO does."""
    steps = len(RECALLS) - 1
    above = np.append(RECALLS, np.inf)
    count = np.nan_to_num(recall * steps).astype(np.int64).clip(0, steps)  # right, or one too low or too high
    count += above[count + 1] <= recall
    return np.where(RECALLS[count] <= recall, count + 1, count)
