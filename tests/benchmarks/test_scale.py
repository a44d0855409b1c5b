"""Counting one rank's work at many ranks: what the loss and the metrics send is what their documentation says."""

import json
import os
import subprocess

import pytest

from tests.launch import ROOT, forking_python

PROGRAM = ROOT / "tools" / "benchmarks" / "scale.py"


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("scale")
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    command = [forking_python(), str(PROGRAM), "--out", str(folder), "--ranks", "16", "512"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (folder / "scale.png").stat().st_size > 10_000
    return json.loads((folder / "scale.json").read_text())


def test_nothing_of_this_package_grows_with_the_number_of_ranks(counted):
    assert counted["verdict"] == ["HIT nothing of this package grows from 16 to 512"]
    few, many = counted["ranks"]["16"], counted["ranks"]["512"]
    assert {"loss", "metrics", "data"} <= few.keys() == many.keys()
    assert all(values["allocated"] for part, values in few.items() if part in ("loss", "metrics", "data"))


@pytest.mark.parametrize("ranks", ["16", "512"])
def test_the_collectives_are_those_that_are_documented(counted, ranks):
    table = counted["ranks"][ranks]
    # Two micro-batches of 128 tokens, each one all-gather of four fp32 numbers per token from eight ranks.
    assert table["loss"]["collectives"] == 2 and table["loss"]["message bytes"] == 2 * 128 * 4 * 4 * 8
    # One all-reduce, of sums that fit in two kibibytes.
    assert table["metrics"]["collectives"] == 1 and table["metrics"]["message bytes"] < 2048
    # Two packs, each in one broadcast per tensor, and nobody else's.
    assert table["data"]["samples read"] == 2
    assert table["data"]["message bytes"] == table["data"]["bytes of samples read"]
    assert table["Megatron"]["collectives"] > 10, "the counts see Megatron's own"


def test_growth_is_found(monkeypatch):
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    from scale import growing

    few = {"loss": {"collectives": 2, "message bytes": 64, "bytes sent": 32}, "Megatron": {"collectives": 3}}
    many = {"loss": {"collectives": 2, "message bytes": 65, "bytes sent": 60}, "Megatron": {"collectives": 9}}
    assert growing(few, few) == []
    assert growing(few, many) == ["loss: message bytes 64 -> 65"]
    assert growing(few, many | {"new": {"collectives": 1}})[1:] == ["new: collectives 0 -> 1"]
