# %% [markdown]
# # 1 · The imbalance
#
# **Question.** A model finds an object. Its mask is accurate, but its box misses a part. Both are predicted from the
# same vector. How is that possible?
#
# A joint model predicts each object twice: as a **box** (detection) and as a **mask** (segmentation). Its decoder
# refines both, layer by layer. DI-MaskDINO starts from an observation about its predecessor MaskDINO: after the
# *first* decoder layer the boxes are worse than the masks, although both come from the same queries. After the *last*
# layer the order is reversed. Detection starts with a disadvantage that the later layers never fully remove.
#
# In this chapter you find this imbalance in published numbers, measure it on a small model, and look at single
# objects.
#
# **You will be able to**
#
# * define the imbalance between detection and segmentation, and name the layers at which it occurs;
# * measure it for any model and follow it object by object;
# * distinguish an imbalance of the model from one that a formula causes.
#
# *Prerequisites*: boxes, masks and neural networks; [chapter 0](00_detr.ipynb) if queries and attention are new to
# you. *Time*: 75 minutes.

# %% tags=["parameters"]
model: str = "dimaskdino-shapes"  # a trained model: a name, a run folder or a file
baseline: str = "maskdino-shapes"  # its baseline, trained in the same way
solids: str = "dimaskdino-solids"  # a model that was trained on rendered scenes
scenes: str = "scenes"  # rendered scenes that it has not seen
images: int = 6  # images to look at
overrides: list = []  # settings that differ from those of the training, such as data.root

# %%
import torch

from dimaskdino.course import begin, checks
from dimaskdino.course.questions import Curve, Number
from dimaskdino.inspection.objects import track_objects
from dimaskdino.studies.report import paper_tables
from dimaskdino.utils.resources import find_data
from dimaskdino.viz import (
    draw_architecture,
    draw_object_stages,
    draw_objects,
    plot_first_and_last_layer,
    plot_layerwise_ap,
    plot_mean_ious,
)
from dimaskdino.viz.explorers import explore_layers, explore_true_boxes

lesson = begin(model, overrides)
looks = begin(solids, [f"data.root={find_data(scenes)}", *overrides]).looks(images)
tracks = [track_objects(look) for look in looks]
imbalances = [float((track.mask_iou[0] - track.box_iou[0]).mean()) for track in tracks]
shown = looks[imbalances.index(max(imbalances))]
names = list(shown.predictions.stages)
stages = [names[0], "decoder.1", names[-1]]
draw_object_stages(shown, stages, track_objects(shown, stages))

# %% [markdown]
# A rendered scene, and the best detection of each object at three stages of a small DI-MaskDINO: the first stage, the
# first decoder layer and the last. Compare the boxes of the first stage with those of the last, then the masks. At
# every stage the same heads predict both, highlighted in this picture:

# %%
draw_architecture("heads")

# %% [markdown]
# ## Published: figure 1 of the paper
#
# Average precision (AP, chapter 2) on BDD100K, a dataset of street scenes. Before you look: what do you expect?

# %%
answer = Number("How many points of AP are MaskDINO's boxes behind its masks after the first decoder layer?", 0, 15)
answer

# %%
published = paper_tables()["figure_1_layer_ap_bdd100k"]
names = {"maskdino": "MaskDINO", "dimaskdino": "DI-MaskDINO"}
first = published["maskdino"]["first"]
answer.reveal(first["mask"] - first["box"], {0: "one vector, but boxes and masks need different knowledge of it"})

# %% [markdown]
# With De-Imbalance and BATO the imbalance shrinks to half a point. At the last layer boxes score higher than masks in
# both models.

# %%
plot_first_and_last_layer({"Published, BDD100K": {names[k]: published[k] for k in names}})

# %% [markdown]
# ## Measured: a small model and its baseline
#
# Two small models of drawn shapes come with the course: DI-MaskDINO, and MaskDINO, which has neither module. Both
# were trained in the same way: 10,000 steps with the same seed, an hour and a half on one CPU core. Here is the same
# figure for them, on images that were not used for training:

