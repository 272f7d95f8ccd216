# %% [markdown]
# # 0 · DETR in thirty minutes
#
# **Question.** A picture has three objects, in no order. A network has six outputs, in a fixed order. Which output is
# wrong about which object?
#
# DI-MaskDINO belongs to a family of detectors that began with **DETR** (detection transformer, 2020). Its idea fits
# on a page: an image becomes a list of **tokens**, a few learned **queries** read the tokens by **attention**, and
# each query answers with one object or with "nothing". This chapter builds such a detector for pictures of coloured
# rectangles and trains it in a few seconds. The other chapters improve its parts, one after the other.
#
# **You will be able to**
#
# * say what a token, a query, a box, a mask and a feature level are;
# * explain why a set of answers needs a matching, and compute one;
# * write attention with several heads;
# * read the table of symbols that the other chapters use.
#
# Each exercise states its difficulty and the time it takes. Each chapter has a longer one, *Build it*, in which you
# write a part of the model. *Prerequisites*: neural networks and how they are trained. *Time*: 60 minutes, a good
# half of them for the exercises.

# %% tags=["parameters"]
steps: int = 400  # training steps of the toy
seed: int = 12

# %%
import itertools

import ipywidgets as widgets
import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from dimaskdino.course import checks
from dimaskdino.course.questions import Number
from dimaskdino.data.painting import CYCLE
from dimaskdino.viz import draw_architecture
from dimaskdino.viz.explorers import Explorer
from dimaskdino.viz.style import NotebookFigure, style

torch.manual_seed(seed)
torch.set_num_threads(1)  # the tensors are small: a second thread would wait more than it works
rng = np.random.default_rng(seed)

# %% [markdown]
# ## Pictures, boxes and classes
#
# A **box** is four numbers relative to the picture: the centre, the width and the height, `(cx, cy, w, h)`. The
# **class** of an object is here its colour. (A **mask** says for each pixel whether it belongs to the object. The toy
# predicts no masks.)

# %%
SIDE, PATCH = 32, 4  # pixels
COLOURS = ("red", "green", "blue")


def picture():
    """A picture (3, SIDE, SIDE) with three rectangles, their colours, and their boxes (cx, cy, w, h) in [0, 1]."""
    image = 0.2 + rng.normal(0, 0.03, (3, SIDE, SIDE)).astype(np.float32)
    labels, boxes = rng.integers(0, 3, 3), []
    for label in labels:
        w, h = rng.integers(5, 12, 2)
        x, y = rng.integers(0, SIDE - w), rng.integers(0, SIDE - h)
        image[:, y : y + h, x : x + w] = 0.2
        image[label, y : y + h, x : x + w] = 0.9
        boxes.append([(x + w / 2) / SIDE, (y + h / 2) / SIDE, w / SIDE, h / SIDE])
    return image, labels, np.array(boxes, np.float32)


def pictures(count):
    """A batch: images (B, 3, SIDE, SIDE), labels (B, 3) and boxes (B, 3, 4)."""
    return [torch.from_numpy(np.stack(part)) for part in zip(*(picture() for _ in range(count)), strict=True)]


images, labels, boxes = pictures(4)

# %% [markdown]
# ### Exercise 0.1
#
# *Easy, 3 minutes.* To draw a box, you need its corners. Turn `(cx, cy, w, h)` into `(x0, y0, x1, y1)`.


# %%
def corners(cx, cy, w, h):
    """Corners (x0, y0, x1, y1) of a box given by its centre, width and height."""
    # solution
    return cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
    # end


checks.check_corners(corners)

# %% [markdown]
# ## Tokens
#
# A transformer reads a list of vectors. Here each square of 4 × 4 pixels becomes one vector: a **token** with `C`
# numbers. A token describes the content of its square but not its position, so a learned vector for each position is
# added. A grid of tokens is a **feature map**. A real detector has several, from fine to coarse: its **feature
# levels**.


