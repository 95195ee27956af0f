"""Random numbers that belong to a cell, regardless of the batch it is in."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor


CELLS_PER_BLOCK = 64


class CellNoise:
    """
    Random numbers that depend on the seed and on the cell's number alone, so that the batch size never changes a cell.

    Cells are drawn in fixed blocks, each with a generator of its own; a batch works on every block that it touches
    (see [`NoiseBatch`]). With a list of generators, one for each cell, each cell is the first of its block. Without
    a generator, PyTorch's own one gives the seed.
    """

    def __init__(self, generator: torch.Generator | list[torch.Generator] | None = None):
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.randint(2**31, (1,))))
        self.one_per_cell = isinstance(generator, list)
        generators = generator if isinstance(generator, list) else [generator]
        self.device = generators[0].device
        # The seeds that give the same cells again: none if a generator was used before
        self.initial_seeds = [one.initial_seed() for one in generators]
        fresh = [torch.Generator(self.device).manual_seed(seed) for seed in self.initial_seeds]
        if any(not torch.equal(one.get_state(), new.get_state()) for one, new in zip(generators, fresh)):
            self.initial_seeds = []
        self.seeds = [int(torch.randint(2**62, (1,), generator=one, device=self.device)) for one in generators]

    def batch(self, start: int, stop: int) -> "NoiseBatch":
        """The random numbers of the cells from `start` to `stop`, and their names, which differ between seeds."""
        of_names = self.initial_seeds or self.seeds
        if self.one_per_cell:
            seeds = self.seeds[start:stop]
            rows = torch.arange(stop - start) * CELLS_PER_BLOCK
            names = [f"wbdit_{seed}_0" for seed in of_names[start:stop]]
        else:
            first_block = start // CELLS_PER_BLOCK
            seeds = [self.seeds[0] + block for block in range(first_block, math.ceil(stop / CELLS_PER_BLOCK))]
            rows = torch.arange(start, stop) - first_block * CELLS_PER_BLOCK
            names = [f"wbdit_{of_names[0]}_{number}" for number in range(start, stop)]
        return NoiseBatch([torch.Generator(self.device).manual_seed(seed) for seed in seeds], rows, names)


@dataclass
class NoiseBatch:
    """
    The random numbers of one batch of cells, drawn for whole blocks, `(blocks, CELLS_PER_BLOCK, values)`. For that
    shape Diffusers' `randn_tensor`, and so the `step` of every scheduler, takes one generator per block.
    """

    generators: list[torch.Generator]  # one for each block that the batch touches
    rows: torch.Tensor  # places of the batch's own cells in these blocks, (cells,)
    names: Sequence[str] = ()  # of the batch's own cells

    def normal(self, num_values: int, device: torch.device) -> torch.Tensor:
        """Gaussian numbers of the batch's cells, `(cells, num_values)` in float32."""
        shape = (len(self.generators), CELLS_PER_BLOCK, num_values)
        return self.take(randn_tensor(shape, generator=self.generators, device=device, dtype=torch.float32))

    def uniform(self, num_values: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Numbers in [0, 1) of the batch's cells, `(cells, num_values)`."""
        size = (CELLS_PER_BLOCK, num_values)
        draws = [torch.rand(size, generator=one, device=one.device, dtype=dtype) for one in self.generators]
        return torch.cat(draws)[self.rows.to(self.generators[0].device)]

    def take(self, blocks: torch.Tensor) -> torch.Tensor:
        """The batch's cells out of whole blocks: `(cells, values)`."""
        return blocks.flatten(0, 1)[self.rows.to(blocks.device)]

    def put(self, cells: torch.Tensor) -> torch.Tensor:
        """The batch's cells `(cells, values)` at their places in whole blocks; zeros elsewhere. In float32."""
        blocks = cells.new_zeros(len(self.generators) * CELLS_PER_BLOCK, cells.shape[1], dtype=torch.float32)
        blocks = blocks.index_copy(0, self.rows.to(cells.device), cells.float())
        return blocks.view(len(self.generators), CELLS_PER_BLOCK, -1)  # (blocks, CELLS_PER_BLOCK, values)

    def parts(self, max_blocks: int) -> list[tuple["NoiseBatch", slice]]:
        """The same random numbers a few blocks at a time, each part with the positions of its cells in the batch."""
        parts, first_cell = [], 0
        for first in range(0, len(self.generators), max_blocks):
            generators = self.generators[first : first + max_blocks]
            rows = self.rows - first * CELLS_PER_BLOCK
            rows = rows[(rows >= 0) & (rows < len(generators) * CELLS_PER_BLOCK)]
            parts.append((NoiseBatch(generators, rows), slice(first_cell, first_cell + len(rows))))
            first_cell += len(rows)
        return parts
