"""`--hf-model` and `--save-hf`: training that begins and ends with Hugging Face folders."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_idft.checkpoint.cache import build_cached_checkpoint, cached_checkpoint
from megatron_idft.checkpoint.config import read_folder_model, read_vocabulary
from megatron_idft.checkpoint.folders import COMPANIONS, copy_companions
from megatron_idft.checkpoint.ignored_config import add_ignore_config, named_to_ignore
from megatron_idft.checkpoint.model_flags import ModelClass, Setting, megatron_settings
from megatron_idft.console import say
from megatron_idft.errors import ArgumentError
from megatron_idft.integration.platform.local_flags import given_flags
from megatron_idft.integration.platform.model_class import CLASS_FLAG, class_of_flags
from megatron_idft.integration.platform.own_tokenizer import own_tokenizer_flags
from megatron_idft.links import refuse_links_out

# Flags that make another model than any of the conversion tables describes.
_OTHER_MODELS = (
    "--squared-relu",
    "--openai-gelu",
    "--quick-geglu",
    "--apply-layernorm-1p",
    "--no-position-embedding",
    "--rotary-percent",
    "--rotary-interleaved",
    "--rotary-seq-len-interpolation-factor",
    "--window-size",
    "--qk-l2-norm",
    "--multi-latent-attention",
    "--moe-layer-freq",
    "--moe-shared-expert-intermediate-size",
    "--moe-router-score-function",
    "--moe-router-enable-expert-bias",
    "--moe-router-topk-scaling-factor",
    "--moe-router-num-groups",
    "--heterogeneous-layers-config-path",
    "--mtp-num-layers",
)


def add_hf_model_arguments(group: Any) -> None:
    """Add the flags of the model that a program begins with to an argument group of Megatron's parser."""
    group.add_argument(
        "--hf-model",
        metavar="DIR",
        default=None,
        help="Begin with this Hugging Face folder: its weights are converted once into a cache, and its Megatron flags,"
        " tokenizer and chat template are taken. Where --load has a checkpoint, that is taken instead.",
    )
    group.add_argument(
        "--hf-cache",
        metavar="DIR",
        default=None,
        help="Where converted models are kept, under a fingerprint of the folder's files; as large as the model."
        " Default: the folder `.megatron-idft-cache` beside the folder of --hf-model.",
    )
    group.add_argument(
        CLASS_FLAG,
        choices=("gpt", "hybrid"),
        default=None,
        help="Which of Megatron's classes --hf-model becomes: GPTModel or HybridModel, of the same numbers. Default:"
        " hybrid with --hybrid-layer-pattern, gpt with flags that only GPTModel has (--num-layers, virtual stages),"
        " else MEGATRON_IDFT_MODEL_CLASS, else hybrid from Megatron 0.20 on and gpt before. Llama 3 stays gpt.",
    )
    add_ignore_config(group)


def add_save_hf_argument(group: Any) -> None:
    """Add the flag of what a training leaves behind."""
    group.add_argument(
        "--save-hf",
        choices=("final", "every"),
        default=None,
        help="Also write Hugging Face folders, SAVE/hf/iter_N: of the last checkpoint of the training, or of every one"
        " that is saved. For models that began with --hf-model or with a checkpoint of `convert to-megatron`.",
    )


