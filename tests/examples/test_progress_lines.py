"""The lines that the examples show of a training: one for each interval, and one for each source, by its name."""

import subprocess

from megatron_idft.integration.loss.metrics import format_report
from tests.launch import ROOT

SCALARS = {"sft loss": 1.25, "sft weight mean": 0.5, "ddt/phi mean": -0.1, "ddt/phi std": 2.0, "trained tokens": 9}


def test_each_source_is_named():
    head = f"iteration {50:8d}/{500:8d}"
    lines = [
        format_report(head, SCALARS),
        *(format_report(f"{head} | source {name}", SCALARS) for name in ("own", "b")),
    ]
    script = f'eval "$(grep "^progress" {ROOT}/examples/common.sh)"; sed -unE "$progress"'
    done = subprocess.run(["bash", "-c", script], input="\n".join(lines) + "\n", capture_output=True, text=True)
    whole, own, other = done.stdout.splitlines()
    assert "step 50 of 500   objective 1.250000E+00   phi mean -1.000000E-01   phi std 2.000000E+00" in whole
    assert "of own: objective 1.25" in own and "of b: objective" in other and "step" not in own + other
