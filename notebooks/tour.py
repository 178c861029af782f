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
# **What do position ids do in a FLUX diffusion transformer?** This tour takes five minutes on a laptop, with the small
# model that is part of fluxlab: ids, an edit, its effect on attention and on images, and an experiment with numbers.

# %%
# %matplotlib inline
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import fluxlab
from fluxlab.drawing import position_plot as plot
from fluxlab.positions import Program
from fluxlab.run import main
from fluxlab.sampling import image_ids, text_ids

warnings.filterwarnings("ignore", "IProgress")  # progress bars work without widgets

pipe = fluxlab.load_pipeline("tiny")
prompt = "a red fox on the left holding a sign that says hello world"

# %% [markdown]
# ## Ids
#
# Every token has a position (index, row, col) in fp32. Image tokens have the positions of their grid, text tokens are
# all at the origin. A FLUX transformer has no other information about where a token is.

# %%
rows, cols = pipe.grid(None, None)  # the model's own size, in tokens
img_ids = image_ids(1, rows, cols)
txt_ids = text_ids(1, pipe.max_sequence_length)
print("img_ids", tuple(img_ids.shape), img_ids.dtype, "txt_ids", tuple(txt_ids.shape))
img_ids.view(rows, cols, 3)[:3, :3]  # the top left corner

# %% [markdown]
# ## An edit
#
# An edit is an op and where it acts. A program is a list of edits. This one halves the distances between image tokens.
# The text stays at the origin.

# %%
half = Program.from_config({"a": {"op": "scale", "factor": 0.5}})
print(half.describe(), half.digest[:12])
plot.position_plot(half, grid=(rows, cols), text=pipe.max_sequence_length)

# %% [markdown]
# Ids enter attention through rotations of queries and keys, so only their differences matter. The RoPE similarity of
# two tokens falls with their distance. With halved ids, every distance counts half.

# %%
params = pipe.transformer.params
plot.similarity_plot(half, grid=(rows, cols), axes_dim=params.axes_dim, theta=params.theta)

# %% [markdown]
# ## Images
#
# Programs in a batch may differ. Here are three programs with the same prompt and seed: unchanged ids, halved ids, and
# all ids (text and image) shifted by a constant, which keeps all differences.

# %%
shift = Program.from_config({"a": {"op": "offset", "by": [3, -2.5, 7], "tokens": "all"}})
images = pipe.generate([prompt], seeds=[0], programs=[None, half, shift])

figure, panels = plt.subplots(1, 3, figsize=(9, 3.4), layout="constrained")
for panel, image, title in zip(panels, images, ("unchanged", half.describe(), "all ids shifted"), strict=True):
    panel.imshow(image, interpolation="nearest")
    panel.set_title(title, fontsize=9)
    panel.axis("off")

# %% [markdown]
# How much do they differ? The shift changes rounding only. It is the noise floor, a control that is shown next to every
# effect.

# %%
unchanged, halved, shifted = (np.asarray(image, int) for image in images)
print("largest difference of a pixel, 0 to 255:")
print("  ids halved: ", abs(halved - unchanged).max())
print("  ids shifted:", abs(shifted - unchanged).max())

# %% [markdown]
# ## An experiment
#
# On the command line, `python -m fluxlab.run +exp=<name>` and keys run an experiment. The same works here. It writes a
# folder, the store: images, one row of metrics per image, means with intervals, and the grid below. The same call again
# computes only what is missing.

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
# Figures, reports and trackers read the store only. This is the structural similarity to the baseline, which is 1 for
# equal images:

# %%
run = fluxlab.read_run(store)
for row in run.summary:
    if row["metric"] == "ssim":
        print(f"{row['variant']:<14}{row['mean']:.3f}  n = {row['n']}")

# %% [markdown]
# Next: `docs/programs.md` lists all ops and where they can act, README lists the experiments, and
# `python -m experiments.article <store>` makes a figure for a paper.
