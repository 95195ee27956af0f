"""Converts a checkpoint of the authors' code (arXiv 2411.06785), of any depth and width: White-Box or DiT.

python benchmarks/convert_original.py checkpoint.pth denoiser
"""

import sys
from pathlib import Path

import torch

from wbdit_diffusers import WhiteBoxDiTModel


# Parts of the authors' names and of ours, replaced in this order
NAMES = {
    "x_embedder.proj.": "proj_in.",
    "t_embedder.mlp.0.": "time_embedder.linear_1.",
    "t_embedder.mlp.2.": "time_embedder.linear_2.",
    "final_layer.adaLN_modulation.1.": "modulation_out.",
    "final_layer.linear.": "proj_out.",
    ".adaLN_modulation.1.": ".modulation.",
    ".attn.to_out.0.": ".attn.to_out.",
    ".mlp.weight": ".ff.dictionary",
    ".attn.proj.": ".attn.to_out.",
    ".mlp.fc": ".ff.fc",
}


def convert(path: str | Path, num_attention_heads: int = 8) -> WhiteBoxDiTModel:
    """The network in a file that holds a `state_dict`."""
    original = torch.load(path, map_location="cpu", weights_only=True)
    dim, _, patch_size, _ = original["x_embedder.proj.weight"].shape
    num_patches = original["pos_embed"].shape[1]
    num_layers = 1 + max(int(key.split(".")[1]) for key in original if key.startswith("blocks."))
    is_dit = "blocks.0.mlp.fc1.weight" in original
    state_dict = {}
    for name, tensor in original.items():
        for theirs, ours in (NAMES if is_dit else {**NAMES, ".attn.qkv.": ".attn.to_w."}).items():
            name = name.replace(theirs, ours)
        state_dict[name] = tensor.float()
    state_dict["proj_in.weight"] = state_dict["proj_in.weight"].flatten(1)  # a convolution (hidden, 1, patch, 1)
    model = WhiteBoxDiTModel(
        sample_size=num_patches * patch_size,
        patch_size=patch_size,
        num_layers=num_layers,
        num_attention_heads=num_attention_heads,
        attention_head_dim=dim // num_attention_heads,
        block_type="dit" if is_dit else "white_box",
    )
    model.load_state_dict(state_dict)
    return model.eval()


if __name__ == "__main__":
    convert(sys.argv[1]).save_pretrained(sys.argv[2])
