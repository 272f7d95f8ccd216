# %% [markdown]
# # 2 · Evaluation: what AP measures
#
# **Question.** Two detectors find the same objects with the same boxes. One has AP 60, the other 45. What is the
# difference?
#
# All chapters use AP. This one takes it apart. Each detection is right or wrong; the detections sorted by score make
# a precision-recall curve; the area below the curve is AP at one IoU threshold; and the mean over ten thresholds and
# all classes is COCO's **AP**. You compute one curve by hand, compare it with the library's, and then look at all
# stages.
#
# **You will be able to**
#
# * decide which detections are right, and draw a precision-recall curve by hand;
# * compute AP at one threshold and explain what the mean over thresholds adds;
# * read a table of AP per stage and name its pitfalls.
#
# *Prerequisites*: chapter 1 (IoU). *Time*: 75 minutes.

# %% tags=["parameters"]
model: str = "dimaskdino-shapes"  # a trained model: a name, a run folder or a file
stage: str = "decoder.1"  # the stage whose curve is computed by hand
label: str = "disk"  # the class whose curve is computed by hand
threshold: float = 0.5  # smallest IoU of a right detection
overrides: list = []  # settings that differ from those of the training, such as data.root

# %%
import numpy as np
import torch
from torchvision.ops import box_iou

from dimaskdino.course import begin, checks
from dimaskdino.course.questions import Choice
from dimaskdino.evaluation.coco_ap import precision_curves, read_truth
from dimaskdino.evaluation.layerwise_ap import detect_layers
from dimaskdino.viz import draw_architecture, plot_layerwise_ap, plot_precision_recall
from dimaskdino.viz.explorers import explore_precision

lesson = begin(model, overrides)
found = detect_layers(lesson.trained)
truth = read_truth(lesson.data.annotations_file)
number = lesson.data.classes.index(label)
print(f"{len(found[stage].boxes)} detections of {stage} on {len(lesson.data)} images")

# %%
draw_architecture("heads")

# %% [markdown]
# ## Right or wrong
#
# Within one image and one class, detections are processed by descending score. Each is assigned to the object that it
# overlaps most among those *not yet assigned*. If that IoU reaches the threshold, the detection is right (a **true
# positive**); otherwise it is wrong (a **false positive**). A second detection of the same object is wrong, however
# well it fits.
#
# ### Exercise 2.1
#
# *Medium, 10 minutes.* Given the IoUs `(D, M)` of detections, sorted by their scores, with objects: which detections
# are right?


# %%
def right_ones(iou, threshold: float):
    """True or False for each detection, a list of length D."""
    # solution
    claimed, right = set(), []
    for row in iou.tolist():
        free = [(overlap, number) for number, overlap in enumerate(row) if number not in claimed]
        overlap, number = max(free, default=(0, -1))
        right.append(overlap >= threshold)
        if right[-1]:
            claimed.add(number)
    return right
    # end


checks.check_right_ones(right_ones)

# %% [markdown]
# ## Precision and recall
#
# Sort the detections of all images by descending score. After $n$ detections, of which $t$ are right, with $M$ objects
# in all images:
#
# $$\text{precision} = t / n \qquad \text{recall} = t / M$$
#
# ### Exercise 2.2
#
# *Easy, 5 minutes.* Precision and recall after each detection.


# %%
def precision_recall(right, objects: int):
    """Two arrays (D,): precision and recall after 1, 2, … detections."""
    # solution
    hits = np.cumsum(right)
    return hits / np.arange(1, len(right) + 1), hits / objects
    # end


checks.check_precision_recall(precision_recall)

# %% [markdown]
# ## The area
#
# COCO samples the curve at 101 recalls, 0, 0.01, … 1. At each recall it takes the best precision at that recall *or a
# larger one*, so that the curve never rises to the right, and 0 if the recall is never reached. AP is the mean of the
# 101 values.
#
# ### Exercise 2.3
#
# *Medium, 8 minutes.* Compute the 101 values.


# %%
def interpolated(precision, recall):
    """Precision at the recalls 0, 0.01, … 1, an array (101,)."""
    # solution
    values = [precision[recall >= r] for r in np.linspace(0, 1, 101)]
    return np.array([part.max() if len(part) else 0.0 for part in values])
    # end


solved = checks.check_interpolated(interpolated)

# %% [markdown]
# ## By hand, and by the library
#
# This cell runs your three functions on the model's detections (all images, one class, boxes) and compares the result
# with the library's.

