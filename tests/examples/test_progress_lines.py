"""The lines that the examples show of a training: one for each interval, and one for each source, by its name."""

import subprocess
import sys

from megatron_idft.integration.loss.metrics import format_report
from tests.launch import ROOT

SCALARS = {"sft loss": 1.25, "sft weight mean": 0.5, "ddt/phi mean": -0.1, "ddt/phi std": 2.0, "trained tokens": 9}


def shown(*lines: str) -> list[str]:
    program = [sys.executable, ROOT / "examples" / "progress.py"]
    text = "".join(f"{line}\n" for line in lines)
    done = subprocess.run(program, input=text, capture_output=True, text=True, check=True)
    assert not done.stderr  # no bar outside a terminal
    return done.stdout.splitlines()


def test_each_source_is_named():
    head = f"iteration {50:8d}/{500:8d}"
    whole, own, other = shown(
        "Megatron's own line",
        format_report(head, SCALARS),
        *(format_report(f"{head} | source {name}", SCALARS) for name in ("own", "b")),
    )
    assert whole.endswith("step 50 of 500: objective 1.2500   phi mean -0.1000   phi std 2.0000")
    assert "of source own: objective 1.25" in own and "of source b: objective" in other
    assert "step" not in own + other


def test_the_time_left_stands_from_the_second_line_to_the_last_but_one():
    first, second, last = shown(*(format_report(f"iteration {step:8d}/{30:8d}", SCALARS) for step in (10, 20, 30)))
    assert "left" not in first + last
    assert "step 20 of 30, 0 s left: " in second
