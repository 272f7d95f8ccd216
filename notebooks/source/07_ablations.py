# %% [markdown]
# # 7 · Ablations: the contribution of each part
#
# **Question.** The full model scores six points higher than its baseline. Would you bet that it does so again, and
# which of its parts is the cause?
#
# A model with ten new ideas is better than one without. Which of the ten made the difference? An **ablation** changes
# one thing at a time and trains again. The paper's tables 3 to 9 are ablations on COCO and BDD100K; each variant
# takes days on eight GPUs. Here a variant is one configuration with a few changed **settings**, so that a table can be
# repeated at a small scale: on the shapes, with ten minutes per run.
#
# **You will be able to**
#
# * read an ablation and name the variants that support a conclusion;
# * compute the uncertainty of a difference, and the power of a study before it is run;
# * find a second explanation for a result.
#
# *Prerequisites*: chapters 1, 2, 4 and 5; mean and standard deviation. *Time*: 90 minutes.

# %% tags=["parameters"]
results: str = "studies/shapes"  # a study folder: run folders or an archive

# %%
import os
import statistics

from IPython.display import Markdown
from scipy import stats

from dimaskdino.course import checks
from dimaskdino.course.questions import Choice
from dimaskdino.inspection import diagnostics
from dimaskdino.modeling import Detector
from dimaskdino.runs import project_root
from dimaskdino.studies.report import StudyReport
from dimaskdino.studies.study import find_study, load_study
from dimaskdino.utils.resources import find_data
from dimaskdino.viz import draw_architecture, plot_ablation, plot_differences, plot_study_layers

os.chdir(project_root())


def report_of(table):
    """The study of a table of the paper, with the results of its runs on the shapes."""
    return StudyReport.of(load_study(find_study(table)), "shapes", find_data(results))


report = report_of("table_4")
modules = report.study
labels = {variant.name: variant.label for variant in modules.variants}

# %%
draw_architecture("token_interaction", "bato")

# %% [markdown]
# ## A variant is a few settings
#
# Table 4 studies the two modules, alone and together. These are its variants, as in `configs/ablations/table_4.yaml`,
# with the size of the model and its settings for the shapes:

# %%
for variant in modules.variants:
    model = Detector(modules.config(variant, "shapes").model)
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{variant.label}: {size:.2f} million parameters")
    print("   ", *modules.overrides(variant, "shapes"))

# %% [markdown]
# De-Imbalance is "on" if there is more than one selection: `model.selection.k` has two numbers. BATO without
# De-Imbalance takes its guidance from the available queries, which the paper calls guidance by $T_i$.
#
# ### Exercise 7.1
#
# *Easy, 3 minutes.* Which settings configure triple selection on the shapes, 80, then 60, then 40 tokens? Write a
# list of `key=value` texts.


# %%
def triple_selection():
    """Settings for three selections."""
    # solution
    return ["model.selection.k=[80, 60, 40]"]
    # end


checks.check_settings(triple_selection, "triple", report_of("table_7").study)

# %% [markdown]
# ## Published and on the shapes
#
# Left: the paper's numbers. Right: runs of 2,000 steps on the shapes, one mark per seed and a bar at their mean.

# %%
plot_ablation(report)

# %%
for name, runs in report.measured.items():
    values = ", ".join(f"{run.result.last.box.AP:.1f}" for run in runs.values())
    print(f"{labels[name]}: box AP {values}")

# %% [markdown]
# **Read it.** Do the variants come in the same order as in the paper? How large is the difference between two
# variants, compared with the scatter of the seeds within one? The differences are not those on COCO: the model is
# small, the training is short, and the shapes are not photographs. A study at this scale can show *that* an effect
# exists, but not its size.
#
# The other tables are `table_3` and `table_5` to `table_9`. Two of them: the guidance of BATO (chapter 5), and shallow
# models, with a tenth of the box losses or with random positions. A variant with a single mark has one seed, which
# supports no conclusion. `dimaskdino study table_5` runs the study's three seeds, ten minutes each; the parameter
# `results` above then names its folder, `runs/studies/shapes`.

# %%
plot_ablation(report_of("table_5"))

# %%
plot_ablation(report_of("table_3"))

# %% [markdown]
# ## Is it more than luck?
#
# Two runs that differ only in the seed end with different APs. How uncertain is the difference between two variants?
#
# ### Exercise 7.2
#
# *Medium, 8 minutes.* You are given the APs `a` and `b` of the runs of two variants. Compute the difference of the
# means, $\bar b - \bar a$, and its standard error, $\sqrt{s_a^2 / n_a + s_b^2 / n_b}$, where $s$ is the standard
# deviation (with $n - 1$) of a variant and $n$ its number of runs.


