"""Which cells are seen when: the same for any number of processes."""

import numpy as np
import pytest

from wbdit_diffusers.data import BatchSampler, CellOrder


GROUP_SIZES = {
    "one file": np.array([1000]),
    "fewer groups than processes": np.array([500, 31]),
    "many groups": np.array([64] * 15 + [40]),
    "unequal groups": np.array([3, 200, 1, 77, 120, 50]),
}


def order(name: str, **kwargs) -> CellOrder:
    return CellOrder(GROUP_SIZES[name], window_size=150, **kwargs)


def take(order: CellOrder, num_steps: int, batch_size: int, num_processes: int, num_seen: int = 0) -> np.ndarray:
    """The cells of some steps of all processes, `(steps, cells of a step)`."""
    ranks = [iter(BatchSampler(order, batch_size, rank, num_processes, num_seen)) for rank in range(num_processes)]
    batches = [[next(rank) for rank in ranks] for _ in range(num_steps)]
    assert all(len(batch) == batch_size for step in batches for batch in step)  # equal on every process
    return np.array(batches).reshape(num_steps, -1)


@pytest.mark.parametrize("name", GROUP_SIZES)
@pytest.mark.parametrize("num_processes", [1, 2, 3, 4])
def test_every_cell_is_seen_once_in_each_epoch(name, num_processes):
    cells = order(name)
    num_steps = 3 * cells.num_cells // (7 * num_processes) + 1
    seen = take(cells, num_steps, 7, num_processes).ravel()
    for epoch in range(3):
        of_epoch = seen[epoch * cells.num_cells : (epoch + 1) * cells.num_cells]
        assert sorted(of_epoch) == list(range(cells.num_cells))


@pytest.mark.parametrize("name", GROUP_SIZES)
def test_cells_of_a_step_do_not_depend_on_the_number_of_processes(name):
    expected = take(order(name), 50, 24, 1)
    for num_processes in (2, 3, 4):
        np.testing.assert_array_equal(take(order(name), 50, 24 // num_processes, num_processes), expected)


@pytest.mark.parametrize("num_steps", [1, 20, 60])  # 42 steps are an epoch
def test_a_resumed_run_goes_on_with_any_number_of_processes(num_steps):
    whole = take(order("many groups"), 100, 24, 1)
    for before, after in ((1, 4), (4, 1), (2, 3)):
        first = take(order("many groups"), num_steps, 24 // before, before)
        rest = take(order("many groups"), 100 - num_steps, 24 // after, after, num_seen=num_steps * 24)
        np.testing.assert_array_equal(np.concatenate([first, rest]), whole)
    # With other batches too, no cell is lost or doubled.
    other = take(order("many groups"), 300, 5, 3, num_seen=num_steps * 24).ravel()
    np.testing.assert_array_equal(np.concatenate([whole[:num_steps].ravel(), other])[:2000], whole.ravel()[:2000])


def test_the_order_follows_from_seed_and_epoch():
    cells, again, other = order("many groups"), order("many groups"), order("many groups", seed=1)
    np.testing.assert_array_equal(again[1200:1400], cells[1200:1400])  # without what came before
    assert (other[0:1000] != cells[0:1000]).mean() > 0.9
    assert (cells[0:1000] != cells[1000:2000]).mean() > 0.9


def test_cells_in_memory_are_shuffled_whole():
    cells = CellOrder(np.array([1000]), window_size=10)[0:1000]
    assert abs(np.corrcoef(cells, np.arange(1000))[0, 1]) < 0.1


def test_groups_are_shuffled_in_windows():
    """Cells of a batch come from all groups of a window, and only from these: so many are in memory at once."""
    cells = CellOrder(np.full(40, 10), window_size=100)[0:400]
    for start in range(0, 400, 100):
        groups = np.unique(cells[start : start + 100] // 10)
        assert len(groups) == 10
        assert len(np.unique(cells[start : start + 20] // 10)) > 5


def test_no_cells():
    with pytest.raises(ValueError, match="no cells"):
        CellOrder(np.array([0]))
