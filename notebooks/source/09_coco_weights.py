# %% [markdown]
# # Appendix · Published COCO weights
#
# **Question.** How do the figures of this course look for the published model and real photographs?
#
# The course uses small models on synthetic data. With the published weights you can draw the same figures for your
# own photographs: DI-MaskDINO with a ResNet-50, 80 classes, six decoder layers, 300 queries. You need
#
# * a **published checkpoint**, a `.pth` file from the authors' repository. `dimaskdino.load` reads it without running
#   any code in the file, and accounts for every tensor in it;
# * some **photographs**; and, to measure AP, COCO's validation images (`data/coco`, 1 GB).
#
# Without a checkpoint the notebook shows the shapes model instead.
#
# **You will be able to**
#
# * load a published checkpoint and inspect its content;
# * repeat the figures of chapters 3 to 5 on your photographs;
# * measure AP of every stage on COCO.
#
# *Prerequisites*: chapters 1 to 5; a checkpoint. Some seconds per photograph on a laptop. *Time*: 30 minutes.

# %% tags=["parameters"]
checkpoint: str = ""  # a published .pth file; empty: the model below
config: str = "coco/instance-segmentation/dimaskdino_r50_4scale_bs16_12ep"  # its configuration
model: str = "dimaskdino-shapes"  # a model of this kit, shown if there is no checkpoint
photos: str = ""  # a folder of photographs; empty: validation images of the model's data
coco: str = ""  # COCO's folder, to measure AP of every stage: about six hours on a laptop, minutes on a GPU
images: int = 4  # photographs to look at
overrides: list = []  # other settings

# %%
import os
from pathlib import Path

from dimaskdino import load, load_config
from dimaskdino.course import begin, checks
from dimaskdino.data.images import find_files
from dimaskdino.evaluation.layerwise_ap import evaluate_layers
from dimaskdino.runs import project_root
from dimaskdino.studies.report import paper_tables
from dimaskdino.viz import (
    draw_architecture,
    draw_guidance,
    draw_sampling,
    draw_selection,
    draw_stages,
    draw_token_maps,
    plot_first_and_last_layer,
    plot_layerwise_ap,
)
from dimaskdino.viz.explorers import explore_guidance, explore_sampling, explore_selection

# %%
draw_architecture()

# %% [markdown]
# ## From a published file to a model
#
# `load` reads a published `.pth`; `dimaskdino convert` converts it to a file of this kit.

# %%
os.chdir(project_root())
if checkpoint:
    trained = load(checkpoint, config=load_config(config, overrides))
    looks = [trained.inspect(file) for file, _ in find_files([Path(photos)])[:images]]
else:
    lesson = begin(model, overrides)
    trained, looks = lesson.trained, lesson.looks(images)
print(f"{len(trained.classes)} classes: {', '.join(trained.classes[:8])} …")

# %% [markdown]
# ## One photograph through the stages

# %%
look = looks[0]
stages = [name for name, stage in look.predictions.stages.items() if stage.has_masks]
draw_stages(look.sample.image, {name: look.instances(name) for name in stages}, trained.classes)

# %% [markdown]
# ## De-Imbalance and BATO
#
# Chapter 4's selections, chapter 3's sampling points, chapter 5's guidance.

# %%
draw_selection(look)

# %%
best = int(look.predictions.last.class_logits[0].amax(-1).argmax())
draw_sampling(look, layer=0, query=best)

# %%
draw_guidance(look, 0)

# %%
draw_token_maps(look)

# %% [markdown]
# ### Explore

# %%
explore_selection(looks)

# %%
explore_sampling(looks)

# %%
explore_guidance(looks)

# %% [markdown]
# ## AP of every stage
#
# The published values for BDD100K, or, if you set the folder of COCO, values measured on its 5,000 validation images.

# %%
if coco:
    measured = load(checkpoint, config=load_config(config, [*overrides, f"data.root={coco}"]))
    layerwise = evaluate_layers(measured)
    figure = plot_layerwise_ap({"published weights": layerwise})
else:
    published = paper_tables()["figure_1_layer_ap_bdd100k"]
    names = {"maskdino": "MaskDINO", "dimaskdino": "DI-MaskDINO"}
    figure = plot_first_and_last_layer({"Published, BDD100K": {names[k]: published[k] for k in names}})
figure

# %% [markdown]
# ### Exercise 9.1
#
# *Medium, 5 minutes.* Detections are the best `n` pairs of query and class, so that one query can be detected as two
# classes. From class logits `(Q, K)`, return the queries of the best `n` pairs, best first.


# %%
def best_queries(logits, n: int):
    """Queries (n,) of the best pairs of query and class."""
    # solution
    pairs = logits.flatten().topk(n).indices
    return pairs // logits.shape[1]
    # end


checks.check_best_queries(best_queries)

# %% [markdown]
# ### Exercise 9.2, to discuss
#
# *5 minutes.* Compare with the shapes model: does token interaction stay within objects if an image has thirty of
# them? Are the sampling points of a small object as far apart, relative to its box, as those of a large one?
#
# <details><summary>A model answer</summary>
#
# With thirty objects token interaction spreads over more of them, and attention within an object is harder to see;
# look at pairs of equal classes. Offsets are scaled by the box, so the points of a small object stay close to it;
# relative to its box they are about as far apart.
#
# </details>
#
# ---
#
# **In three sentences.** The kit reads the published checkpoint as it is, and the figures of the course work on
# photographs. Stages, selections, sampling and guidance can all be inspected. AP of every stage on COCO takes hours
# on a laptop.
#
# **Read on.**
#
# * DI-MaskDINO, section 4: results on COCO and BDD100K.
# * MaskDINO, arXiv 2206.02777, section 4.
