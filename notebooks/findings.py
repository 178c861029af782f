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
# # Findings, redrawn
#
# The numbers that README and `docs/findings.md` quote are committed, in `docs/results.json`. This notebook draws them.
# It needs no model and takes seconds. `python docs/results.py` measures them again, and `make figures` draws the
# figures for a paper from the runs themselves.
#
# All of them are about the embedded model. Bars are 95 % bootstrap intervals over images.

# %%
# %matplotlib inline
import json
from pathlib import Path

import matplotlib.pyplot as plt

results = json.loads(Path("../docs/results.json").read_text())
n = results["dose_response"]["x2"]["ssim"]["n"]
print("weights", results["weights"], "images per mean:", n)

# %% [markdown]
# ## Where does the image break?
#
# Structural similarity to the baseline, while all `img_ids` are multiplied by a factor. The two lines are controls:
# rounding alone (noise floor), and another seed.

# %%
dose = {name: row["ssim"] for name, row in results["dose_response"].items()}
names = [name for name in dose if name[0] == "x" and name[1:2].isdigit()]
factors = [float(name[1:].replace("_", ".")) for name in names]
means = [dose[name]["mean"] for name in names]

figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.plot(factors, means, marker="o", markersize=3)
axes.fill_between(factors, [dose[name]["low"] for name in names], [dose[name]["high"] for name in names], alpha=0.25)
axes.axhline(dose["noise floor"]["mean"], color="grey", linestyle=":", label="noise floor")
axes.axhline(dose["another seed"]["mean"], color="grey", linestyle="--", label="another seed")
axes.set(xlabel="factor of img_ids", ylabel="SSIM to the baseline", ylim=(0, 1.05))
axes.legend(fontsize=8)
# %% [markdown]
# ## Which axis matters?
#
# The same with a constant added to one axis of `img_ids`. Text keeps its ids, so the distance of text and image
# changes, and distances within the image do not.

# %%
edits = {name: row["ssim"] for name, row in results["dose_edits"].items()}
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
for axis, marker in (("index", "o"), ("row", "s"), ("col", "^")):
    names = [name for name in edits if name.startswith(f"{axis}_")]
    amounts = [int(name.rpartition("_")[2]) for name in names]
    means = [edits[name]["mean"] for name in names]
    below = [edits[name]["mean"] - edits[name]["low"] for name in names]
    above = [edits[name]["high"] - edits[name]["mean"] for name in names]
    axes.errorbar(amounts, means, [below, above], marker=marker, capsize=3, label=axis)
axes.axhline(edits["another seed"]["mean"], color="grey", linestyle="--", label="another seed")
axes.set(xlabel="offset of img_ids", ylabel="SSIM to the baseline", xscale="log", ylim=(0, 1.05))
axes.set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
axes.legend(fontsize=8)
# %% [markdown]
# ## Which blocks need positions, and when?
#
# Left: the keys of one block lose their rotation (FreeFlux's probe, arXiv 2503.16153). Right: all keys lose it, during
# a part of the noise levels only. Low means that the model depends on positions there.

# %%
blocks = {int(name[5:]): row["psnr"] for name, row in results["freeflux_probe"].items() if name.startswith("none_")}
windows = {name: results["step_roles"][name]["psnr"] for name in ("first", "second", "third", "last", "always")}
figure, panels = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
for panel, rows in zip(panels, (blocks, windows), strict=True):
    means = [row["mean"] for row in rows.values()]
    below = [row["mean"] - row["low"] for row in rows.values()]
    above = [row["high"] - row["mean"] for row in rows.values()]
    panel.errorbar(range(len(rows)), means, [below, above], marker="o", linestyle="", capsize=3)
    panel.set_xticks(range(len(rows)), rows)
panels[0].set(xlabel="block", ylabel="PSNR to the baseline, dB")
panels[1].set_xlabel("noise levels, from σ = 1 to 0")
# %% [markdown]
# ## Through which block does the prompt enter the image?
#
# Keys and values of the text come from another prompt in one block, and only image tokens see them. How many images now
# have the other prompt's place, colour and word?

# %%
trace = results["trace"]
count = sum(name.startswith("text → image, block") for name in trace)
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
for attribute, marker in (("place", "o"), ("letters", "s"), ("colour", "^")):
    rows = [trace[f"text → image, block {block}"][attribute] for block in range(count)]
    means = [row["mean"] for row in rows]
    below = [row["mean"] - row["low"] for row in rows]
    above = [row["high"] - row["mean"] for row in rows]
    label = "word" if attribute == "letters" else attribute
    axes.errorbar(range(count), means, [below, above], marker=marker, capsize=3, label=label)
axes.set(xlabel="block", ylabel="share of images with the source's", ylim=(-0.03, 1.03), xticks=range(count))
axes.legend(fontsize=8)
