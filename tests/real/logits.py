"""Logits of a converted checkpoint by Megatron, and how far they may lie from those of transformers."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.launch import ROOT, forked


def megatron_logits(
    checkpoint: Path, model_flags: Sequence[str], tokens: torch.Tensor, folder: Path, layout: str = "", nproc: int = 1
) -> torch.Tensor:
    """[rows, length, vocabulary] fp32 of `tokens` [rows, length]. folder: for files on the way."""
    flags = [*model_flags, "--seq-length", str(tokens.shape[1]), "--load", str(checkpoint)]
    (folder / "cases.json").write_text(json.dumps({"logits": {"flags": flags, "tokens": tokens.tolist()}}))
    script = ROOT / "tests" / "checkpoint" / "logits.py"
    log = forked([script, folder / "cases.json", folder, *layout.split()], nproc=nproc)
    assert "load_return" not in log, "Megatron found keys missing and went on without"
    return torch.load(folder / "logits.pt")


def assert_same_logits(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """To 1e-4, and 1e-5 of the logit: transformers' own logits in fp32 lie up to 1.0e-4 from those in float64."""
    difference = (got - expected).abs()
    told = f"{what}: the logits differ by {difference.max():.1e} at most, by {difference.mean():.1e} on average"
    print(f"{told}; they reach {expected.max():.0f}")
    assert expected.std() > 0.5, "logits that are all alike would prove nothing"
    assert (difference <= 1e-4 + 1e-5 * expected.abs()).all() and difference.mean() < 3e-5, told
