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
# # Your own op
#
# An op is a function of position ids. fluxlab gives it everything else: where it acts, how strongly, its arguments on
# the command line, and its place in experiments. This notebook writes an op, looks at the positions it makes, draws
# images with it, and measures how much of it the model bears. It takes two minutes on a laptop.

# %%
# %matplotlib inline
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image

import fluxlab
from fluxlab.drawing import position_plot as plot
from fluxlab.positions import OPS, Program, load_plugins
from fluxlab.run import main

warnings.filterwarnings("ignore", "IProgress")  # progress bars work without widgets

pipe = fluxlab.load_pipeline("tiny")
prompt = "a red fox on the left holding a sign that says open"

# %% [markdown]
# ## Write it
#
# Ops live in a module of your own, here a file in the current folder. `ids` has shape (n, 3): index, row and col of the
# selected tokens, in fp32. The result has the same shape. `scope` says which tokens these are. The second argument of
# `@op` gives each argument its type, which reads YAML and reports wrong values.

# %%
source = '''
import torch

from fluxlab.positions import op
from fluxlab.select.arguments import number


@op("shear", {"by": number})
def shear(ids, scope, by=0.25):
    """Move columns by `by` × row, so that the image leans."""
    return torch.stack((ids[:, 0], ids[:, 1], ids[:, 2] + by * ids[:, 1]), dim=-1)
'''
Path("my_ops.py").write_text(source, encoding="utf-8")

# %% [markdown]
# On the command line this module is named with `plugins=[my_ops]`. Here:

# %%
load_plugins(["my_ops"])
print(OPS["shear"].summary)

# %% [markdown]
# ## Look at it
#
# The op can now be used in a program like any other. A program says what it does, and can be drawn without a model.

# %%
lean = Program.from_config({"a": {"op": "shear", "by": 0.25}})
print(lean.describe())
rows, cols = pipe.grid(None, None)
plot.position_plot(lean, grid=(rows, cols), text=pipe.max_sequence_length)

# %% [markdown]
# Where an edit acts is not the op's concern. The same op works on some tokens, steps, blocks or heads, and with a
# strength between 0 and 1:

# %%
programs = {
    "unchanged": None,
    "everywhere": lean,
    "first quarter of steps": Program.from_config({"a": {"op": "shear", "steps": {"fraction": [0, 0.25]}}}),
    "single blocks": Program.from_config({"a": {"op": "shear", "blocks": "single"}}),
    "at half strength": Program.from_config({"a": {"op": "shear", "strength": 0.5}}),
}
images = pipe.generate([prompt], seeds=[0], programs=list(programs.values()), steps=8)

figure, panels = plt.subplots(1, len(programs), figsize=(10, 2.5), layout="constrained")
for panel, image, title in zip(panels, images, programs, strict=True):
    panel.imshow(image, interpolation="nearest")
    panel.set_title(title, fontsize=9)
    panel.axis("off")

# %% [markdown]
# ## A wrong value
#
# The argument's type reports it, with the key and the value:

# %%
try:
    Program.from_config({"a": {"op": "shear", "by": "a lot"}})
except fluxlab.UserError as error:
    print(error)

# %% [markdown]
# ## Measure it
#
# How much shear does the model bear? An experiment with one variant for each amount, two prompts and two seeds. The
# scene oracle looks for the object and its letters in every image.

# %%
store = Path(tempfile.mkdtemp()) / "shear"
amounts = [0.0625, 0.125, 0.25, 0.5]
main(
    [
        "+exp=hello",
        "name=shear",
        'caption="columns moved by row × 1/16 to 1/2"',
        "plugins=[my_ops]",
        "model=tiny",
        f'prompts=["{prompt}","a blue heart on the right holding a sign that says rain"]',
        "seeds=2",
        "steps=8",
        *(f"+variants.by_{i}={{a: {{op: shear, by: {amount}}}}}" for i, amount in enumerate(amounts)),
        "tracking=none",
        f"out={store}",
    ]
)
Image.open(store / "grid.png")

# %% [markdown]
# The summary has the mean of each metric with a 95 % interval, for every variant and for the two controls.

# %%
run = fluxlab.read_run(store)
ssim = {row["variant"]: row for row in run.summary if row["metric"] == "ssim"}
shown = [ssim[f"by_{i}"] for i in range(len(amounts))]
means = [row["mean"] for row in shown]
below = [row["mean"] - row["low"] for row in shown]
above = [row["high"] - row["mean"] for row in shown]

figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
axes.errorbar(amounts, means, [below, above], marker="o", capsize=3, label="shear")
axes.axhline(ssim["noise floor"]["mean"], color="grey", linestyle=":", label="noise floor")
axes.axhline(ssim["another seed"]["mean"], color="grey", linestyle="--", label="another seed")
axes.set(xlabel="shear", ylabel="SSIM to the baseline", ylim=(0, 1.05))
axes.legend(fontsize=8)

# %% [markdown]
# Next: `docs/programs.md` has ops on the frequencies of RoPE, which see the spectrum instead of ids, and
# CONTRIBUTING.md says how to add an op to fluxlab itself.
