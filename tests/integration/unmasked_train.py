"""`train` with a planted fault: stages that hold neither end of the model get no mask, as under stock get_batch."""

import sys

from megatron_idft.cli.train import main


def plant() -> None:
    from megatron.training import get_args

    from megatron_idft.integration.training import batches

    honest = batches.get_batch

    def get_batch(data_iterator, vp_stage, *args, **kwargs):
        batch = honest(data_iterator, vp_stage, *args, **kwargs)
        if not any(batches.stage_reads(get_args(), vp_stage)):
            batch["attention_mask"] = None
        return batch

    batches.get_batch = get_batch


if __name__ == "__main__":
    plant()
    sys.exit(main(sys.argv[1:]))
