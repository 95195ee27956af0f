"""Recovers integer counts from log-normalised values.

A file of `log(1 + counts * s)` with one factor `s` per cell (`target_sum / library size`, or a size factor) determines
its counts, for any base of the logarithm. Rounding must not be too coarse. The smallest values of a cell leave
a few candidates for `s`, and each larger value makes `s` more precise.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from ..data.cells import MAX_LOG_VALUE


LN_BASES = {"e": 1.0, "2": math.log(2), "10": math.log(10)}
FLOAT32 = 2.0**-24  # half of a unit in the last place, relative
MAX_SMALLEST_COUNT = 64
MIN_VALUES = 50  # non-zero values of the median cell: fewer fit by chance
MIN_SHARE = 0.99  # fraction of cells whose counts must be found
MAX_SHARE_OF_LARGER_SMALLEST = 0.1  # fraction of cells without a count of 1: halves of counts would come out doubled
COMMON_TARGETS = (1e4, 1e6, 1e5, 1e3)


@dataclass(frozen=True)
class LogScale:
    """`log(1 + counts * s) / ln_base` with `s = target_sum / library_size`, or the same `factor` in all cells."""

    ln_base: float  # natural logarithm of the base
    target_sum: float | None = None  # library size to which cells were scaled, if they were
    factor: float | None = None  # of all cells, if they were not scaled
    knows_library_size: bool = False  # target_sum / s, with genes that the file lacks; else the sum of the counts
    decimals: int | None = None  # to which values were rounded

    def apply(self, counts: sparse.csr_matrix, library_size: np.ndarray) -> sparse.csr_matrix:
        """Puts counts `(cells, genes)` on the scale of the file, in float32."""
        s = np.full(counts.shape[0], self.factor) if self.target_sum is None else self.target_sum / library_size
        values = sparse.csr_matrix(sparse.diags_array(s) @ counts.astype(np.float64))
        values.data = np.log1p(values.data) / self.ln_base
        if self.decimals is not None:
            values.data = values.data.round(self.decimals)
        return values.astype(np.float32)

    def describe(self) -> str:
        """The scale in words, for a message."""
        base = next(name for name, ln_base in LN_BASES.items() if ln_base == self.ln_base)
        scaled = "" if self.target_sum is None else f" of counts scaled to {self.target_sum:,.0f} per cell"
        return f"logarithms to base {base}{scaled}"


def find_log_scale(matrix: sparse.csr_matrix, max_cells: int = 400) -> LogScale | None:
    """The scale of log values `(cells, genes)` of all genes. `None` if they are not log-normalised counts."""
    cells = np.flatnonzero(np.diff(matrix.indptr) > 0)
    if not len(cells) or matrix.data.max() > MAX_LOG_VALUE or np.median(np.diff(matrix.indptr)[cells]) < MIN_VALUES:
        return None
    cells = cells[np.linspace(0, len(cells) - 1, min(max_cells, len(cells))).astype(int)]
    some_values = matrix.data[:: max(1, len(matrix.data) // 20_000)].astype(np.float64)
    if np.mean(some_values == np.rint(some_values)) > MIN_SHARE:  # whole numbers are not logarithms
        return None
    decimals = _decimals(some_values)
    values = np.split(matrix.data, matrix.indptr[1:-1])  # of each cell
    few = cells[:: max(1, len(cells) // 50)]
    found = {
        ln_base: sum(cell_counts(values[cell], ln_base, decimals) is not None for cell in few)
        for ln_base in LN_BASES.values()
    }
    ln_base = max(found, key=lambda ln_base: found[ln_base])
    results = [result for cell in cells if (result := cell_counts(values[cell], ln_base, decimals))]
    if len(results) < MIN_SHARE * len(cells):
        return None
    if np.mean([counts.min() > 1 for counts, _ in results]) > MAX_SHARE_OF_LARGER_SMALLEST:
        return None
    totals, factors = np.array([counts.sum() for counts, _ in results]), np.array([s for _, s in results])
    if np.ptp(factors) < 1e-5 * factors.mean():
        return LogScale(ln_base, factor=float(factors.mean()), decimals=decimals)
    sums = factors * totals
    if np.ptp(sums) < 1e-3 * sums.mean():  # no gene is missing
        middle = float(np.median(sums))
        target = next((target for target in COMMON_TARGETS if abs(middle / target - 1) < 1e-4), middle)
        return LogScale(ln_base, target, None, True, decimals)
    for target in COMMON_TARGETS:  # genes are missing, but library sizes are whole numbers
        libraries = target / factors
        if (np.abs(libraries - np.rint(libraries)) < 0.02).all() and (libraries > totals - 0.5).all():
            return LogScale(ln_base, target, None, True, decimals)
    return LogScale(ln_base, float(np.median(factors) * np.median(totals)), None, False, decimals)


def recover_counts(matrix: sparse.csr_matrix, scale: LogScale) -> tuple[sparse.csr_matrix, np.ndarray, np.ndarray]:
    """Returns counts (CSR, float32), library sizes `(cells,)`, and a mask `(cells,)` of cells with counts found."""
    counts, found = matrix.astype(np.float32), np.zeros(matrix.shape[0], dtype=bool)
    library_size = np.zeros(matrix.shape[0])
    for cell, values in enumerate(np.split(matrix.data, matrix.indptr[1:-1])):
        result = cell_counts(values, scale.ln_base, scale.decimals)
        if result is not None:
            counts.data[matrix.indptr[cell] : matrix.indptr[cell + 1]], s = result
            target = scale.target_sum if scale.knows_library_size else None
            library_size[cell] = result[0].sum() if target is None else np.rint(target / s)
            found[cell] = True
    return counts, library_size, found


def cell_counts(values: np.ndarray, ln_base: float, decimals: int | None) -> tuple[np.ndarray, float] | None:
    """The counts of one cell's log values, and the factor `s` of its [`LogScale`]. `None` if there are none."""
    if not len(values):
        return None
    unique, inverse = np.unique(values.astype(np.float64), return_inverse=True)
    scaled = np.expm1(unique * ln_base)  # counts * s, ascending
    # Largest error of a value: two units of float32 in the logarithm, and one in its argument 1 + y
    value_error = FLOAT32 * (2 * unique + 1 / ln_base) + (0.5 * 10.0**-decimals if decimals is not None else 0)
    relative_error = value_error * ln_base * (1 + scaled) / scaled + 2 * FLOAT32
    for smallest in range(1, MAX_SMALLEST_COUNT + 1):
        result = _try_smallest(scaled, relative_error, smallest)
        if result is None:
            continue
        counts, s, error_of_s, num_certain = result
        back = np.log1p(counts * s) / ln_base
        slack = 2 * (value_error + (error_of_s + 2 * FLOAT32) / ln_base)
        slack[num_certain:] += 0.5 * s / (1 + scaled[num_certain:]) / ln_base  # nearly any integer fits
        if (np.abs(back - unique) <= slack).all():
            return counts[inverse], s
    return None


