"""The report of `prepare`, as numbers and as text."""

import json
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_idft.corpus.formats import describe_forms
from megatron_idft.data.packed.chunks import ChunkInfo
from megatron_idft.data.packed.counts import Counts
from megatron_idft.data.packed.encoding import SOURCE_FIGURES
from megatron_idft.data.packed.pack_settings import PrepareSettings
from megatron_idft.data.packed.packing import best_fit_decreasing, efficiency, first_fit

_COMPARED = 200_000  # documents: first-fit is slow in Python


def total(infos: list[ChunkInfo]) -> Counts:
    """The counts of all chunks."""
    return Counts(**{f.name: sum(getattr(info.counts, f.name) for info in infos) for f in fields(Counts)})


def numbers(infos: list[ChunkInfo], settings: PrepareSettings) -> dict[str, Any]:
    """The report as JSON, without what `packing_numbers` adds where there is packing."""
    counts = total(infos)
    per_source: dict[str, dict[str, int]] = {}
    lengths: Counter[int] = Counter()
    forms: Counter[tuple[str, str]] = Counter()
    for info in infos:
        forms.update({(settings.paths[info.file_number], name): number for name, number in info.forms.items()})
        for name, figures in zip(info.sources, info.per_source, strict=True):
            sums = per_source.setdefault(name, dict.fromkeys(SOURCE_FIGURES, 0))
            for key in SOURCE_FIGURES:
                sums[key] += figures[key]
        lengths.update({int(bits): number for bits, number in info.lengths.items()})
    return {
        "counts": asdict(counts),
        "trained_share": counts.trained_tokens / max(counts.tokens, 1),
        "lengths": [
            {"from": 1 << max(bits - 1, 0), "to": (1 << bits) - 1, "records": lengths[bits]} for bits in sorted(lengths)
        ],
        "forms": [[file, name, number] for (file, name), number in forms.items()],
        "per_source": per_source,
        "seq_length": settings.seq_length,
    } | _weights(infos, counts.trained_tokens)


def _weights(infos: list[ChunkInfo], trained: int) -> dict[str, Any]:
    """Of trained tokens, where any weighs another than 1: the mean weight, and how many weigh less than 0."""
    found = [info.weights for info in infos if info.weights]
    if not found:
        return {}
    sums = {key: sum(weights[key] for weights in found) for key in found[0]}
    mean = (sums["sum"] + trained - sums["trained"]) / max(trained, 1)  # in the other records each token weighs 1
    return {"weights": {"mean": mean, **{key: sums[key] for key in sums if key not in ("sum", "trained")}}}


def negative_mean(values: dict[str, Any]) -> str | None:
    """What is wrong with data of a negative mean weight, in words, or None.

    Args:
        values: of a report, or of PREFIX.json.
    """
    mean = values.get("weights", {}).get("mean", 1)
    if mean >= 0:
        return None
    return (
        f"its trained tokens weigh {mean:.3g} on average: on the whole, training moves the model away from it, and"
        " nothing holds the model elsewhere. Give it positive turns or smaller negative weights, blend it with other"
        " data, or train for a few steps only"
    )


def reference_numbers(infos: list[ChunkInfo], model: str) -> dict[str, Any]:
    """The part of a report on the reference model.

    Args:
        infos: of all chunks.
        model: its name.
    """
    trained = max(total(infos).trained_tokens, 1)
    sums = sum(info.reference["log_prob_sum"] for info in infos if info.reference)
    return {"model": model, "log_prob_mean": sums / trained}


def packing_numbers(sizes: NDArray[np.int32], packs: int, seq_length: int) -> dict[str, Any]:
    """The part of a report on the packing.

    Args:
        sizes: int32 [documents], the positions that each takes up, in the order of the input.
        packs: how many there are.
        seq_length: the positions of each.
    """
    compared = sizes[:_COMPARED]
    alike = {
        "documents": len(compared),
        "best_fit_decreasing": efficiency(compared, len(best_fit_decreasing(compared, seq_length)), seq_length),
        "first_fit": efficiency(compared, first_fit(compared.tolist(), seq_length), seq_length),
        "one_record_per_pack": efficiency(compared, len(compared), seq_length),
    }
    return {"packs": packs, "efficiency": efficiency(sizes, packs, seq_length), "compared": alike}


