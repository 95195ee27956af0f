"""Library sizes: measured on the training cells by label, and drawn for new cells."""

import numpy as np
import torch


QUANTILES = np.linspace(0, 1, 101)


def log_quantiles(library_size: np.ndarray, combination: np.ndarray) -> np.ndarray:
    """
    Quantiles of the log library size `(num_combinations, 101)`, from total counts `(cells,)` and the number of each
    cell's combination of labels `(cells,)`.
    """
    return np.stack(
        [np.quantile(np.log(library_size[combination == i]), QUANTILES) for i in range(combination.max() + 1)]
    )


def draw(
    class_labels: torch.Tensor,
    uniform: torch.Tensor,
    combinations: torch.Tensor,
    frequencies: torch.Tensor,
    quantiles: torch.Tensor,
) -> torch.Tensor:
    """
    Draws library sizes from training cells with the same labels, by inverting their cumulative distribution.

    `class_labels` `(cells, num_label_keys)` are the labels, `uniform` `(cells,)` random numbers in [0, 1). Training
    cells have `combinations` `(num_combinations, num_label_keys)` of labels, with `frequencies` `(num_combinations,)`
    and `quantiles` `(num_combinations, 101)` of the log library size. Returns total counts `(cells,)`.
    """
    same = (class_labels[:, None].cpu() == combinations).all(dim=2).float()  # (cells, combinations)
    # A combination without training cells gets the average over all of them.
    weights = torch.where(same.any(dim=1, keepdim=True), same, frequencies)
    of_cell = weights @ quantiles / weights.sum(dim=1, keepdim=True)  # (cells, 101)
    position = uniform.cpu()[:, None] * (of_cell.shape[1] - 1)
    low = position.floor().long().clamp(max=of_cell.shape[1] - 2)
    return torch.lerp(of_cell.gather(1, low), of_cell.gather(1, low + 1), position - low).squeeze(1).exp()