# %%
result = lesson.layerwise_ap()
models = {"MaskDINO": begin(baseline, overrides).layerwise_ap(), "DI-MaskDINO": result}
plot_first_and_last_layer({"Measured, shapes": {name: result.first_and_last() for name, result in models.items()}})

# %% [markdown]
# **Compare.** The imbalance of the first layer shrinks here too. Two things differ from the paper: masks still score
# higher than boxes at the last layer, and the two models are much further apart. These are single trainings of small
# models; chapter 7 repeats the comparison with several seeds, and with each module alone.
#
# ## Every stage
#
# A *stage* is a point of the model that predicts boxes, and usually masks: the tokens of the first selection, the
# token-interaction layers of De-Imbalance (boxes only), the queries that enter the decoder, and each decoder layer. One
# pass over the validation images gives the AP of all stages. The bars below the curves show the imbalance
#
# $$\text{imbalance} = AP_{mask} - AP_{box},$$
#
# It is positive where boxes are worse than masks. Before you look, draw the curve that you expect of DI-MaskDINO.

# %%
with_masks = [name for name, measured in result.stages.items() if measured.mask is not None]
course = Curve("The imbalance at each stage of DI-MaskDINO", with_masks, -10, 20)
course

# %%
course.reveal([result.stages[name].imbalance for name in with_masks], "imbalance (points)")

# %%
print(result.table())

# %%
plot_layerwise_ap({"DI-MaskDINO": result})

# %% [markdown]
# Both models together:

# %%
plot_layerwise_ap(models)

# %% [markdown]
# **Read it.** Where is the imbalance largest? Is that before or after De-Imbalance (the token-interaction stages)? Do
# boxes or masks gain more from the first stage to the last?
#
# ### How a measurement misleads
#
# The AP of the baseline's boxes collapses at the input of the decoder. It looks as if the imbalance were largest
# there. Look at the dotted lines first. They are **upper bounds on AP**: the AP of the *true* objects after the same
# steps as the predictions. Masks have a quarter of the image's resolution, so true masks lose thin parts. And the
# boxes that enter MaskDINO's decoder are not predicted: they are the bounds of predicted masks, computed by a formula
# that takes the last occupied cell and leaves out its width. With this formula even true masks lead to wrong boxes.

# %%
plot_layerwise_ap({"MaskDINO": models["MaskDINO"]})

# %% [markdown]
# ### Explore
#
# True objects at a quarter of the resolution: the cells that an object covers by more than half, the box that each
# formula makes of them (blue), and the true box (black). Which objects lose most?

# %%
explore_true_boxes(lesson.samples(images))

# %% [markdown]
# The diamonds show the imbalance after both APs are divided by their upper bounds. At the decoder's input little of
# the imbalance is left: most of it is arithmetic, not learning. De-Imbalance predicts its own boxes before this
# point, which can compensate for the formula. A smaller imbalance at the decoder's input is therefore no evidence
# that De-Imbalance balances anything; the imbalance from the first layer on needs an explanation.
# [docs/study.md](../docs/study.md) measures both.
#
# ### Exercise 1.1
#
# *Easy, 1 minute.* Write the imbalance as a function of the two APs.


# %%
def imbalance(box_ap: float, mask_ap: float) -> float:
    """Mask AP − box AP, in points."""
    # solution
    return mask_ap - box_ap
    # end


checks.check_imbalance(imbalance)

# %% [markdown]
# ## One object at a time
#
# AP is one number for a whole dataset. To see its causes, follow single objects: for each true object, take the best
# detection of its class at every stage, and measure the overlap of its box and mask with those of the object. The
# scenes are rendered, with textures, light and shadow; the model was trained on 3,000 others. The measure is
# *intersection over union*, for boxes and masks alike:
#
# $$IoU(A, B) = \frac{|A \cap B|}{|A \cup B|}$$

# %%
draw_objects(shown, track_objects(shown), "first_selection")

# %%
draw_objects(shown, track_objects(shown), stages[-1])

# %% [markdown]
# Solid lines are boxes, dashed lines are masks. Averaged over the objects of all images:

# %%
plot_mean_ious(tracks)

# %% [markdown]
# ### Explore
#
# Choose an image, a stage and a score threshold. Look for an object whose mask fits from the beginning while its box
# does not: what does that box miss?

