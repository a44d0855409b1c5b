"""A launch beside another one that holds the last chunk of its ledger."""

import re
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_idft.corpus.ledger.ledger import Ledger
from megatron_idft.corpus.ledger.manifest import read_manifest
from tests.launch import start_on_a_terminal


def lines_of_one_that_waits(ledger: Path, chunk: int, words: Sequence[str | Path], text: str, shown: Path) -> list[str]:
    """Take a chunk of a finished ledger back, launch, let go when the terminal shows `text`: lines until the end."""
    (ledger / "parts" / f"chunk-{chunk:06d}.parquet").unlink()
    job = read_manifest(ledger)
    with Ledger(ledger, job["settings"], job["num_chunks"]) as other, open(shown, "wb") as file:
        assert other.claim() == chunk
        launch = start_on_a_terminal(words, file)
        deadline = time.monotonic() + 120
        while text not in shown.read_text(errors="replace"):
            assert launch.poll() is None and time.monotonic() < deadline, shown.read_text(errors="replace")
            time.sleep(0.1)
    assert launch.wait(60) == 0, shown.read_text()
    return re.split(r"[\r\n]+", shown.read_text())
