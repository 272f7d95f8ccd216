# %% [markdown]
# # 4 · De-Imbalance: residual double-selection
#
# **Question.** Forty tokens may enter the decoder. The image has more than five hundred. How are they chosen?
#
# Where do the decoder's queries come from? MaskDINO takes the feature tokens that look most like an object, all at
# once. This is bad for boxes in two ways: a token describes its own location rather than the extent of its object
# (chapter 1), and the tokens with the highest scores lie on the easiest objects. **De-Imbalance** (DI, Eq. 1 to 4)
# selects in three steps:
#
# $$T_{s1} = \text{select}_{k_1}(T_i) \qquad
# T_{s2} = \text{select}_{k_2}\big(\text{MHSA}(T_{s1})\big) \qquad
# Q_{bal} = \text{MHCA}(T_{s2}, T_i)$$
#
# 1. a **first selection** keeps more tokens than needed, $k_1$;
# 2. **token interaction**, self-attention among them, lets the tokens of one object exchange information, and a
#    **second selection** keeps the $k_2$ best;
# 3. a **residual connection**: the result attends to the original tokens $T_i$ again, since token interaction has
# blurred details. This is the first decoder layer.
#
# **You will be able to**
#
# * follow a token from the feature map through both selections;
# * explain what token interaction adds to a single selection;
# * measure whether every object keeps a token.
#
# *Prerequisites*: chapters 1 and 3. *Time*: 60 minutes.

# %% tags=["parameters"]
model: str = "dimaskdino-solids"  # a trained model: a name, a run folder or a file
scenes: str = "scenes"  # images that it has not seen, in COCO format
images: int = 6  # images to look at
overrides: list = []  # settings that differ from those of the training

# %%
import torch

from dimaskdino.course import begin, checks
from dimaskdino.course.questions import Number
from dimaskdino.inspection.objects import token_owners, track_objects
from dimaskdino.modeling.layers import inverse_sigmoid, sine_boxes
from dimaskdino.utils.resources import find_data
from dimaskdino.viz import draw_architecture, draw_interaction, draw_selection, plot_mean_ious
from dimaskdino.viz.explorers import explore_selection

lesson = begin(model, [f"data.root={find_data(scenes)}", *overrides])
looks = lesson.looks(images)
trace = looks[0].trace
k1, k2 = lesson.trained.config.model.selection.k[:2]
print(f"{trace.T_i.tokens.shape[1]} feature tokens T_i, k1 = {k1}, k2 = {k2}")

# %%
draw_architecture("first_selection", "token_interaction", "decoder_1")

# %% [markdown]
# ## The first selection
#
# The class head scores every feature token, and the $k_1$ tokens whose best class scores highest are kept
# (`FirstSelection.forward` in `dimaskdino/modeling/de_imbalance.py`):
#
# ```python
# scores, indices = heads.label(m).amax(-1).topk(min(self.k, m.shape[1]), dim=1)
# ```
#
# ### Exercise 4.1
#
# *Easy, 3 minutes.* Do the same for one image: return the indices of the `k` tokens whose best class scores highest,
# best first.


# %%
def select(logits, k: int):
    """Indices (k,) from class logits (N, K)."""
    # solution
    return logits.amax(-1).topk(k).indices
    # end


checks.check_select(select)

# %% [markdown]
# Each token comes with a box. It is not the box that the token predicts but the box **around its mask**, since masks
# are better than boxes at this stage (`mask_guided_boxes`). The paper inherits this from MaskDINO; chapter 7 switches
# it off.
#
# ### Exercise 4.2
#
# *Medium, 8 minutes.* Compute the box `(cx, cy, w, h)` around a mask `(h, w)`, relative to the map's width and
# height.


# %%
def mask_to_box(mask):
    """Tight box (4,) cxcywh in [0, 1] of a boolean mask."""
    # solution
    h, w = mask.shape
    columns, rows = mask.any(0).nonzero(), mask.any(1).nonzero()
    x0, x1 = columns.min() / w, (columns.max() + 1) / w
    y0, y1 = rows.min() / h, (rows.max() + 1) / h
    return torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0])
    # end


checks.check_mask_to_box(mask_to_box)

# %% [markdown]
# ## Token interaction
#
# The figure shows the self-attention among the selected tokens, averaged over the heads. The tokens are sorted by the
# object that they lie on, with white lines between objects, background first. Blocks on the diagonal that are
# brighter than their surroundings are tokens that attend to others of their own object; bright columns are tokens to
# which all others attend. Which of the two do you see?

# %%
draw_interaction(looks[0])

# %% [markdown]
# ## The second selection
#
# The second selection removes half of the tokens. Does every object keep one? Make a guess before you look.

