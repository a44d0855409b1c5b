"""`train <Megatron flags>`: fine-tune on chat records with Megatron's trainer."""

from collections.abc import Sequence

USAGE = """usage: torchrun … -m megatron_idft train --sft-data FILE … --tokenizer-model PATH [--sft-loss idft] <flags>

Fine-tunes a Megatron model on chat records. Every flag of Megatron-LM 0.19 is understood; `train --help` lists them
all, in the groups "sft data" and "sft loss" those of this program. Without --sft-loss the loss is Megatron's own
cross-entropy.

  --cpu   run on the CPU with gloo even where a GPU is present; automatic where there is none"""


def main(argv: Sequence[str]) -> int:
    if not argv or list(argv) == ["-h"]:
        print(USAGE)
        return 0 if argv else 2
    from megatron_idft.integration.program import train
    from megatron_idft.integration.script import prepare_process

    prepare_process("megatron-idft train", argv, force_cpu="--cpu" in argv)
    train("megatron-idft train")
    return 0
