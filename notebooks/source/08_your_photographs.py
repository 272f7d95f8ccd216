# %% [markdown]
# # 8 · Your photographs and your own idea
#
# **Question.** You have forty pictures of your own and an idea. How much work is it to train a model that knows your
# objects, and to test the idea?
#
# Two things that you may want next are your own objects and your own change of the model. Both are short. The data
# need a folder in **COCO format**; a change is a **module** that replaces another one with the same `forward`.
#
# **You will be able to**
#
# * write annotations in COCO format and train on them;
# * choose augmentation, and estimate the results of a small training on photographs;
# * replace a module of the model with your own;
# * state beforehand which result would refute your idea.
#
# *Prerequisites*: chapters 1, 5 and 6; PyTorch modules. *Time*: 105 minutes.

# %% tags=["parameters"]
model: str = "dimaskdino-solids"  # a trained model: a name, a run folder or a file
config: str = "solids/dimaskdino_r18w16"  # its configuration
folder: str = "runs/course/rolls_or_stays"  # for the data and runs of this chapter
train_images: int = 40  # number of training images
val_images: int = 30  # number of validation images
steps: int = 30  # training steps of the fine-tuning
seeds: int = 3  # trainings with and without your own module
overrides: list = []  # other settings of the model and the configuration

# %%
import json
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from scipy import stats
from torch import nn

from dimaskdino import load
from dimaskdino.checkpoints.catalogue import find_model
from dimaskdino.cli.data import check as data_check
from dimaskdino.config import SOLIDS, Shapes, load_config
from dimaskdino.course import begin, checks
from dimaskdino.course.questions import Choice
from dimaskdino.data.coco import CocoDataset, Sample
from dimaskdino.data.dataloader import batches, collate, training_dataset, training_loader
from dimaskdino.data.shapes import generate, scene
from dimaskdino.evaluation.layerwise_ap import evaluate_layers
from dimaskdino.inspection.objects import track_objects
from dimaskdino.modeling import ImageBatch
from dimaskdino.runs import TrainingProcess, show_training
from dimaskdino.training.criterion import criterion
from dimaskdino.training.optimizer import build_optimizer
from dimaskdino.training.recipe import Machine, propose
from dimaskdino.utils.resources import find_data
from dimaskdino.viz import draw_architecture, draw_samples, plot_layerwise_ap, plot_losses, plot_trainings
from dimaskdino.viz.explorers import explore_layers

lesson = begin(model, [f"data.root={find_data('scenes')}", *overrides])
folder = Path(folder).resolve()

# %%
draw_architecture("bato")

# %% [markdown]
# ## A folder in COCO format
#
# ```
# my_data/annotations/train.json    images/train/000.png …
#         annotations/val.json      images/val/000.png …
# ```
#
# Each json lists `images` (id, file name, size), `categories` (id, name) and `annotations`: for each object its
# image, its category, its mask as polygons or run-length code, its box `[x, y, width, height]` and its area.
# Labelling tools such as CVAT, Label Studio and Roboflow export this format.
#
# ### Exercise 8.1
#
# *Easy, 5 minutes.* Compute the box and the area of an object from its mask, an array `(h, w)` of zeros and ones.


# %%
def box_and_area(mask):
    """[x, y, width, height] and the number of pixels."""
    # solution
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    x, y = columns[0], rows[0]
    return [x, y, columns[-1] - x + 1, rows[-1] - y + 1], int(mask.sum())
    # end


checks.check_annotation(box_and_area)

# %% [markdown]
# The data of this chapter ask a new question about familiar scenes: does an object *roll* away or *stay* if somebody
# pushes the table? There are two classes and a few dozen images, as many as one can label in an afternoon. (The
# scenes are rendered here, in place of your photographs.)

# %%
ROLLS = ("ball", "can", "hoop")


