"""`train <Megatron flags>`: fine-tune on chat records with Megatron's trainer."""

import argparse
from collections.abc import Sequence

from megatron_idft.parsing import OF_EVERY_VERB

USAGE = f"""usage: torchrun … -m megatron_idft train --sft-data FILE … --hf-model DIR [--sft-loss idft] <flags>
       torchrun … -m megatron_idft train --sft-data FILE … --load DIR [--tokenizer-model PATH] <model flags> <flags>

Fine-tunes a Megatron model on chat records. Every flag of Megatron-LM 0.19 is understood besides those below. Without
--sft-loss the loss is Megatron's own cross-entropy.

{OF_EVERY_VERB}"""


def print_help() -> None:
    """Only our flags: argparse cannot print Megatron 0.19's, one of whose help texts has a stray percent sign."""
    from megatron_idft.integration.loss.flags import add_arguments
    from megatron_idft.integration.training.arguments import add_data_arguments

    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False, description=None)
    print(USAGE + "\n\n" + add_arguments(add_data_arguments(parser)).format_help())


def main(argv: Sequence[str]) -> int:
    if not argv:
        print(USAGE)
        return 2
    if "-h" in argv or "--help" in argv:
        print_help()
        return 0
    from megatron_idft.integration.platform import early_ending, outcome, signals

    outcome.begin()
    signals.listen(early_ending.before_flags(argv))
    from megatron_idft.integration.platform.hf_model import expand
    from megatron_idft.integration.platform.start import prepare_process
    from megatron_idft.integration.training.program import train

    prepare_process("megatron-idft train", expand(argv), force_cpu="--cpu" in argv)
    train()
    return 0
