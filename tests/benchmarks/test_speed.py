"""What benchmarks/speed.py measures with; the command itself takes minutes."""

import json
import subprocess
import sys

import numpy as np
import pytest
import speed
import torch
from conftest import ROOT
from reference import ReferenceDiT

from wbdit_diffusers import WhiteBoxDiTModel


@pytest.mark.slow
def test_peak_memory_is_that_of_the_child():
    ballast = np.ones(2**28, dtype=np.uint8)  # 256 MiB that are this process's own
    code = "import time; block = bytearray(b'x') * (64 * 2**20); del block; time.sleep(0.2)"
    peak = speed.peak_memory([sys.executable, "-c", code])
    assert 64 * 2**20 < peak < ballast.nbytes  # also after the block was given back


@pytest.mark.slow
def test_peak_memory_of_a_command_that_fails():
    with pytest.raises(subprocess.CalledProcessError, match="status 3"):
        speed.peak_memory([sys.executable, "-c", "raise SystemExit(3)"])


def test_flop_are_those_of_the_matrix_products():
    layer = torch.nn.Linear(30, 20)
    assert speed.forward_flop(layer, (torch.randn(8, 30),)) == 2 * 8 * 30 * 20


def test_a_third_product_of_ista_is_what_the_reference_has_more():
    """ISTA as it is written has three products of (tokens, dim) with (dim, dim) in each block; ours has two."""
    batch, genes, dim, depth = 2, 60, 32, 2
    inputs = torch.randn(batch, genes), torch.tensor([3, 900])
    shape = {"patch_size": 10, "num_layers": depth, "num_attention_heads": 4, "attention_head_dim": dim // 4}
    ours = WhiteBoxDiTModel(sample_size=genes, **shape, block_type="white_box")
    reference = ReferenceDiT(genes, 10, depth, dim, heads=4)
    tokens = batch * genes // 10
    assert speed.forward_flop(reference, inputs) - speed.forward_flop(ours, inputs) == depth * 2 * tokens * dim**2


def test_closest_depth_has_the_size_of_the_plain_network():
    shape = {"patch_size": 40, "num_attention_heads": 4, "attention_head_dim": 24}
    plain = speed.paper_network(block_type="dit", **shape)
    depth = speed.closest_depth(plain.num_parameters(), lambda model: model.num_parameters(), **shape)
    sizes = {n: speed.paper_network(n, **shape).num_parameters() for n in (depth - 1, depth, depth + 1)}
    assert min(sizes, key=lambda n: abs(sizes[n] - plain.num_parameters())) == depth == 6


def test_tables_of_the_committed_results():
    table = speed.table(json.loads((ROOT / "lab" / "results" / "speed_cpu.json").read_text()))
    assert table.startswith("CPU, torch ")
    assert "### network, batch 16" in table and "### pipeline" in table
    assert "| ours, float32 | 17,926,666 | " in table
