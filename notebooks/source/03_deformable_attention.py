# %% [markdown]
# # 3 · Multi-scale deformable attention
#
# **Question.** An image has a million pixels, and a query may read sixteen places. Where should it look?
#
# In a transformer, every query attends to every token. An image of 800 × 1333 pixels has 22,223 feature tokens in
# four levels: attention among all of them would need half a billion weights per head and layer. In *deformable
# attention* (Deformable DETR, Eq. 3), each query reads only a few locations, which it chooses itself:
#
# $$\text{out}(q) = \sum_{l=1}^{L} \sum_{k=1}^{K} A_{qlk}\; V_l\big(p_q + \Delta p_{qlk}\big)$$
#
# for each head. $p_q$ is the query's reference point, $\Delta p$ and $A$ are linear functions of the query, and
# $V_l(p)$ is the feature map of level $l$ at the location $p$, interpolated between four cells. With $L = 4$ levels
# and $K = 4$ points a query reads 16 locations per head, whatever the size of the image.
#
# **You will be able to**
#
# * compute a bilinear sample and explain why the location can be learned;
# * compute the cost of full and of deformable attention;
# * read a figure of sampling points.
#
# *Prerequisites*: attention, as in chapter 0. *Time*: 60 minutes.

# %% tags=["parameters"]
model: str = "dimaskdino-shapes"  # a trained model: a name, a run folder or a file
images: int = 4  # images to look at
overrides: list = []  # settings that differ from those of the training, such as data.root

# %%
import math
import time

import ms_deform_attn
import torch
from torch.nn import functional

from dimaskdino.course import begin, checks
from dimaskdino.course.questions import Number
from dimaskdino.viz import draw_architecture, draw_sampling
from dimaskdino.viz.explorers import explore_sampling

lesson = begin(model, overrides)
looks = lesson.looks(images)
settings = lesson.trained.config.model

# %%
draw_architecture("pixel_decoder", "decoder_1", "decoder")

# %%
reads = Number("How many places of the feature maps does one query read in one layer, with all its heads?", 0, 400, 8)
reads

# %%
per_head = settings.pixel_decoder.levels * settings.points
tokens = looks[0].trace.T_i.tokens.shape[1]
reads.reveal(settings.heads * per_head, {per_head: "that is one head", tokens: "all tokens: ordinary attention"})

# %% [markdown]
# ## Where a query looks
#
# The figure shows the best query of the first image in the first decoder layer. Its reference is a box, not a point:
# the offsets are scaled by the width and height of the box, so that a query for a large object reads a larger region.
# Each colour is a head; the size of a point is its weight $A$.

# %%
best = int(looks[0].predictions.last.class_logits[0].amax(-1).argmax())
draw_sampling(looks[0], layer=0, query=best)

# %% [markdown]
# One head alone:

# %%
draw_sampling(looks[0], layer=0, query=best, head=0)

# %% [markdown]
# ### Explore
#
# Click on the image to choose the query whose reference is nearest. Do the points of one head stay on one side of the
# box? Does a small object use the fine levels more than a large one? How does the pattern change from the first layer
# to the last?

# %%
explore_sampling(looks)

# %% [markdown]
# ## Between the cells
#
# Between cell centres the map is interpolated *bilinearly*: the value is the mean of the four cells around the
# location, weighted by proximity. Cell $i$ of a row of $w$ cells has its centre at $(i + \tfrac12) / w$. Outside the
# map every value is 0.
#
# ### Exercise 3.1
#
# *Medium, 10 minutes.* Compute the value of a map `(h, w)` at `(x, y)`, relative to its width and height.


# %%
def bilinear(values, x: float, y: float) -> float:
    """The map (h, w) at a place, zero outside."""
    # solution
    h, w = values.shape
    px, py = x * w - 0.5, y * h - 0.5
    total = 0.0
    for cy in (math.floor(py), math.floor(py) + 1):
        for cx in (math.floor(px), math.floor(px) + 1):
            if 0 <= cx < w and 0 <= cy < h:
                total += float(values[cy, cx]) * (1 - abs(px - cx)) * (1 - abs(py - cy))
    return total
    # end


checks.check_bilinear(bilinear)

