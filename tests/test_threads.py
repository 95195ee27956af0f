"""Threads that wait do not keep a core from other programs, unless the user wants it so."""

import os
import subprocess
import sys

import pytest


# OpenMP reads the variable when PyTorch is imported: what it is then is printed, and nothing without that import.
CODE = """
import os, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            sys.exit()
sys.meta_path.insert(0, Finder())
import wbdit_diffusers
"""


@pytest.mark.parametrize(
    ("set_by_user", "expected"),
    [({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_it_is_said_before_pytorch_is_imported_and_what_the_user_sets_is_kept(set_by_user, expected):
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", CODE]
    printed = subprocess.run(command, env=environment | set_by_user, check=True, capture_output=True, text=True).stdout
    assert printed.strip() == expected
