"""
A pipeline of few cells that starts from another one.

The pipeline in the package was trained on some of 700 PBMCs. Here, 100 of the others are the training cells, and one
type has another name. The codec then describes cells that neither training has seen:

    python examples/start_from_pipeline.py
"""

import numpy as np
import torch

from wbdit_diffusers.data import CellSplit, load_pbmc
from wbdit_diffusers.pretrained import FOLDER, PBMC
from wbdit_diffusers.training import CodecConfig, fit_codec


cells = CellSplit.load(FOLDER / PBMC).apply(load_pbmc())[1]  # the pipeline has not seen them
cells.obs["cell_type"] = cells.obs["cell_type"].astype(str).replace({"CD19+ B": "B cell"})
order = np.random.default_rng(0).permutation(cells.n_obs)
few, others = cells[np.sort(order[:100])].copy(), cells[np.sort(order[100:])].copy()

for name, start in {
    "nothing": {},
    "the other pipeline": {"init_from": PBMC, "init_labels": {"B cell": "CD19+ B"}},
}.items():
    processor, codec = fit_codec(few, CodecConfig(label_keys=["cell_type"], num_genes=300, decoder_steps=100, **start))
    matrix, library_size = processor.select(others)
    values, library_size = torch.from_numpy(matrix.toarray()), torch.from_numpy(library_size).float()
    with torch.no_grad():
        log_likelihood = codec.decode(codec.encode(values, library_size)).log_prob(values).mean()
    print(f"Start from {name}: {log_likelihood:.1f} nats per new cell.")
