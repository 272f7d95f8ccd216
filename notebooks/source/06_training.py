# %% [markdown]
# # 6 · Training: matching, losses, denoising
#
# **Question.** The model predicts forty answers in no order, and there are three objects. Which answer should be
# compared with which object?
#
# The model predicts a *set*: 40 queries on the shapes, 300 on COCO, in no particular order and most of them without
# an object. Before any loss can be computed, each object must be assigned to a query. This assignment is the
# **matching**. The losses then pull matched queries towards their objects, at **every stage**, and **denoising
# queries** make the beginning of the training easier.
#
# **You will be able to**
#
# * match queries with objects and explain why the matching is one-to-one;
# * compute the losses of boxes and masks;
# * explain which other queries denoising queries may see.
#
# *Prerequisites*: chapters 1 and 4; losses and gradients. *Time*: 120 minutes.

# %% tags=["parameters"]
model: str = "dimaskdino-shapes"  # a trained model: a name, a run folder or a file
image: int = 0  # number of a training image
overrides: list = []  # settings that differ from those of the training, such as data.root

# %%
import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional

from dimaskdino.course import begin, checks
from dimaskdino.course.questions import Number
from dimaskdino.data.dataloader import collate, training_dataset
from dimaskdino.modeling import ImageBatch
from dimaskdino.training.criterion import criterion, stage_losses
from dimaskdino.training.matcher import Matches, match, matching_costs
from dimaskdino.viz import draw_architecture, draw_denoising, draw_matching, plot_loss_terms, plot_losses
from dimaskdino.viz.explorers import explore_matching

lesson = begin(model, overrides)
settings = lesson.trained.config
data = training_dataset(settings)
torch.manual_seed(0)
sample = data[image % len(data)]  # with its augmentation, which is random
batch = collate([sample])
images, targets = ImageBatch.from_images(batch.images), batch.targets
with torch.no_grad():
    predictions = lesson.trained.detector(images, targets)
print(
    f"{targets.counts[0]} objects; {predictions.last.boxes.shape[1]} queries; stages: {', '.join(predictions.stages)}"
)

# %%
draw_architecture("heads")

# %% [markdown]
# ## Matching
#
# The cost of a query $q$ for an object $o$ measures how badly $q$ detects $o$:
#
# $$C(q, o) = 4\,C_{class} + 5\,C_{mask} + 5\,C_{dice} + 5\,\lVert b_q - b_o\rVert_1 - 2\,GIoU(b_q, b_o)$$
#
# (`matching_costs` in `dimaskdino/training/matcher.py`.) The Hungarian algorithm picks one query per object so that
# the *total* is lowest. Yellow cells are cheap.

# %%
stage = predictions.last
cost = matching_costs([stage], targets, settings.loss)[0][0]  # (Q, M) of this image
queries, objects = linear_sum_assignment(cost)
pairs = list(zip(queries.tolist(), objects.tolist(), strict=True))
draw_matching(sample.image, targets.boxes[0], stage.boxes[0], cost, pairs)

# %% [markdown]
# ### Explore
#
# The same for every stage. From which stage on does the matching stay the same?

# %%
explore_matching(predictions, targets, sample, settings.loss)

# %% [markdown]
# Every stage is matched separately. Do objects keep their queries? First make a guess, for twelve images:

# %%
faithful = Number("Percentage of the objects with the same query after the first and the last layer", 0, 100, 5)
faithful

# %%
more = collate([data[i] for i in range(12)])
with torch.no_grad():
    stages = lesson.trained.detector(ImageBatch.from_images(more.images)).stages
first, last = match([stages["decoder.1"], list(stages.values())[-1]], more.targets, settings.loss)
same = [set(zip(*(x.tolist() for x in (m.image, m.target, m.query)), strict=True)) for m in (first, last)]
chance = 100 / predictions.last.boxes.shape[1]
faithful.reveal(100 * len(same[0] & same[1]) / len(same[0]), {chance: "by chance, if all queries were equal"})

# %% [markdown]
# And in the image above, layer by layer:

# %%
decoder = [stage for name, stage in predictions.stages.items() if name.startswith("decoder.")]
for stage, matches in zip(decoder, match(decoder, targets, settings.loss), strict=True):
    found = dict(zip(matches.target.tolist(), matches.query.tolist(), strict=True))
    print(f"{stage.name}: " + ", ".join(f"object {o + 1} ← query {found[o]}" for o in sorted(found)))

