"""Tests whether atoms of ISTA's dictionary match known gene sets more often than neurons of an equal DiT do.

    python benchmarks/gene_sets.py --work_dir WORK --output lab/results/gene_sets_cpu.json \\
        --dataset ../shared/data/{kang_ifnb_pbmc,pbmc3k,pancreas_endocrinogenesis}.h5ad
    python benchmarks/gene_sets.py --table lab/results/gene_sets_cpu.json

Denoisers are those that blocks.py trained with `--labels none`. Both have about 80,000 parameters. A unit is an atom
of a block's dictionary, or a neuron of a block's MLP. Its effect is measured on held-out cells with noise up to
TIMESTEP. Its activation is replaced by the mean over cells. The leading principal component of the change of the
predicted velocity is then decoded into genes. Genes are ranked by the change of their log rate, weighted by its
information.

The TOP genes at either end are compared with the sets below (hypergeometric test, Benjamini-Hochberg over all units,
ends and sets of a network). Controls are 256 random directions in the space of programs, and the programs themselves.
"largest overlap" is the median fraction of a set that one end of a unit has. "sets found" counts those that at least
one unit is enriched in. "sets per unit" is a mean: a unit with one set has a clearer meaning. "nearest program" is the
median of the largest cosine, over genes, between a unit and a program.
"""

import argparse
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import torch
from blocks import load_block, read_dataset
from common import add_rows, make_parser, markdown, parse, read_results
from scipy.stats import false_discovery_control, hypergeom
from torch import nn
from torch.utils.hooks import RemovableHandle

from wbdit_diffusers import WhiteBoxDiTModel
from wbdit_diffusers.interpretation.denoising import add_noise
from wbdit_diffusers.models.transformer_white_box_dit import DiTBlock


