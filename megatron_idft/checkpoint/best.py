"""Keep the best checkpoints of a run by what its evaluations measured; free the space of the others."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_idft.checkpoint.checksums import iteration_folder, read_tracker
from megatron_idft.errors import InputError
from megatron_idft.files import write_atomically

STATE = "best_checkpoints.json"


@dataclass
class BestCheckpoints:
    """The `keep` best of the checkpoints that a run has saved in a folder, and always its latest, which a resume needs.

    In one process of the run. The results lie in FOLDER/best_checkpoints.json, so a resumed run goes on with it;
    checkpoints that are not recorded there as the run's own are never deleted.

    Args:
        folder: with Megatron's `iter_…` folders and its tracker file.
        keep: how many, from 1.
        metric: the key of the metric that ranks them.
        mode: whether its smallest or its largest value is the best.

    Raises:
        InputError: the folder was ranked by another metric, or its state is damaged.
    """

    folder: Path
    keep: int
    metric: str
    mode: Literal["min", "max"]
    measured: dict[int, float] = field(default_factory=dict, init=False)
    saved: set[int] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        path = self.folder / STATE
        if not path.exists():
            return
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            ranked_by = state["metric"], state["mode"]
            self.measured = {int(iteration): float(value) for iteration, value in state["measured"].items()}
            self.saved = {int(iteration) for iteration in state["saved"]}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path} is damaged ({error}): delete it, and only coming checkpoints are ranked"
            ) from error
        if ranked_by != (self.metric, self.mode):
            raise InputError(
                f"the checkpoints in {self.folder} are ranked by the {ranked_by[1]} of {ranked_by[0]!r}, not by the"
                f" {self.mode} of {self.metric!r}: pass --sft-keep-best-metric and --sft-keep-best-mode as before, or"
                f" delete {path} to rank the coming ones anew"
            )

    def measure(self, iteration: int, values: dict[str, float]) -> None:
        """The results of the evaluation at `iteration`, by metric key.

        Raises:
            InputError: the metric is not among them.
        """
        if self.metric not in values:
            raise InputError(
                f"--sft-keep-best-metric {self.metric!r} was not measured. This run measures: "
                + ", ".join(repr(key) for key in sorted(values))
            )
        self.measured[iteration] = values[self.metric]

    def save(self, iteration: int) -> None:
        """The checkpoint of `iteration` was saved, or is being saved in the background."""
        self.saved.add(iteration)

    def best(self) -> list[int]:
        """The iterations of the best checkpoints that were saved and measured, the best first; of equals the later."""
        sign = 1 if self.mode == "min" else -1
        ranked = [i for i in self.saved if i in self.measured and self._path(i).is_dir()]
        # A value that is not a number is worse than all that are.
        ranked.sort(key=lambda i: (self.measured[i] != self.measured[i], sign * self.measured[i], -i))
        return ranked[: self.keep]

    def prune(self) -> list[int]:
        """Delete the run's checkpoints that are neither among the best nor the latest, and record what is known.

        Returns the iterations whose checkpoints were deleted. A checkpoint later than the latest complete one is left
        alone: it is still being written, or of a branch that this run has not reached again.
        """
        latest = read_tracker(self.folder)
        kept = {*self.best(), latest}
        deleted = sorted(i for i in self.saved if isinstance(latest, int) and i < latest and i not in kept)
        self.saved -= set(deleted)
        self._record()  # first: a checkpoint that is half deleted must not be ranked after a crash
        for iteration in deleted:
            for path in (self._path(iteration), self.folder / "hf" / self._path(iteration).name):
                if path.is_dir() and not path.is_symlink():
                    # Renamed first: what a crash leaves of it is never taken for a checkpoint.
                    path.rename(path.with_name(f".deleting-{path.name}"))
        for parent in (self.folder, self.folder / "hf"):
            for path in parent.glob(".deleting-iter_*"):
                shutil.rmtree(path)
        return deleted

    def _path(self, iteration: int) -> Path:
        return iteration_folder(self.folder, iteration)

    def _record(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "metric": self.metric,
            "mode": self.mode,
            "best": self.best(),
            "saved": sorted(self.saved),
            "measured": dict(sorted(self.measured.items())),
        }
        write_atomically(self.folder / STATE, json.dumps(state, indent=1))
