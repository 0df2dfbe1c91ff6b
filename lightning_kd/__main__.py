"""``python -m lightning_kd``: the command line, where its script is not on the path."""

import sys

from lightning_kd.cli import main

if __name__ == "__main__":
    sys.exit(main())
