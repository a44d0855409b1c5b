"""`plan <training flags>`: what a training needs, before a GPU is touched."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_idft import console
from megatron_idft.errors import ArgumentError
from megatron_idft.parsing import OF_EVERY_VERB

USAGE = f"""usage: megatron-idft plan --gpus N <the flags of `train` or `run`, all of Megatron's and ours>
       megatron-idft plan --gpus N [--gpu h200] [--mfu 0.4] [--json FILE] -- <the same>

Parameters, memory of a rank item by item, flops, tokens a day, batch arithmetic, warnings, and layouts that would fit.
Needs neither torchrun nor a GPU and opens no data. Exit code 0: it fits; 1: it does not; 2: unusable flags.

{OF_EVERY_VERB}"""


def print_help() -> None:
    from megatron_idft.integration.plan.arguments import add_plan_arguments

    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False, description=None)
    print(USAGE + "\n\n" + add_plan_arguments(parser).format_help())
    print("Every other flag is that of `megatron-idft train --help` or of Megatron-LM.")


def main(argv: Sequence[str]) -> int:
    if not argv:
        raise ArgumentError("pass --gpus N and the flags of the training; `megatron-idft plan --help` lists them")
    if "-h" in argv or "--help" in argv:
        print_help()
        return 0
    with console.quiet("plan"):
        from megatron_idft.integration.plan.request import plan_from_flags
        from megatron_idft.planning.numbers import as_json
        from megatron_idft.planning.text import format_plan

        plan, target = plan_from_flags(argv)
    print(format_plan(plan))
    if target is not None:
        Path(target).write_text(json.dumps(as_json(plan), indent=1) + "\n", encoding="utf-8")
        print(f"\n{target}", file=sys.stderr)
    return 0 if plan.fits else 1
