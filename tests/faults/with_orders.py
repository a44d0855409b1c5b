"""`megatron_idft` in a forked rank that takes its faults from a folder: `-m faults.with_orders FOLDER train …`."""

import os
import sys

from launch import ROOT
from megatron_idft.cli import main

if __name__ == "__main__":
    os.environ["FAULTS"] = sys.argv[1]
    sys.path.insert(0, str(ROOT / "tests" / "faults"))
    sys.exit(main(sys.argv[2:]))