# %%
def unpaired(a, b):
    """Difference of the means b − a and its standard error."""

    # solution
    def mean_and_variance(values):
        mean = sum(values) / len(values)
        return mean, sum((value - mean) ** 2 for value in values) / (len(values) - 1)

    (mean_a, variance_a), (mean_b, variance_b) = mean_and_variance(a), mean_and_variance(b)
    return mean_b - mean_a, (variance_a / len(a) + variance_b / len(b)) ** 0.5
    # end


box = modules.quantities[0]
if checks.check_unpaired(unpaired):
    base = list(report.values("neither", box).values())
    for name in ("di", "bato", "di_bato"):
        other = list(report.values(name, box).values())
        if min(len(base), len(other)) > 1:
            difference, error = unpaired(base, other)
            print(f"{labels[name]} − neither: {difference:+.1f} ± {error:.1f} points of box AP")

# %% [markdown]
# Runs that share a seed see the same images in the same order. Should they be compared in pairs, seed by seed? Only
# if a seed that is good for one variant is good for the other, so that the correlation over the seeds is high. Check
# it first.

# %%
base = report.values("neither", box)
for name in ("di", "bato", "di_bato"):
    other = report.values(name, box)
    common = sorted(set(base) & set(other))
    if len(common) > 2:
        correlation = statistics.correlation([base[seed] for seed in common], [other[seed] for seed in common])
        print(f"neither and {labels[name]}: correlation over seeds {correlation:+.2f}")

# %% [markdown]
# A difference has two sources of uncertainty. Other **trainings** would lead to other models, and other **images** to
# other APs of these models. The thick blue intervals resample the 200 images with replacement, a thousand times, with
# the same images for all models (a *paired bootstrap*). The thin grey intervals include both sources. Make a bet
# before you look: how many of the three variants differ significantly from the one with neither module, with five
# seeds?

# %%
bet = Choice("How many of the three gains in box AP are supported (adjusted p < 0.05)?", ["none", "one", "two", "all"])
bet

# %%
gains = [c for c in report.results if c.comparison.quantity == box and c.comparison.minus == ("neither",)]
supported = sum(c.adjusted_p is not None and c.adjusted_p < 0.05 for c in gains)
bet.reveal(
    bet.options[supported], {"all": "the gains are large, but the seeds scatter a lot, most of all with both modules"}
)

# %%
plot_differences(report)

# %%
Markdown(report.markdown())

# %% [markdown]
# Each of the fifteen comparisons has a chance of 5 % to look significant without an effect, so the p-values are
# *adjusted* for their number (Holm's method). Before a study is run, compute its **power**: the difference that it
# would detect in four of five cases, the minimum detectable effect. Compare the column `MDE` with the published
# differences.
#
# Which signs of the paper's differences do these runs support?
#
# ### Build it: the verdict
#
# *Hard, 25 minutes.* Compute the verdicts from the runs, with the uncertainty of trainings alone: for each variant
# after the first, its difference from the first, the 95 % interval, and the p-value adjusted for all variants. With
# the standard error $e$ of exercise 7.2 and $v_i = s_i^2 / n_i$, Welch's test has Student's t distribution with
#
# $$\nu = \frac{(v_a + v_b)^2}{v_a^2 / (n_a - 1) + v_b^2 / (n_b - 1)}$$
#
# degrees of freedom: the interval is $d \pm t_{0.975,\nu}\, e$, and $p = 2\,P(t_\nu > |d| / e)$; `scipy.stats.t` has
# `ppf(q, df)` and `sf(x, df)`. Holm's method sorts the $m$ p-values, multiplies the smallest by $m$, the next by $m -
# 1$, … the largest by 1, makes none smaller than one before it, and none larger than 1.


# %%
def verdicts(variants):
    """(difference, low, high, adjusted p) of each variant after the first; a variant is a list of APs."""
    # solution
    first, *others = variants
    found = []
    for other in others:
        difference, error = unpaired(first, other)
        v = [statistics.variance(runs) / len(runs) for runs in (first, other)]
        df = sum(v) ** 2 / (v[0] ** 2 / (len(first) - 1) + v[1] ** 2 / (len(other) - 1))
        half = stats.t.ppf(0.975, df) * error
        found.append((difference, difference - half, difference + half, 2 * stats.t.sf(abs(difference) / error, df)))
    adjusted, largest = {}, 0.0
    for rank, i in enumerate(sorted(range(len(found)), key=lambda i: found[i][3])):
        largest = min(1.0, max(largest, found[i][3] * (len(found) - rank)))
        adjusted[i] = largest
    return [(*interval, adjusted[i]) for i, (*interval, _) in enumerate(found)]
    # end