def write_split(split: str, count: int):
    """Images and annotations of one split."""
    size = lesson.trained.config.data.resize.shortest
    (folder / "data" / "images" / split).mkdir(parents=True, exist_ok=True)
    (folder / "data" / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for number in range(count):
        pixels, labels, masks = scene(Shapes(kinds=SOLIDS, size=size, seed=2), split, number)
        file = f"{number:03}.png"
        Image.fromarray(pixels).save(folder / "data" / "images" / split / file)
        images.append({"id": number, "file_name": file, "height": pixels.shape[0], "width": pixels.shape[1]})
        for label, mask in zip(labels, masks, strict=True):
            code = coco_mask.encode(np.asfortranarray(mask))
            annotations.append({
                "id": len(annotations) + 1, "image_id": number, "iscrowd": 0,
                "category_id": 1 if SOLIDS[label] in ROLLS else 2,
                "segmentation": {"size": code["size"], "counts": code["counts"].decode()},
                "bbox": coco_mask.toBbox(code).tolist(), "area": int(coco_mask.area(code)),
            })  # fmt: skip
    categories = [{"id": 1, "name": "rolls"}, {"id": 2, "name": "stays"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "data" / "annotations" / f"{split}.json").write_text(json.dumps(content))


write_split("train", train_images)
write_split("val", val_images)

# %% [markdown]
# Check a new folder before anything else: the check opens every image, decodes every mask and reports every problem.

# %%
status = data_check(folder / "data", ("train",))  # `dimaskdino data check FOLDER train` on the command line

# %% [markdown]
# `dimaskdino new DATA RUN` writes a configuration for a folder, with a reason beside each setting that it chose:

# %%
print(propose(folder / "data", Machine.here()).summary())

# %% [markdown]
# ## Augmentation
#
# A model soon memorises a few dozen images. Augmentation makes new images of them. `data.jitter` scales, crops and
# flips; `data.augmentation=colour` or `strong` also changes colours, and `strong` blurs and removes colour as well;
# `data.copy_paste` pastes objects of another training image in front of the objects of an image.
#
# The masks are moved and covered together with the image. Look at both before you train with them:


# %%
def augmented(name: str, *changes: str, count: int = 4):
    """The first training images as a training would see them."""
    settings = load_config(config, [f"data.root={folder / 'data'}", "train.batch_size=4", "data.workers=0", *changes])
    loader = training_loader(training_dataset(settings), settings, first_step=0, rank=0, world=1)
    batch = next(batches(loader))
    for image, labels, masks in zip(batch.images[:count], batch.targets.labels, batch.targets.masks, strict=False):
        there = masks.flatten(1).any(1).bool()
        yield Sample(image, labels[there], masks[there], 0, name, tuple(image.shape[-2:]))


kinds = {
    "jitter": (),
    "augmentation=colour": ("data.augmentation=colour",),
    "augmentation=strong": ("data.augmentation=strong",),
    "copy_paste=1": ("data.copy_paste=1",),
}
draw_samples([sample for name, changes in kinds.items() for sample in augmented(name, *changes)], ["rolls", "stays"])

# %% [markdown]
# ## Fine-tuning
#
# A model that was trained on many scenes already knows edges, shadows, overlaps and extents. `train.weights` starts
# from its weights; parameters that depend on the classes are re-initialised. Everything else is an ordinary training,
# in a separate process.

# %%
changes = [
    *overrides,
    *(f"data.root={folder / 'data'}", "data.shapes=null", "model.classes=2"),
    *(
        f"schedule.steps={steps}",
        f"schedule.drops=[{max(1, 3 * steps // 4)}]",
        "schedule.warmup=5",
        "train.log_every=5",
    ),
]
run = folder / f"fine_tuned_{steps}"
with TrainingProcess(config, run, [*changes, f"train.weights={find_model(model).resolve()}"]) as training:
    show_training(training, steps, plot_losses)

# %% [markdown]
# Did this help? The same number of steps from scratch:

# %%
with TrainingProcess(config, folder / f"from_nothing_{steps}", changes) as training:
    show_training(training, steps, plot_losses)

# %%
results = {name: evaluate_layers(load(folder / f"{name}_{steps}")) for name in ("fine_tuned", "from_nothing")}
plot_layerwise_ap(results)

# %%
tuned = load(run)
sample = CocoDataset(folder / "data", "val")[0]
tuned.predict(sample.image)

# %% [markdown]
# ### Explore
#
# The fine-tuned model on images that it has not seen: where does it fail, and from which stage on is it right?

# %%
explore_layers([tuned.inspect(CocoDataset(folder / "data", "val")[i]) for i in range(min(val_images, 4))])

# %% [markdown]
# ## Photographs
#
# This section shows trainings on photographs with `data import`, `new` and `train` on two CPU cores, first of
# animals. The photographs are not part of the kit, but the record of the trainings is, and everything below is read
# from it. Both models have an EfficientNet-Lite0 with ImageNet weights as backbone; their other modules start from
# the small models of this course, which were trained on drawn shapes only.

# %%
records = json.loads(find_data("measurements/photographs.json").read_text())
record = records["animals"]
shown = record["recipe"][0]
print(f"{record['train']['images']} training images with {record['train']['objects']:,} objects of")
print(f"{record['train']['classes']} classes, {record['val']['images']} images for validation;")
print(f"{record['steps']:,} steps in {shown['minutes']:.0f} minutes with {shown['threads']} threads, under CPU load")
better = Choice(
    "How much of the final AP do you expect from the first decoder layer?", ["a third", "half", "nine tenths"]
)
better

# %%
groups = {"DI-MaskDINO, dimaskdino new": record["recipe"], **record["rows"]}
box = {stage: ap["box"] for stage, ap in shown["stages"].items()}
print(f"DI-MaskDINO: box AP {box['decoder.1']:.1f} after the first layer, {box['decoder.4']:.1f} after the last")
share = box["first_selection"] / box["decoder.4"]
better.reveal("nine tenths", {"a third": f"the first selection, before De-Imbalance, has {share:.0%}"})
plot_trainings(groups, record["steps"])

# %% [markdown]
# The imbalance of chapter 1 occurs here too: compare boxes and masks at the first selection. Few trainings support
# few conclusions, so the comparison of the two models has a rule that was written down before:
# [results](../docs/results.md), section *Photographs*. That section also compares them with Mask R-CNN and
# Mask2Former on the same images.
#
# Nuclei of cells under a microscope are the other extreme: one class, dozens to hundreds of objects in an image, most
# of them a few pixels wide. The commands are the same; `new` has chosen a larger image size and more tokens.

# %%
nuclei = records["nuclei"]
print(f"{nuclei['train']['images']} training images with {nuclei['train']['objects']:,} objects")
for name, trainings in (("animals", record["recipe"]), ("nuclei", nuclei["recipe"])):
    first = trainings[0]["stages"]["decoder.1"]
    print(f"{name}: imbalance after the first layer {first['mask'] - first['box']:+.1f} points of AP")
plot_trainings({"DI-MaskDINO, nuclei": nuclei["recipe"]}, nuclei["steps"])

# %% [markdown]
# An error of one pixel costs a small box much of its IoU (chapter 1), so this imbalance was to be expected.
#
# ### Exercise 8.2, to discuss
#
# *5 minutes.* The fine-tuned model has seen *scenes* of this kind before, only with other names. Which result do you
# expect on photographs instead? For which parts of the model would you then use weights trained on photographs?
#
# <details><summary>A model answer</summary>
#
# A small gain: its knowledge of edges and textures comes from rendered tables, and only the general layout of boxes
# and masks helps. Start the backbone from weights trained on photographs, and the pixel decoder and the decoder too
# if they come from the same model. Only the parts that depend on the classes have to be new.
#
# </details>
#
# ## Your own idea
#
# Should BATO (chapter 5) replace the tokens altogether? With a *gate* $g$ the model can learn how much of the change
# it uses:
#
# $$T' = T_i + g\,(T_{bal} - T_i)$$
#
# ### Exercise 8.3
#
# *Easy, 3 minutes.* Write the gate: 0 returns `before`, 1 returns `after`.


# %%
def gated(before, after, gate):
    """From `before` to `after`, as far as the gate is open."""
    # solution
    return before + gate * (after - before)
    # end


checks.check_gate(gated)

# %% [markdown]
# ### Build it: a module of your own
#
# *Hard, 20 minutes.* Write the module around the gate. It has the `forward` of the module that it replaces (`BATO`),
# so that nothing else in the model has to change. `__init__` keeps `bato` and makes the gate a parameter that can be
# learned. `forward` calls `bato`, which returns a record with `T_bal`, the feature tokens of all levels (`.tokens`,
# and `.with_tokens(…)` for a copy with other tokens), and `mask_features`. Both go through the gate; `replace(output,
# T_bal=…, mask_features=…)` makes the new record.


# %%
class GatedBATO(nn.Module):
    """BATO behind a gate."""

    def __init__(self, bato: nn.Module, gate: float) -> None:
        super().__init__()
        # solution
        self.bato, self.gate = bato, nn.Parameter(torch.tensor(gate))
        # end

    def forward(self, T_i, mask_features, guide, heads, need_weights):
        # solution
        output = self.bato(T_i, mask_features, guide, heads, need_weights)
        T_bal = T_i.with_tokens(gated(T_i.tokens, output.T_bal.tokens, self.gate))
        return replace(output, T_bal=T_bal, mask_features=gated(mask_features, output.mask_features, self.gate))
        # end


built = checks.check_gated_module(GatedBATO, lesson.looks(1)[0], lesson.trained.detector)

# %% [markdown]
# Insert the module and look, before any training: with an open gate the model is unchanged. How much do the later
# layers rely on BATO, after a training with it?

# %%
detector = lesson.trained.detector
bato = detector.bato
if built:
    for gate in (0.0, 0.5, 1.0):
        detector.bato = GatedBATO(bato, gate)
        tracks = [track_objects(look) for look in lesson.looks(8)]
        box, mask = (torch.cat([getattr(t, name)[-1] for t in tracks]).mean() for name in ("box_iou", "mask_iou"))
        print(f"gate {gate:.1f}: mean IoU at the last layer, box {box:.2f}, mask {mask:.2f}")
    detector.bato = bato

# %% [markdown]
# ## A comparison over seeds
#
# Is the model better with a gate? First the rule: training continues for some steps with the gate and without it,
# from the same weights, once for each seed, and the measure is the loss on scenes that are not in the training set.
# *The gate is worth keeping if the 95 % interval of the difference lies below 0.* (The whole loop is here, so that
# you can change it. For a long training, make the gate a module of your own as in [docs/extend.md](../docs/extend.md)
# and use `dimaskdino train`, which can be interrupted and keeps records.)

# %% tags=["varies"]
scenes = folder / "five_classes"  # of the five classes that the model knows
if not scenes.exists():
    generate(scenes, Shapes(kinds=SOLIDS, train=40, val=8, size=lesson.trained.config.data.resize.shortest, seed=3))


def loss_after(seed: int, gate: float | None) -> float:
    """Loss on the held-out scenes after some steps with the gate; None: without one."""
    settings = load_config(
        config, [*changes, f"model.classes={len(SOLIDS)}", f"data.root={scenes}", f"train.seed={seed}"]
    )
    detector = load(model, overrides=overrides).detector
    if gate is not None:
        detector.bato = GatedBATO(detector.bato, gate)
    torch.manual_seed(seed)  # of the points at which the loss compares masks, and of the denoising queries
    detector.train()
    optimizer = build_optimizer(detector, settings.optimizer)
    parts = batches(training_loader(training_dataset(settings), settings, first_step=0, rank=0, world=1))
    for _ in range(min(steps, 10)):
        batch = next(parts)
        predictions = detector(ImageBatch.from_images(batch.images), batch.targets)
        loss = criterion(predictions, batch.targets, settings.loss, sum(batch.targets.counts)).total
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), settings.optimizer.clip_norm)
        optimizer.step()
    held_out = collate(list(CocoDataset(scenes, "val")))
    torch.manual_seed(0)
    with torch.no_grad():
        predictions = detector.eval()(ImageBatch.from_images(held_out.images))
        return criterion(predictions, held_out.targets, settings.loss, sum(held_out.targets.counts)).total.item()


