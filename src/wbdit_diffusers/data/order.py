"""In which order cells are trained on: a pure function of seed and epoch, the same for any number of processes.

The cells of all epochs are one endless sequence, in which every cell comes once in each epoch. A batch is a slice of
it, which the processes share by position. So all batches are equal (the last one of an epoch is filled from the next),
no cell is dropped, and all that a resumed run must know is how many cells were seen, be it with other processes or
batches of another size.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler


WINDOW_SIZE = 32_768  # cells that are shuffled among each other, and are in memory at once


class CellOrder:
    """
    The order of the cells of a [`CellSource`]: in each epoch groups are shuffled, neighbours joined to windows, and
    the cells of a window shuffled. Cells in memory are one group, and so are shuffled whole.

    Args:
        group_sizes (`np.ndarray` of shape `(groups,)`): Cells in each group.
        seed (`int`, defaults to 0): Seed of all epochs.
        window_size (`int`, defaults to 32,768): Cells in a window, about.
    """

    def __init__(self, group_sizes: np.ndarray, seed: int = 0, window_size: int = WINDOW_SIZE):
        self.group_sizes, self.seed, self.window_size = np.asarray(group_sizes, dtype=np.int64), seed, window_size
        self.group_starts = np.concatenate([[0], np.cumsum(self.group_sizes)])  # in the source
        self.num_cells = int(self.group_starts[-1])
        if self.num_cells == 0:
            raise ValueError("There are no cells to put in order.")
        self._windows = lru_cache(maxsize=2)(self._windows_of_epoch)
        self._window = lru_cache(maxsize=2)(self._cells_of_window)

    def __getitem__(self, positions: slice) -> np.ndarray:
        """The numbers of the cells from one position of the endless sequence up to another."""
        parts, position = [], positions.start
        while position < positions.stop:
            epoch, offset = divmod(position, self.num_cells)
            _, starts = self._windows(epoch)
            window = int(np.searchsorted(starts, offset, side="right")) - 1
            cells = self._window(epoch, window)[offset - starts[window] :][: positions.stop - position]
            parts.append(cells)
            position += len(cells)
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def _windows_of_epoch(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """The groups of each window, and the position in the epoch at which it begins."""
        groups = np.random.default_rng([self.seed, epoch]).permutation(len(self.group_sizes))
        sizes = self.group_sizes[groups]
        window_of_group = (np.cumsum(sizes) - sizes) // self.window_size
        firsts = np.flatnonzero(np.diff(window_of_group, prepend=-1))
        return np.split(groups, firsts[1:]), (np.cumsum(sizes) - sizes)[firsts]

    def _cells_of_window(self, epoch: int, window: int) -> np.ndarray:
        groups = self._windows(epoch)[0][window]
        cells = np.concatenate([np.arange(self.group_starts[g], self.group_starts[g + 1]) for g in groups])
        return np.random.default_rng([self.seed, epoch, window]).permutation(cells)


def choose_groups(group_sizes: np.ndarray, num_cells: int, seed: int) -> list[int]:
    """Random groups with so many cells or somewhat more, in order: `group_sizes` has the cells of each `(groups,)`."""
    groups = np.random.default_rng(seed).permutation(len(group_sizes))
    enough = int(np.searchsorted(np.cumsum(np.asarray(group_sizes)[groups]), num_cells)) + 1
    return np.sort(groups[:enough]).tolist()


class BatchSampler(Sampler):
    """
    The batches of one process, endlessly; to be given to a DataLoader as `batch_sampler`.

    Args:
        order ([`CellOrder`]): The order of all cells.
        batch_size (`int`): Cells in a batch of each process.
        process_index (`int`, defaults to 0): Which process.
        num_processes (`int`, defaults to 1): Of how many.
        num_seen (`int`, defaults to 0): Cells that all processes together have seen: from where to go on.
    """

    def __init__(
        self, order: CellOrder, batch_size: int, process_index: int = 0, num_processes: int = 1, num_seen: int = 0
    ):
        self.order, self.batch_size, self.num_seen = order, batch_size, num_seen
        self.process_index, self.num_processes = process_index, num_processes

    def __iter__(self) -> Iterator[list[int]]:
        position = self.num_seen + self.process_index * self.batch_size
        while True:
            yield self.order[position : position + self.batch_size].tolist()
            position += self.batch_size * self.num_processes
