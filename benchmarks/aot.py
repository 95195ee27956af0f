"""Tests whether layers of attention raise the tokens' signal-to-noise by the factor that the theory of AoT predicts.

    python benchmarks/aot.py --work_dir WORK --output lab/results/aot_cpu.json \\
        --dataset ../shared/data/{kang_ifnb_pbmc,pbmc3k,pancreas_endocrinogenesis}.h5ad
    python benchmarks/aot.py --table lab/results/aot_cpu.json

The theorem (arXiv 2506.03790) is for tokens that lie in one of several orthogonal subspaces, plus Gaussian noise in
the others. A layer adds `η Σ UUᵀZ φ(ZᵀUUᵀZ)` to the tokens Z, where φ is a softmax whose weights are cut to 0 or τ.
The norm of a token's part in its own subspace, divided by the norm of the rest, then grows by `1 + ητ` in each layer.
The paper itself was not at hand. This is what its abstract and a summary of it report.

Our step also subtracts the token: `η Σ Uᵀ(softmax(wwᵀ/√p)w - w)`. In the regime of the theorem the part in its own
subspace then stays. The rest shrinks by 1 - η at most. So the ratio grows by `1 / (1 - η)` at most. η is the gate
times the mean eigenvalue of UᵀU / ‖U‖². τ is the mean weight that a token has for itself, in its own subspace. Both
steps are also measured in the theorem's mixture, in the shape MIXTURE.

Denoisers are those that blocks.py trained with `--labels none`. Held-out cells get noise of several timesteps.

- "signal" is the true ratio of signal to noise. All cells get the same DRAWS draws of noise. The signal is the
  standard deviation over cells of a cell's mean token. The noise is the standard deviation over the draws of one cell.
  Interactions of cell and draw count as noise.
- "subspace" is the paper's ratio. A token's own subspace is the head with most of its norm. "random" is the control,
  with random subspaces.
- "prediction" is the growth of "signal" from the noisy to the predicted clean cell, by the whole network or by the
  closed form, whose loss is the lowest here.

Untrained networks have the trained gates, and random orthogonal matrices U and D.
"""

import argparse
import copy
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import numpy as np
import torch
from blocks import load_block, read_dataset
from common import add_rows, make_parser, markdown, parse, read_results
from torch import nn

from wbdit_diffusers import WhiteBoxDiTModel
from wbdit_diffusers.interpretation.layers import record_blocks, subspaces_of
from wbdit_diffusers.models.transformer_white_box_dit import BoundedISTA, largest_eigenvalue, orthogonal_
from wbdit_diffusers.sampling import signal_and_noise, to_clean


BLOCKS = ["descent, without ISTA", "descent"]
TIMESTEPS = [99, 299, 499, 699, 899]
CELLS, DRAWS = 100, 16
MIXTURE = {"tokens": 64, "heads": 4, "p": 64, "δ": 0.1, "η": 0.5, "τ": 0.9}


def untrained(denoiser: WhiteBoxDiTModel) -> WhiteBoxDiTModel:
    """The network with random orthogonal matrices in attention and ISTA."""
    control = copy.deepcopy(denoiser)
    torch.manual_seed(0)
    for block in control.blocks:
        orthogonal_(block.attn.subspaces)
        if isinstance(block.ff, BoundedISTA):
            orthogonal_(block.ff.dictionary)
    return control


def signal_to_noise(tokens: torch.Tensor) -> float:
    """The ratio for tokens `(draws, cells, ...)`, from an analysis of their variance."""
    number, of_draw, of_cell = len(tokens), tokens.mean(dim=1, keepdim=True), tokens.mean(dim=0, keepdim=True)
    both = (tokens - of_draw - of_cell + of_draw.mean(dim=0)).var(dim=(0, 1)).sum() * number / (number - 1)
    signal = of_cell[0].var(dim=0).sum() - both / number
    return (signal.clamp(min=1e-12) / tokens.var(dim=0).mean(dim=0).sum()).sqrt().item()


def in_subspaces(tokens: torch.Tensor, subspaces: torch.Tensor) -> torch.Tensor:
    """Squared norms `(heads, tokens)` of tokens `(cells, tokens, hidden)` in subspaces `(heads, p, hidden)`."""
    bases = torch.linalg.qr(subspaces.transpose(1, 2)).Q  # (heads, hidden, p)
    return torch.einsum("bnd,hdp->bnhp", tokens, bases).square().sum(dim=(0, 3)).T


