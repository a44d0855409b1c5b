"""Shared by the verbs that run a model over a corpus: sub-verbs without a model, help, start."""

from argparse import SUPPRESS, ArgumentParser
from collections.abc import Callable, Mapping, Sequence

from megatron_idft import console

Main = Callable[[Sequence[str]], int]


def run_verb(
    verb: str,
    argv: Sequence[str],
    usage: str,
    without_model: Mapping[str, Main],
    add_arguments: Callable[[ArgumentParser], ArgumentParser],
    run: Callable[[], None],
) -> int:
    """Run a sub-verb, print the help, or prepare this process and run the program.

    Args:
        verb: the name, as in `megatron-idft VERB`.
        argv: the words after it.
        usage: the first lines of the help.
        without_model: the sub-verbs by name.
        add_arguments: adds the program's flags to a parser.
        run: the program. It may import torch, and reads `sys.argv`.

    Returns:
        the exit code.
    """
    if not argv:
        print(usage)
        return 2
    if argv[0] in without_model:
        return without_model[argv[0]](argv[1:])
    if "-h" in argv or "--help" in argv:
        parser = ArgumentParser(usage=SUPPRESS, add_help=False)
        print(usage + "\n\n" + add_arguments(parser).format_help())
        return 0
    with console.quiet(verb):
        from megatron_idft.integration.platform.hf_model import expand
        from megatron_idft.integration.platform.start import prepare_process

        prepare_process(f"megatron-idft {verb}", expand(argv), force_cpu="--cpu" in argv)
        run()
    return 0
