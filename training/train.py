"""Trains a White-Box DiT on single cells and writes a complete pipeline, on one device or many.

    accelerate launch training/train.py --dataset cells.h5ad --label_keys cell_type --output_dir wbdit-cells

This is `wbdit train`. Without a clone of the repository: `accelerate launch -m wbdit_diffusers.cli train …`.
"""

import sys

from wbdit_diffusers.cli import main


if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