# %% [markdown]
# ### Exercise 6.1
#
# *Easy, 4 minutes.* Why not simply assign every object to its cheapest query? Write this for a cost matrix `(Q, M)`:
# return the cheapest query of each object, and whether two objects share a query.


# %%
def cheapest(cost):
    """For each object its cheapest query, (M,), and whether two objects share one."""
    # solution
    queries = cost.argmin(dim=0)
    return queries, len(queries.unique()) < len(queries)
    # end


checks.check_cheapest(cheapest)

# %% [markdown]
# If two objects share a query, one of them is never learned. If two queries predict the same object well, only one is
# matched, and the other learns to predict nothing. In this way the model learns to avoid duplicates, without the
# non-maximum suppression of older detectors.
#
# ## The losses
#
# A matched query has losses for its class (focal loss), its box ($L_1$ and $1 - GIoU$) and its mask (binary
# cross-entropy and dice, at points, most of them where the mask is uncertain). An unmatched query has a loss for its
# class only. All stages have these losses, and so do the denoising queries (`stage_losses` in
# `dimaskdino/training/criterion.py`).

# %%
losses = criterion(predictions, targets, settings.loss, sum(targets.counts))
plot_loss_terms({name: float(value) for name, value in losses.terms.items()})

# %% [markdown]
# **Read it.** Which stage has the largest loss, and which term? The token-interaction stages have no masks and
# therefore no mask loss: De-Imbalance trains classes and boxes only.
#
# ### Exercise 6.2
#
# *Medium, 8 minutes.* Compute the generalised IoU of two boxes `(x0, y0, x1, y1)`. IoU is 0 for all boxes that do not
# touch, so it has no gradient there. GIoU subtracts the fraction of the hull, the smallest box around both, that
# neither box covers:
#
# $$GIoU = IoU - \frac{|hull| - |union|}{|hull|}$$


# %%
def giou(a, b):
    """Generalised IoU of two boxes (4,), xyxy, from −1 to 1."""
    # solution
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return width * height / union - (hull - union) / hull
    # end


checks.check_giou(giou)

# %% [markdown]
# ### Exercise 6.3
#
# *Easy, 3 minutes.* Compute the dice loss of one mask from probabilities `p` and true values `t` at the same points:
#
# $$1 - \frac{2\sum pt + 1}{\sum p + \sum t + 1}$$


# %%
def dice_loss(p, t):
    """Dice loss of one mask from values (P,) in [0, 1]."""
    # solution
    return 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
    # end


checks.check_dice_loss(dice_loss)

# %% [markdown]
# ### Build it: the matching cost
#
# *Hard, 25 minutes.* Compute $C(q, o)$ for all pairs of an image; the check compares it with the model's. You are
# given class `logits` `(Q, K)`, `boxes` `(Q, 4)` and mask logits at $P$ points `masks` `(Q, P)` of $Q$ queries;
# `labels` `(M,)`, `true_boxes` `(M, 4)` and the values of the masks at the same points `true_masks` `(M, P)` of $M$
# objects; and `giou` `(Q, M)`. With $p$, the probability of the object's class,
#
# $$C_{class} = 0.25\,(1 - p)^2 \big(-\log(p + 10^{-8})\big) - 0.75\,p^2 \big(-\log(1 - p + 10^{-8})\big),$$
#
# $C_{mask}$ is the binary cross-entropy averaged over the points and $C_{dice}$ the dice loss of exercise 6.3, for
# every pair.


# %%
def matching_cost(logits, boxes, masks, labels, true_boxes, true_masks, giou):
    """Costs (Q, M)."""
    # solution
    p, P = logits.sigmoid()[:, labels], masks.shape[1]
    c_class = -0.25 * (1 - p) ** 2 * (p + 1e-8).log() + 0.75 * p**2 * (1 - p + 1e-8).log()
    c_mask = (functional.softplus(masks).sum(1, keepdim=True) - masks @ true_masks.T) / P
    inside = masks.sigmoid()
    c_dice = 1 - (2 * inside @ true_masks.T + 1) / (inside.sum(1, keepdim=True) + true_masks.sum(1) + 1)
    return 4 * c_class + 5 * c_mask + 5 * c_dice + 5 * torch.cdist(boxes, true_boxes, p=1) - 2 * giou
    # end


checks.check_matching_cost(matching_cost, predictions.last, targets, settings.loss)

# %% [markdown]
# ## Denoising
#
# At first the matching changes from step to step: a query is assigned to one object now and to another later.
# Denoising queries belong to a known object from the start. They are its class and box with added noise, and the
# decoder learns to remove the noise. They come in groups that contain every object once, and the attention mask
# separates the groups: a query that could attend to another group's copy would have an easier task. The matching
# queries must not attend to any denoising query, since there are none at inference.

