"""`megatron-idft realign` from a checkout: python tools/realign_corpus.py --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_idft.cli import main

if __name__ == "__main__":
    sys.exit(main(["realign", *sys.argv[1:]]))
