# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: -jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A tour of fluxlab
#
# **What do position ids do in a FLUX diffusion transformer?** Five minutes on a laptop, with the small model that ships
# with fluxlab: ids, an edit of them, what it does to attention, what it does to pictures, and an experiment with
# numbers. Nothing in here is needed elsewhere; everything it calls is documented where it lives.

# %%
# %matplotlib inline
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import fluxlab
from fluxlab.drawing import token_layout as plot
from fluxlab.experiment.reading import read_store
from fluxlab.positions import Program
from fluxlab.run import main
from fluxlab.sampling import image_ids, text_ids

warnings.filterwarnings("ignore", "IProgress")  # progress bars do without widgets

pipe = fluxlab.load_pipeline("tiny")
prompt = "a red fox on the left holding a sign that says hello world"

# %% [markdown]
# ## Ids
#
# Every token has a position: (index, row, col), in fp32. Image tokens stand on their grid, text tokens all at the
# origin; that is all a FLUX transformer is told about where things are.

# %%
rows, cols = pipe.grid(None, None)  # the model's own size, in tokens
img_ids = image_ids(1, rows, cols)
txt_ids = text_ids(1, pipe.max_sequence_length)
print("img_ids", tuple(img_ids.shape), img_ids.dtype, "txt_ids", tuple(txt_ids.shape))
img_ids.view(rows, cols, 3)[:3, :3]  # the top left corner

# %% [markdown]
# ## An edit
#
# An edit is an op and where it acts; a program is a list of edits. This one halves the distances between image tokens.
# The text stays at the origin.

# %%
half = Program.from_config({"a": {"op": "scale", "factor": 0.5}})
print(half.describe(), half.digest[:12])
plot.layout(half, grid=(rows, cols), text=pipe.max_sequence_length)

# %% [markdown]
# Attention sees ids only through rotations of queries and keys, so only their differences count. For equal vectors the
# score falls off with distance; halved ids make everything look half as far away.

# %%
params = pipe.transformer.params
plot.kernel(half, grid=(rows, cols), axes_dim=params.axes_dim, theta=params.theta)

# %% [markdown]
# ## Pictures
#
# Programs of one batch may differ. Same prompt, same seed, three programs: untouched ids; halved; and all ids, the
# text's too, shifted by one constant, which leaves all differences as they were.

# %%
shift = Program.from_config({"a": {"op": "offset", "by": [3, -2.5, 7], "tokens": "all"}})
images = pipe.generate([prompt], seeds=[0], programs=[None, half, shift])

figure, panels = plt.subplots(1, 3, figsize=(9, 3.4), layout="constrained")
for panel, image, title in zip(panels, images, ("untouched", half.describe(), "all ids shifted"), strict=True):
    panel.imshow(image, interpolation="nearest")
    panel.set_title(title, fontsize=9)
    panel.axis("off")

# %% [markdown]
# How far apart are they? The shift changes nothing but rounding: it is the noise floor that every effect is quoted
# beside.

# %%
untouched, halved, shifted = (np.asarray(image, int) for image in images)
print("largest difference of a pixel, 0 to 255:")
print("  ids halved: ", abs(halved - untouched).max())
print("  ids shifted:", abs(shifted - untouched).max())

# %% [markdown]
# ## An experiment
#
# On the command line an experiment is `python -m fluxlab.run +exp=<name>` and keys; the same from here. It fills a
# folder, the store: pictures, a row of numbers for each, means with intervals, and the grid below. The same command
# again makes only what is missing.

# %%
store = Path(tempfile.mkdtemp()) / "tour"
main(
    [
        "+exp=hello",
        "name=tour",
        'caption="img_ids × 0.5 and × 1.2"',
        "model=tiny",
        f'prompts=["{prompt}"]',
        "seeds=2",
        "+variants.half={a: {op: scale, factor: 0.5}}",
        "+variants.stretch={a: {op: scale, factor: 1.2}}",
        "tracking=none",
        f"out={store}",
    ]
)
Image.open(store / "grid.png")

# %% [markdown]
# Figures, reports and trackers read nothing but the store, and so can you. Structural similarity to the baseline, 1
# where nothing changed:

# %%
run = read_store(store)
for row in run.summary:
    if row["metric"] == "ssim":
        print(f"{row['variant']:<14}{row['mean']:.3f}  n = {row['n']}")

# %% [markdown]
# From here: the README lists all ops and where they can act, `configs/exp/` has the article's experiments, and
# `python -m experiments.article <store>` draws a store for a paper.
