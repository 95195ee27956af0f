"""Explains a trained pipeline by measurements on held-out cells."""

import anndata as ad
import numpy as np
import torch
from scipy import sparse
from sklearn.metrics import roc_auc_score
from torch import nn
from tqdm.auto import tqdm

from ..evaluation.cells import combined_labels, real_cells
from ..evaluation.metrics import rank_markers
from ..hub.facts import read_warning
from ..models.codec_programs import ProgramCodec
from ..models.gaussian_mixture import within_labels
from ..models.transformer_white_box_dit import WhiteBoxDiTModel
from ..pipelines import ScRNAGenerationPipeline
from ..pipelines.programs import add_programs, program_table
from .condition import measure_condition
from .denoising import measure_explained_variance, measure_type_stability
from .interventions import fit_gaussian_mixture, hold_program, program_direction, with_denoiser
from .layers import LAYER_TIMESTEPS, measure_layers


NUM_MARKERS = 50
MIN_CELLS = 5  # of a type, for a program to be judged on it
FEW_CELLS = 500  # for the slow parts, and to generate at each held activity
HELD_ACTIVITIES = [-1.0, 0.0, 1.0, 2.0]


def explain(
    pipe: ScRNAGenerationPipeline, train: ad.AnnData, test: ad.AnnData, max_cells: int = 3000, seed: int = 0
) -> tuple[dict, ad.AnnData]:
    """
    Measures a pipeline's programs, layers, denoising and interventions, each next to a control.

    The pipeline has a [`ProgramCodec`] and a [`WhiteBoxDiTModel`]. The closed form is fitted to the cells of `train`.
    Everything is measured on at most `max_cells` held-out cells of `test`.

    Returns:
        `tuple[dict, AnnData]`: the report and the held-out cells, with programs as generated cells have them, and a
        UMAP of their latents in `obsm["X_umap"]`. The report has

        - `"warning"`: why the pipeline is not fit for use, if its folder says so, or `""`;
        - `"programs"`: their genes and mean activities; `"types"`: the program that best separates each type;
        - `"layers"`: what each layer of the trained and of an untrained network does, by timestep;
        - `"explained_variance"`: how well network and closed form predict the programs of noisy cells;
        - `"type_stability"`: how many cells change their type if noise is added up to a timestep and removed again;
        - `"interventions"`: whether other programs follow a held program as they do in held-out cells (slope 1);
        - `"condition"`: how the second label key acts in each type ([`measure_condition`]), or `None`.

    Raises a `ValueError` if the pipeline has no programs or network, or under 20 held-out cells have known labels.
    """
    if not isinstance(pipe.codec, ProgramCodec):
        raise ValueError(f"The pipeline has no gene programs: it was trained with {type(pipe.codec).__name__}.")
    if not isinstance(pipe.denoiser, WhiteBoxDiTModel):
        raise ValueError(f"The pipeline has no network to explain: its denoiser is a {type(pipe.denoiser).__name__}.")
    train, test = (pipe.processor.source(cells).read() for cells in (train, test))
    test = test[pipe.processor.knows_labels(test)]
    if test.n_obs < 20:
        raise ValueError(f"{test.n_obs} held-out cells have labels that the model knows: at least 20 are needed.")
    chosen = np.random.default_rng(seed).permutation(test.n_obs)[:max_cells]
    test, train = test[chosen], train[pipe.processor.knows_labels(train)]
    latents, train_latents = pipe.encode_cells(test), pipe.encode_cells(train)
    label_keys = list(pipe.processor.label_keys)
    labels = pipe.processor.encode_labels(test) if label_keys else None
    types, train_types = (combined_labels(cells, label_keys[:1]) for cells in (test, train))
    gaussian_mixture, network = fit_gaussian_mixture(pipe, train), pipe.denoiser.cpu().eval()
    denoisers: dict[str, nn.Module] = {"network": network, "closed_form": gaussian_mixture}
    parts = {
        "layers": lambda: measure_layers(network, pipe.scheduler, latents, labels, LAYER_TIMESTEPS, seed),
        "explained_variance": lambda: measure_explained_variance(denoisers, pipe, latents, labels, seed),
        "type_stability": lambda: measure_type_stability(
            denoisers, pipe, latents[:FEW_CELLS], train_latents, train_types, seed
        ),
        "interventions": lambda: measure_interventions(
            denoisers, pipe, [(test, latents), (train, train_latents)], seed
        ),
        "condition": lambda: measure_condition(
            pipe, gaussian_mixture, train_latents, pipe.processor.encode_labels(train), seed
        ),
    }
    with tqdm(total=1 + len(parts), desc="Looking inside", unit=" parts") as progress_bar:
        cells = _cells(pipe, test, latents)
        programs, by_type = describe_programs(pipe, cells, types)
        report = {
            "num_cells": test.n_obs,
            "num_components": gaussian_mixture.config.num_components,
            "label_key": label_keys[0] if label_keys else None,
            "warning": read_warning(pipe.config.get("_name_or_path") or ""),
            "programs": programs,
            "types": by_type,
        }
        progress_bar.update()
        for name, measure in parts.items():
            report[name] = measure()
            progress_bar.update()
    return report, cells


