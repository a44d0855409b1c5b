"""`megatron-idft realign FLAGS`, which fails at its first chunk, as a bug would."""

import sys

from megatron_idft.cli import main
from megatron_idft.hinted_decoding.stages.pipeline import Realigner


def fail(*_):
    raise ZeroDivisionError("of mine")


Realigner.realign_chunks = fail
sys.exit(main(["realign", *sys.argv[1:]]))
