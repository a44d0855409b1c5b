"""`run SCRIPT.py <its flags>`: a Megatron training script that knows nothing of this package, with the loss."""

import sys
from collections.abc import Sequence

USAGE = """usage: torchrun … -m megatron_idft run [--cpu] SCRIPT.py <the script's flags> --sft-loss idft …

Runs a Megatron training script (Megatron-LM's pretrain_gpt.py or pretrain_hybrid.py, or one of yours in their shape)
unmodified, and adds the flags of the loss to its own: the group "sft loss" of `megatron-idft train --help`. Everything
after SCRIPT.py is the script's. Without --sft-loss the script runs as it is.

  --cpu      run on the CPU with gloo even where a GPU is present; automatic where there is none
  --verbose  show tracebacks"""


def main(argv: Sequence[str]) -> int:
    argv = list(argv)
    force_cpu = argv[:1] == ["--cpu"]
    if force_cpu:
        argv = argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0].startswith("-"):
        print(f"megatron-idft run: expected a script, got {argv[0]}\n\n{USAGE}", file=sys.stderr)
        return 2
    from megatron_idft.integration.platform.local_flags import given_flags
    from megatron_idft.integration.platform.own_tokenizer import own_tokenizer_flags
    from megatron_idft.integration.script import run_script

    flags = [*argv[1:], *own_tokenizer_flags(given_flags(argv[1:]), of_script=True)]
    run_script(argv[0], flags, force_cpu=force_cpu or "--cpu" in flags)
    return 0