def expand(argv: Sequence[str]) -> list[str]:
    """`argv` with the flags that `--hf-model` stands for; without it, with the tokenizer beside the checkpoint, if any.

    Reads only config.json. Rank 0 prints which of its fields are ignored.

    Raises:
        ArgumentError: flags beside it that describe another model, or other weights, all of them named.
        ConversionError: a folder or model that cannot be converted.
    """
    given = given_flags(argv)
    if "--hf-model" not in given:
        if "--ignore-config" in given and "--save-hf" not in given:
            raise ArgumentError("--ignore-config names fields of --hf-model's config.json: pass --hf-model, or drop it")
        return [*argv, *own_tokenizer_flags(given)]
    source = Path(given["--hf-model"])
    model = read_folder_model(source, named_to_ignore(argv))
    model_class = class_of_flags(given, model)
    settings = megatron_settings(model, model_class)
    conflicts = _conflicts(given, settings)
    if given.get("--vocab-size", str(model.vocab)) != str(model.vocab):
        conflicts.append(f"--vocab-size {given['--vocab-size']} (the model has {model.vocab} tokens)")
    if conflicts:
        raise ArgumentError(
            f"--hf-model {source} brings the model's flags, and these say otherwise; drop them: " + ", ".join(conflicts)
        )
    if os.environ.get("RANK", "0") == "0":
        for line in model.ignored_lines(source / "config.json"):
            say(f"> {line}")
        if model_class == "hybrid" and "--hybrid-layer-pattern" not in given:
            say(f"> --hf-model {source}: as a HybridModel ({CLASS_FLAG} gpt makes it a GPTModel)")
    added = [word for setting in settings if setting.flag not in given for word in setting.words]
    cache = Path(given.get("--hf-cache") or source.resolve().parent / ".megatron-idft-cache")
    added += ["--pretrained-checkpoint", str(cached_checkpoint(source, cache, model_class, model.ignored_by_user))]
    if "--tokenizer-model" not in given:
        added += ["--tokenizer-model", str(source)]
    if "--sft-loss" in given and "--sft-loss-vocab-size" not in given:
        added += ["--sft-loss-vocab-size", str(model.vocab)]
    return [*argv, *added]


def _conflicts(given: dict[str, str], settings: Sequence[Setting]) -> list[str]:
    conflicts = [f"{flag} {given[flag]}".strip() for flag in _OTHER_MODELS if flag in given]
    for setting in settings:
        if setting.name == "hybrid_layer_pattern":  # pipeline stages may be cut anywhere
            if given.get(setting.flag, setting.value).replace("|", "") != setting.value:
                conflicts.append(f"{setting.flag} {given[setting.flag]} (the model is {setting.value})")
        elif setting.fixed and setting.flag in given and not _same(given[setting.flag], setting):
            is_so = " ".join(setting.words) or f"without {setting.flag}"
            conflicts.append(f"{setting.flag} {given[setting.flag]}".strip() + f" (the model is {is_so})")
    names = {setting.flag for setting in settings}
    conflicts += [flag for flag in ("--num-layers", "--num-experts") if flag in given and flag not in names]
    for flag in ("--pretrained-checkpoint", "--use-checkpoint-args"):
        if flag in given:
            conflicts.append(flag)
    if "--load" in given and "--finetune" in given:
        conflicts.append("--finetune (with --load it would begin with other weights)")
    return conflicts


def _same(word: str, setting: Setting) -> bool:
    """Whether a flag given with `word` (empty for a switch) makes the setting what it must be."""
    if len(setting.words) < 2:
        return bool(setting.words)  # a switch, wanted or not
    wanted = setting.words[1]
    try:
        return float(word) == float(wanted)
    except ValueError:
        return word == wanted


def convert_before_loading(args: argparse.Namespace) -> None:
    """Convert `--hf-model` into its cache, unless it is there. Called on every rank, before the model is loaded."""
    if args.hf_model is None:
        return
    from megatron_idft.integration.platform.ranks import build_once  # noqa: PLC0415  imports torch

    model_class: ModelClass = "hybrid" if args.hybrid_layer_pattern else "gpt"
    source, target = Path(args.hf_model), Path(args.pretrained_checkpoint)
    ignore = args.ignore_config or ()
    build_once("--hf-model", lambda progress: build_cached_checkpoint(source, target, model_class, progress, ignore))


