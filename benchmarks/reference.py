"""The network of arXiv 2411.06785, and the DiT that it is compared with, written out formula by formula.

Nothing is fused or rearranged: three matrix products in ISTA, an explicit softmax, one modulation per cell. It is what
`WhiteBoxDiTModel` must equal (tests/models/test_transformer_white_box_dit.py), and what benchmarks/speed.py times it
against. Parameters have the names of the authors' checkpoints, so that `convert_original.py` reads its
`state_dict()`.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class Patches(nn.Module):
    def __init__(self, dim: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(1, dim, kernel_size=(patch_size, 1), stride=(patch_size, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x[:, None, :, None]).flatten(2).transpose(1, 2)  # (batch, patches, dim)


class Timestep(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        frequencies = torch.exp(-math.log(10_000) * torch.arange(128, device=t.device) / 128)
        angles = t[:, None].to(self.mlp[0].weight.dtype) * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class MSSA(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.qkv(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (batch, heads, patches, head dim)
        attention = torch.softmax(w @ w.transpose(-1, -2) / math.sqrt(w.shape[-1]), dim=-1)
        return self.to_out((attention @ w).transpose(1, 2).flatten(2))


class ISTA(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dim))
        nn.init.kaiming_uniform_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Dx = F.linear(x, self.weight)
        DtDx = F.linear(Dx, self.weight.T)
        Dtx = F.linear(x, self.weight.T)
        return F.relu(x + 0.1 * (Dtx - DtDx) - 0.1 * 0.1)


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attention = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
        return self.proj((attention @ v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, block_type: str):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = MSSA(dim, heads) if block_type == "white_box" else SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = ISTA(dim) if block_type == "white_box" else MLP(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, dim: int, patch_size: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, patch_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class ReferenceDiT(nn.Module):
    """
    Args:
        num_genes (`int`, defaults to 2000): A multiple of `patch_size`.
        block_type (`str`, defaults to `"white_box"`): `"white_box"` or `"dit"`.
    """

    def __init__(
        self,
        num_genes: int = 2000,
        patch_size: int = 10,
        depth: int = 3,
        dim: int = 768,
        heads: int = 8,
        block_type: str = "white_box",
    ):
        super().__init__()
        self.x_embedder = Patches(dim, patch_size)
        self.t_embedder = Timestep(dim)
        patches = num_genes // patch_size
        angles = torch.arange(patches)[:, None] / 10_000 ** (torch.arange(dim // 4) / (dim // 4))
        constant = torch.cat([torch.zeros(patches, dim // 4), torch.ones(patches, dim // 4)], dim=1)
        self.pos_embed = nn.Parameter(torch.cat([constant, angles.sin(), angles.cos()], dim=1)[None])
        self.pos_embed.requires_grad_(False)
        self.blocks = nn.ModuleList(Block(dim, heads, block_type) for _ in range(depth))
        self.final_layer = FinalLayer(dim, patch_size)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x = self.x_embedder(x) + self.pos_embed  # (batch, patches, dim)
        c = self.t_embedder(t)  # (batch, dim)
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x, c).flatten(1)
