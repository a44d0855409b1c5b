"""The packaged prompt by which the model judges responses; it sees `question`, `reference` and `response`."""

import hashlib
from importlib import resources


def judge_prompt() -> str:
    """Its Jinja text."""
    return resources.files("megatron_idft.hinted_decoding").joinpath("templates", "judge.txt").read_text("utf-8")


def judge_sha256() -> str:
    """Identifies the prompt."""
    return hashlib.sha256(judge_prompt().encode()).hexdigest()
