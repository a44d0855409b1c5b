"""Parse command lines on a pretended node of 8 GPUs: gpu_node.py CASES.json ANSWERS.json.

CASES: a list of {"verb", "words", "env", "engine", "capability"}; without "engine" there is no Transformer Engine, with
it a recent one is pretended. Each runs in a fork that stops where the trainer would first touch a GPU,
and answers {"code", "argv", "out", "err", "args", "env"}. Nothing is computed.
"""

import argparse
import ast
import contextlib
import functools
import inspect
import io
import json
import os
import sys
import types
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
for name in ("transformer_engine", "apex", "fused_weight_gradient_mlp_cuda", "scaled_upper_triang_masked_softmax_cuda"):
    sys.modules[name] = None  # whatever this machine has

import torch  # noqa: E402

GPU = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, name="NVIDIA H100")
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 8
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_properties = lambda *_: GPU
torch.cuda.get_device_capability = lambda *_: (GPU.major, GPU.minor)

# What the forks would import one by one.
import megatron.core.models.gpt.gpt_model  # noqa: E402
import megatron.core.models.hybrid.hybrid_model  # noqa: E402
import megatron.core.tokenizers.text  # noqa: E402
import megatron.training.training  # noqa: E402
import pyarrow.parquet  # noqa: E402, F401
import torch._dynamo  # noqa: E402
import torch._inductor.utils  # noqa: E402
from megatron.core.models.common.embeddings import rope_utils  # noqa: E402
from megatron.training import arguments, initialize  # noqa: E402

import megatron_idft.integration.training.program  # noqa: E402, F401
from megatron_idft.integration.platform import gpu_libraries  # noqa: E402

# Megatron reads the help of its flags out of its sources whenever it makes a parser.
inspect.getsource, ast.parse = functools.cache(inspect.getsource), functools.cache(ast.parse)
arguments.add_megatron_arguments(argparse.ArgumentParser())

WANTED = ("transformer_impl", "apply_rope_fusion", "gradient_accumulation_fusion", "masked_softmax_fusion")
WANTED += ("no_persist_layer_norm",)


class Reached(BaseException):
    """The flags are good: what comes next needs a GPU."""


def reached(*_, **__):
    raise Reached


def run(verb, words):
    if verb == "doctor":
        from megatron_idft.integration.platform import doctor as environment

        for finding in environment.examine():
            print(f"{finding.name}: {finding.detail}")
        return None
    from megatron_idft.cli import main

    return main([verb, *words])


class FusedAdam:
    """Of whose constructor Megatron reads which arguments it has."""

    def __init__(
        self, params, master_weight_dtype, exp_avg_dtype, exp_avg_sq_dtype, use_decoupled_grad, store_param_remainders
    ):
        raise AssertionError("there is none")


def pretend_engine():
    """Answer Megatron's questions about Transformer Engine as a recent one would. Nothing can be built with it."""
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("megatron."):
            if hasattr(module, "is_te_min_version"):
                module.is_te_min_version = lambda *_, **__: True
            if hasattr(module, "HAVE_TE"):
                module.HAVE_TE = True
    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules[name].FusedAdam = FusedAdam
    rope_utils.fused_apply_rotary_pos_emb = rope_utils.fused_apply_rotary_pos_emb_thd = reached
    gpu_libraries.find_gpu_libraries = lambda *_: gpu_libraries.GPULibraries(True, "", True, True)


def build(args, engine):
    """Config and layer specification, whose checks are the next to refuse flags."""
    from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args

    config = (gpt_config_from_args if args.hybrid_layer_pattern is None else hybrid_config_from_args)(args)
    if args.hybrid_layer_pattern is None and not engine:
        from megatron.training.models.gpt import default_layer_spec

        default_layer_spec(config, 0)


def answer(case):
    os.environ.pop("NCCL_GRAPH_REGISTER", None)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # nobody comes to meet there
    os.environ |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1", **case.get("env", {})}
    GPU.major = case.get("capability", 9)
    if case.get("engine"):
        pretend_engine()
    seen = []
    validate = arguments.validate_args

    def validate_args(args, *rest, **kwargs):
        result = validate(args, *rest, **kwargs)
        seen.append(args)
        return result

    arguments.validate_args = validate_args
    initialize.initialize_megatron = megatron.training.training.initialize_megatron = reached
    out, err = io.StringIO(), io.StringIO()
    found = {"code": "reached", "args": None}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            found["code"] = run(case["verb"], case["words"])
        except Reached:
            try:
                build(seen[-1], case.get("engine"))
            except Exception as error:
                found["code"] = f"{type(error).__name__}: {error}"
    if seen:
        found["args"] = {name: getattr(seen[-1], name) for name in WANTED}
    return found | {"argv": sys.argv[1:], "out": out.getvalue(), "err": err.getvalue(), "env": dict(os.environ)}


def main() -> None:
    cases, answers = map(Path, sys.argv[1:])
    found = []
    for number, case in enumerate(json.loads(cases.read_text())):
        part = answers.with_suffix(f".{number}")
        pid = os.fork()
        if pid == 0:
            try:
                part.write_text(json.dumps(answer(case)))
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        found.append(json.loads(part.read_text()))
    answers.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
