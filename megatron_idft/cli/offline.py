"""What the verbs have in common that run a model over a corpus: sub-verbs without a model, help, start."""

import argparse
from collections.abc import Callable, Mapping, Sequence

Main = Callable[[Sequence[str]], int]
Program = Callable[[], tuple[Callable[[argparse.ArgumentParser], argparse.ArgumentParser], Callable[[], None]]]


def run_verb(verb: str, argv: Sequence[str], usage: str, without_model: Mapping[str, Main], program: Program) -> int:
    """program: imports what needs torch, and gives (what adds the flags to a parser, what runs)."""
    if not argv:
        print(usage)
        return 2
    if argv[0] in without_model:
        return without_model[argv[0]](argv[1:])
    add_arguments, run = program()
    if "-h" in argv or "--help" in argv:
        parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
        print(usage + "\n\n" + add_arguments(parser).format_help())
        return 0
    from megatron_idft.integration.platform.hf_model import expand
    from megatron_idft.integration.platform.start import prepare_process

    prepare_process(f"megatron-idft {verb}", expand(argv), force_cpu="--cpu" in argv)
    run()
    return 0
