import pytest
import torch

from wbdit_diffusers.sampling import CellNoise
from wbdit_diffusers.sampling.noise import CELLS_PER_BLOCK


NUM_CELLS = 200  # of four blocks, the last one not full
CPU = torch.device("cpu")


def seeded(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(noise: CellNoise, start: int, stop: int) -> torch.Tensor:
    """What a pipeline draws of a batch: uniform numbers, then normal ones, then others of another type."""
    batch = noise.batch(start, stop)
    numbers = [batch.uniform(2), batch.normal(3, CPU), batch.uniform(2, torch.float64)]
    return torch.cat([values.double() for values in numbers], dim=1)  # (cells, 7)


@pytest.mark.parametrize("batch_size", [1, 37, 64, 100])
def test_batches_never_change_the_numbers(batch_size):
    noise = CellNoise(seeded())
    starts = range(0, NUM_CELLS, batch_size)
    batches = [draw(noise, start, min(start + batch_size, NUM_CELLS)) for start in starts]
    assert torch.equal(torch.cat(batches), draw(CellNoise(seeded()), 0, NUM_CELLS))


def test_numbers_follow_from_the_seed_and_differ_between_cells():
    numbers = draw(CellNoise(seeded()), 0, NUM_CELLS)
    assert torch.equal(numbers, draw(CellNoise(seeded()), 0, NUM_CELLS))
    assert not torch.isclose(numbers, draw(CellNoise(seeded(1)), 0, NUM_CELLS)).any(dim=1).all()
    assert all(len(column.unique()) == NUM_CELLS for column in numbers.T)
    uniform = numbers[:, [0, 1, 5, 6]]
    assert 0 <= uniform.min() < 0.02 and 0.98 < uniform.max() < 1
    assert (uniform.mean(0) - 0.5).abs().max() < 0.1
    assert numbers[:, 2:5].mean(0).abs().max() < 0.3 and (numbers[:, 2:5].std(0) - 1).abs().max() < 0.2


def test_with_a_generator_for_each_cell_every_cell_is_the_first_of_its_own():
    noise = CellNoise([seeded(i) for i in range(5)])
    alone = torch.cat([draw(CellNoise(seeded(i)), 0, 1) for i in range(5)])
    assert torch.equal(draw(noise, 0, 5), alone)
    assert torch.equal(draw(noise, 3, 5), alone[3:])


@pytest.mark.parametrize("start, stop", [(0, 64), (0, 3), (63, 65), (30, 150)])
def test_put_and_take_are_inverse(start, stop):
    batch = CellNoise(seeded()).batch(start, stop)
    first, last = start // CELLS_PER_BLOCK, (stop - 1) // CELLS_PER_BLOCK
    cells = 1 + torch.arange(4.0 * (stop - start)).view(-1, 4)
    blocks = batch.put(cells)
    assert blocks.shape == (last - first + 1, CELLS_PER_BLOCK, 4)
    assert torch.equal(batch.take(blocks), cells)
    assert (blocks != 0).any(dim=2).sum() == stop - start  # and no other cell of the blocks


@pytest.mark.parametrize("max_blocks", [1, 2, 5])
@pytest.mark.parametrize("one_per_cell", [False, True])
def test_parts_tile_the_batch_and_keep_the_numbers(max_blocks, one_per_cell):
    def batch():
        return CellNoise([seeded(i) for i in range(NUM_CELLS)] if one_per_cell else seeded()).batch(30, NUM_CELLS)

    parts = batch().parts(max_blocks)
    assert all(len(part.generators) <= max_blocks for part, _ in parts)
    positions = torch.cat([torch.arange(NUM_CELLS - 30)[rows] for _, rows in parts])
    assert torch.equal(positions, torch.arange(NUM_CELLS - 30))
    assert torch.equal(torch.cat([part.uniform(2) for part, _ in parts]), batch().uniform(2))