# %% [markdown]
# ### Build it: the values that a query reads
#
# *Hard, 25 minutes.* Compute the whole sum for the first decoder layer; the check compares it with the model on a
# real image. For $Q$ queries you are given
#
# * `maps`: for each level the values as maps `(heads, D, h, w)`, since every head has $D$ channels of its own;
# * `boxes` `(Q, 4)`: the references `(cx, cy, w, h)`, relative to the image;
# * `offsets` `(Q, heads, levels, points, 2)`: the output of the linear layer, in units of half a box divided by the
#   number of points;
# * `scores` `(Q, heads, levels, points)`: the weights before the softmax, which is taken over all points of a head.
#
# `functional.grid_sample(map, grid, align_corners=False)` reads maps `(N, D, h, w)` at places `(N, Q, points, 2)`
# between −1 and 1, bilinearly and with zeros outside. Use the heads as $N$.


# %%
def attended(maps, boxes, offsets, scores):
    """The values that each query reads with all its heads, (Q, heads · D)."""
    # solution
    unit = boxes[:, None, None, None, 2:] * (0.5 / offsets.shape[3])
    places = boxes[:, None, None, None, :2] + offsets * unit
    weights = scores.flatten(2).softmax(-1).view(scores.shape)
    total = 0
    for level, values in enumerate(maps):
        grid = 2 * places[:, :, level].transpose(0, 1) - 1
        read = functional.grid_sample(values, grid, align_corners=False)  # (heads, D, Q, points)
        total = total + (read * weights[:, :, level].transpose(0, 1)[:, None]).sum(-1)
    return total.permute(2, 0, 1).flatten(1)
    # end


checks.check_attended(attended, looks[0], lesson.trained.detector)

# %% [markdown]
# ## The cost of a point
#
# ### Exercise 3.2
#
# *Easy, 2 minutes.* How many cells does one layer read for `Q` queries? (A cell that is read twice counts twice.)


# %%
def cells_read(queries: int, heads: int, levels: int, points: int) -> int:
    """Cells that one layer of deformable attention reads."""
    # solution
    return queries * heads * levels * points * 4
    # end


checks.check_samples(cells_read)

# %% [markdown]
# ## Three implementations of one sum
#
# The same formula can be computed in three ways: by a loop over samples as in the exercise (slow), with PyTorch's
# `grid_sample` level by level (the kit's `reference`), and by kernels that compute addresses once and read all
# channels of a cell together (the kit's operator, [ops/README.md](../ops/README.md)).

# %% tags=["varies"]
shapes = [(32, 32), (16, 16), (8, 8)]
generator = torch.Generator().manual_seed(0)
value = torch.randn(1, sum(h * w for h, w in shapes), 4, 16, generator=generator)
locations = torch.rand(1, 300, 4, len(shapes), 4, 2, generator=generator)
weights = torch.rand(1, 300, 4, len(shapes), 4, generator=generator)


def seconds(name: str) -> float:
    """Median time of ten calls of an implementation."""
    times = []
    with ms_deform_attn.backend(name):
        for _ in range(10):
            begin = time.perf_counter()
            ms_deform_attn.ms_deform_attn(value, shapes, locations, weights)
            times.append(time.perf_counter() - begin)
    return sorted(times)[5]


print(ms_deform_attn.status("cpu"))
for name in ("reference", "auto"):
    print(f"{name:10} {1e3 * seconds(name):7.2f} ms")

# %% [markdown]
# They agree up to rounding:

# %%
with ms_deform_attn.backend("reference"):
    expected = ms_deform_attn.ms_deform_attn(value, shapes, locations, weights)
found = ms_deform_attn.ms_deform_attn(value, shapes, locations, weights)
print(f"largest difference: {(found - expected).abs().max():.1e}")

# %% [markdown]
# ### Exercise 3.3, to discuss
#
# *5 minutes.* The derivative of the sum with respect to a *location* consists of differences between neighbouring
# cells. What happens to it when a location crosses the line between two cell centres? What does that mean for a query
# that starts far from its object?
#
# <details><summary>A model answer</summary>
#
# Between two cell centres the value is linear along each axis, so the derivative is constant. At a centre the pair of
# cells changes and the derivative jumps. A location gets a gradient from the four cells around it only: a query far
# from its object gets no signal about where the object is. This is why good initial boxes, several points per level
# and coarse levels matter.
#
# </details>
#
# ---
#
# **In three sentences.** A query of deformable attention reads a few places that it chooses itself, in all levels at
# once. Bilinear interpolation makes the places differentiable. The cost does not depend on the size of the image.
#
# **Read on.**
#
# * Deformable DETR, arXiv 2010.04159, section 4.1: attention and its cost.
# * Spatial Transformer Networks, arXiv 1506.02025, section 3.3: differentiable sampling.
#
# **Next**: how tokens become queries, [De-Imbalance](04_de_imbalance.ipynb).
