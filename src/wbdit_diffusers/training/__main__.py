"""`python -m wbdit_diffusers.training`, `wbdit train` and `training/train.py` are this program."""

import logging
import sys
from collections.abc import Sequence

from .config import config_from_args
from .train import train


def main(argv: Sequence[str] | None = None, prog: str | None = None):
    """Trains as the flags say; see `--help`. A mistake in data or flags ends in one line and exit code 2."""
    config = config_from_args(argv, prog)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        train(None, config)
    except (ValueError, OSError) as error:
        print(f"{prog or 'train'}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
