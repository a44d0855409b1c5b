"""`train`, noting of each micro-batch what the hook was told of it, beside what loss function and backward then made.

    counted_train.py FOLDER FLAGS…

Writes FOLDER/rank<N>.json: a list in the order of the forward passes.
"""

import json
import os
import sys
from pathlib import Path

import torch

from megatron_idft.cli.train import main


def watch(rows: list[dict]) -> None:
    from megatron_idft.integration.loss.hook import LossHook
    from megatron_idft.integration.training import batches

    capture, loss_func, told = LossHook._capture, batches.loss_func, []

    def watched_capture(self, *words):
        capture(self, *words)
        told[:] = self._pending[-1:]

    def watched_loss_func(loss_mask, output, **settings):
        [micro_batch] = told
        factors = micro_batch.token_factors
        expected = loss_mask if factors is None else loss_mask * factors
        row = {"told": micro_batch.num_trained, "trained": int((loss_mask != 0).sum()), "factors": factors is not None}
        row["training"] = output.requires_grad
        rows.append(row)
        if row["training"]:
            output.register_hook(lambda gradient: row.update(exact=torch.equal(gradient, expected)))
        return loss_func(loss_mask, output, **settings)

    LossHook._capture, batches.loss_func = watched_capture, watched_loss_func


if __name__ == "__main__":
    noted: list[dict] = []
    watch(noted)
    folder, *words = sys.argv[1:]
    code = main(words)
    (Path(folder) / f"rank{os.environ['RANK']}.json").write_text(json.dumps(noted))
    sys.exit(code)