def _cells(pipe: ScRNAGenerationPipeline, test: ad.AnnData, latents: torch.Tensor) -> ad.AnnData:
    """The held-out cells with the modelled genes as log expression, their programs and a UMAP of their latents."""
    import scanpy as sc  # slow to import

    config, genes = pipe.processor.config, pipe.processor.var_names
    expression = sparse.csr_matrix(real_cells(test, genes, config.values, config.layer).expression)
    cells = ad.AnnData(expression, obs=test.obs[list(config.label_keys)].copy(), var=test.var.loc[genes, []])
    add_programs(cells, pipe.codec, latents)
    cells.obsm["X_latents"] = latents.cpu().numpy()
    sc.pp.neighbors(cells, n_neighbors=min(15, cells.n_obs - 1), use_rep="X_latents", random_state=0)
    sc.tl.umap(cells, random_state=0)
    return cells


def describe_programs(pipe: ScRNAGenerationPipeline, cells: ad.AnnData, types: np.ndarray) -> tuple[list, list]:
    """
    A row for each program, and one for each type of five or more cells: the program that best separates it from other
    types, and how many of its 50 markers are among the 50 genes that the program raises most (or lowers).
    """
    table = program_table(pipe.codec, pipe.processor.var_names).to_dict("index")
    activities, expression = cells.obsm["X_programs"], cells.X.toarray()
    weighted = pipe.codec.weighted_loadings.cpu().numpy()
    names, numbers = np.unique(types, return_counts=True)
    names = [str(name) for name in names[numbers >= MIN_CELLS]]
    rows, by_type = [], []
    for i, (program, row) in enumerate(table.items()):
        means = {name: float(activities[types == name, i].mean()) for name in names}
        rows.append({"program": program, **row, "mean_activity": means})
    for name in names if len(names) > 1 else []:
        aucs = np.array([roc_auc_score(types == name, activity) for activity in activities.T])
        separation = np.maximum(aucs, 1 - aucs)
        best, *others = np.argsort(-separation)
        sign = 1 if aucs[best] >= 0.5 else -1
        markers = rank_markers(expression, types, name)[:NUM_MARKERS]
        top = np.argsort(-sign * weighted[:, best])[:NUM_MARKERS]
        row = {
            "type": name,
            "cells": int((types == name).sum()),
            "program": f"program_{best}",
            "sign": sign,
            "auc": float(separation[best]),
            "second_auc": float(separation[others[0]]) if others else None,
            "markers": len(set(markers) & set(top)),
        }
        by_type.append(row)
    return rows, by_type


def measure_interventions(
    denoisers: dict[str, nn.Module], pipe: ScRNAGenerationPipeline, sides: list, seed: int = 0
) -> list[dict]:
    """
    Holds each of the first two programs at some activities. Compares the responses of the other programs with their
    regression on it among held-out cells of the same labels. The regression among training cells is the reference.
    `sides` are held-out and training cells, each with its latents `(cells, num_features)`.
    """
    rows, codec, label_keys = [], pipe.codec, list(pipe.processor.label_keys)
    within, train_within = (
        within_labels(codec.activities(latents).cpu().numpy(), combined_labels(cells, label_keys))
        for cells, latents in sides
    )
    test = sides[0][0][:FEW_CELLS]
    conditions = {key: test.obs[key].astype(str).tolist() for key in label_keys}
    for program in range(min(2, codec.config.num_programs)):
        truth, of_training = (
            cells.T @ cells[:, program] / (cells[:, program] @ cells[:, program]) for cells in (within, train_within)
        )
        responses, held = {"training cells": of_training}, {}
        for name, denoiser in denoisers.items():
            source, means, misses = with_denoiser(pipe, denoiser), [], []
            for activity in HELD_ACTIVITIES:
                drawn = source(
                    num_cells=test.n_obs,
                    conditions=conditions,
                    generator=torch.Generator().manual_seed(seed),
                    output_type="latent",
                    guides=[hold_program(source, denoisers["closed_form"], program, activity)],
                ).cells
                misses.append((drawn @ program_direction(codec, program) - activity).abs().mean().item())
                means.append(codec.activities(drawn).mean(0).cpu().numpy())
            responses[name] = np.polyfit(HELD_ACTIVITIES, np.array(means), 1)[0]
            held[name] = {"held": float(np.mean(misses))}
        others = np.arange(len(truth)) != program
        for name, values in responses.items():
            row = {"program": f"program_{program}", "source": name, **held.get(name, {})}
            row["slope"] = float(values[others] @ truth[others] / (truth[others] @ truth[others]))
            row["correlation"] = float(np.corrcoef(values[others], truth[others])[0, 1])
            rows.append(row | {"responses": values.tolist(), "regression": truth.tolist()})
    return rows
