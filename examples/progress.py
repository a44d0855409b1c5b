"""The progress of a training out of Megatron's log: stdin -> a bar with the time left, and a line for each interval.

    torchrun … -m megatron_idft train … 2>&1 | tee train.log | python examples/progress.py

Not in a terminal: the lines only. Megatron's and torch's own lines go to the log.
"""

import re
import sys
import time

from tqdm import tqdm

INDENT = " " * 8
# Another process may have printed in front of it.
STEP = re.compile(r"sft iteration +(\d+)/ +(\d+) \|(?: source (\S+) \|)?")
VALUES = {"objective": "sft loss", "phi mean": "ddt/phi mean", "phi std": "ddt/phi std"}


def values(line: str) -> str:
    """The values of a line that people follow."""
    found = {name: re.search(rf"\| {key}: (\S+)", line) for name, key in VALUES.items()}
    return "   ".join(f"{name} {float(value[1]):.4f}" for name, value in found.items() if value)


def duration(seconds: float) -> str:
    """35 s, or 2 min 05 s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def main() -> None:
    bar = tqdm(total=None, desc=f"{INDENT}training", unit="step", disable=None, leave=False, delay=0.5)
    first = None  # the step and the time of the first line: what came before was loading
    for line in sys.stdin:
        match = STEP.search(line)
        if match is None:
            continue
        step, steps, source = int(match[1]), int(match[2]), match[3]
        if source is not None:
            bar.write(f"{INDENT}    of source {source}: {values(line)}", file=sys.stdout)
            continue
        first = first or (step, time.monotonic())
        left = ""
        if step > first[0] and step < steps:
            left = f", {duration((time.monotonic() - first[1]) / (step - first[0]) * (steps - step))} left"
        bar.total = steps
        bar.update(step - bar.n)
        bar.write(f"{INDENT}step {step} of {steps}{left}: {values(line)}", file=sys.stdout)
        sys.stdout.flush()
    bar.close()


if __name__ == "__main__":
    main()
