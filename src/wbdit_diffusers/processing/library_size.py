"""Library sizes of the training cells by their labels, to draw others like them."""

import numpy as np
import torch


QUANTILES = np.linspace(0, 1, 101)


def log_quantiles(library_size: np.ndarray, combination: np.ndarray) -> np.ndarray:
    """
    Args:
        library_size (`np.ndarray` of shape `(cells,)`): Total counts.
        combination (`np.ndarray` of shape `(cells,)`): Number of each cell's combination of labels.

    Returns:
        `np.ndarray` of shape `(num_combinations, 101)`: quantiles of the log library size.
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
    Library sizes of training cells with the same labels, by inverting their cumulative distribution.

    Args:
        class_labels (`torch.LongTensor` of shape `(cells, num_label_keys)`): Labels of the cells.
        uniform (`torch.Tensor` of shape `(cells,)`): Random numbers in [0, 1).
        combinations (`torch.LongTensor` of shape `(num_combinations, num_label_keys)`):
            The combinations of labels that training cells have.
        frequencies (`torch.Tensor` of shape `(num_combinations,)`): Their shares.
        quantiles (`torch.Tensor` of shape `(num_combinations, 101)`): Of the log library size.

    Returns:
        `torch.Tensor` of shape `(cells,)`: total counts.
    """
    same = (class_labels[:, None].cpu() == combinations).all(dim=2).float()  # (cells, combinations)
    # For a combination that no training cell has, the average over all.
    weights = torch.where(same.any(dim=1, keepdim=True), same, frequencies)
    of_cell = weights @ quantiles / weights.sum(dim=1, keepdim=True)  # (cells, 101)
    position = uniform.cpu()[:, None] * (of_cell.shape[1] - 1)
    low = position.floor().long().clamp(max=of_cell.shape[1] - 2)
    return torch.lerp(of_cell.gather(1, low), of_cell.gather(1, low + 1), position - low).squeeze(1).exp()