# %%
kept = Number("Percentage of the objects on whose mask a token of the second selection lies", 0, 100, 5)
kept

# %% [markdown]
# Left: $T_{s1}$ with the boxes of the masks. Right: the tokens that are left after token interaction, with their
# refined boxes. The true boxes are black.

# %%
draw_selection(looks[0])

# %% [markdown]
# **Look for** places that lose many tokens and keep one: the second selection can drop duplicates of one object. Look
# also for boxes that grow from a part of an object to the whole.

# %%
explore_selection(looks)

# %% [markdown]
# ### Build it: the second selection
#
# *Hard, 20 minutes.* Write the whole step from its pieces; the check compares it with the model on a real image. You
# are given $T_{s1}$ (`content` (1, k1, C), `boxes` (1, k1, 4)) and
#
# * `block.position(sine_boxes(boxes, C))`, the position of each token from its box;
# * `layer(x, position, False)` for each `layer` of `block.layers`: attention and feed-forward; it returns the new `x`
#   first;
# * `block.box(x)`, the change of each box, added before the sigmoid: `(block.box(x) +
#   inverse_sigmoid(boxes)).sigmoid()`;
# * `block.norm`, and `heads.label`, whose best class is the score.


# %%
def second_selection(T_s1, block, heads, k: int):
    """Rows (k,) of the tokens that are kept, best first."""
    # solution
    x, boxes = T_s1.content, T_s1.boxes
    for layer in block.layers:
        x = layer(x, block.position(sine_boxes(boxes, x.shape[-1])), False)[0]
        boxes = (block.box(x) + inverse_sigmoid(boxes)).sigmoid()
    return heads.label(block.norm(x)).amax(-1).topk(k, dim=1).indices[0]
    # end


checks.check_second_selection(second_selection, looks[0], lesson.trained.detector)

# %% [markdown]
# ### Exercise 4.3
#
# *Easy, 4 minutes.* Does the second selection lose objects when it drops half of the tokens? `owners` has for each
# token the number of the object that it lies on, −1 for none. What fraction of the objects owns at least one token?


# %%
def recall(owners, objects: int) -> float:
    """Fraction of the objects that own a token, from (k,) owners."""
    # solution
    return len(set(owners.tolist()) - {-1}) / objects
    # end


if checks.check_recall(recall):
    for i, look in enumerate(looks):
        parts = [recall(token_owners(look, tokens), len(look.sample.labels)) for tokens in look.trace.T_s]
        print(f"image {i + 1}: objects with a token in T_s1 {parts[0]:.0%}, in T_s2 {parts[1]:.0%}")

# %%
owned = [{int(o) for o in token_owners(look, look.trace.T_s2)} - {-1} for look in looks]
objects = sum(len(look.sample.labels) for look in looks)
kept.reveal(
    100 * sum(map(len, owned)) / objects,
    {
        50: "half of the tokens are dropped, but most objects have several",
        100: "a token beside a small object can represent it",
    },
)

# %% [markdown]
# ## Do the boxes improve?
#
# The figure shows the mean IoU of the objects' best detections before and after each step. The first stage is the
# first selection, followed by the token-interaction layers; *decoder input* is $T_{s2}$, and *layer 1* is $Q_{bal}$,
# after the residual connection. The masks of the first selection and those of the decoder's input come from the same
# mask features. Compare with care: after the second selection half of the tokens are left, and the best of fewer
# boxes is worse.

# %%
tracks = [track_objects(look) for look in looks]
plot_mean_ious(tracks)

# %% [markdown]
# ### Exercise 4.4, to discuss
#
# *5 minutes.* Token interaction sees only the selected tokens. What could go wrong if an object has *no* token in
# $T_{s1}$? And which effect do you expect of $k_1 = k_2$? Table 8 of the paper (chapter 7) has the answer for COCO.
#
# <details><summary>A model answer</summary>
#
# An object without a token in T_s1 is not lost: a neighbouring token can be selected, and the decoder can still move
# its box. But the object has no representative in token interaction. With k1 = k2 the second selection keeps all
# tokens, and only the interaction is left. On COCO that costs some tenths of a point.
#
# </details>
#
# ---
#
# **In three sentences.** A first selection keeps more tokens than needed, token interaction lets them exchange
# information, and a second selection keeps the best. The first decoder layer reads the original tokens again. The
# resulting boxes are predicted, whereas MaskDINO takes the bounds of masks.
#
# **Read on.**
#
# * DI-MaskDINO, section 3: De-Imbalance, Eq. 1 to 4.
# * Deformable DETR, arXiv 2010.04159, section 4.2: the origin of two-stage selection.
#
# **Next**: how the balanced queries improve the tokens, [BATO](05_bato.ipynb).
