# %% [markdown]
# # 5 · BATO: balance-aware tokens optimisation
#
# **Question.** After one decoder layer forty queries know a lot about the objects. Eleven hundred feature tokens know
# nothing of it. How does one tell them?
#
# De-Imbalance (chapter 4) gave the decoder balanced queries, $Q_{bal}$. The feature tokens $T_i$ that all later
# layers read are still those of the beginning. **BATO** (Eq. 5 to 8) lets the balanced queries improve them, once,
# after the first decoder layer:
#
# $$T_g^{mask} = \text{MLP}_{mask}(Q_{bal}) \qquad T_g^{box} = \text{MLP}(\text{sine}(b))$$
# $$T_{bal} = \text{MHCA}\big(q = T_i,\; k = T_g^{mask} + T_g^{box},\; v = T_g^{mask}\big)$$
#
# The *guiding tokens* are made from the best queries: their mask embedding, $T_g^{mask}$, and the position of their box
# $b$, $T_g^{box}$. Note the direction: every **feature token** is a query here, thousands of them, and the few guiding
# tokens are the keys and values.
#
# **You will be able to**
#
# * say which tokens ask and which answer in BATO, and why in this direction;
# * compute its attention and a mask by hand;
# * see which object a feature token is told about.
#
# *Prerequisites*: chapters 1 to 4. *Time*: 60 minutes.

# %% tags=["parameters"]
model: str = "notebooks/models/dimaskdino"  # a trained model: a run folder or a file
images: int = 6  # images to look at
overrides: list = []  # settings that differ from those of the training, such as data.root

# %%
import torch

from dimaskdino.course import begin, checks
from dimaskdino.course.questions import Choice
from dimaskdino.inspection.objects import box_owners, token_owners
from dimaskdino.viz import draw_architecture, draw_guidance, draw_mask_features, draw_token_maps
from dimaskdino.viz.explorers import explore_guidance

lesson = begin(model, overrides)
looks = lesson.looks(images)
trace = looks[0].trace
print(f"{trace.T_g_mask.shape[1]} guiding tokens for {trace.T_i.tokens.shape[1]} feature tokens")

# %%
draw_architecture("bato")

# %% [markdown]
# In attention some tokens ask (queries) and others answer (keys and values). Decide before you read on.

# %%
asks = Choice("Who asks in BATO's attention?", ["the guiding tokens", "the feature tokens", "both, in turns"])
asks

# %%
mistake = "in the decoder, queries ask the feature tokens; here it is the other way round"
asks.reveal("the feature tokens", {"the guiding tokens": mistake})

# %% [markdown]
# ## Guiding tokens
#
# The $G$ queries whose best class scores highest (`BATO._guiding_tokens` in
# `dimaskdino/modeling/bato.py`):
#
# ```python
# T_g_mask = heads.mask(gather_rows(guide.content, indices))
# return T_g_mask + gather_rows(guide.position, indices), T_g_mask, indices
# ```
#
# Which feature tokens attend to the best one? Yellow means much, blue little. A value of 1 is the attention of each
# guiding token if all received the same.

# %%
draw_guidance(looks[0], 0)

# %% [markdown]
# ### Explore
#
# Find guiding tokens of the same object, and one that no object owns. Do the tokens *inside* the box take most, or
# those along its edge? What does the background look at?

# %%
explore_guidance(looks)

# %% [markdown]
# ### Exercise 5.1
#
# *Easy, 5 minutes.* Cross-attention with one head: `N` feature tokens `(N, C)` ask, `G` guiding tokens `(G, C)` give
# keys and values.
#
# $$\text{softmax}\big(q k^\top / \sqrt{C}\big)\, v$$


# %%
def cross_attention(q, k, v):
    """What each query takes from the values, (N, C)."""
    # solution
    weights = (q @ k.T / q.shape[1] ** 0.5).softmax(dim=1)
    return weights @ v
    # end


checks.check_cross_attention(cross_attention)

# %% [markdown]
# ### Build it: the tokens after BATO
#
# *Medium, 15 minutes.* Eq. 7 and 8 from their pieces, compared with the model on a real image: `bato.attention(x,
# query, key, value)` attends, adds `x` and normalises, and returns the weights as well; `bato.ffn` is the feed-forward
# block.