# %%
if solved:
    category, scores, right, objects = lesson.data.category_ids[number], [], [], 0
    for i in range(len(lesson.data)):
        sample = lesson.data[i]
        boxes = sample.boxes[sample.labels == number]
        mine = [d for d in found[stage].boxes if d["image_id"] == sample.image_id and d["category_id"] == category]
        mine.sort(key=lambda d: -d["score"])
        corners = torch.tensor([d["bbox"] for d in mine]).view(-1, 4)
        corners[:, 2:] += corners[:, :2]
        right += right_ones(box_iou(corners, boxes), threshold) if len(boxes) else [False] * len(mine)
        scores += [d["score"] for d in mine]
        objects += len(boxes)
    order = np.argsort(-np.array(scores), kind="stable")
    by_hand = interpolated(*precision_recall(np.array(right)[order], objects))
    print(f"{objects} objects of class {label}; AP at IoU {threshold:g} by hand {100 * by_hand.mean():.2f}")

library = precision_curves(truth, found[stage].boxes, "box", threshold)[number]
print(f"by the library {100 * library.mean():.2f}")

# %% [markdown]
# ### Build it: AP at every layer
#
# *Medium, 20 minutes.* COCO's AP of a class averages over ten thresholds, 0.50, 0.55, … 0.95. Write it with your
# three functions; the check compares it with the library's on the model's detections at three stages. `images` is a
# list with one pair for each image: the IoUs `(D, M)` of its detections with its objects, best detection first, and
# their scores `(D,)`. An image can have no objects, or no detections.


# %%
def average_precision(images) -> float:
    """AP in percent."""
    # solution
    objects = sum(iou.shape[1] for iou, _ in images)
    order = np.argsort(-np.concatenate([scores for _, scores in images]), kind="stable")
    values = []
    for least in np.linspace(0.5, 0.95, 10):
        right = np.concatenate([np.array(right_ones(iou, least), bool) for iou, _ in images])
        values.append(interpolated(*precision_recall(right[order], objects)).mean())
    return 100 * float(np.mean(values))
    # end


checks.check_average_precision(average_precision, found, truth, lesson.data, label)

# %% [markdown]
# ## Loose and strict
#
# The same class at three thresholds. First make a guess: do boxes or masks lose more AP from IoU ≥ 0.5 to IoU ≥ 0.9?

# %%
strict = Choice("Which lose more AP at the strict threshold?", ["boxes", "masks", "both, within one point"])
strict

# %%
detections = {"box": found[stage].boxes, "mask": found[stage].masks}
curves = {
    f"{kind}, IoU ≥ {least:g}": precision_curves(truth, detections[kind], kind, least)[number]
    for least in (0.5, 0.75, 0.9)
    for kind in ("box", "mask")
}
lost = {kind: 100 * (curves[f"{kind}, IoU ≥ 0.5"] - curves[f"{kind}, IoU ≥ 0.9"]).mean() for kind in detections}
alike = abs(lost["box"] - lost["mask"]) <= 1
strict.reveal(strict.options[2] if alike else strict.options[int(lost["mask"] > lost["box"])])
print(f"Lost: boxes {lost['box']:.1f}, masks {lost['mask']:.1f} points.")

# %%
plot_precision_recall(curves, f"{label}, {stage}")

# %% [markdown]
# **Read it.** A curve that ends early belongs to a detector that misses objects; a curve that sags has wrong
# detections with high scores. How does a stricter threshold change the curve of boxes, and the curve of masks? This
# difference *is* the imbalance in detail.
#
# ### Explore
#
# Choose a class, a stage and a threshold. At which threshold do the boxes of the first layer fall behind its masks,
# and for which classes does this never happen?

# %%
explore_precision(found, truth, lesson.data.classes)

# %% [markdown]
# ## Every stage
#
# One pass over the data returns the detections of all stages, and from them all APs.

# %%
result = lesson.layerwise_ap()
print(result.table())

# %%
plot_layerwise_ap({"DI-MaskDINO": result})

# %% [markdown]
# ### Exercise 2.4, to discuss
#
# *5 minutes.* A detector assigns the score 1 to every detection. How does its AP change? And is a detector with AP 40
# for boxes and 40 for masks "balanced" if the masks' AP50 is 70 and the boxes' 60?
#
# <details><summary>A model answer</summary>
#
# With equal scores the order of detections is arbitrary. Right and wrong ones are mixed from the start, precision is
# the same everywhere, and AP falls far although no box changed. The second detector is balanced only on average. Its
# masks are better at the loose threshold and worse at the strict ones: it segments many objects roughly and few
# exactly. The mean over thresholds hides this.
#
# </details>
#
# ---
#
# **In three sentences.** AP depends on the order of detections: right ones should come before wrong ones. The IoU
# threshold decides which detections are right, and COCO averages over ten of them. Detectors with equal averages can
# differ.
#
# **Read on.**
#
# * The PASCAL Visual Object Classes Challenge, IJCV 2010, section 4.2: AP before COCO.
# * Microsoft COCO, arXiv 1405.0312, and [cocodataset.org](https://cocodataset.org/#detection-eval): the metrics and
#   their names.
#
# **Next**: how a query reads an image, [multi-scale deformable attention](03_deformable_attention.ipynb).
