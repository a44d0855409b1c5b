"""`convert to-megatron|to-hf|check`: models between Hugging Face folders and Megatron checkpoints."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from megatron_idft import console
from megatron_idft.checkpoint.ignored_config import add_ignore_config
from megatron_idft.errors import ArgumentError
from megatron_idft.parsing import OF_EVERY_VERB, Parser

USAGE = f"""usage: megatron-idft convert to-megatron HF_DIR OUT_DIR [--model gpt|hybrid] [--ignore-config FIELD ...]
       megatron-idft convert to-hf MEGATRON_DIR OUT_DIR [--hf-config DIR] [--iteration N] [--dtype bf16|fp16|fp32]
                                  [--ignore-config FIELD ...]
       megatron-idft convert check HF_DIR|FLAG ... [--config-only] [--ignore-config FIELD ...]

Converts Llama, Mistral, Qwen2, Qwen2.5, Qwen3 and Qwen3-MoE between Hugging Face safetensors folders and Megatron's
torch_dist checkpoints, tensor by tensor, on the CPU, in one process. One checkpoint serves every TP, PP and EP, and the
local as well as the Transformer Engine layers. Other families go to Megatron-Bridge where it is installed.

  --model gpt|hybrid   write it for GPTModel or for HybridModel; default MEGATRON_IDFT_MODEL_CLASS, else hybrid from
                       Megatron 0.20 on and gpt before. Llama 3 stays gpt
  --hf-config DIR      the Hugging Face folder that the model came from, where the checkpoint does not have its config
  --iteration N        instead of the last one
  --dtype              of the tensors written; the checkpoint's own unless given
  --ignore-config FIELD ...
                       fields of config.json that would be refused and do not change what the model computes: you take
                       responsibility. to-hf takes over those that the checkpoint was converted or trained with

to-megatron  writes OUT_DIR for --load, with the model's flags in OUT_DIR/model_flags.sh and the tokenizer in
             OUT_DIR/tokenizer
to-hf        writes OUT_DIR for transformers, from a checkpoint of this tool or of a training that began with one
check        says in a fraction of a second whether HF_DIR can be converted: config.json, and every tensor's name and
             shape; no weights are read. Given the flags of train, score, realign or prepare it takes --hf-model, checks
             that --tensor-model-parallel-size and --seq-length fit the model and that the data they name is there. What
             this machine does not see is named. --config-only: nothing but config.json is there yet

{OF_EVERY_VERB}"""


def _parser() -> Parser:
    parser = Parser(prog="megatron-idft convert", usage=USAGE.removeprefix("usage: "), add_help=False)
    verbs = parser.add_subparsers(dest="direction", required=True)
    megatron = verbs.add_parser("to-megatron", usage=USAGE.removeprefix("usage: "), add_help=False)
    megatron.add_argument("source")
    megatron.add_argument("target")
    add_ignore_config(megatron)
    megatron.add_argument("--model", choices=("gpt", "hybrid"), default=None)
    hf = verbs.add_parser("to-hf", usage=USAGE.removeprefix("usage: "), add_help=False)
    hf.add_argument("source")
    hf.add_argument("target")
    add_ignore_config(hf)
    hf.add_argument("--hf-config", metavar="DIR", default=None)
    hf.add_argument("--iteration", type=int, default=None)
    hf.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default=None)
    return parser


def main(argv: Sequence[str]) -> int:
    if not argv or "-h" in argv or "--help" in argv:
        print(USAGE)
        return 0 if argv else 2
    if argv[0] == "check":
        return _check(argv[1:])
    args = _parser().parse_args(list(argv))
    with console.quiet("convert", filled="kept"):
        console.say(_convert(args))
    return 0


def _convert(args: Namespace) -> str:
    """Convert; returns what the user can do with the result."""
    import torch

    from megatron_idft.checkpoint import bridge
    from megatron_idft.checkpoint.config import read_folder_model
    from megatron_idft.checkpoint.convert import to_hf, to_megatron
    from megatron_idft.errors import UnknownFamilyError
    from megatron_idft.integration.platform.model_class import usual_class

    if args.direction == "to-megatron":
        try:
            ignore = args.ignore_config or ()
            model_class = args.model or usual_class(read_folder_model(Path(args.source), ignore))
            model = to_megatron(args.source, args.target, model_class, ignore=ignore)
        except UnknownFamilyError as error:
            bridge.to_megatron(args.source, args.target, error)
            return f"{args.target}: converted by Megatron-Bridge; its flags are in its run_config.yaml"
        _tell(model.ignored_lines(Path(args.source) / "config.json"))
        return f"{args.target}: --load it with the flags in model_flags.sh; true vocabulary {model.vocab}"
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, None: None}
    try:
        ignore = args.ignore_config or ()
        model = to_hf(args.source, args.target, args.hf_config, args.iteration, dtypes[args.dtype], ignore=ignore)
        _tell(model.ignored_lines(Path(args.target) / "config.json"))
    except UnknownFamilyError as error:
        if args.hf_config is None:
            raise
        bridge.to_hf(args.source, args.target, args.hf_config, error)
    return f"{args.target}: open it with transformers' from_pretrained"


def _check(argv: Sequence[str]) -> int:
    from megatron_idft.checkpoint.input_check import check_inputs

    words = [word for word in argv if word != "--config-only"]
    if words and words[0].startswith("--ignore-config"):
        raise ArgumentError("name the folder, or --hf-model, before --ignore-config: the words after it are fields")
    if words and not words[0].startswith("-"):
        words = ["--hf-model", *words]
    _tell(check_inputs(words, config_only="--config-only" in argv))
    return 0


def _tell(lines: Sequence[str]) -> None:
    for line in lines:
        console.say(line)