# %%
def draw(image, found=(), weights=None, title=""):
    """A picture with its grid of tokens, boxes ((cx, cy, w, h), colour), and attention weights (tokens,)."""
    with style():
        figure = NotebookFigure(figsize=(3.4, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.imshow(image.permute(1, 2, 0), extent=(0, 1, 1, 0))
        if weights is not None:
            grid = weights.reshape(SIDE // PATCH, SIDE // PATCH)
            axes.imshow(grid, extent=(0, 1, 1, 0), cmap="magma", alpha=0.6)
        for (cx, cy, w, h), colour in found:
            x, y = [cx - w / 2, cx + w / 2], [cy - h / 2, cy + h / 2]
            axes.plot([x[0], x[1], x[1], x[0], x[0]], [y[0], y[0], y[1], y[1], y[0]], color=colour, linewidth=2)
        axes.set_xticks(np.arange(0, 1.01, PATCH / SIDE), [])
        axes.set_yticks(np.arange(0, 1.01, PATCH / SIDE), [])
        axes.set(title=title, xlim=(0, 1), ylim=(1, 0))
    return figure


draw(images[0], [(box, "white") for box in boxes[0]], title=f"{(SIDE // PATCH) ** 2} tokens, 3 objects")

# %% [markdown]
# ## Queries and attention
#
# A **query** is a learned vector. **Attention** compares it with every token, turns the comparisons into weights that
# sum to one, and returns the weighted sum of the tokens:
#
# $$\text{attention}(q, T) = \text{softmax}\!\left(\frac{q\, T^\top}{\sqrt{C}}\right) T$$
#
# (with linear layers around `q` and `T`). The queries also attend to each other, so that two of them do not give the
# same answer. One round of both, followed by a small network, is a **decoder layer**. The toy has three layers and
# six queries. Each query ends as scores for three colours and "nothing", and a box.


# %%
class Toy(nn.Module):
    """A detector in a few lines: tokens, queries, three decoder layers, two heads."""

    def __init__(self, C=64, queries=6):
        super().__init__()
        self.tokens = nn.Conv2d(3, C, PATCH, PATCH)
        self.places = nn.Parameter(0.5 * torch.randn((SIDE // PATCH) ** 2, C))
        self.queries = nn.Parameter(torch.randn(queries, C))
        self.layers = nn.ModuleList(nn.TransformerDecoderLayer(C, 4, 128, 0.0, batch_first=True) for _ in range(3))
        self.label = nn.Linear(C, len(COLOURS) + 1)
        self.box = nn.Sequential(nn.Linear(C, C), nn.ReLU(), nn.Linear(C, 4))

    def forward(self, images):
        tokens = self.tokens(images).flatten(2).transpose(1, 2) + self.places
        x = self.queries.expand(len(images), -1, -1)
        for layer in self.layers:
            x = layer(x, tokens)
        return self.label(x), self.box(x).sigmoid()


toy = Toy()
print(f"{sum(p.numel() for p in toy.parameters()):,} parameters")

# %% [markdown]
# ## A set of answers needs a matching
#
# There are six answers and three objects. For training, each object is assigned to one answer, and the other answers
# should be "nothing". The **matching** is the assignment with the lowest total **cost**; the cost of a pair is low if
# the class is likely and the box is close.
#
# ### Exercise 0.2
#
# *Medium, 8 minutes.* Find the cheapest assignment of a cost matrix (queries × objects) by trying all of them:
# `itertools.permutations(range(queries), objects)` returns every way to choose a query for each object.


# %%
def cheapest(cost):
    """For each object its query, so that the sum of the costs is least; cost is (queries, objects)."""
    # solution
    queries, objects = cost.shape
    ways = itertools.permutations(range(queries), objects)
    return min(ways, key=lambda way: sum(cost[query, number] for number, query in enumerate(way)))
    # end


checks.check_cheapest_assignment(cheapest)

# %% [markdown]
# For six queries there are 120 ways; for 300 queries and ten objects there are more than $10^{24}$. The *Hungarian
# algorithm* finds the best one without trying all: `scipy.optimize.linear_sum_assignment`. The losses follow: cross
# entropy for the classes, and the distance of the matched boxes. Make a guess before the training:

# %%
speaking = Number("After the training, how many of the six queries answer with an object, on average?", 0, 6)
speaking


# %%
def match(logits, found, labels, boxes):
    """For each image the matched queries and objects, two index tensors (B, 3)."""
    cost = -logits.softmax(-1).gather(2, labels[:, None].expand(-1, found.shape[1], -1))
    cost = cost + 5 * torch.cdist(found, boxes, p=1)
    pairs = [linear_sum_assignment(one) for one in cost.detach().numpy()]
    return (torch.from_numpy(np.stack(part)) for part in zip(*pairs, strict=True))


def loss_of(images, labels, boxes):
    """The loss, and the mean error of the matched boxes."""
    logits, found = toy(images)
    query, number = match(logits, found, labels, boxes)
    wanted = torch.full(logits.shape[:2], len(COLOURS))  # "nothing" …
    wanted.scatter_(1, query, labels.gather(1, number))  # … except for the matched queries
    rows = query[..., None].expand(-1, -1, 4), number[..., None].expand(-1, -1, 4)
    distance = (found.gather(1, rows[0]) - boxes.gather(1, rows[1])).abs()
    return nn.functional.cross_entropy(logits.transpose(1, 2), wanted) + 5 * distance.sum(-1).mean(), distance.mean()


optimizer = torch.optim.AdamW(toy.parameters())
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
errors = []
for _ in range(steps):
    loss, error = loss_of(*pictures(32))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    errors.append(error.item())


def curve(values):
    """The error of the boxes over the training."""
    with style():
        figure = NotebookFigure(figsize=(6, 2.6), layout="constrained")
        axes = figure.subplots()
        axes.plot(values)
        axes.set(xlabel="step", ylabel="error (pixels)", title="Error of a box's numbers", ylim=(0, None))
    return figure


curve(np.array(errors) * SIDE)

# %%
with torch.no_grad():
    many = toy(pictures(256)[0])[0].argmax(-1)
speaking.reveal(
    float((many < len(COLOURS)).sum(1).float().mean()),
    {6: "then three of them would repeat another's answer, which costs"},
)

# %% [markdown]
# ## What it found, and where it looked
#
# ### Explore
#
# Choose a picture and a query. The colours over the picture show the query's attention in the last layer; the box is
# its answer. Does a query specialise in a region? Where do the queries that answer "nothing" look?

# %%
with torch.no_grad():
    tokens = toy.tokens(images).flatten(2).transpose(1, 2) + toy.places
    x = toy.queries.expand(len(images), -1, -1)
    for layer in toy.layers[:-1]:
        x = layer(x, tokens)
    last = toy.layers[-1]
    x = last.norm1(x + last.self_attn(x, x, x)[0])
    attention = last.multihead_attn(x, tokens, tokens)[1]
    logits, found = toy(images)
names = [*COLOURS, "nothing"]


def look(image, query):
    """One picture with one query's attention and answer."""
    answer = names[logits[image, query].argmax()]
    box = [] if answer == "nothing" else [(found[image, query], "white")]
    return draw(images[image], box, attention[image, query], f"query {query + 1}: {answer}")


Explorer(
    look,
    {
        "image": widgets.Dropdown(options=[(str(i + 1), i) for i in range(len(images))], description="picture"),
        "query": widgets.Dropdown(
            options=[(str(i + 1), i) for i in range(len(toy.queries))],
            value=int(logits[0, :, : len(COLOURS)].amax(-1).argmax()),  # the one that is most sure of an object
            description="query",
        ),
    },
)

# %%
answers = [(found[0, q], CYCLE[q]) for q in range(len(toy.queries)) if logits[0, q].argmax() < len(COLOURS)]
draw(images[0], answers, title="All answers of picture 1")

# %% [markdown]
# ### Build it: attention with several heads
#
# *Medium, 20 minutes.* The layers of the toy do not compare whole vectors. Each of their **heads** compares a part of
# $C / heads$ numbers and has its own weights, so that one query can look for several things at once. Write it; the
# check compares it with the last layer of the trained toy. For $Q$ queries and $N$ tokens you are given
#
# * `x` `(Q, C)` and `tokens` `(N, C)`;
# * `ask(x)`, `key(tokens)` and `value(tokens)`: the linear layers before the comparison. Their outputs hold the
#   numbers of all heads one after the other: `.view(n, heads, C // heads)` separates them;
# * `out`: the linear layer that mixes the results of the heads, `(Q, C)` again.


# %%
def attend(x, tokens, ask, key, value, out, heads):
    """The result of the attention (Q, C), and the weights of each head (heads, Q, N)."""
    # solution
    q, k, v = (part.view(len(part), heads, -1).transpose(0, 1) for part in (ask(x), key(tokens), value(tokens)))
    weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
    return out((weights @ v).transpose(0, 1).flatten(1)), weights
    # end


checks.check_attend(attend, toy.layers[-1].multihead_attn)

# %% [markdown]
# ### Exercise 0.3, to discuss
#
# *5 minutes.* Before the training, two queries often answer with the same object. Which part of the loss stops this?
# And what would happen without self-attention among the queries?
#
# <details><summary>A model answer</summary>
#
# The matching assigns the object to one of the two queries; the target of the other is "nothing" for the same answer.
# A query lowers the loss only with an answer that no other query gives, so the queries divide the work. Without
# self-attention, a query has no information about the answers of the others: two queries that see the same object can
# only divide the work by fixed rules, such as place or class.
#
# </details>
#
# ## From the toy to DI-MaskDINO

# %%
draw_architecture()

# %% [markdown]
# Round boxes are data, square boxes are modules. Each chapter shows this picture with its part highlighted.
#
# | | the toy | DI-MaskDINO | chapter |
# |---|---|---|---|
# | tokens | one convolution, one level | a backbone and an encoder, four levels | 3 |
# | queries | learned, the same for every image | feature tokens of this image, selected twice (De-Imbalance) | 4 |
# | attention to tokens | all of them | a few places that the query chooses | 3 |
# | boxes | from scratch | refined from layer to layer | 1 |
# | masks | none | a dot product of the query and every pixel | 5 |
# | tokens after the first layer | unchanged | improved by the best queries (BATO) | 5 |
# | losses | after the last layer | at every stage, and for denoising queries | 6 |
#
# ## Symbols
#
# | paper | in the code | shape | meaning |
# |---|---|---|---|
# | $T_i$ | `trace.T_i` | (B, N, C) | feature tokens of all levels |
# | $T_{s1}$, $T_{s2}$ | `trace.T_s1`, `trace.T_s2` | (B, k, C) | tokens kept by the first and the second selection |
# | $k_1$, $k_2$ | `model.selection.k` | | number of tokens kept |
# | $Q_{bal}$ | `trace.Q_bal` | (B, k, C) | balanced queries, after the first decoder layer |
# | $T_g^{mask}$, $T_g^{box}$ | `trace.bato.T_g_mask`, `T_g_box` | (B, G, C) | guiding tokens of BATO |
# | $T_{bal}$ | `trace.bato.T_bal` | (B, N, C) | feature tokens after BATO |
# | $F$ | `trace.mask_features` | (B, C, H/4, W/4) | mask features |
#
# B images, N feature tokens, C channels, k and Q queries, G guiding tokens, K classes, M objects.
#
# ## Glossary
#
# * **AP**: average precision in percent, which measures how many objects are found and how well the detections are
#   ranked (chapter 2).
# * **backbone**: the network that turns an image into feature maps, here a ResNet.
# * **upper bound**: the AP that true objects reach when they go through the steps of a prediction (chapter 1).
# * **decoder input**: the queries before the first decoder layer, stage `decoder.0`.
# * **denoising query**: a true object with noise; training adds some to the queries (chapter 6).
# * **feature level**: a feature map of one resolution; its *stride* is the number of input pixels per cell.
# * **feature token**: the vector of one place of a feature level.
# * **guiding token**: one of the best queries, which BATO uses to improve the feature tokens (chapter 5).
# * **imbalance**: mask AP minus box AP at one stage, in points (chapter 1).
# * **IoU**: intersection over union of two boxes or masks, 1 if they are equal (chapter 1).
# * **logit**: a score before the sigmoid or softmax.
# * **mask**: for every pixel, whether it belongs to the object.
# * **matching**: the assignment of one query to each object, whose target that object becomes (chapter 6).
# * **query**: a vector that attends to the tokens and answers with one object or nothing.
# * **reference point, reference box**: the place around which a query samples the image (chapter 3).
# * **selection**: keeping the tokens whose best class scores highest (chapter 4).
# * **stage**: a point of the model that predicts, from `first_selection` to the last decoder layer.
# * **token interaction**: self-attention among the selected tokens (chapter 4).
#
# ---
#
# **In three sentences.** An image becomes tokens, queries read them by attention, and every query gives one answer.
# The matching assigns answers to objects, so that the answers form a set. DI-MaskDINO keeps this plan and changes
# where the queries come from, how they read the tokens, and how the tokens are improved by the queries.
#
# **Read on.**
#
# * Carion et al., End-to-End Object Detection with Transformers (DETR), arXiv 2005.12872, section 3.
# * Vaswani et al., Attention Is All You Need, arXiv 1706.03762, section 3.2.
#
# **Next**: why the first boxes are worse than the first masks, [the imbalance](01_imbalance.ipynb).
