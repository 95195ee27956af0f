"""`python -m wbdit_diffusers.training`, `wbdit train` and `training/train.py` are this program."""

import logging
import sys
from collections.abc import Sequence

import torch

from .config import config_from_args
from .processes import TrainingInterrupted, is_first_process, limit_threads
from .train import train


def main(argv: Sequence[str] | None = None, prog: str | None = None):
    """
    Trains as the flags say; see `--help`. A mistake in data or flags ends in one line and exit code 2; SIGTERM and
    Ctrl-C in one that says how to go on, and exit code 143 or 130.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    config = config_from_args(argv, prog)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    for name in ("httpx", "accelerate"):  # each request, and each file of a checkpoint
        logging.getLogger(name).setLevel(logging.WARNING)
    limit_threads()
    try:
        train(None, config)
    except TrainingInterrupted as interrupted:
        _end(f"{prog or 'train'}: interrupted. Run the same command with --resume_from_checkpoint latest to continue.")
        sys.exit(128 + interrupted.signal_number)
    except (MemoryError, torch.OutOfMemoryError) as error:
        _end(f"{prog or 'train'}: out of memory ({error}): lower --train_batch_size or --num_genes.")
        sys.exit(2)
    except (ValueError, OSError) as error:
        _end(f"{prog or 'train'}: {error}")
        sys.exit(2)


def _end(message: str):
    """One line, of several processes only once."""
    if is_first_process():
        print(" ".join(message.split()), file=sys.stderr)


if __name__ == "__main__":
    main()
