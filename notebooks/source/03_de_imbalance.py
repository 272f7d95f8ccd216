# %% [markdown]
# # 3 · De-Imbalance: residual double-selection
#
# Where do the decoder's queries come from? MaskDINO takes the feature tokens that look most like an object, all at
# once. This is bad for boxes in two ways: a token describes its own location rather than the extent of its object
# (chapter 1), and the tokens with the highest scores crowd on the easiest objects. **De-Imbalance** (DI, Eq. 1 to 4)
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
#    blurred details. This is the first decoder layer.
#
# *Prerequisites*: chapters 1 and 2. *Time*: 60 minutes.

# %% tags=["parameters"]
model: str = "notebooks/models/dimaskdino"  # a trained model: a run folder or a file
images: int = 6  # images to look at
overrides: list = []  # settings that differ from those of the training, such as data.root

# %%

import torch

from dimaskdino.course import begin, checks
from dimaskdino.inspection.objects import token_owners, track_objects
from dimaskdino.viz import draw_interaction, draw_selection, plot_mean_ious
from dimaskdino.viz.explorers import explore_selection

lesson = begin(model, overrides)
looks = lesson.looks(images)
trace = looks[0].trace
k1, k2 = lesson.trained.config.model.selection.k[:2]
print(f"{trace.T_i.tokens.shape[1]} feature tokens T_i, k1 = {k1}, k2 = {k2}")

# %% [markdown]
# ## The first selection
#
# Every feature token is scored by the class head, and the $k_1$ whose best class scores highest are kept
# (`FirstSelection.forward` in `dimaskdino/modeling/de_imbalance.py`):
#
# ```python
# scores, indices = heads.label(m).amax(-1).topk(min(self.k, m.shape[1]), dim=1)
# ```
#
# ### Exercise 3.1
#
# The same for one image: indices of the `k` tokens whose best class scores highest, best first.


# %%
def select(logits, k: int):
    """Indices (k,) from class logits (N, K)."""
    # solution
    return logits.amax(-1).topk(k).indices
    # end


checks.check_select(select)

# %% [markdown]
# Each token brings a box: not the one it predicts, but the one **around its mask**, since the masks are ahead of the
# boxes (`mask_guided_boxes`). In the paper this is inherited from MaskDINO; chapter 7 switches it off.
#
# ### Exercise 3.2
#
# The box `(cx, cy, w, h)` around a mask `(h, w)`, relative to the map's width and height.


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
# Self-attention among the selected tokens, averaged over the heads. The tokens are sorted by the object that they
# lie on, white lines between objects, background first. Bright blocks on the diagonal are tokens that attend to others
# of their own object.

# %%
draw_interaction(looks[0])

# %% [markdown]
# ## The second selection
#
# Left, $T_{s1}$ with the boxes that the masks gave; right, what is left of it after token interaction, with the
# refined boxes. Black are the true boxes.

# %%
draw_selection(looks[0])

# %% [markdown]
# **Look for**: places that lose many tokens and keep one (duplicates of one object are what the second selection can
# afford to drop), and boxes that move from a part of an object to its whole.

# %%
explore_selection(looks)

# %% [markdown]
# ### Exercise 3.3
#
# The second selection throws half of the tokens away. Does it lose objects? `owners` says for each token the number of
# the object that it lies on, −1 for none. What part of the objects owns at least one token?


# %%
def recall(owners, objects: int) -> float:
    """Part of the objects that own a token, from (k,) owners."""
    # solution
    return len(set(owners.tolist()) - {-1}) / objects
    # end


if checks.check_recall(recall):
    for i, look in enumerate(looks):
        parts = [recall(token_owners(look, tokens), len(look.sample.labels)) for tokens in look.trace.T_s]
        print(f"image {i + 1}: objects with a token in T_s1 {parts[0]:.0%}, in T_s2 {parts[1]:.0%}")

# %% [markdown]
# ## Do the boxes improve?
#
# Mean IoU of the objects' best detections, before and after each step. The first stage is the first selection, the
# next are the token-interaction layers, *decoder input* is $T_{s2}$, and *layer 1* is after the residual, $Q_{bal}$.
# The masks of the first selection and those of the decoder's input come from the same mask features.

# %%
tracks = [track_objects(look) for look in looks]
plot_mean_ious(tracks)

# %% [markdown]
# ### Exercise 3.4, to discuss
#
# Token interaction sees only the selected tokens. What could go wrong if an object has *no* token in $T_{s1}$? And
# what would you expect of $k_1 = k_2$? Table 8 of the paper (chapter 7) has the answer for COCO.
#
# ---
#
# **Next**: how the balanced queries improve the tokens, [BATO](04_bato.ipynb).
