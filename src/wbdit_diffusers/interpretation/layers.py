"""Records the layers with hooks, and compares what they do with their equations."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from sklearn.linear_model import RidgeCV
from torch import nn

from ..models.transformer_white_box_dit import (
    ISTA,
    MSSA,
    BoundedISTA,
    Contraction,
    DescentBlock,
    WhiteBoxDiTModel,
)


PRECISION = 0.5  # ε of the coding rate, as in CRATE
LAYER_TIMESTEPS = [99, 299, 499, 799]  # of the figures and benchmarks: from nearly clean to nearly noise


@contextmanager
def record_blocks(denoiser: WhiteBoxDiTModel) -> Iterator[list[dict[str, torch.Tensor]]]:
    """
    Records the tokens before and after every block of the next call.

    Args:
        denoiser ([`WhiteBoxDiTModel`]): The network.

    Yields:
        `list[dict[str, torch.Tensor]]`: for each block, after the call, `"input"` and `"output"` of the block,
        `"attn_input"`, `"attn_output"`, `"ff_input"` and `"ff_output"`: `(batch, tokens, hidden)` each.
    """
    records: list[dict[str, torch.Tensor]] = [{} for _ in denoiser.blocks]
    handles = []

    def keep(record: dict[str, torch.Tensor], prefix: str):
        def hook(module: nn.Module, args: tuple, output: torch.Tensor):
            record[f"{prefix}input"], record[f"{prefix}output"] = args[0].detach(), output.detach()

        return hook

    for block, record in zip(denoiser.blocks, records):
        for prefix, module in (("", block), ("attn_", block.attn), ("ff_", block.ff)):
            handles.append(module.register_forward_hook(keep(record, prefix)))
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


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
    The coding rate of a cell's tokens in subspaces, `½ Σ_h log det(I + p / (n ε²) Z U_hᵀ U_h Zᵀ)` (CRATE,
    arXiv 2306.01129, equation 5), which MSSA is derived to lower.

    Args:
        tokens (`torch.Tensor` of shape `(batch, n, hidden)`): Tokens Z.
        subspaces (`torch.Tensor` of shape `(heads, p, hidden)`): Their bases U.

    Returns:
        `torch.Tensor` of shape `(batch,)`: in nats.
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
    """
    Measures how one attention changes the coding rate of its tokens.

    Args:
        own (`torch.Tensor` of shape `(heads, p, hidden)`): Subspaces of the attention.
        tokens (`torch.Tensor` of shape `(batch, n, hidden)`): Its input.
        step (`torch.Tensor` of shape `(batch, n, hidden)`): Its step, which is added to the tokens.
        seed (`int`, defaults to 0): Seed of the random subspaces.

    Returns:
        `dict[str, float]`: `"own"` and `"random"`, the relative change of the coding rate in its own subspaces and in
        random ones of the same size; `"cosine"` of the step and the steepest descent of its own coding rate.
    """
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
    """
    Measures one step of sparse coding.

    Args:
        ff ([`ISTA`] or [`BoundedISTA`]): The step.
        tokens (`torch.Tensor` of shape `(batch, n, hidden)`): Its input.
        output (`torch.Tensor` of shape `(batch, n, hidden)`): Its output.

    Returns:
        `dict[str, float]`: `"zeros"`, the share of zeros in its output; `"zeros_of_relu"`, in `relu(x - ηλ)` of its
        input alone, without any dictionary; `"curvature"`, η times the largest eigenvalue of DᵀD: below 2 the step
        descends; `"objective"`, the relative change of `½‖x - Da‖² + λ‖a‖₁` from the code `a = relu(x)` to the output.
    """
    dictionary, step_size, lambd = ff.dictionary.detach().float(), float(ff.step_size), float(ff.lambd)

    def objective(code: torch.Tensor) -> torch.Tensor:
        return 0.5 * (tokens - code @ dictionary.t()).square().sum() + lambd * code.abs().sum()

    return {
        "zeros": (output == 0).float().mean().item(),
        "zeros_of_relu": (tokens <= step_size * lambd).float().mean().item(),
        "curvature": step_size * torch.linalg.matrix_norm(dictionary, 2).item() ** 2,
        "objective": (objective(output) / objective(tokens.relu()) - 1).item(),
    }


def explained_by_tokens(tokens: np.ndarray, clean: np.ndarray) -> float:
    """
    Fraction of the variance of clean cells that a linear map of the tokens of noisy cells explains. The map is fitted
    to one half of the cells, and judged on the other.

    Args:
        tokens (`np.ndarray` of shape `(cells, values)`): All tokens of each cell.
        clean (`np.ndarray` of shape `(cells, sample_size)`): The clean cells.
    """
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
    """
    Measures every layer of the trained and of an untrained network at some timesteps.

    Args:
        denoiser ([`WhiteBoxDiTModel`]): The network.
        scheduler ([`SchedulerMixin`]): Its noise schedule.
        latents (`torch.Tensor` of shape `(cells, sample_size)`): Clean latents of held-out cells.
        class_labels (`torch.LongTensor` of shape `(cells, num_label_keys)`, *optional*): Their labels.
        timesteps (`list[int]`): Timesteps of the noise.
        seed (`int`, defaults to 0): Seed of the noise and of the untrained network.

    Returns:
        `list[dict]`: a row for each network (`"trained"`, `"untrained"`), timestep and layer. Layer 0 is the input
        of the first block. `"explained"` is from [`explained_by_tokens`]. From layer 1 on, `"step"` is the size of
        the block's step relative to its tokens, next to the results of [`step_of_attention`] and [`step_of_ista`]. The
        attention's step includes the gate in a [`DescentBlock`]. In the published block, channel gates act after it.
    """
    rows = []
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)
    clean = latents.cpu().numpy()
    forward_process = DDPMScheduler.from_config(scheduler.config)  # solvers add noise by their own, fewer, timesteps
    for name, network in (("trained", denoiser), ("untrained", untrained_copy(denoiser, seed))):
        for timestep in timesteps:
            noisy = forward_process.add_noise(latents, noise, torch.tensor([timestep], device=latents.device))
            with record_blocks(network) as records:
                network(noisy, timestep, class_labels, return_dict=False)
            for layer in range(len(records) + 1):
                record = records[max(layer - 1, 0)]
                tokens = record["output" if layer else "input"]
                row = {"network": name, "timestep": timestep, "layer": layer}
                row["explained"] = explained_by_tokens(tokens.flatten(1).cpu().numpy(), clean)
                rows.append(row)
                if layer == 0:
                    continue
                block = network.blocks[layer - 1]
                row["step"] = ((record["output"] - record["input"]).norm() / record["input"].norm()).item()
                if isinstance(block.attn, MSSA | Contraction):
                    tokens, step = record["attn_input"], record["attn_output"]
                    if isinstance(block, DescentBlock):
                        step = record["ff_input"] - tokens
                    row |= step_of_attention(subspaces_of(block.attn), tokens, step, seed)
                if isinstance(block.ff, ISTA | BoundedISTA):
                    row |= step_of_ista(block.ff, record["ff_input"], record["ff_output"])
    return rows
