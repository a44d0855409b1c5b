"""Flags that Megatron needs where Transformer Engine or apex are missing, on a GPU too: added and announced.

Without them a run stops at the first layer, with an error that names a library and no flag.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

from megatron_idft.console import say
from megatron_idft.errors import MissingLibraryError
from megatron_idft.integration.platform.gpu_libraries import GPULibraries

# transformer_config.py refuses rope fusion without Transformer Engine; transformer/torch_norm.py the persistent norm;
# fusions/fused_softmax.py imports a CUDA extension, tensor_parallel/layers.py apex's (for the output layer, also beside
# Transformer Engine's layers).
LOCAL_LAYERS: tuple[tuple[str, str | None], ...] = (
    ("--transformer-impl", "local"),
    ("--no-gradient-accumulation-fusion", None),
    ("--no-masked-softmax-fusion", None),
    ("--no-rope-fusion", None),
    ("--no-persist-layer-norm", None),
)

# Flags that only Transformer Engine serves, with the values that need it; () means all.
NEED_TRANSFORMER_ENGINE: dict[str, tuple[str, ...]] = {
    "--transformer-impl": ("transformer_engine", "inference_optimized"),
    "--fp8-format": (),
    "--fp4-format": (),
    "--sft": (),
    "--multi-latent-attention": (),
    "--moe-permute-fusion": (),
    "--moe-router-fusion": (),
    "--tp-comm-overlap": (),
    "--te-rng-tracker": (),
    "--use-precision-aware-optimizer": (),
    "--external-cuda-graph": (),
    "--cuda-graph-impl": ("transformer_engine",),
}


def given_flags(argv: Sequence[str]) -> dict[str, str]:
    """Every `--flag value` and `--flag=value` of a command line, the last of each; the value is empty for a switch."""
    return dict(_flags(argv))


def _flags(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    for position, word in enumerate(argv):
        if word.startswith("--"):
            flag, _, value = word.partition("=")
            following = argv[position + 1] if position + 1 < len(argv) else "--"
            yield flag, value or ("" if following.startswith("--") else following)


def add_missing(
    argv: Sequence[str],
    needed: Sequence[tuple[str, str | None]],
    program_name: str,
    why: str,
    *,
    also: str = "",
    announced: bool = True,
) -> list[str]:
    """`argv` and those of the needed flags that the user did not give; rank 0 names them in one line, after `also`."""
    given = given_flags(argv)
    added = [word for flag, value in needed if flag not in given for word in (flag, value) if word]
    if announced and os.environ.get("RANK", "0") == "0" and (added or also):
        say(f"{program_name}: {why}; added: {' '.join(filter(None, (also, *added)))}")
    return [*argv, *added]


def add_local_flags(argv: Sequence[str], program_name: str, libraries: GPULibraries) -> list[str]:
    """`argv` (without the program) plus the flags that Megatron needs on a GPU with these libraries.

    Raises:
        MissingLibraryError: a flag needs Transformer Engine, and there is none; names the remedy.
    """
    given = given_flags(argv)
    if not libraries.transformer_engine:
        for flag, values in NEED_TRANSFORMER_ENGINE.items():
            if flag in given and (not values or given[flag] in values):
                because = f" (it is installed, but does not import: {libraries.why_not})" if libraries.why_not else ""
                raise MissingLibraryError(
                    f"{program_name}: {f'{flag} {given[flag]}'.strip()} needs Transformer Engine, which is not here"
                    f'{because}: use an NGC PyTorch container, pip install "transformer-engine[pytorch]", or '
                    + ("pass --transformer-impl local" if flag == "--transformer-impl" else "leave the flag out")
                )
    if "--num-experts" in given and "--disable-bias-linear" not in given and _is_local(given, libraries):
        # transformer/mlp.py adds the bias in place to the output of a custom autograd function, which torch forbids.
        raise MissingLibraryError(
            f"{program_name}: local experts with a bias cannot be trained: add --disable-bias-linear"
        )
    return add_missing(argv, missing_flags(given, libraries), program_name, _reason(given, libraries))


def _is_local(given: Mapping[str, str], libraries: GPULibraries) -> bool:
    return not libraries.transformer_engine or given.get("--transformer-impl") == "local"


def missing_flags(given: Mapping[str, str], libraries: GPULibraries) -> list[tuple[str, str | None]]:
    """Those of LOCAL_LAYERS that a run with these flags cannot do without."""
    local = _is_local(given, libraries)
    wanted = {
        "--transformer-impl": not libraries.transformer_engine,
        "--no-rope-fusion": not libraries.transformer_engine,
        "--no-persist-layer-norm": local,
        "--no-masked-softmax-fusion": local and not libraries.softmax_kernel,
        "--no-gradient-accumulation-fusion": not libraries.weight_gradient_kernel,
    }
    return [(flag, value) for flag, value in LOCAL_LAYERS if wanted[flag]]


def _reason(given: Mapping[str, str], libraries: GPULibraries) -> str:
    names = []
    if _is_local(given, libraries):
        names.append("Transformer Engine's layers" if libraries.transformer_engine else "Transformer Engine")
    if not libraries.weight_gradient_kernel:
        names.append("apex's kernel for weight gradients")
    return f"without {' and '.join(names)}"