checks.check_verdicts(verdicts, report, box)

# %% [markdown]
# ### How a measurement misleads
#
# According to the table, the modules, above all BATO, reduce the imbalance of the first layer. Look at it class by
# class before you explain it.

# %%
for name, runs in report.measured.items():
    by_class = [diagnostics.imbalance_by_group(run.result, by="class") for run in runs.values()]
    imbalances = {kind: sum(one[kind]["decoder.1"] for one in by_class) / len(by_class) for kind in by_class[0]}
    print(f"{labels[name]:20}", "  ".join(f"{kind} {value:+.1f}" for kind, value in imbalances.items()))

# %% [markdown]
# Which classes cause the difference, and what is special about their masks? Find a second explanation for the smaller
# imbalance, in which neither module affects it. [docs/study.md](../docs/study.md) has one.
#
# ### Does it repeat?
#
# These runs were exploration: two of the five seeds were added when three had been inconclusive. The comparisons,
# seeds and decision rule of a second study were written down before its 96 runs: other shapes, eight seeds, the same
# initial weights for all variants of a seed, and three formulas for the boxes that enter the decoder. Which of the
# gains do you expect again?

# %%
repeated = Choice(
    "Which module raises box AP there, under the published formula?", ["neither", "De-Imbalance", "BATO", "both"]
)
repeated

# %%
formulas = load_study(find_study("box_formula"))
second = StudyReport.of(formulas, "miniature", find_data("studies/miniature"))
published = [c for c in second.results if c.comparison.quantity == box and "published formula" in c.comparison.label]
raised = [c.comparison.label.split(",")[0] for c in published if c.adjusted_p < 0.05 and c.difference > 0]
right = raised[0] if len(raised) == 1 else "both" if raised else "neither"
repeated.reveal(
    right, {"BATO": "its gain above was large but inconclusive, and two of the five seeds had been added later"}
)
plot_differences(second)

# %% [markdown]
# Read the first column from top to bottom. How much of De-Imbalance's gain is left if the boxes that enter the
# decoder are not biased? And if they do not come from masks at all? [docs/study.md](../docs/study.md) discusses the
# results.
#
# ## At which layers does a module act?
#
# Table 4 compares the last layers. The other layers show *where* a module acts.

# %%
plot_study_layers(report)

# %% [markdown]
# ### Exercise 7.3, to discuss
#
# *5 minutes.* Three seeds, a difference of 2 points, a standard error of 1.5: how would you report this in a paper?
# How would you spend one more hour of computing: on another seed of the same variants, or on a longer training with
# one seed?
#
# <details><summary>A model answer</summary>
#
# Report the difference with its interval, which includes 0: 2 points with a standard error of 1.5 and three seeds say
# nothing about the sign. More seeds of the same variants narrow the interval; a longer training answers another
# question. Before either, decide which difference matters, and how many seeds detect it in four of five cases. If
# that is more than you can pay for, do not run the study.
#
# </details>
#
# ### Exercise 7.4, to discuss
#
# *5 minutes.* Table 3 reduces the box losses to a tenth. MaskDINO loses 2.8 points of box AP, De-Imbalance 0.8. Is
# this evidence that De-Imbalance *repairs* the imbalance, or that it makes training more robust? Which experiment
# would distinguish the two?
#
# <details><summary>A model answer</summary>
#
# Weak box losses disturb training in many ways, and a model that is more robust to any of them would show the same
# result. To distinguish the two, disturb something unrelated to boxes by as much, such as the class loss: if
# De-Imbalance loses less there too, the cause is robustness. Also measure the imbalance itself, relative to its upper
# bounds and at equal AP.
#
# </details>
#
# ---
#
# **In three sentences.** An ablation changes one thing; a difference needs runs, an interval, and a rule that was
# written down before. More comparisons find more effects by chance. A result is only as strong as the best
# alternative explanation is weak.
#
# **Read on.**
#
# * Bouthillier et al., Accounting for Variance in Machine Learning Benchmarks, arXiv 2103.03098.
# * Card et al., With Little Power Comes Great Responsibility, arXiv 2010.06595.
#
# **Next**: [your own data and your own idea](08_your_photographs.ipynb).
