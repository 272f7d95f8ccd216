# %% [markdown]
# # 5 · BATO: balance-aware tokens optimisation
#
# **Question.** After one decoder layer, forty queries have a lot of information about the objects. The feature
# tokens, hundreds of them, have none of it. How can the queries pass it on?
#
# De-Imbalance (chapter 4) provides the decoder with balanced queries, $Q_{bal}$. The feature tokens $T_i$ that all
# later layers read are still unchanged. **BATO** (Eq. 5 to 8) lets the balanced queries improve them, once, after the
# first decoder layer:
#
# $$T_g^{mask} = \text{MLP}_{mask}(Q_{bal}) \qquad T_g^{box} = \text{MLP}(\text{sine}(b))$$
# $$T_{bal} = \text{MHCA}\big(q = T_i,\; k = T_g^{mask} + T_g^{box},\; v = T_g^{mask}\big)$$
#
# The *guiding tokens* are computed from the best queries: $T_g^{mask}$ is their mask embedding, $T_g^{box}$ the
# position of their box $b$. Note the direction: here every **feature token** is a query, and the few guiding tokens
# are the keys and values.
#
# **You will be able to**
#
# * name the tokens that ask and the tokens that answer in BATO, and explain the direction;
# * compute its attention and a mask by hand;
# * find the object whose information a feature token receives.
#
# *Prerequisites*: chapters 1 to 4. *Time*: 60 minutes.

# %% tags=["parameters"]
model: str = "dimaskdino-shapes"  # a trained model: a name, a run folder or a file
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
# In attention, some tokens ask (queries) and others answer (keys and values). Decide before you read on.

# %%
asks = Choice("Who asks in BATO's attention?", ["the guiding tokens", "the feature tokens", "both, in turns"])
asks

# %%
mistake = "in the decoder, queries ask the feature tokens; here it is the other way round"
asks.reveal("the feature tokens", {"the guiding tokens": mistake})

# %% [markdown]
# ## Guiding tokens
#
# The guiding tokens come from the $G$ queries whose best class scores highest (`BATO._guiding_tokens` in
# `dimaskdino/modeling/bato.py`):
#
# ```python
# T_g_mask = heads.mask(gather_rows(guide.content, indices))
# return T_g_mask + gather_rows(guide.position, indices), T_g_mask, indices
# ```
#
# Which feature tokens attend to the best one? Yellow means much attention, blue little. The value 1 is the attention
# that each guiding token would receive if all received the same.

# %%
draw_guidance(looks[0], 0)

# %% [markdown]
# ### Explore
#
# Find two guiding tokens of the same object, and one that lies on no object. Do the tokens *inside* the box take
# most, or those along its edge? Where does the attention of the background go?

# %%
explore_guidance(looks)

# %% [markdown]
# ### Exercise 5.1
#
# *Easy, 5 minutes.* Write cross-attention with one head: `N` feature tokens `(N, C)` are the queries, `G` guiding
# tokens `(G, C)` the keys and values.
#
# $$\text{softmax}\big(q k^\top / \sqrt{C}\big)\, v$$


# %%
def cross_attention(q, k, v):
    """The result for each query, (N, C)."""
    # solution
    weights = (q @ k.T / q.shape[1] ** 0.5).softmax(dim=1)
    return weights @ v
    # end


checks.check_cross_attention(cross_attention)

# %% [markdown]
# ### Build it: the tokens after BATO
#
# *Medium, 15 minutes.* Compute Eq. 7 and 8 from their pieces; the check compares the result with the model on a real
# image. `bato.attention(x, query, key, value)` attends, adds `x`, normalises, and returns the weights as well;
# `bato.ffn` is the feed-forward block.


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
# A feature token belongs to an object if its centre lies on the object's mask; a guiding token, if the IoU of its box
# with the object's is at least one half. If guidance works by objects, a token pays more attention to guiding tokens
# of its own object than their number alone would explain.
#
# ### Exercise 5.2
#
# *Medium, 8 minutes.* You are given the attention `(N, G)` and the owners of feature tokens `(N,)` and guiding tokens
# `(G,)`, −1 for none. Compute the fraction of its attention that a token of an object pays to guiding tokens of the
# same object, averaged over those tokens.


# %%
def own_share(attention, token_owner, guide_owner):
    """Attention to guiding tokens of the same object, in [0, 1]."""
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
# ## The effect on the tokens
#
# The figure shows the tokens of one level before and after BATO, with their three largest principal components as
# colours, and how far each token moved.

# %%
draw_token_maps(looks[0])

# %% [markdown]
# **Look for** the colours of one object: do they become more alike? Where do tokens move most, on objects or beside
# them?
#
# ## Refreshed mask features
#
# A mask is the product of a query's embedding with the mask features $F$ at each pixel. BATO renews these features
# too, with the optimised tokens at stride 8:
#
# $$F' = \text{ReLU}(\text{GN}(\text{conv}(F + \text{up}(T_{bal}))))$$
#
# The figure shows the best query of the last layer (left) and its mask twice (right): the model's mask, in $F'$, and
# the mask that the same embedding finds in $F$, which it was not trained to read.

# %%
best = int(looks[0].predictions.last.class_logits[0].amax(-1).argmax())
draw_mask_features(looks[0], best)

# %% [markdown]
# ### Exercise 5.3
#
# *Easy, 3 minutes.* Compute a mask from an embedding `(C,)` and mask features `(C, h, w)`, as probabilities.


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
# *5 minutes.* BATO could take its guidance from $T_{s1}$ or $T_{s2}$ instead of $Q_{bal}$ (table 5, chapter 7). How
# do the guiding tokens benefit from one decoder layer? And why does BATO not run after *every* layer?
#
# <details><summary>A model answer</summary>
#
# One decoder layer adds context to the guiding tokens: they have attended to each other, so that fewer of them
# represent the same object, and to the image. After every layer the same few queries would rewrite the tokens again
# and again. In the kit's one experiment with shared weights every seed was worse, but there were too few seeds for a
# conclusion.
#
# </details>
#
# ---
#
# **In three sentences.** In BATO the feature tokens ask and a few good queries answer. The answers carry information
# about whole objects to every place of the image. This happens once, after the first decoder layer.
#
# **Read on.**
#
# * DI-MaskDINO, section 3: BATO, Eq. 5 to 8.
# * Attention Is All You Need, arXiv 1706.03762, section 3.2: queries, keys and values.
#
# **Next**: how the model is trained, [training](06_training.ipynb).
