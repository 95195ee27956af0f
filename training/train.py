"""Trains a White-Box DiT on single cells and writes a complete pipeline, on one device or many.

    accelerate launch training/train.py --dataset cells.h5ad --label_keys cell_type --output_dir wbdit-cells

The code is `wbdit_diffusers.training`; `wbdit train` is the same without a clone of the repository.
"""

from wbdit_diffusers.training.__main__ import main


if __name__ == "__main__":
    main()
