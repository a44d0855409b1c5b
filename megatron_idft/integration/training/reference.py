"""What a training's objective needs of a reference model, and whether its data holds it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from megatron_idft.data.packed.records import TokenizedRecords
from megatron_idft.data.packed.store import PackedStore
from megatron_idft.data.reference.columns import ReferenceColumns
from megatron_idft.data.reference.settings import ReferenceSettings, open_scores
from megatron_idft.errors import ArgumentError
from megatron_idft.integration.loss.arguments import build_objective

_TOP_K = 20  # of the reference's most probable tokens, unless a flag or the scores say otherwise


def needed_reference(args: argparse.Namespace) -> ReferenceColumns | None:
    """The columns of a reference model that the objective of `args` needs; a top_k of 1 stands for any."""
    objective = None if getattr(args, "sft_loss", None) is None else build_objective(args)
    if objective is None or not (objective.reference_statistics or objective.kl_coefficient):
        return None
    entropy = "reference_entropy" in objective.reference_statistics
    return ReferenceColumns(entropy, top_k=int(objective.kl_coefficient is not None))


def reference_settings(args: argparse.Namespace) -> ReferenceSettings | None:
    """The scores for the records of a training; None where its objective needs none, whatever is named."""
    needed = needed_reference(args)
    if needed is None or args.sft_reference is None:
        return None
    top_k = 0
    if needed.top_k:
        recorded = open_scores(args.sft_reference).recorded
        top_k = args.sft_reference_top_k or recorded.get("reference_top_k") or _TOP_K
    columns = ReferenceColumns(needed.entropy, top_k, args.sft_reference_dtype)
    return ReferenceSettings(args.sft_reference, columns)


def sample_columns(args: argparse.Namespace, stores: Mapping[str, PackedStore]) -> ReferenceColumns | None:
    """The columns that samples hold: those that the objective needs, of as many tokens as all stores have.

    Args:
        args: of the training.
        stores: its data, by the names that flags give it.

    Raises:
        ArgumentError: a store lacks what the objective needs.
    """
    needed = needed_reference(args)
    if needed is None:
        return None
    top_k = []
    for name, store in stores.items():
        there = store.reference
        missing = {
            "--sft-reference SCORES": there is None,
            "--sft-reference-entropy": needed.entropy and not (there and there.entropy),
            f"--sft-reference-top-k {_TOP_K}": needed.top_k and not (there and there.top_k),
        }
        if any(missing.values()):
            flags = [flag for flag, lacks in missing.items() if lacks]
            verb, tops = "prepare", f" --sft-reference-top-k {_TOP_K}" if needed.top_k else ""
            if isinstance(store, TokenizedRecords):  # what is kept beside these follows from the objective
                verb, flags = "train", flags[:1]
            raise ArgumentError(
                f"--sft-loss {args.sft_loss} compares with a reference model, of which {name} does not hold what it"
                f" needs: score the data with that model (`megatron-idft score{tops}`), and `{verb}` it with"
                f" {' '.join(flags)}"
            )
        top_k.append(there.top_k if there else 0)
    return ReferenceColumns(needed.entropy, min(top_k) if needed.top_k else 0)


def reference_lines(args: argparse.Namespace, stores: Mapping[str, PackedStore], used: bool) -> list[str]:
    """Whose numbers the objective compares with; or that it compares with none, though there are some.

    Args:
        args: of the training.
        stores: its data, by the names that flags give it.
        used: whether the objective compares with any.
    """
    there = {name: store.meta["reference"] for name, store in stores.items() if "reference" in store.meta}
    if not used:
        named = [*there, *(["--sft-reference"] if getattr(args, "sft_reference", None) else [])]
        loss = f"--sft-loss {args.sft_loss}" if named and args.sft_loss else "Megatron's own loss"
        return [f"> not read: the reference model of {name}; {loss} compares with none" for name in named]
    return [
        f"> reference model of {name}: {found['model']}; its log q is {found['log_prob_mean']:.4f} on average"
        for name, found in there.items()
    ]