# %%
def guided_tokens(T_i, position, T_g_mask, T_g_box, bato):
    """T_bal (1, N, C) from the feature tokens (1, N, C), their positions (N, C) and the guiding tokens (1, G, C)."""
    # solution
    attended, _ = bato.attention(T_i, T_i + position, T_g_mask + T_g_box, T_g_mask)
    return bato.ffn(attended)
    # end


checks.check_guided_tokens(guided_tokens, looks[0], lesson.trained.detector)

# %% [markdown]
# ## Do tokens look at their own object?
#
# A feature token belongs to an object if its centre lies on the object's mask; a guiding token, if its box overlaps
# the object's with an IoU of at least one half. If guidance works by objects, a token gives more of its attention to
# guiding tokens of its own object than their number alone would explain.
#
# ### Exercise 5.2
#
# *Medium, 8 minutes.* From the attention `(N, G)` and the owners of feature tokens `(N,)` and guiding tokens `(G,)`, −1
# for none: the part of its attention that a token of an object gives to guiding tokens of its own, averaged over those
# tokens.


# %%
def own_share(attention, token_owner, guide_owner):
    """Attention to guiding tokens of the own object, in [0, 1]."""
    # solution
    own = token_owner[:, None] == guide_owner
    return float((attention * own).sum(dim=1)[token_owner >= 0].mean())
    # end


if checks.check_own_share(own_share):
    for number, look in enumerate(looks):
        rows = look.trace.guiding_indices[0]
        guides = box_owners(look, look.predictions.stages["decoder.1"].boxes[0, rows])
        tokens, attention = token_owners(look), look.trace.guidance_attention[0]
        chance = own_share(torch.full_like(attention, 1 / len(guides)), tokens, guides)
        print(f"image {number + 1}: own share {own_share(attention, tokens, guides):.2f}, by chance {chance:.2f}")

# %% [markdown]
# ## What it does to the tokens
#
# The tokens of one level as colours, their three largest principal components, before and after; and how far each
# moved.

# %%
draw_token_maps(looks[0])

# %% [markdown]
# **Look for**: do the colours of one object become more alike? Where is the movement largest, on objects or beside
# them?
#
# ## Refreshed mask features
#
# Masks are products of a query's embedding with the mask features $F$, pixel by pixel. BATO renews these too, with
# the optimised tokens at stride 8:
#
# $$F' = \text{ReLU}(\text{GN}(\text{conv}(F + \text{up}(T_{bal}))))$$
#
# On the left the best query of the last layer; on the right its mask as the model makes it, in $F'$, and what the
# same embedding would find in $F$, which it was not trained to read.

# %%
best = int(looks[0].predictions.last.class_logits[0].amax(-1).argmax())
draw_mask_features(looks[0], best)

# %% [markdown]
# ### Exercise 5.3
#
# *Easy, 3 minutes.* A mask from an embedding `(C,)` and mask features `(C, h, w)`, as probabilities.


# %%
def mask_probability(embedding, features):
    """Probability (h, w) that a pixel belongs to the query's object."""
    # solution
    return torch.einsum("c,chw->hw", embedding, features).sigmoid()
    # end


checks.check_mask_probability(mask_probability)

# %% [markdown]
# ### Exercise 5.4, to discuss
#
# *5 minutes.* BATO could take its guidance from $T_{s1}$ or $T_{s2}$ instead of $Q_{bal}$ (table 5, chapter 7). What do
# the guiding tokens gain from one decoder layer? And why would BATO not be run after *every* layer?
#
# <details><summary>A model answer</summary>
#
# One decoder layer gives the guiding tokens context: they have attended to each other, so that fewer of them speak for
# the same object, and to the image. After every layer the same few queries would rewrite the tokens again and again; in
# the one experiment of this kit with shared weights every seed was worse, too few to conclude anything.
#
# </details>
#
# ---
#
# **In three sentences.** In BATO the feature tokens ask and a few good queries answer. The answer carries what the
# queries know about whole objects to every place of the image. It happens once, after the first decoder layer.
#
# **Read on.**
#
# * DI-MaskDINO, section 3: BATO, Eq. 5 to 8.
# * Attention Is All You Need, arXiv 1706.03762, section 3.2: queries, keys and values.
#
# **Next**: how all of this learns, [training](06_training.ipynb).