def read(prefix: str | Path) -> str:
    """The report of finished packs, for a person."""
    values = json.loads(Path(f"{prefix}.report.json").read_text(encoding="utf-8"))
    return text(values, str(prefix))


def text(values: dict[str, Any], prefix: str, *, written: bool = True) -> str:
    """The report for a person; without packing, only what was read and kept."""
    counts, seq_length = values["counts"], values["seq_length"]
    mean = counts["tokens"] / max(counts["kept"], 1)
    packing = "packs" in values
    rows = [
        ("records read", counts["records"], ""),
        ("  kept as documents" if packing else "  kept", counts["kept"], f"{mean:,.1f} tokens on average"),
        ("  bad, skipped", counts["bad"], f"see {prefix}.errors.jsonl" if counts["bad"] and written else ""),
        ("  empty, left out", counts["empty"], "no trained token within the sequence length"),
        ("  too long, left out", counts["dropped"], f"more than {seq_length} + 1 tokens"),
        ("truncated", counts["truncated"], f"kept, cut to {seq_length} + 1 tokens"),
        ("tokens", counts["tokens"], ""),
        ("trained tokens", counts["trained_tokens"], f"{100 * values['trained_share']:.1f} %"),
        ("trained tokens lost", counts["lost_trained_tokens"], "cut off or left out for length"),
    ]
    notes = {
        "pretokenized": ("pre-tokenized records", "kept, with the ids and the mask they came with"),
        "weighted": ("weighted records", "their tokens count by their weights"),
        "straddling_spans": ("messages begun inside a token", "that token is not trained"),
        "spells_special": ("records spelling special tokens", "read as these tokens"),
        "unwritten": ("records not fully written", "the template leaves out or rewrites a message"),
    }
    if "reference" in values:
        mean = round(values["reference"]["log_prob_mean"], 4)
        rows.append(("reference model's mean log q", mean, f"of a trained token; {values['reference']['model']}"))
    rows += [(name, counts[key], note) for key, (name, note) in notes.items() if counts.get(key)]
    weights = values.get("weights", {})  # reports of earlier versions do not say
    if weights.get("prompt_records"):
        note = "of users, the system or tools"
        rows.append(("records that train messages", weights["prompt_records"], note))
    if weights.get("negative_tokens"):
        note = f"moved away from, in {weights['negative_records']:,} records; {weights['mean']:.3g} is the mean weight"
        rows.append(("tokens of negative weight", weights["negative_tokens"], note))
    if packing:
        rows.append(("packs", values["packs"], f"of {seq_length} positions, {_percent(values['efficiency'])} full"))
    lines = [f"{name:<34}{value:>16,}   {note}".rstrip() for name, value, note in rows]
    lines = [*describe_forms(values.get("forms", [])), *lines]  # reports of earlier versions do not say
    warning = negative_mean(values)
    lines += [f"WARNING: {warning}"] if warning else []
    if not packing:
        return "\n".join([f"tokenized records {prefix}".rstrip(), *(f"  {line}" for line in lines)])
    compared = values["compared"]
    lines.append(f"packing the first {compared['documents']:,} documents in three ways:")
    for key, name in (
        ("best_fit_decreasing", "best-fit decreasing, as here"),
        ("first_fit", "first-fit, in the input's order"),
        ("one_record_per_pack", "one record to a pack, as --sft"),
    ):
        lines.append(f"  {name:<32}{_percent(compared[key]):>16}   full")
    lines.append("records by length in tokens, before any was cut:")
    most = max([row["records"] for row in values["lengths"]] or [1])
    for row in values["lengths"]:
        bar = "█" * max(1, round(30 * row["records"] / most))
        lines.append(f"  {row['from']:>10,} to {row['to']:>10,}{row['records']:>24,}   {bar}")
    lines.append(
        f"{'by source':<34}{'records':>12}{'documents':>12}{'tokens':>16}{'trained':>9}{'cut':>9}{'left out':>10}"
    )
    for name, row in values["per_source"].items():
        share = 100 * row["trained_tokens"] / max(row["tokens"], 1)
        out = row["dropped"] + row["empty"]
        shown = name if len(name) <= 30 else name[:29] + "…"
        lines.append(
            f"  {shown:<32}{row['records']:>12,}{row['documents']:>12,}{row['tokens']:>16,}{share:>7.1f} %"
            f"{row['truncated']:>9,}{out:>10,}"
        )
    return "\n".join([f"packs {prefix}", *(f"  {line}" for line in lines)])


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
