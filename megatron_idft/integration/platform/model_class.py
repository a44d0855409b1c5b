"""Which of Megatron's two classes a Hugging Face model becomes."""

from __future__ import annotations

import os
from collections.abc import Mapping

from megatron_idft.checkpoint.config import ModelShape
from megatron_idft.checkpoint.model_flags import ModelClass, why_not_hybrid
from megatron_idft.errors import ArgumentError, InstallationError
from megatron_idft.integration.platform.compatibility import megatron_version

CLASS_FLAG, CLASS_VARIABLE = "--hf-model-class", "MEGATRON_IDFT_MODEL_CLASS"
_HYBRID_SINCE = (0, 20)  # where upstream has deprecated GPTModel
# HybridModel is cut into pipeline stages by its pattern, and takes none of these.
_GPT_ONLY = (
    "--num-layers",
    "--num-layers-per-virtual-pipeline-stage",
    "--num-virtual-stages-per-pipeline-rank",
    "--decoder-first-pipeline-num-layers",
    "--decoder-last-pipeline-num-layers",
    "--pipeline-model-parallel-layout",
    "--account-for-embedding-in-pipeline-split",
    "--account-for-loss-in-pipeline-split",
)


def usual_class(model: ModelShape) -> ModelClass:
    """The class of a model for which none is asked: the environment's, else that of the installed Megatron.

    HybridModel from Megatron 0.20 on, GPTModel before and where there is no Megatron. GPTModel for a model that
    HybridModel cannot be.

    Raises:
        ArgumentError: another value of MEGATRON_IDFT_MODEL_CLASS.
    """
    asked = os.environ.get(CLASS_VARIABLE, "")
    if asked not in ("", "gpt", "hybrid"):
        raise ArgumentError(f"{CLASS_VARIABLE}={asked[:40]}: set it to gpt or hybrid")
    if not asked:
        try:
            asked = "hybrid" if megatron_version()[:2] >= _HYBRID_SINCE else "gpt"
        except InstallationError:  # `convert` needs none
            asked = "gpt"
    return "hybrid" if asked == "hybrid" and not why_not_hybrid(model) else "gpt"


def class_of_flags(given: Mapping[str, str], model: ModelShape) -> ModelClass:
    """The class of `--hf-model` under these flags: the one asked for, else the one that they fit, else the usual.

    Raises:
        ArgumentError: a class that is none, or that the flags beside it contradict.
    """
    pattern = "--hybrid-layer-pattern" in given
    asked = given.get(CLASS_FLAG)
    if asked is not None and asked not in ("gpt", "hybrid"):
        raise ArgumentError(f"{CLASS_FLAG} {asked[:40]}: pass gpt or hybrid")
    if asked == "gpt" and pattern:
        raise ArgumentError(f"{CLASS_FLAG} gpt: a GPTModel has no --hybrid-layer-pattern. Drop one of them")
    others = [flag for flag in _GPT_ONLY if flag in given]
    if asked == "hybrid" and others:
        raise ArgumentError(
            f"{CLASS_FLAG} hybrid: HybridModel is cut by '|' in --hybrid-layer-pattern; drop {', '.join(others)}"
        )
    if asked is None:
        return "hybrid" if pattern else "gpt" if others else usual_class(model)
    return "hybrid" if asked == "hybrid" else "gpt"
