"""Records the layers with hooks, and compares what they do with their equations."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from sklearn.linear_model import RidgeCV
from torch import nn

from ..models.transformer_white_box_dit import ISTA, MSSA, BoundedISTA, Contraction, DescentBlock, WhiteBoxDiTModel
from .denoising import add_noise


PRECISION = 0.5  # ε of the coding rate, as in CRATE
LAYER_TIMESTEPS = [99, 299, 499, 799]  # of the figures and benchmarks: from nearly clean to nearly noise


@contextmanager
def record_blocks(denoiser: WhiteBoxDiTModel) -> Iterator[list[dict[str, torch.Tensor]]]:
    """
    Records the next call. Yields a list that then has, for each block, its `"input"` and `"output"`, `"attn_input"`,
    `"attn_output"`, `"ff_input"` and `"ff_output"`: `(batch, tokens, hidden)` each.
    """
    records: list[dict[str, torch.Tensor]] = [{} for _ in denoiser.blocks]

    def keep(record: dict[str, torch.Tensor], prefix: str):
        def hook(module: nn.Module, args: tuple, output: torch.Tensor):
            record[f"{prefix}input"], record[f"{prefix}output"] = args[0].detach(), output.detach()

        return hook

    with ExitStack() as hooks:
        for block, record in zip(denoiser.blocks, records):
            for prefix, module in (("", block), ("attn_", block.attn), ("ff_", block.ff)):
                hooks.enter_context(module.register_forward_hook(keep(record, prefix)))
        yield records


def untrained_copy(denoiser: WhiteBoxDiTModel, seed: int = 0) -> WhiteBoxDiTModel:
    """The network with untrained attention and dictionaries. Gates stay, as untrained ones are closed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = WhiteBoxDiTModel.from_config(dict(denoiser.config))
    control = copy.deepcopy(denoiser)
    for block, fresh_block in zip(control.blocks, fresh.blocks):
        block.attn.load_state_dict(fresh_block.attn.state_dict())
        block.ff.load_state_dict(fresh_block.ff.state_dict())
    return control.eval()


def coding_rate(tokens: torch.Tensor, subspaces: torch.Tensor) -> torch.Tensor:
    """
    The coding rate of each cell's tokens Z `(batch, n, hidden)` in subspaces U `(heads, p, hidden)`, in nats:
    `½ Σ_h log det(I + p / (n ε²) Z U_hᵀ U_h Zᵀ)`. MSSA is derived to lower it (CRATE, arXiv 2306.01129, equation 5).
    """
    w = torch.einsum("bnd,hpd->bhnp", tokens, subspaces)
    number, dim = w.shape[-2:]
    gram = torch.eye(number, device=w.device) + dim / (number * PRECISION**2) * w @ w.transpose(-1, -2)
    return 0.5 * torch.logdet(gram).sum(1)


def subspaces_of(attn: MSSA | Contraction) -> torch.Tensor:
    """The bases U of an attention's subspaces, `(heads, p, hidden)`."""
    bases = attn.subspaces if isinstance(attn, Contraction) else attn.to_w.weight
    return bases.detach().float().unflatten(0, (attn.heads, -1))


def step_of_attention(own: torch.Tensor, tokens: torch.Tensor, step: torch.Tensor, seed: int = 0) -> dict[str, float]:
    """The change of the coding rate by a step, in its own and in random subspaces, and its cosine with the descent."""
    noise = torch.randn(own.shape, generator=torch.Generator().manual_seed(seed)).to(own)
    random = noise * (own.norm() / noise.norm())
    changes = {}
    for name, subspaces in (("own", own), ("random", random)):
        before, after = coding_rate(tokens, subspaces), coding_rate(tokens + step, subspaces)
        changes[name] = (after.sum() / before.sum() - 1).item()
    with torch.enable_grad():
        free = tokens.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(coding_rate(free, own).sum(), free)
    cosine = torch.cosine_similarity(step.flatten(1), -gradient.flatten(1)).mean().item()
    return {**changes, "cosine": cosine}


def step_of_ista(ff: ISTA | BoundedISTA, tokens: torch.Tensor, output: torch.Tensor) -> dict[str, float]:
    """Zeros after a step of sparse coding and after a ReLU, its curvature, and the change of the objective."""
    dictionary, step_size, lambd = ff.dictionary.detach().float(), float(ff.step_size), float(ff.lambd)

    def objective(code: torch.Tensor) -> torch.Tensor:
        return 0.5 * (tokens - code @ dictionary.t()).square().sum() + lambd * code.abs().sum()

    return {
        "zeros": (output == 0).float().mean().item(),
        "zeros_of_relu": (tokens <= step_size * lambd).float().mean().item(),
        "curvature": step_size * torch.linalg.matrix_norm(dictionary, 2).item() ** 2,  # it descends below 2
        "objective": (objective(output) / objective(tokens.relu()) - 1).item(),
    }


def explained_by_tokens(tokens: np.ndarray, clean: np.ndarray) -> float:
    """The fraction of the variance of clean cells that a linear map of tokens, fitted to other cells, explains."""
    half = len(tokens) // 2
    fit = RidgeCV(alphas=10.0 ** np.arange(-1, 6)).fit(tokens[:half], clean[:half])
    residual = np.square(clean[half:] - fit.predict(tokens[half:])).sum()
    return float(1 - residual / np.square(clean[half:] - clean[:half].mean(axis=0)).sum())


@torch.no_grad()
def measure_layers(
    denoiser: WhiteBoxDiTModel,
    scheduler: SchedulerMixin,
    latents: torch.Tensor,
    class_labels: torch.Tensor | None,
    timesteps: list[int],
    seed: int = 0,
) -> list[dict]:
    """Measures every layer of the trained and of an untrained network. Layer 0 is the input of the first block."""
    rows = []
    clean = latents.cpu().numpy()
    for name, network in (("trained", denoiser), ("untrained", untrained_copy(denoiser, seed))):
        for timestep in timesteps:
            noisy = add_noise(latents, timestep, scheduler, seed)
            with record_blocks(network) as records:
                network(noisy, timestep, class_labels, return_dict=False)
            for layer, tokens in enumerate([records[0]["input"], *(record["output"] for record in records)]):
                row = {"network": name, "timestep": timestep, "layer": layer}
                row["explained"] = explained_by_tokens(tokens.flatten(1).cpu().numpy(), clean)
                if layer > 0:
                    row |= _steps(network.blocks[layer - 1], records[layer - 1], seed)
                rows.append(row)
    return rows


def _steps(block: nn.Module, record: dict[str, torch.Tensor], seed: int) -> dict[str, float]:
    """The size of a block's step relative to its tokens, and the steps of its attention and of its ISTA."""
    row = {"step": ((record["output"] - record["input"]).norm() / record["input"].norm()).item()}
    if isinstance(block.attn, MSSA | Contraction):
        tokens, step = record["attn_input"], record["attn_output"]
        if isinstance(block, DescentBlock):
            step = record["ff_input"] - tokens
        row |= step_of_attention(subspaces_of(block.attn), tokens, step, seed)
    if isinstance(block.ff, ISTA | BoundedISTA):
        row |= step_of_ista(block.ff, record["ff_input"], record["ff_output"])
    return row