BLOCKS = {"atoms of ISTA": "descent", "neurons of the DiT": "dit, as few parameters"}
TIMESTEP, CELLS, TOP, MIN_GENES = 299, 200, 50, 5
SETS = {  # known by heart: Tirosh et al. 2016 for the cell cycle, and usual markers
    "ribosome": "RPL* RPS*",
    "mitochondrion": "MT-*",
    "MHC class II": "HLA-D* CD74 H2-*",
    "interferon": (
        "ISG15 ISG20 IFIT1 IFIT2 IFIT3 IFIT5 IFI6 IFI27 IFI35 IFI44 IFI44L IFITM1 IFITM2 IFITM3 MX1 MX2 OAS1 OAS2 "
        "OAS3 OASL RSAD2 CXCL10 CXCL11 STAT1 STAT2 IRF7 IRF9 HERC5 CMPK2 EPSTI1 XAF1 DDX58 LY6E PLSCR1 SAMD9L TRIM22 "
        "USP18 BST2 TNFSF10"
    ),
    "S phase": (
        "MCM5 PCNA TYMS FEN1 MCM2 MCM4 RRM1 UNG GINS2 MCM6 CDCA7 DTL PRIM1 UHRF1 MLF1IP HELLS RFC2 RPA2 NASP RAD51AP1 "
        "GMNN WDR76 SLBP CCNE2 UBR7 POLD3 MSH2 ATAD2 RAD51 RRM2 CDC45 CDC6 EXO1 TIPIN DSCC1 BLM CASP8AP2 USP1 CLSPN "
        "POLA1 CHAF1B BRIP1 E2F8"
    ),
    "G2 and M phase": (
        "HMGB2 CDK1 NUSAP1 UBE2C BIRC5 TPX2 TOP2A NDC80 CKS2 NUF2 CKS1B MKI67 TMPO CENPF TACC3 FAM64A SMC4 CCNB2 "
        "CKAP2L CKAP2 AURKB BUB1 KIF11 ANP32E TUBB4B GTSE1 KIF20B HJURP CDCA3 HN1 CDC20 TTK CDC25C KIF2C RANGAP1 "
        "NCAPD2 DLGAP5 CDCA2 CDCA8 ECT2 KIF23 HMMR AURKA PSRC1 ANLN LBR CKAP5 CENPE CTCF NEK2 G2E3 GAS2L3 CBX5 CENPA"
    ),
    "cytotoxicity": (
        "GNLY NKG7 GZMA GZMB GZMH GZMK GZMM PRF1 CST7 CTSW KLRD1 KLRB1 KLRG1 FGFBP2 CCL4 CCL5 XCL1 XCL2 FCGR3A SPON2 "
        "CLIC3 HOPX"
    ),
    "immediate early": (
        "FOS FOSB FOSL2 JUN JUNB JUND EGR1 EGR2 EGR3 IER2 IER3 IER5 ATF3 DUSP1 DUSP2 ZFP36 KLF2 KLF4 KLF6 NR4A1 NR4A2 "
        "BTG2"
    ),
    "platelets": (
        "PPBP PF4 GNG11 SDPR ITGA2B TUBB1 CLU GP9 GP1BB SPARC NRGN TREML1 CLDN5 MYL9 ACRBP CD9 MPP1 CA2 TSC22D1"
    ),
    "B cells": (
        "CD79A CD79B MS4A1 CD19 BANK1 TCL1A BLK VPREB3 FCRLA LINC00926 CD37 CD22 PAX5 IGLL5 IGHM IGHD HVCN1 BLNK"
    ),
    "monocytes": (
        "LYZ CD14 S100A8 S100A9 S100A12 FCN1 VCAN CST3 TYROBP FCER1G MS4A6A CSF3R LGALS2 LGALS3 AIF1 CTSS GRN CD68 "
        "CFD SERPINA1 PSAP TYMP LST1 FTL FTH1 CCL2 CCL7 CCL8 SPI1 C5AR1 FPR1"
    ),
    "T cells": (
        "CD3D CD3E CD3G CD2 CD7 IL7R TRAC LCK LTB CCR7 TCF7 LEF1 MAL CD27 CD28 CD8A CD8B CD4 SELL CD5 CD6 CD247"
    ),
    "beta cells": (
        "INS1 INS2 IAPP NNAT PCSK1 PCSK2 SLC2A2 UCN3 MAFA G6PC2 NKX6-1 PDX1 SYTL4 ADRA2A PPP1R1A GNG12 SLC30A8"
    ),
    "alpha cells": "GCG ARX IRX1 IRX2 SLC38A5 TTR PEG10 MAFB GPX3 TMEM27 DPP4 PYY WNK3 TMSB15L",
    "endocrine progenitors": (
        "NEUROG3 NEUROD1 NEUROD2 PAX4 INSM1 SOX4 FEV NKX2-2 BTBD17 GADD45A CCK CHGA CHGB MDK HES6"
    ),
    "ducts": (
        "SPP1 SOX9 HNF1B KRT18 KRT8 KRT19 ANXA2 ANXA5 DBI MGST1 CLU CYR61 1700011H14RIK SPARC VIM CDKN1C BICC1 ID2 ID3"
    ),
}


def find_sets(genes: np.ndarray) -> dict[str, np.ndarray]:
    """Which genes each set has, for sets with enough of them."""
    upper, sets = np.char.upper(genes.astype(str)), {}
    for name, text in SETS.items():
        words = text.split()
        starts = tuple(word[:-1] for word in words if word.endswith("*"))
        found = np.isin(upper, words) | np.array([gene.startswith(starts) if starts else False for gene in upper])
        if found.sum() >= MIN_GENES:
            sets[name] = found
    return sets


def without_unit(module: nn.Module, unit: int) -> RemovableHandle:
    """Sets one unit to its mean over cells, for each token, until the hook is removed."""

    def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[..., unit] = output[..., unit].mean(dim=0, keepdim=True)
        return output

    return module.register_forward_hook(hook)


@torch.no_grad()
def directions_of_units(denoiser: WhiteBoxDiTModel, noisy: torch.Tensor) -> torch.Tensor:
    """The direction in which each unit of each block moves the prediction, `(units, num_features)`."""
    whole, directions = denoiser(noisy, TIMESTEP, return_dict=False)[0], []
    for block in denoiser.blocks:
        module = block.ff.act if isinstance(block, DiTBlock) else block.ff
        number = block.ff.fc1.out_features if isinstance(block, DiTBlock) else len(block.ff.dictionary)
        for unit in range(number):
            hook = without_unit(module, unit)
            change = whole - denoiser(noisy, TIMESTEP, return_dict=False)[0]
            hook.remove()
            if change.norm() > 1e-4 * whole.norm():  # atoms that no cell uses have no effect
                directions.append(torch.linalg.svd(change - change.mean(dim=0), full_matrices=False).Vh[0])
    return torch.stack(directions)


