"""`python -m megatron_idft VERB …`, also under torchrun, and the console command `megatron-idft`."""

import sys

from megatron_idft.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
