"""Explains a trained pipeline by measurements on held-out cells."""

import anndata as ad
import numpy as np
import torch
from scipy import sparse
from sklearn.metrics import roc_auc_score
from tqdm.auto import tqdm

from ..evaluation.cells import real_cells
from ..evaluation.metrics import rank_markers
from ..models.codec_programs import ProgramCodec
from ..models.gaussian_mixture import GaussianMixtureDenoiser, within_labels
from ..models.transformer_white_box_dit import WhiteBoxDiTModel
from ..pipelines.pipeline_scrna_generation import ScRNAGenerationPipeline
from ..pipelines.programs import add_programs, program_table
from .denoising import measure_explained_variance, measure_program_jacobian, measure_type_stability
from .interventions import fit_gaussian_mixture, hold_program, program_direction, with_denoiser
from .layers import LAYER_TIMESTEPS, measure_layers


TIMESTEPS = list(range(99, 1000, 100))
JACOBIAN_TIMESTEP = 299
NUM_MARKERS = 50
MIN_CELLS = 5  # of a type, for a program to be judged on it
JACOBIAN_CELLS = 500
HELD_ACTIVITIES = [-1.0, 0.0, 1.0, 2.0]
RENOISED_CELLS = 500
HELD_CELLS = 500  # for each activity