if built:
    differences = [loss_after(seed, 0.5) - loss_after(seed, None) for seed in range(seeds)]
    mean, error = statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    half = stats.t.ppf(0.975, len(differences) - 1) * error
    print("with the gate − without it, by seed:", ", ".join(f"{d:+.2f}" for d in differences))
    print(f"mean {mean:+.2f}, 95 % interval {mean - half:+.2f} to {mean + half:+.2f}")

# %% [markdown]
# ### Exercise 8.4, to discuss
#
# *10 minutes.* Does the rule say yes, no, or nothing? Which experiment would test the gate: how many seeds and steps,
# compared with what? And which outcome would convince you that it is *not* a good idea?
#
# <details><summary>A model answer</summary>
#
# At least five seeds of the model with the gate and of the one without, from the same initial weights, compared at
# the last layer; a control with the same number of parameters, since the gate adds some; and a rule such as: if the
# 95 % interval of the difference does not lie above 0, the gate is not worth its parameters. It must be possible that
# the outcome refutes the idea.
#
# </details>
#
# ---
#
# **In three sentences.** Data in COCO format consist of images, categories, and a mask per object. A new module is a
# class with the same forward. An idea becomes a result through runs, a control, and a rule that was written down
# before.
#
# **Read on.**
#
# * Microsoft COCO, arXiv 1405.0312, section 4: how annotations are made, and checked.
# * Bouthillier et al., arXiv 2103.03098: how many runs.
#
# **Next**: [published COCO weights](09_coco_weights.ipynb), and the notebooks in [runs/](runs/).
