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

    Args:
        class_labels (`torch.LongTensor` of shape `(cells, num_label_keys)`): Labels of the cells.
        uniform (`torch.Tensor` of shape `(cells,)`): Random numbers in [0, 1).
        combinations (`torch.LongTensor` of shape `(num_combinations, num_label_keys)`):
            Combinations of labels in the training cells.
        frequencies (`torch.Tensor` of shape `(num_combinations,)`): Fraction of training cells with each combination.
        quantiles (`torch.Tensor` of shape `(num_combinations, 101)`): Quantiles of the log library size.

    Returns:
        `torch.Tensor` of shape `(cells,)`: total counts.
    """
    same = (class_labels[:, None].cpu() == combinations).all(dim=2).float()  # (cells, combinations)
    # A combination without training cells gets the average over all of them.
    weights = torch.where(same.any(dim=1, keepdim=True), same, frequencies)
    of_cell = weights @ quantiles / weights.sum(dim=1, keepdim=True)  # (cells, 101)
    position = uniform.cpu()[:, None] * (of_cell.shape[1] - 1)
    low = position.floor().long().clamp(max=of_cell.shape[1] - 2)
    return torch.lerp(of_cell.gather(1, low), of_cell.gather(1, low + 1), position - low).squeeze(1).exp()
