"""Plans of command lines, all in one process."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.launch import forked

HERE = Path(__file__).parent


def plans(folder: Path, *calls: str | Sequence[str]) -> list[dict[str, Any]]:
    """What `megatron-idft plan CALL` answers: {"code", "out", "err", "plan"} for each."""
    words = [shlex.split(call) if isinstance(call, str) else list(call) for call in calls]
    (folder / "calls.json").write_text(json.dumps(words))
    forked([HERE / "plan_calls.py", folder / "calls.json", folder / "answers.json"])
    return json.loads((folder / "answers.json").read_text())