class HuggingFaceExport:
    """`--save-hf`: what a run writes for transformers, beside its checkpoints.

    Raises:
        ArgumentError: flags with which there would be nothing to write, or nothing to write it from.
    """

    def __init__(self, args: argparse.Namespace):
        self._mode = args.save_hf
        self._written: int | None = None
        self._model = _huggingface_folder(args)
        if self._mode is None:
            return
        if not args.save:
            raise ArgumentError("--save-hf writes beside the checkpoints: pass --save DIR")
        if args.async_save:
            raise ArgumentError("--save-hf reads each checkpoint when it is complete: drop --async-save")
        if args.ckpt_format != "torch_dist":
            raise ArgumentError(f"--save-hf reads torch_dist checkpoints: drop --ckpt-format {args.ckpt_format}")
        if self._model is None:
            raise ArgumentError(
                "--save-hf must know the Hugging Face model: begin with --hf-model, or with a checkpoint of"
                " `megatron-idft convert to-megatron`"
            )
        read_folder_model(self._model, args.ignore_config or ())  # refuse now, not after training

    def keep_companions(self, args: argparse.Namespace, template: str) -> None:
        """Put config.json and tokenizer into SAVE/tokenizer, so that the checkpoints there can be converted.

        Args:
            args: Megatron's.
            template: the chat template that is trained; written where it is not the tokenizer folder's own.
        """
        import torch  # noqa: PLC0415  a help is shown without

        if self._model is None or not args.save or torch.distributed.get_rank() != 0:
            return
        folder = Path(args.save) / COMPANIONS
        folder.mkdir(parents=True, exist_ok=True)
        files = ("config.json", "generation_config.json")
        refuse_links_out(self._model, [self._model / file for file in files])
        for file in files:
            if (self._model / file).is_file():
                refuse_links_out(self._model, [self._model / file])
                shutil.copyfile(self._model / file, folder / file)
        tokenizer = Path(args.tokenizer_model)
        if tokenizer.is_file():
            shutil.copyfile(tokenizer, folder / tokenizer.name)
        else:
            config = (folder / "config.json").read_bytes()
            copy_companions(tokenizer, folder)
            (folder / "config.json").write_bytes(config)
        if args.chat_template is not None:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")

    def after_save(self, args: argparse.Namespace, iteration: int) -> None:
        """Called on every rank when the checkpoint of `iteration` is complete."""
        if self._mode == "every":
            self._write(args, iteration)

    def after_training(self, args: argparse.Namespace, iteration: int | None) -> None:
        """Called on every rank at the end with the iteration last saved by this run, None if it saved none."""
        if self._mode == "final" and iteration is not None and iteration != self._written:
            self._write(args, iteration)

    def complete(self, args: argparse.Namespace, iteration: int) -> None:
        """Called on every rank when a finished training is started again: write what is not there yet."""
        if self._mode is not None and not (Path(args.save) / "hf" / f"iter_{iteration:07d}").exists():
            self._write(args, iteration)

    def _write(self, args: argparse.Namespace, iteration: int) -> None:
        from megatron_idft.checkpoint.convert import to_hf  # noqa: PLC0415  imports torch
        from megatron_idft.integration.platform.ranks import on_rank_0  # noqa: PLC0415  imports torch

        target = Path(args.save) / "hf" / f"iter_{iteration:07d}"

        def convert() -> None:
            to_hf(args.save, target, iteration=iteration, replace=True, verify=False)  # just saved and summed
            say(f"> saved {target} for transformers")

        on_rank_0(f"save-hf/{iteration}", convert)
        self._written = iteration


def _huggingface_folder(args: argparse.Namespace) -> Path | None:
    """The folder with the config.json of the model that is trained, if it is known."""
    if getattr(args, "hf_model", None) is not None:  # a script under `run` has no such flag
        return Path(args.hf_model)
    places = [Path(place) / COMPANIONS for place in (args.load, args.pretrained_checkpoint) if place]
    return next((place for place in places if (place / "config.json").is_file()), None)


def recorded_vocab_size(args: argparse.Namespace) -> int | None:
    """The true vocabulary of the model that is loaded, where a config.json lies beside its checkpoint."""
    folder = _huggingface_folder(args)
    return None if folder is None else read_vocabulary(folder)
