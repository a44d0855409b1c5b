"""The verbs: parse, call, exit code. No arithmetic lives here.

May import every room. Begin with main below; each verb is a file, failures.py says how a verb fails.
"""

import os
import select
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from itertools import takewhile

from megatron_idft import __version__, console
from megatron_idft.errors import VERBOSE

VERBS = {
    "train": "fine-tune on chat records with Megatron's trainer:  torchrun … -m megatron_idft train <Megatron flags>",
    "prepare": "tokenize, mask and pack a corpus once, by many processes, on a CPU",
    "score": "score a corpus under a Megatron model:  torchrun … -m megatron_idft score <Megatron flags>",
    "realign": "rewrite a corpus into a model's own distribution:  torchrun … -m megatron_idft realign <flags>",
    "run": "run a Megatron training script of yours with the loss:  torchrun … -m megatron_idft run SCRIPT.py <flags>",
    "convert": "models between Hugging Face folders and Megatron checkpoints, on the CPU, tensor by tensor",
    "plan": "parameters, memory per rank, flops, time and layouts that fit, from the same flags, without a GPU",
    "init": "copy the launch scripts for one node, Slurm and Kubernetes into a folder",
    "doctor": "check versions, devices and packages; exit 0 only if training can start",
}

VERBOSE_FLAG = "--verbose"
EXIT_CODES = """Exit codes: 0 done. 1 failed while it worked, or the answer is no (`plan`: no fit; `doctor`: cannot
start). 2 flags, files or an installation that cannot be used. 143 stopped by SIGTERM, 130 by
Ctrl-C; in `train` only where a checkpoint holds all that was trained. torchrun makes 1 of all but 0.
An error is one message. `--verbose`, of every verb, or MEGATRON_IDFT_VERBOSE=1 shows tracebacks, and on the console
what Megatron and other libraries print: without it they print to a log file in all verbs but `train` and `run`.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code (EXIT_CODES). Whatever it raises becomes one message (failures.py)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["--version"]:
        print(f"megatron-idft {__version__}")
        return 0
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: megatron-idft VERB ...\n\n" + "\n".join(f"  {verb:8} {help}" for verb, help in VERBS.items()))
        print(f"\n{EXIT_CODES}\nmegatron-idft VERB --help says more.")
        return 0 if argv else 2
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        nearest = get_close_matches(verb, VERBS, n=1)
        meant = f"; did you mean {nearest[0]}?" if nearest else f"; choose one of {', '.join(VERBS)}"
        print(f"megatron-idft: error: there is no verb {verb[:100]!r}{meant}", file=sys.stderr)
        return 2
    if VERBOSE_FLAG in (of_verb := _before_script(rest) if verb == "run" else rest):
        os.environ[VERBOSE] = "1"
        rest = [word for word in of_verb if word != VERBOSE_FLAG] + rest[len(of_verb) :]
    console.forget_log()
    try:
        return int(import_module(f"megatron_idft.cli.{verb}").main(rest))
    except KeyboardInterrupt:
        print(f"megatron-idft {verb}: ended by Ctrl-C", file=sys.stderr, flush=True)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_has_ended():  # such as `--help | head`
            return 1
        from megatron_idft.cli import failures

        return failures.report(verb, error)


def _before_script(words: Sequence[str]) -> list[str]:
    """What comes after it is the script's."""
    return list(takewhile(lambda word: word.startswith("-"), words))


def _reader_has_ended() -> bool:
    """Whether nobody reads standard output; what is left for it is dropped: Python's end would fail on it."""
    output, poll = sys.stdout.fileno(), select.poll()
    poll.register(output, 0)
    if not any(events & select.POLLERR for _, events in poll.poll(0)):
        return False
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, output)
    os.close(nothing)
    return True