def enrichment(effects: np.ndarray, sets: dict[str, np.ndarray], programs: np.ndarray) -> dict[str, float]:
    """Tests the genes at both ends of each effect `(units, genes)`, and compares it with `programs`."""
    order = np.argsort(effects, axis=1)
    ends = np.stack([order[:, :TOP], order[:, -TOP:]], axis=1)  # (units, 2, TOP)
    hits = np.stack([found[ends].sum(axis=-1) for found in sets.values()], axis=-1)  # (units, 2, sets)
    sizes = np.array([found.sum() for found in sets.values()])
    adjusted = false_discovery_control(hypergeom.sf(hits - 1, effects.shape[1], sizes, TOP), axis=None)
    adjusted = adjusted.reshape(hits.shape)
    enriched = (adjusted < 0.05).any(axis=1)  # (units, sets)
    effects, programs = (values / np.linalg.norm(values, axis=1, keepdims=True) for values in (effects, programs))
    return {
        "units": len(effects),
        "enriched": float(enriched.any(axis=1).mean()),
        "best": float(np.median(adjusted.min(axis=(1, 2)))),
        "overlap": float(np.median((hits / np.minimum(sizes, TOP)).max(axis=(1, 2)))),
        "nearest": float(np.median(np.abs(effects @ programs.T).max(axis=1))),
        "found": int(enriched.any(axis=0).sum()),
        "sets": len(sets),
        "per_unit": float(enriched.sum(axis=1)[enriched.any(axis=1)].mean()) if enriched.any() else 0.0,
    }


@torch.no_grad()
def measure(dataset: Path, seed: int, args: argparse.Namespace) -> Iterator[dict]:
    pipe, _, test, _ = read_dataset(dataset, "none", args.work_dir)
    codec, sets = pipe.codec, find_sets(np.asarray(pipe.processor.var_names))
    noisy = add_noise(test.values[:CELLS], TIMESTEP, pipe.scheduler, seed=0)
    number, loadings = codec.config.num_programs, codec.weighted_loadings.detach()  # (genes, programs)

    def judge(directions: torch.Tensor) -> dict[str, float]:
        effects = loadings @ codec.program_axes @ directions[:, :number].T
        return enrichment(effects.T.numpy(), sets, loadings.T.numpy())

    results = {}
    for name, block in BLOCKS.items():
        denoiser = load_block(args.work_dir, dataset, "none", block, seed)
        results[name] = judge(directions_of_units(denoiser, noisy))
    generator = torch.Generator().manual_seed(seed)
    results["random directions"] = judge(torch.randn(256, number, generator=generator))
    results["programs"] = judge(torch.linalg.inv(codec.program_axes).T)
    for name, result in results.items():
        yield {"dataset": dataset.stem, "seed": seed, "units_of": name, **result}


def table(rows: list[dict]) -> str:
    """Means over trainings."""
    header = ["dataset", "directions", "number", "enriched", "median best p", "largest overlap", "nearest program"]
    formats = {"units": ".0f", "enriched": ".0%", "best": ".1g", "overlap": ".0%", "nearest": ".2f", "found": ".1f"}
    formats |= {"sets": ".0f", "per_unit": ".1f"}
    groups = {}
    for row in rows:
        groups.setdefault((row["dataset"], row["units_of"]), []).append(row)
    lines = [
        [*key, *(format(np.mean([row[name] for row in own]), form) for name, form in formats.items())]
        for key, own in groups.items()
    ]
    return markdown([*header, "sets found", "of", "sets per unit"], lines)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="Seeds of the denoiser's training.")
    args = parse(parser, table)
    torch.set_num_threads(1)
    for seed, dataset in product(args.seeds, args.dataset):
        done = {(row["dataset"], row["seed"]) for row in read_results(args.output, [])}
        if (dataset.stem, seed) not in done:
            add_rows(args.output, list(measure(dataset, seed, args)))
    print(table(read_results(args.output, [])))


if __name__ == "__main__":
    main()