def _try_smallest(
    scaled: np.ndarray, relative_error: np.ndarray, smallest: int
) -> tuple[np.ndarray, float, float, int] | None:  # counts, s, its relative error, and the number of certain counts
    """Finds the counts, given the smallest one. From small to large, each must fit, and makes `s` more precise."""
    s, error_of_s, num_certain = scaled[0] / smallest, relative_error[0], 0
    counts = np.zeros(len(scaled))
    while num_certain < len(scaled):
        certain = (scaled / s) * (relative_error + error_of_s) < 0.2  # only one integer is near enough
        reach = len(scaled) if certain.all() else int(np.argmin(certain))
        if reach <= num_certain:
            break
        quotient = scaled[:reach] / s
        counts[:reach] = np.rint(quotient)
        off = np.abs(quotient - counts[:reach])
        tolerance = np.maximum(quotient * (relative_error[:reach] + error_of_s), 1e-9)
        if (counts[:reach] < 1).any() or (off > tolerance).any():
            return None
        weight = 1 / (relative_error[:reach] * scaled[:reach]) ** 2
        s = (weight * counts[:reach] * scaled[:reach]).sum() / (weight * counts[:reach] ** 2).sum()
        error_of_s = min(error_of_s, 2 / math.sqrt((1 / relative_error[:reach] ** 2).sum()) + 0.5 * FLOAT32)
        num_certain = reach
    if num_certain == 0:
        return None
    counts[num_certain:] = np.rint(scaled[num_certain:] / s)
    return counts, s, error_of_s, num_certain


def _decimals(values: np.ndarray) -> int | None:
    """The decimals to which values were rounded, if fewer than float32 holds."""
    coarsest = 4 * FLOAT32 * np.abs(values).max(initial=0)
    tolerance = 2 * FLOAT32 * np.abs(values) + 1e-12
    possible = (decimals for decimals in range(1, 7) if 0.5 * 10.0**-decimals > coarsest)
    return next((n for n in possible if (np.abs(values - values.round(n)) <= tolerance).all()), None)
