"""Draws the figure of docs/unseen.md from lab/results/unseen_cpu.json: `python docs/unseen_figure.py`."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np


ROOT = Path(__file__).parents[1]
ROWS = {
    "real, half against half": ("real halves", "#999999", "s"),
    "network": ("network", "#0072B2", "o"),
    "closed form": ("closed form", "#56B4E9", "D"),
    "latent arithmetic": ("mean shift in latents", "#E69F00", "v"),
    "mean shift in genes": ("mean shift in genes", "#D55E00", "^"),
}
PANELS = {"pearson": "Pearson of the change, 100 genes", "slope": "slope of the change", "energy": "energy distance"}

plt.switch_backend("Agg")
plt.rcParams["font.size"] = 12
results = json.loads((ROOT / "lab" / "results" / "unseen_cpu.json").read_text())
held = list(dict.fromkeys((row["cell_type"], row["condition"]) for row in results))
figure, axes = plt.subplots(1, len(PANELS), figsize=(13, 0.42 * len(held) + 1.6), sharey=True, layout="constrained")
for axis, (metric, title) in zip(axes, PANELS.items()):
    for name, (label, colour, marker) in ROWS.items():
        values = [
            np.mean(
                [row[metric] for row in results if row["row"] == name and (row["cell_type"], row["condition"]) == one]
            )
            for one in held
        ]
        axis.scatter(values, range(len(held)), color=colour, marker=marker, s=48, label=label, alpha=0.9)
    axis.set(title=title)
    axis.grid(axis="y", color="#eeeeee")
    axis.set_axisbelow(True)
axes[0].set_yticks(range(len(held)), [f"{cell_type}, {condition}" for cell_type, condition in held])
axes[0].invert_yaxis()
axes[1].axvline(1, color="black", linewidth=0.7)
axes[2].set_xscale("log")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ROWS), frameon=False)
figure.savefig(ROOT / "docs" / "unseen.png", dpi=80)
