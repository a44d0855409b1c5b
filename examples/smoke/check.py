"""What the trainings of run.sh left behind: one line for each check, with figures, then PASS or FAIL."""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

Curve = dict[int, float]


def curves(folder: Path) -> list[dict[str, Curve]]:
    """key -> iteration -> value, of each start of a training, in order; from its TensorBoard files."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    starts = []
    for path in sorted((folder / "tensorboard").iterdir()):
        found: dict[str, Curve] = {}
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.HasField("tensor") and value.metadata.plugin_data.plugin_name == "scalars":
                    found.setdefault(value.tag, {})[event.step] = float(make_ndarray(value.tensor))
        if "lm loss" in found:
            starts.append(found)
    return starts


def transformers_loss(model_folder: Path, records: Path, seq_length: int, device: str) -> float:
    """Mean cross-entropy of the trained tokens of `records` under a Hugging Face folder, without Megatron."""
    import torch
    from transformers import AutoModelForCausalLM

    from megatron_idft.corpus.records import read_records
    from megatron_idft.data.chat.conversations import encode_conversation
    from megatron_idft.data.chat.tokenizer import load_tokenizer

    place = "cuda" if device == "gpu" else "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="auto").to(place).eval()
    tokenizer = load_tokenizer(str(model_folder))
    total, count = 0.0, 0
    for record in read_records([records]):
        encoded, mask = encode_conversation(tokenizer, record.messages)
        ids = torch.as_tensor(encoded[: seq_length + 1]).long()
        trained = torch.as_tensor(mask[: seq_length + 1]).bool()[1:]
        with torch.no_grad():
            logits = model(ids[None, :-1].to(place)).logits[0].float().cpu()
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        total += losses[trained].sum().item()
        count += int(trained.sum())
    return total / count


def checks(args: argparse.Namespace) -> Iterator[tuple[bool, str]]:
    last, half = args.iterations, args.stopped_at
    (ce,), idft_starts = curves(args.out / "ce"), curves(args.out / "idft")
    steps = [sorted(start["lm loss"]) for start in idft_starts]
    wanted = [list(range(1, half + 1)), list(range(half + 1, last + 1))]
    yield (
        steps == wanted,
        (f"stopped at iteration {half} and continued: the starts took steps {[(s[0], s[-1]) for s in steps]}"),
    )
    idft: dict[str, Curve] = {}
    for start in idft_starts:
        for key, curve in start.items():
            idft.setdefault(key, {}).update(curve)

    for name, curve in (("ce", ce), ("idft", idft)):
        losses = [curve["lm loss"][step] for step in sorted(curve["lm loss"])]
        finite = all(map(math.isfinite, losses)) and len(losses) == last
        yield finite, f"{name}: {len(losses)} steps, all losses finite"
        share = max(last // 5, 1)
        first, final = sum(losses[:share]) / share, sum(losses[-share:]) / share
        text = f"{name}: lm loss falls from {first:.4f} to {final:.4f} (means of {share} steps)"
        if name == "idft" and final >= first:
            text += "; idft need not lower it where phi is far below 0, as for a model that has learned little"
        yield final < first, text
        hooked = sorted(curve.get("sft loss", {})) == sorted(curve["lm loss"])
        yield hooked, f"{name}: the loss hook reported on {len(curve.get('sft loss', {}))} of {last} steps"

    a, b = ce["lm loss"][1], idft["lm loss"][1]
    yield abs(a - b) <= 1e-4 * abs(a), f"lm loss of step 1 is the same with both: {a:.6f} and {b:.6f}"
    objective, plain = ce["sft loss"][1], idft["sft loss"][1]
    yield abs(objective - a) <= 1e-3 * abs(a), f"ce: the objective is cross-entropy: {objective:.6f}"
    yield 0 < plain < b, f"idft: the objective is a weighted part of it: {plain:.6f}"

    exported = args.out / "idft" / "hf" / f"iter_{last:07d}"
    yield (exported / "config.json").is_file(), f"exported to {exported}"
    config = json.loads((exported / "config.json").read_text())
    reduced = (config.get("dtype") or config.get("torch_dtype")) != "float32"
    here = idft["lm loss validation"][last]
    there = transformers_loss(exported, args.out / "valid.jsonl", args.seq_length, args.device)
    close = abs(here - there) <= (2e-2 if reduced else 1e-3) * abs(here)
    yield close, f"validation loss: {here:.5f} in Megatron, {there:.5f} in transformers from the exported folder"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--iterations", type=int, required=True)
    parser.add_argument("--stopped-at", type=int, required=True)
    parser.add_argument("--seq-length", type=int, required=True)
    parser.add_argument("--device", choices=("gpu", "cpu"), required=True)
    passed = True
    for ok, text in checks(parser.parse_args()):
        passed &= ok
        print(f"{'ok  ' if ok else 'FAIL'}  {text}", flush=True)
    print("PASS" if passed else "FAIL")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
