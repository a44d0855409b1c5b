"""One JSON of a run: its checkpoints' numbers and what its training reported. `python collect.py RUN OUT`."""

import argparse
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_idft.files import write_atomically

PREFIXES = ("ddt/", "idft/", "sft ", "reference/", "trained tokens", "lm loss")


def phi(scores: Path) -> tuple[float, float]:
    """Mean and standard deviation per token under the base model, of the records of a corpus."""
    rows = pq.read_table(scores / "scores.parquet", columns=["num_tokens", "phi_mean", "phi_std"]).to_pydict()
    tokens, means, stds = (np.array(rows[name], dtype=np.float64) for name in ("num_tokens", "phi_mean", "phi_std"))
    mean = np.average(means, weights=tokens)
    return float(mean), float(np.average(stds**2 + means**2, weights=tokens) - mean**2) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="its folder, with numbers/ and tensorboard/")
    parser.add_argument("out", type=Path)
    parser.add_argument("--scores", type=Path, required=True, help="of its corpus under the base model")
    parser.add_argument("--training-seconds", type=float, required=True)
    args = parser.parse_args()
    training: dict[str, list[list[float]]] = {}  # of another trainer there is none
    if (args.run / "tensorboard").is_dir():
        events = EventAccumulator(str(args.run / "tensorboard"), size_guidance={"scalars": 0})
        events.Reload()
        keys = [key for key in events.Tags()["scalars"] if key.startswith(PREFIXES) and "vs samples" not in key]
        training = {key: [[event.step, event.value] for event in events.Scalars(key)] for key in keys}
    numbers = [json.loads(path.read_text(encoding="utf-8")) for path in (args.run / "numbers").glob("*.json")]
    result = {
        "checkpoints": sorted(numbers, key=lambda one: one["step"]),
        "training": training,
        "phi_before": phi(args.scores),
        "training_seconds": args.training_seconds,
    }
    write_atomically(args.out, json.dumps(result, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
