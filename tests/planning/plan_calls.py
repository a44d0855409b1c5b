"""Call `megatron-idft plan` several times in one process: plan_calls.py CALLS.json ANSWERS.json.

CALLS: a list of lists of words. ANSWERS: for each, exit code, stdout, stderr and what it wrote as JSON.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

from megatron_idft.cli import main

calls, answers = map(Path, sys.argv[1:])
results = []
for number, words in enumerate(json.loads(calls.read_text())):
    target = answers.with_name(f"plan{number}.json")
    os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["plan", *words, "--json", str(target)])
    plan = json.loads(target.read_text()) if target.exists() else None
    results.append({"code": code, "out": out.getvalue(), "err": err.getvalue(), "plan": plan})
answers.write_text(json.dumps(results))