def growth_in(subspaces: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The growth of the paper's ratio, a geometric mean over tokens, and the head of each token."""
    parts = [in_subspaces(tokens, subspaces) for tokens in (before, after)]
    heads = parts[0].argmax(dim=0, keepdim=True)
    own = [part.gather(0, heads)[0] for part in parts]
    rest = [tokens.square().sum(dim=(0, 2)) - part for tokens, part in zip((before, after), own)]
    return ((own[1] / rest[1]).log() - (own[0] / rest[0]).log()).mean().div(2).exp().item(), heads[0]


def measure_layer(block: nn.Module, record: dict[str, torch.Tensor]) -> dict[str, float]:
    """Growth of the ratios in one layer, and the factors that theory predicts from its step size."""
    places = {"start": "attn_input", "attention": "ff_input", "ista": "output"}
    cells = {name: record[key].unflatten(0, (DRAWS, -1)) for name, key in places.items()}
    signal = {name: signal_to_noise(tokens) for name, tokens in cells.items()}
    before, after, subspaces = record["attn_input"], record["ff_input"], subspaces_of(block.attn)
    w = torch.einsum("bnd,hpd->bhnp", before, subspaces)
    attention = (w @ w.transpose(-1, -2) * w.shape[-1] ** -0.5).softmax(-1)
    own, heads = growth_in(subspaces, before, after)
    noise = torch.randn(subspaces.shape, generator=torch.Generator().manual_seed(0))
    u, tokens = block.attn.subspaces, before.shape[1]
    gate = ((after - before).norm() / record["attn_output"].norm()).item()
    step = gate * (u.square().sum() / len(u) / largest_eigenvalue(u)).item()
    tau = attention.diagonal(dim1=-2, dim2=-1).mean(0)[heads, torch.arange(tokens)].mean().item()
    return {
        "attention": signal["attention"] / signal["start"],
        "ista": signal["ista"] / signal["attention"],
        "subspace": own,
        "random": growth_in(noise, before, after)[0],
        "step": step,
        "tau": tau,
        "predicted": 1 + step * tau,
        "limit": 1 / (1 - step),
    }


def measure_mixture() -> Iterator[dict]:
    """The growth of the paper's ratio by the paper's step and by ours, in the mixture of the theorem."""
    n, heads, p, delta, eta, tau = MIXTURE.values()
    torch.manual_seed(0)
    subspaces = torch.linalg.qr(torch.randn(heads * p, heads * p)).Q.unflatten(0, (heads, p))
    own = (torch.arange(n) % heads)[None] == torch.arange(heads)[:, None]  # (heads, tokens)
    w = torch.randn(CELLS, heads, n, p) * torch.where(own, 1, delta)[..., None]
    tokens = torch.einsum("bhnp,hpd->bnd", w, subspaces)
    kept = torch.where((w @ w.transpose(-1, -2)).softmax(-1) > tau, tau, 0.0)
    ours = (w @ w.transpose(-1, -2) * p**-0.5).softmax(-1)
    for name, step, attention in (("step of the paper", kept @ w, kept), ("step of descent", ours @ w - w, ours)):
        after = tokens + eta * torch.einsum("bhnp,hpd->bnd", step, subspaces)
        weight = attention.diagonal(dim1=-2, dim2=-1).mean(0)[own].mean().item()
        row = {"dataset": "mixture of the theorem", "block": name, "seed": 0, "network": "–"}
        row |= {"subspace": growth_in(subspaces, tokens, after)[0], "tau": weight}
        yield row | {"limit": 1 / (1 - eta), "predicted": 1 + eta * weight}


@torch.no_grad()
def measure(dataset: Path, name: str, seed: int, args: argparse.Namespace) -> Iterator[dict]:
    pipe, _, test, _ = read_dataset(dataset, "none", args.work_dir)
    denoiser = load_block(args.work_dir, dataset, "none", name, seed)
    noise = torch.randn(DRAWS, 1, test.values.shape[1], generator=torch.Generator().manual_seed(0))
    networks = {"trained": denoiser, "untrained": untrained(denoiser), "closed form": pipe.gaussian_mixture}
    for (kind, network), timestep in product(networks.items(), TIMESTEPS):
        a, s = signal_and_noise(pipe.scheduler, timestep, noise)
        noisy = (a * test.values[:CELLS] + s * noise).flatten(0, 1)
        is_mixture = kind == "closed form"
        with nullcontext([]) if is_mixture else record_blocks(network) as records:
            output = network(noisy, timestep, return_dict=False)[0]
        clean = to_clean(output, noisy, timestep, pipe.scheduler)
        before, after = (signal_to_noise(part.unflatten(0, (DRAWS, -1))) for part in (noisy, clean))
        facts = {"dataset": dataset.stem, "block": kind if is_mixture else name, "seed": seed, "timestep": timestep}
        facts |= {"network": "–" if is_mixture else kind, "prediction": after / before}
        if is_mixture:
            yield facts
        for layer, record in enumerate(records, start=1):
            yield facts | {"layer": layer} | measure_layer(network.blocks[layer - 1], record)


def table(rows: list[dict]) -> str:
    """Geometric means and standard deviations over layers, timesteps and trainings; then by layer and timestep."""

    def text(own: list[dict], key: str) -> str:
        if key not in own[0]:
            return "–"
        logs = np.log([row[key] for row in own])
        low, middle, high = np.exp(logs.mean() + np.array([-1, 0, 1]) * logs.std())
        return f"{middle:.2f}" if len(own) == 1 else f"{middle:.2f} ({low:.2f}–{high:.2f})"

    groups, places = {}, {}
    for row in rows:
        groups.setdefault((row["dataset"], row["block"], row["network"]), []).append(row)
        if row["network"] == "trained":
            layers = places.setdefault((row["block"], str(row["timestep"])), {})
            layers.setdefault(row["layer"], []).append(row)
    keys = ["attention", "ista", "prediction", "subspace", "random", "limit", "predicted"]
    lines = [[*group, *(text(own, key) for key in keys), text(own, "tau")] for group, own in groups.items()]
    header = ["dataset", "block", "network", "signal: attention", "ISTA", "prediction", "subspace: own", "random"]
    first = markdown([*header, "1 / (1 - η)", "1 + ητ", "τ"], lines)
    lines = [[*key, *(text(own, "attention") for own in layers.values())] for key, layers in places.items()]
    return f"{first}\n\n{markdown(['block', 'timestep', *(f'layer {layer}' for layer in layers)], lines)}"


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="Seeds of the denoiser's training.")
    args = parse(parser, table)
    torch.set_num_threads(1)
    if not read_results(args.output, []):
        add_rows(args.output, measure_mixture())
    for seed, dataset, name in product(args.seeds, args.dataset, BLOCKS):
        done = {(row["dataset"], row["block"], row["seed"]) for row in read_results(args.output, [])}
        if (dataset.stem, name, seed) not in done:
            add_rows(args.output, list(measure(dataset, name, seed, args)))
    print(table(read_results(args.output, [])))


if __name__ == "__main__":
    main()
