"""How PyTorch's threads wait for each other."""

import os


SPINS = "5000"  # costs nothing measurable where cores are free (lab/results/busy_cpu.json)


def share_cores():
    """
    Lets the threads of GNU's OpenMP, which PyTorch has on Linux, sleep soon while they wait, instead of keeping a core
    for milliseconds. Beside another training a step takes half as long again otherwise, as the thread waited for
    has no core. OpenMP reads this once, when PyTorch is imported: it has no effect later, and neither where
    `GOMP_SPINCOUNT` or `OMP_WAIT_POLICY` says what the user wants.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
