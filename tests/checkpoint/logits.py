"""Logits of converted checkpoints as Megatron computes them: `logits.py CASES.json OUTPUT <layout flags>`.

Every case is one command line of flags; Megatron parses, builds and loads each with its own code, one after the other
in this process group. Writes OUTPUT/<case>.pt, fp32 [rows, length, padded vocabulary], of two rows of random tokens or
of the case's `tokens`; for a case with a prompt the ids of the prompt and `steps` more, each the likeliest, by as many
forward passes over all that there is. Where a case has a folder to `save` to, Megatron saves what it has loaded there.
"""

import json
import sys
from pathlib import Path

from megatron_idft.integration.platform.start import prepare_process

cases_file, output, *layout = sys.argv[1:]
COMMON = """
    --micro-batch-size 2 --global-batch-size 4 --seq-length 48 --train-iters 1 --lr 1e-3
    --tokenizer-type NullTokenizer --vocab-size 100 --no-load-optim --no-load-rng --exit-on-missing-checkpoint
"""


def result_of(argv, case):
    """The logits, or the ids, on one rank of the last stage; None on the others."""
    sys.argv[1:] = argv
    import torch
    from megatron.core import mpu
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
    from megatron.training import argument_utils, get_args
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.checkpointing import load_checkpoint, save_checkpoint
    from megatron.training.global_vars import unset_global_variables
    from megatron.training.initialize import initialize_megatron

    from tests import tiny_models

    args = parse_and_validate_args()
    make = argument_utils.hybrid_config_from_args if args.hybrid_layer_pattern else argument_utils.gpt_config_from_args
    config = make(args)
    initialize_megatron()
    args = get_args()
    builder = config.get_builder_cls()(config)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = builder.build_distributed_models(pg_collection=groups, wrap_with_ddp=False)
    load_checkpoint(model, None, None)
    for chunk in model:
        chunk.eval()

    def forward(tokens):
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)

        def forward_step(iterator, chunk):
            def collect(result, non_loss_data=False):
                return gather_from_tensor_model_parallel_region(result)

            return chunk(tokens, positions, None), collect

        with torch.no_grad():
            return get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[None] * len(model) if len(model) > 1 else None,
                model=model,
                num_microbatches=2 if len(model) > 1 else 1,
                seq_length=tokens.shape[1],
                micro_batch_size=tokens.shape[0],
                forward_only=True,
                collect_non_loss_data=True,
            )

    if "prompt" in case:
        ids = torch.tensor([case["prompt"]])
        for _ in range(case["steps"]):
            likeliest = forward(ids)[0][:, -1:, : case["vocab"]].argmax(-1)
            ids = torch.cat([ids, likeliest], dim=1)
        result = [ids]
    elif "tokens" in case:
        result = forward(torch.tensor(case["tokens"]))
    else:
        result = forward(tiny_models.tokens(case["vocab"], args.seq_length))
    if "save" in case:
        args.save, args.no_save_optim, args.no_save_rng = case["save"], True, True
        save_checkpoint(1, model, None, None, 0)
    unset_global_variables()
    destroy_rerun_state_machine()
    first = mpu.get_tensor_model_parallel_rank() == 0 and mpu.get_data_parallel_rank() == 0
    return result[0] if first and mpu.is_pipeline_last_stage(ignore_virtual=True) else None


def main() -> None:
    prepare_process("logits", [*layout, *COMMON.split()], force_cpu=True)
    added = sys.argv[1:]
    import torch

    for name, case in json.loads(Path(cases_file).read_text()).items():
        result = result_of([*added, *case["flags"]], case)
        if result is not None:
            torch.save(result, Path(output) / f"{name}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