# %%
explore_layers(looks)

# %% [markdown]
# Where do the predictions come from? Follow the arrows from the image to the heads. Backbone and pixel decoder turn the
# image into feature tokens $T_i$, one for each place of each feature level, and into mask features $F$. The first
# selection keeps the best tokens, $T_{s1}$; these interact, and the second selection keeps the best of them, $T_{s2}$.
# The decoder layers turn them into queries, which read from all feature tokens. At every stage, the heads predict a
# class, a box and a mask from each token or query.

# %%
draw_architecture()

# %% [markdown]
# Why are boxes harder at first? A token of the feature map describes its own location. The question of a mask, "does
# this pixel belong to the object?", can be answered locally. The question of a box, "how far is it to the left edge
# of the object?", requires the whole object, most of which lies elsewhere. The attention of the decoder collects this
# information layer by layer; De-Imbalance (chapter 4) does part of it before the first layer.
#
# ### Exercise 1.2
#
# *Medium, 6 minutes.* Compute the IoU of two boxes `(x0, y0, x1, y1)`, as a number. `max` and `min` are enough; no
# library function is needed.


# %%
def box_iou(a, b):
    """Intersection over union of two boxes (4,), xyxy."""
    # solution
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return shared / (areas - shared)
    # end


checks.check_box_iou(box_iou)

# %% [markdown]
# ### Exercise 1.3
#
# *Easy, 3 minutes.* Compute the IoU of two masks, tensors `(h, w)` of booleans.


# %%
def mask_iou(a, b):
    """Intersection over union of two masks (h, w) bool."""
    # solution
    return (a & b).sum() / (a | b).sum()
    # end


checks.check_mask_iou(mask_iou)

# %% [markdown]
# ### Build it: from detections to a figure
#
# *Medium, 15 minutes.* The figures above follow each object through the stages. Compute their numbers from the
# detections of a stage with a score of at least 0.3: for each object, take the detection **of its class** with the
# largest sum of box IoU and mask IoU, and return both IoUs. If no detection has its class, both are 0. Use your two
# functions; a loop is fast enough.


# %%
def best_detections(boxes, masks, labels, true_boxes, true_masks, true_labels):
    """IoU of the box and of the mask of each object's best detection, two tensors (M,)."""
    # solution
    found = []
    for true_box, true_mask, true_label in zip(true_boxes, true_masks, true_labels, strict=True):
        pairs = [(0.0, 0.0)]
        for box, mask, label in zip(boxes, masks, labels, strict=True):
            if label == true_label:
                pairs.append((float(box_iou(box, true_box)), float(mask_iou(mask, true_mask))))
        found.append(max(pairs, key=sum))
    return torch.tensor(found).T.unbind()
    # end


checks.check_best_detections(best_detections, looks)

# %% [markdown]
# ### Exercise 1.4, to discuss
#
# *5 minutes.* A box is one pixel too wide on each side. How much IoU does that cost an object of 8 × 8 pixels, and
# one of 64 × 64? What does this mean for comparisons of box AP with mask AP on small objects?
#
# <details><summary>A model answer</summary>
#
# The box of 8 × 8 becomes 10 × 10: IoU 64/100. The box of 64 × 64 becomes 66 × 66: IoU 4096/4356, 0.94. The same
# error of one pixel costs a small object almost all thresholds above 0.6, and a large one none below 0.95. A mask of
# the same small object that is one pixel too wide loses just as much. AP of small objects therefore measures pixels,
# and box AP can be compared with mask AP only if the same resolution limits both.
#
# </details>
#
# ---
#
# **In three sentences.** In the first layers of MaskDINO boxes are worse than masks, since a token describes its own
# place better than the extent of its object. AP of every stage shows where this happens, and single objects show how.
# Part of the measured imbalance is arithmetic, since the formulas and the resolution set upper bounds on AP.
#
# **Read on.**
#
# * DI-MaskDINO, arXiv 2410.16707, section 1: the observation and its explanation.
# * MaskDINO, arXiv 2206.02777, section 3: where queries and their boxes come from.
#
# **Next**: how AP is measured, [evaluation](02_evaluation.ipynb).
