"""Threads that wait do not keep a core from other programs, unless the user wants it so."""

import os
import subprocess
import sys

import pytest


CODE = """
import os, sys
import wbdit_diffusers._threads
assert "torch" in sys.modules, "the package imports PyTorch"
print(os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize(
    ("set_by_user", "expected"),
    [({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_what_the_user_sets_is_kept(set_by_user, expected):
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", CODE]
    printed = subprocess.run(command, env=environment | set_by_user, check=True, capture_output=True, text=True).stdout
    assert printed.strip() == expected


def test_it_is_said_before_pytorch_is_imported():
    code = """
import os, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT")); sys.exit()
sys.meta_path.insert(0, Finder())
import wbdit_diffusers
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert printed.strip() == "5000"