def explain(
    pipe: ScRNAGenerationPipeline, train: ad.AnnData, test: ad.AnnData, max_cells: int = 3000, seed: int = 0
) -> tuple[dict, ad.AnnData]:
    """
    Measures a pipeline's programs, layers, denoising and interventions, each next to a control.

    Args:
        pipe ([`ScRNAGenerationPipeline`]): A pipeline with a [`ProgramCodec`] and a [`WhiteBoxDiTModel`].
        train (`AnnData`): Training cells. The closed form is fitted to them.
        test (`AnnData`): Held-out cells. Everything is measured on them.
        max_cells (`int`, defaults to 3000): Maximum number of held-out cells to use.
        seed (`int`, defaults to 0): Seed of all random numbers.

    Returns:
        `tuple[dict, AnnData]`: the report and the held-out cells. The report has `"programs"` (a row for each),
        `"types"` (the best program of each type), and the results of [`measure_layers`],
        [`measure_explained_variance`], [`measure_type_stability`], [`measure_program_jacobian`] and
        [`measure_interventions`] under the functions' names. The cells have programs as generated cells do, and a UMAP
        of their latents in `obsm["X_umap"]`.

    Raises:
        ValueError: If the pipeline has no programs, or no network, or no held-out cell has labels that it knows.
    """
    if not isinstance(pipe.codec, ProgramCodec):
        raise ValueError(f"The pipeline has no gene programs: it was trained with {type(pipe.codec).__name__}.")
    if not isinstance(pipe.denoiser, WhiteBoxDiTModel):
        raise ValueError(f"The pipeline has no network to explain: its denoiser is a {type(pipe.denoiser).__name__}.")
    test = test[pipe.processor.knows_labels(test)]
    if test.n_obs < 20:
        raise ValueError(f"{test.n_obs} held-out cells have labels that the model knows: at least 20 are needed.")
    chosen = np.random.default_rng(seed).permutation(test.n_obs)[:max_cells]
    test, train = test[chosen], train[pipe.processor.knows_labels(train)]
    latents, train_latents = pipe.encode_cells(test), pipe.encode_cells(train)
    labels, train_labels = (
        pipe.processor.encode_labels(cells) if pipe.processor.label_keys else None for cells in (test, train)
    )
    gaussian_mixture = fit_gaussian_mixture(pipe, train)
    denoiser, codec, scheduler = pipe.denoiser.cpu().eval(), pipe.codec, pipe.scheduler
    if pipe.processor.label_keys:
        types, train_types = (
            cells.obs[pipe.processor.label_keys[0]].astype(str).to_numpy() for cells in (test, train)
        )
    else:
        types, train_types = np.full(test.n_obs, ""), np.full(train.n_obs, "")

    few = slice(JACOBIAN_CELLS)
    few_labels = None if labels is None else labels[few]
    denoisers = {"network": denoiser, "closed_form": gaussian_mixture}
    parts = {
        "layers": lambda: measure_layers(denoiser, scheduler, latents, labels, LAYER_TIMESTEPS, seed),
        "explained_variance": lambda: measure_explained_variance(
            denoiser, gaussian_mixture, scheduler, codec, latents, labels, TIMESTEPS, seed
        ),
        "type_stability": lambda: measure_type_stability(
            denoiser, gaussian_mixture, scheduler, codec, (train_latents, train_types), latents[:RENOISED_CELLS], seed
        ),
        "program_jacobian": lambda: {
            "timestep": JACOBIAN_TIMESTEP,
            **{
                name: measure_program_jacobian(
                    one, scheduler, codec, latents[few], few_labels, JACOBIAN_TIMESTEP, seed
                ).tolist()
                for name, one in denoisers.items()
            },
        },
        "interventions": lambda: measure_interventions(
            pipe, gaussian_mixture, latents, labels, train_latents, train_labels, seed
        ),
    }
    with tqdm(total=1 + len(parts), desc="Looking inside", unit=" parts") as progress_bar:
        cells = _cells(pipe, test, latents)
        programs, by_type = describe_programs(pipe, cells, types)
        report = {
            "num_cells": test.n_obs,
            "num_components": gaussian_mixture.config.num_components,
            "label_key": pipe.processor.label_keys[0] if pipe.processor.label_keys else None,
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
    expression = real_cells(test, genes, config.values, config.layer).expression
    cells = ad.AnnData(
        sparse.csr_matrix(expression),
        obs=test.obs[list(pipe.processor.label_keys)].copy(),
        var=test.var.loc[genes, []],
    )
    add_programs(cells, pipe.codec, latents)
    cells.obsm["X_latents"] = latents.cpu().numpy()
    sc.pp.neighbors(cells, n_neighbors=min(15, cells.n_obs - 1), use_rep="X_latents", random_state=0)
    sc.tl.umap(cells, random_state=0)
    return cells


def describe_programs(pipe: ScRNAGenerationPipeline, cells: ad.AnnData, types: np.ndarray) -> tuple[list, list]:
    """
    Describes programs by their genes, and types by their programs.

    Args:
        pipe ([`ScRNAGenerationPipeline`]): The pipeline.
        cells (`AnnData`): Held-out cells, with log expression in `X` and `obsm["X_programs"]`.
        types (`np.ndarray` of shape `(cells,)`): Types of the cells.

    Returns:
        `tuple[list, list]`: a row for each program, with `"mean_activity"` by type, and a row for each type of five or
        more cells. The latter has the program that best separates the type from others, its AUC, the AUC of the second
        program, and how many of the type's 50 markers are among the 50 genes that the program raises most.
    """
    table = program_table(pipe.codec, pipe.processor.var_names)
    activities = cells.obsm["X_programs"]
    names, numbers = np.unique(types, return_counts=True)
    names = [str(name) for name, number in zip(names, numbers) if number >= MIN_CELLS]
    rows = [
        {
            "program": program,
            **{key: float(value) if key == "explained" else value for key, value in row.items()},
            "mean_activity": {name: float(activities[types == name, i].mean()) for name in names},
        }
        for i, (program, row) in enumerate(table.iterrows())
    ]
    weighted = pipe.codec.weighted_loadings.cpu().numpy()
    expression, by_type = cells.X.toarray(), []
    for name in names if len(names) > 1 else []:
        aucs = np.array([roc_auc_score(types == name, activity) for activity in activities.T])
        order = np.argsort(-np.maximum(aucs, 1 - aucs))
        best = int(order[0])
        sign = 1 if aucs[best] >= 0.5 else -1
        markers = rank_markers(expression, types, name)[:NUM_MARKERS]
        top = np.argsort(-sign * weighted[:, best])[:NUM_MARKERS]
        second = float(max(aucs[order[1]], 1 - aucs[order[1]])) if len(order) > 1 else None
        by_type.append(
            {
                "type": name,
                "cells": int((types == name).sum()),
                "program": f"program_{best}",
                "sign": sign,
                "auc": float(max(aucs[best], 1 - aucs[best])),
                "second_auc": second,
                "markers": len(set(markers) & set(top)),
            }
        )
    return rows, by_type


def measure_interventions(
    pipe: ScRNAGenerationPipeline,
    gaussian_mixture: GaussianMixtureDenoiser,
    latents: torch.Tensor,
    class_labels: torch.Tensor | None,
    train_latents: torch.Tensor,
    train_labels: torch.Tensor | None,
    seed: int = 0,
) -> list[dict]:
    """
    Tests whether other programs follow a held program as they do in cells. The two programs that explain most are held
    at -1, 0, 1 and 2 standard deviations.

    Args:
        pipe ([`ScRNAGenerationPipeline`]): The pipeline.
        gaussian_mixture ([`GaussianMixtureDenoiser`]): The closed form, which guides the network and is the control.
        latents (`torch.Tensor` of shape `(cells, num_features)`): Held-out cells. Their regression is the truth.
        class_labels (`torch.LongTensor` of shape `(cells, num_label_keys)`, *optional*): Labels of held-out cells, and
            of the cells that are generated.
        train_latents (`torch.Tensor` of shape `(training cells, num_features)`): Training cells. Their regression is
            the real reference.
        train_labels (`torch.LongTensor` of shape `(training cells, num_label_keys)`, *optional*): Their labels.
        seed (`int`, defaults to 0): Seed of the cells.

    Returns:
        `list[dict]`: a row for each program and source (`"network"`, `"closed_form"`, `"training cells"`). `"held"` is
        the mean deviation of the program from the requested activity. `"slope"` and `"correlation"` compare the
        responses of other programs with their regression on the program among held-out cells of the same labels. The
        slope is 1 in held-out cells, and 0 if a value is merely overwritten.
    """
    rows, codec = [], pipe.codec
    within, train_within = (
        _within_labels(codec.activities(cells).cpu().numpy(), labels)
        for cells, labels in ((latents, class_labels), (train_latents, train_labels))
    )
    num_cells = min(HELD_CELLS, len(latents))
    conditions = {}
    if class_labels is not None:
        conditions = {
            key: [pipe.processor.config.categories[k][code] for code in class_labels[:num_cells, k].tolist()]
            for k, key in enumerate(pipe.processor.label_keys)
        }
    closed_form = with_denoiser(pipe, gaussian_mixture)

    def row(program: int, name: str, responses: np.ndarray, truth: np.ndarray, **more: float) -> dict:
        others = np.arange(len(truth)) != program
        return {
            "program": f"program_{program}",
            "source": name,
            **more,
            "slope": float(responses[others] @ truth[others] / (truth[others] @ truth[others])),
            "correlation": float(np.corrcoef(responses[others], truth[others])[0, 1]),
            "responses": responses.tolist(),
            "regression": truth.tolist(),
        }

    for program in range(min(2, codec.config.num_programs)):
        truth, of_training = (
            cells.T @ cells[:, program] / (cells[:, program] @ cells[:, program]) for cells in (within, train_within)
        )
        rows.append(row(program, "training cells", of_training, truth))
        for name, source in (("network", pipe), ("closed_form", closed_form)):
            means, misses = [], []
            for activity in HELD_ACTIVITIES:
                drawn = source(
                    num_cells=num_cells,
                    conditions=conditions,
                    generator=torch.Generator().manual_seed(seed),
                    output_type="latent",
                    guides=[hold_program(source, gaussian_mixture, program, activity)],
                ).cells
                misses.append((drawn @ program_direction(codec, program) - activity).abs().mean().item())
                means.append(codec.activities(drawn).mean(0).cpu().numpy())
            slopes = np.polyfit(HELD_ACTIVITIES, np.array(means), 1)[0]
            rows.append(row(program, name, slopes, truth, held=float(np.mean(misses))))
    return rows


def _within_labels(activities: np.ndarray, class_labels: torch.Tensor | None) -> np.ndarray:
    if class_labels is None:
        return activities - activities.mean(axis=0)
    return within_labels(activities, np.unique(class_labels.numpy(), axis=0, return_inverse=True)[1].ravel())
