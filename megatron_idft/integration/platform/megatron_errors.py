"""Megatron's errors for a user's mistake, in one sentence with the flag and the remedy. Imports nothing of Megatron.

Megatron 0.19 checks its flags by assertions, many without a message, in places from the parser to the first step. The
table has those that people meet; whatever else its modules of flags and configs raise is shown as their refusal.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Mapping
from pathlib import PurePath

_MISSING = {
    "seq_length": "pass --seq-length N, the tokens of a sequence",
    "micro_batch_size": "pass --micro-batch-size N, the sequences of a rank at a time",
    "max_position_embeddings": "pass --max-position-embeddings N, the longest sequence that the model knows",
    "save_interval": "pass --save-interval N with --save",
    "lr": "pass --lr, the learning rate, such as 1e-5",
}
NO_MODEL = (
    "no model: describe it by --hf-model DIR, a checkpoint's model_flags.sh, or --num-layers, --hidden-size and so on"
)
_MISSING["encoder_seq_length"] = _MISSING["seq_length"]
_MISSING |= dict.fromkeys(("num_layers", "hidden_size", "num_attention_heads"), NO_MODEL)


def ranks_needed(ranks: int, needed: int, sizes: Mapping[str, int] | None = None, *, planned: bool = False) -> str:
    """Why so many ranks cannot hold a model that is cut into `needed` parts, and the remedy.

    Args:
        ranks: that were started.
        needed: parts of the model.
        sizes: the flags that cut it, where they are known.
        planned: the ranks are those of `plan --gpus`.
    """
    parts = " x ".join(f"{flag} {size}" for flag, size in (sizes or {}).items()) or "the parallel sizes"
    parts += f": the model is cut into {needed} parts"
    if planned and ranks % needed:
        return f"{parts}, which --gpus {ranks} is no multiple of: pass one, or change these flags"
    if ranks < needed:
        started = "one process was started" if ranks == 1 else f"{ranks} ranks were started"
        return (
            f"{parts}, but {started}: torchrun --nproc-per-node {needed} -m megatron_idft … (a multiple of {needed},"
            " over all nodes), or make these flags smaller"
        )
    return f"{parts}, which does not divide the {ranks} ranks: start a multiple of {needed}, or change these flags"


def _batches(found: re.Match[str]) -> str:
    whole, micro, data = (int(number) for number in found.groups())
    return uneven_batch(whole, micro, data)


def uneven_batch(whole: int, micro: int, data: int) -> str:
    """Why a global batch cannot be divided, and the next that can."""
    each = micro * data
    next_one = -(-whole // each) * each
    return (
        f"--global-batch-size {whole} (also of evaluations, unless --eval-global-batch-size says otherwise) is no"
        f" multiple of --micro-batch-size {micro} x {data} data-parallel ranks: take {next_one}, or another"
        " --micro-batch-size"
    )


def _missing(found: re.Match[str]) -> str:
    name = found[1]
    return _MISSING.get(name, f"pass --{name.replace('_', '-')}")


# A pattern of the message, or of the line of an assertion without one -> what is said.
_TABLE: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (
        r"^world size \((\d+)\) is not divisible by total_model_size \(\D*(\d+)\)",
        lambda m: ranks_needed(int(m[1]), int(m[2])),
    ),
    (
        r"^eval_global_batch_size \((\d+)\) must be divisible by eval_micro_batch_size \((\d+)\)"
        r" \* data_parallel_size \((\d+)\)",
        _batches,
    ),
    (
        r"^global batch size \((\d+)\) is not divisible by micro batch size \((\d+)\)"
        r" times data parallel size \((\d+)\)",
        _batches,
    ),
    (r"^(\w+) argument is None$", _missing),
    (r"^assert args\.(\w+) is not None\b", _missing),
    (r"^assert args\.(\w+) > 0$", lambda m: f"--{m[1].replace('_', '-')}: pass a number above 0"),
    (r"^either num-layers or encoder-num-layers should be specified", NO_MODEL),
    (
        r"^max_position_embeddings \((\d+)\) must be greater than or equal to seq_length \((\d+)\)",
        r"--seq-length \2 is more than the \1 positions of the model (--max-position-embeddings): use at most \1, or a"
        " model with more",
    ),
    (
        r"^num_attention_heads \((\d+)\) must be a multiple of tensor_model_parallel_size \((\d+)\)",
        r"--tensor-model-parallel-size \2 does not divide the \1 attention heads of the model: use a divisor of \1",
    ),
    (
        r"^num_query_groups \((\d+)\) must be a multiple or divisor of tensor_model_parallel_size \((\d+)\)",
        r"--tensor-model-parallel-size \2 does not fit the \1 query groups of the model: use a divisor or multiple of"
        r" \1",
    ),
    (
        r"[Nn]umber of layers should be divisible by the pipeline-model-parallel size|"
        r"number of layers of the model must be divisible pipeline model parallel size",
        "--pipeline-model-parallel-size does not divide the layers of the model: use a divisor, or say with"
        " --decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers how they are cut",
    ),
    (
        r"^assert args\.hidden_size % args\.num_attention_heads == 0",
        "--num-attention-heads does not divide --hidden-size: use a divisor, or pass --kv-channels",
    ),
    (
        r"^assert args\.min_lr <= args\.lr|^assert self\.max_lr >= self\.min_lr",
        "--min-lr is larger than --lr: pass a smaller --min-lr",
    ),
    (
        r"^assert self\.lr_warmup_steps < self\.lr_decay_steps",
        "the warm-up of the learning rate is as long as the whole training: make --lr-warmup-iters,"
        " --lr-warmup-samples or --lr-warmup-fraction smaller, or train longer",
    ),
    (r"^assert self\.init_lr <= self\.max_lr", "--lr-warmup-init is larger than --lr: pass a smaller one"),
    (
        r"'<=' not supported between instances of 'float' and 'NoneType'|^assert self\.max_lr is not None",
        _MISSING["lr"],
    ),
    (
        r"seq-length should be a multiple of 2 \* context-parallel-size",
        "--seq-length must be a multiple of 2 x --context-parallel-size: choose another one of the two",
    ),
    (
        r"^environment variable MASTER_(?:ADDR|PORT) expected, but not set",
        "several ranks need a meeting point: start them with torchrun, or set MASTER_ADDR and MASTER_PORT",
    ),
    (
        r"^no samples left to consume: (\d+), (\d+)",
        r"no sample is left: \1 are consumed of \2. The training that this checkpoint is of has seen all its data: pass"
        " a larger --train-iters or --train-epochs, or begin a new one with --finetune and another --save",
    ),
)

# Files that hold nothing but checks of flags and configs: what they refuse is the user's to mend.
_CHECKS = {
    "arguments.py",
    "argument_utils.py",
    "yaml_arguments.py",
    "transformer_config.py",
    "model_parallel_config.py",
    "num_microbatches_calculator.py",
    "optimizer_param_scheduler.py",
    "hybrid_layer_allocation.py",
    "pipeline_parallel_layer_layout.py",
    "distributed_data_parallel_config.py",
    "optimizer_config.py",
}
_REFUSALS = (AssertionError, ValueError, TypeError, RuntimeError, NotImplementedError, KeyError)


_SIGNS_OF_A_LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "Broken pipe",
    "Socket closed",
)


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective has failed because another rank is gone."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS_OF_A_LOST_PEER)


def translate(error: BaseException) -> str | None:
    """The sentence for an error that Megatron raised because of flags or data; None if it is not known to be one."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if "megatron" in PurePath(frame.filename).parts
    ]
    if not isinstance(error, _REFUSALS):
        return None
    line = (frames[-1].line or "") if frames else ""
    text = str(error).strip() or line
    for pattern, said in _TABLE:
        found = re.search(pattern, text)
        if found:
            return said(found) if callable(said) else found.expand(said)
    if frames and PurePath(frames[-1].filename).name in _CHECKS:
        return f"Megatron refuses these flags: {' '.join(text.split())[:500]}"
    return None
