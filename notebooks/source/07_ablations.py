# %% [markdown]
# # 7 · Ablations: which part brings what
#
# A model with ten new ideas is better than one without. Which of the ten made the difference? An **ablation** changes
# one thing at a time and trains again. The paper's tables 3 to 9 are ablations on COCO and BDD100K; each row takes
# days on eight GPUs. Here every row is one configuration with a few **settings** changed, so that the same table can
# be run in miniature: on the shapes, ten minutes per run.
#
# *Prerequisites*: chapters 1, 3, 4 and 6; mean and standard deviation. *Time*: 60 minutes.

# %% tags=["parameters"]
results: str = "notebooks/studies"  # a study folder: runs/ROW_SEED/evaluation/layers.json

# %%
import os
from pathlib import Path

from IPython.display import Markdown

from dimaskdino.course import checks
from dimaskdino.modeling import Detector
from dimaskdino.runs import project_root
from dimaskdino.studies.report import StudyReport, paper_tables
from dimaskdino.studies.study import load_study
from dimaskdino.viz import plot_ablation, plot_differences, plot_study_layers
from dimaskdino.viz.explorers import explore_studies

os.chdir(project_root())
studies = [load_study(path) for path in sorted(Path("configs/ablations").glob("table_*.yaml"))]
tables = paper_tables()
modules = next(study for study in studies if "table 4" in study.title)

# %% [markdown]
# ## A row is a few settings
#
# Table 4 asks for the two modules, alone and together. These are its rows, as they are written in
# `configs/ablations/table_4.yaml`, for the shapes; what they do to the model's size and stages:

# %%
for row in modules.rows:
    model = Detector(modules.config(row, "shapes").model)
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{row.label}: {size:.2f} million parameters")
    print("   ", *modules.overrides(row, "shapes"))

# %% [markdown]
# De-Imbalance is "on" when there is more than one selection, `model.selection.k` has two numbers. BATO without
# De-Imbalance takes its guidance from the queries that it has, which the paper calls guidance by $T_i$.
#
# ### Exercise 7.1
#
# Which settings give triple selection on the shapes, 80, then 60, then 40 tokens? Write a list of `key=value` texts.


# %%
def triple_selection():
    """Settings for three selections."""
    # solution
    return ["model.selection.k=[80, 60, 40]"]
    # end


checks.check_settings(triple_selection, "triple", next(s for s in studies if "table 7" in s.title))

# %% [markdown]
# ## Published and in miniature
#
# On the left the paper's numbers; on the right runs of 2,000 steps on the shapes, one mark per seed and a bar at
# their mean.


# %%
def columns_of(study):
    """Published numbers of a study, one pair a row, and those measured on the shapes, one a seed."""
    found = {
        f"{name}, published": {row: [(ap["last.box"], ap["last.mask"])] for row, ap in rows.items()}
        for name, rows in study.published(tables).items()
    }
    measured = {
        row: [(m.result.last.box.AP, m.result.last.mask.AP) for m in runs.values()]
        for row, runs in study.measured(Path(results)).items()
    }
    return found | {"shapes, 2,000 steps": measured}


labels = {study.title: {row.name: row.label for row in study.rows} for study in studies}
plot_ablation(labels[modules.title], columns_of(modules), modules.title)

# %%
report = StudyReport.of(modules, "shapes", Path(results))
for row, runs in report.measured.items():
    values = ", ".join(f"{m.result.last.box.AP:.1f}" for m in runs.values())
    print(f"{labels[modules.title][row]}: box AP {values}")

# %% [markdown]
# **Read it.** Do the rows come in the same order as in the paper? How large is the difference between two rows,
# compared with the scatter of the seeds within one? The distances are not those on COCO: the model is small, the
# training short, and the shapes are not photographs. A miniature can show *that* something happens, not how much of it
# there is.
#
# ### Explore
#
# The other tables. Where a row has a single mark, one seed has been run; `dimaskdino study table_5` runs the study's
# three, ten minutes each, and `results` above then names its folder, `runs/studies/shapes`.

# %%
explore_studies(labels, {study.title: columns_of(study) for study in studies})

# %% [markdown]
# ## Is it more than luck?
#
# Two runs that differ in nothing but the seed end differently. Runs of two variants that *share* a seed see the same
# images in the same order, so their difference scatters less than each of them: look at the differences of pairs.
#
# ### Exercise 7.2
#
# From the APs `a` and `b` of two variants, seed by seed: the mean of the differences $b - a$ and its standard error,
# $s / \sqrt{n}$, where $s$ is the standard deviation (with $n - 1$) of the differences.


# %%
def paired(a, b):
    """Mean difference b − a and its standard error."""
    # solution
    differences = [y - x for x, y in zip(a, b, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1)
    return mean, (variance / n) ** 0.5
    # end


if checks.check_paired(paired):
    box = modules.quantities[0]
    base = list(report.values("neither", box).values())
    for name in ("di", "bato", "di_bato"):
        other = list(report.values(name, box).values())
        if len(base) == len(other) > 1:
            mean, error = paired(base, other)
            print(f"{labels[modules.title][name]} − neither: {mean:+.1f} ± {error:.1f} points of box AP")

# %% [markdown]
# A mean of a few seeds is uncertain twice over. Other **trainings** would have given other models: the thin grey
# intervals are 95 % intervals from the seeds' differences, by Student's t, which with few seeds is wide. And other
# **images** would have given other APs for these very models: the thick blue ones draw the 200 images again, with
# replacement, a thousand times, the same images for both models (a *paired bootstrap*).

# %%
plot_differences(report.comparisons(), "Differences to the model with neither module")

# %%
Markdown(report.markdown())

# %% [markdown]
# Which of the paper's signs could you defend with these runs? Which module narrows the lag of the first layer, and
# which one would you have expected from its place in the model?
#
# ## Where along the layers does it act?
#
# Table 4 looks at the end. The layers tell *where* a module acts.

# %%
by_label = {labels[modules.title][name]: [m.result for m in runs.values()] for name, runs in report.measured.items()}
plot_study_layers(by_label, "Table 4 in miniature, every stage")

# %% [markdown]
# ### Exercise 7.3, to discuss
#
# Three seeds, a difference of 2 points, a standard error of 1.5. What would you write in a paper? What would you do
# with one more hour of computing: another seed of the same rows, or a longer training with one seed?
#
# ### Exercise 7.4, to discuss
#
# Table 3 weakens the box losses to a tenth. MaskDINO loses 2.8 points of box AP, De-Imbalance 0.8. Is that evidence
# that De-Imbalance *mends* the imbalance, or that it makes training more robust? How could one tell?
#
# ---
#
# **Next**: [your own data and your own idea](08_your_own.ipynb).
