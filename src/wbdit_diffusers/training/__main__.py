"""`python -m wbdit_diffusers.training`, which `training/train.py` runs too, is `wbdit train`."""

import sys
from collections.abc import Sequence

from .. import cli


def main(argv: Sequence[str] | None = None):
    """Trains with the flags of `wbdit train`."""
    cli.main(["train", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    main()