# %%
torch.manual_seed(0)
denoising = lesson.trained.detector.denoising(targets, matching=predictions.last.boxes.shape[1])
draw_denoising(sample.image, targets.boxes[0], denoising, targets.labels.shape[1])

# %% [markdown]
# ### Build it: a training step
#
# *Hard, 30 minutes.* Combine all parts of this chapter, for a batch of one image. The check runs your step on a copy
# of the model and the package's step on another, with the same random numbers. You are given
#
# * `detector(images, targets)`: predictions with `stages` and, for the denoising queries, `denoising` (both map names
#   to stages) and `denoising_groups`;
# * `match(stages, targets, settings)`: the matches of each stage of a list;
# * `Matches.from_lists([(queries, objects)], targets.boxes.device)`: pairs that are known without matching, from two
#   NumPy arrays. Denoising query $gM + j$ is the noised object $j$ in group $g$, with $M$ objects;
# * `stage_losses(pairs, targets, settings)`, from a list of (stage, matches): for each stage the *sums* of its losses
#   by term. Call it once, with the stages before the denoising ones, so that the random points are the package's.
#
# Each term has its weight, `getattr(settings.weights, term)`. Losses are divided by the number of objects, those of
# the denoising queries also by the number of groups. Then remove old gradients, compute the new ones, clip them to
# `clip_norm`, and make a step.


# %%
def training_step(detector, optimizer, images, targets, settings, clip_norm):
    """Make one step and return the loss before it, a number."""
    # solution
    predictions = detector(images, targets)
    stages, M, groups = list(predictions.stages.values()), targets.counts[0], predictions.denoising_groups
    pairs = list(zip(stages, match(stages, targets, settings), strict=True))
    known = Matches.from_lists([(np.arange(groups * M), np.tile(np.arange(M), groups))], targets.boxes.device)
    pairs += [(stage, known) for stage in predictions.denoising.values()]
    total = 0
    for (_, matches), sums in zip(pairs, stage_losses(pairs, targets, settings), strict=True):
        divisor = M * groups if matches is known else M
        total = total + sum(getattr(settings.weights, term) * value for term, value in sums.items()) / divisor
    optimizer.zero_grad()
    total.backward()
    torch.nn.utils.clip_grad_norm_(detector.parameters(), clip_norm)
    optimizer.step()
    return total.item()
    # end


checks.check_training_step(training_step, lesson.trained.detector, images, targets, settings)

# %% [markdown]
# ## The records of a training
#
# Every run folder has a `metrics.jsonl`. These are the losses of the model of this course (a model without records
# has no figure).

# %%
records = lesson.run.read_metrics()
plot_losses({"DI-MaskDINO": records}) if records else print("no records")

# %% [markdown]
# The drops are at the steps at which the learning rate is lowered (`schedule.drops`). To train a model yourself, use
# the notebook [runs/train.ipynb](runs/train.ipynb): about a quarter of an hour on two cores. `make demo` adds
# De-Imbalance and BATO to a trained MaskDINO in five minutes.
#
# ### Exercise 6.4, to discuss
#
# *5 minutes.* The loss weights are 5 for $L_1$ and 2 for GIoU. Table 3 of the paper lowers them on purpose, to
# measure how much imbalance a model tolerates. Which effect do you expect on MaskDINO, and on DI-MaskDINO? Chapter 7
# has the numbers.
#
# <details><summary>A model answer</summary>
#
# With weak box losses, boxes are learned late. In MaskDINO the decoder starts from boxes that come from masks and
# must learn everything else about boxes itself, so it should lose more. De-Imbalance trains its own box head before
# the decoder and should lose less. The paper reports this result. In this kit's studies it is inconclusive
# ([docs/study.md](../docs/study.md)).
#
# </details>
#
# ---
#
# **In three sentences.** Matching assigns one query to each object, so that no two queries learn the same answer and
# no suppression is needed afterwards. Losses of classes, boxes and masks are taken at every stage. Denoising queries
# start from noised true objects and must not see the others.
#
# **Read on.**
#
# * End-to-End Object Detection with Transformers (DETR), arXiv 2005.12872, section 3.1: matching and losses.
# * DN-DETR, arXiv 2203.01305, section 4: denoising and its attention mask.
#
# **Next**: the contribution of each part of the model, [ablations](07_ablations.ipynb).
