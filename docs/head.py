"""Write the measured tables of the output head in docs/benchmarks.md.

python docs/head.py
"""

import json
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- made by docs/head.py -->\n", "<!-- end -->\n"
RESULTS = Path(__file__).resolve().parents[1] / "tools" / "benchmarks" / "results"


def heads(result: dict[str, Any]) -> str:
    """Of every case on a CPU: what each head needs, beside the materialised one."""
    machine = result["machine"]
    rows = [
        f"Time and memory on a CPU ({machine['cpu']}, {machine['threads']} thread, load {machine['load_average']}, "
        f"torch {machine['torch']}, {result['date']}; `head_cpu.json`):",
        "",
        "| tokens x hidden size x vocabulary | head | time / its products alone | time / materialised | "
        "memory beside the gradients / logits |",
        "|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        measured = {one["name"]: one for one in case["heads"] if one["status"] == "measured"}
        kept = measured["materialised, overwriting"]["total_ms"]
        for name, one in measured.items():
            if one["chunk"]:  # the default is what users get; the others are in the file
                continue
            memory = f"{one['extra_over_logits']:.3f}" if "extra_over_logits" in one else "not counted"
            times = f"{one['over_products']:.2f} of {one['products']} | {one['total_ms'] / kept:.2f}"
            rows.append(f"| {case['name']} | {name} | {times} | {memory} |")
    goals = [
        f"{'hit' if goal['hit'] else '**missed**'} {goal['value']:.3f} (limit {goal['limit']:g}; {goal['goal']}; "
        f"{goal['case']})"
        for goal in result["goals"]
    ]
    return "\n".join(rows) + f"\n\nGoals: {', '.join(goals)}.\n"


def drift(result: dict[str, Any]) -> str:
    """What rounded logits do to entropy and phi."""
    rows = [
        f"Entropy and φ over {result['steps']} steps of IDFT on SmolLM2-135M in bf16, {result['trained_tokens']:,} "
        f"trained tokens of gsm_symbolic, against fp32 logits ({result['date']}; `drift_cpu.json`). The signed mean "
        "over the steps, its standard error, and the root mean square of a step, in nats; the gradient's, relative:",
        "",
        "| | head | entropy, mean | of a step | φ, mean | of a step | gradient, of a step | along itself, mean |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def mean(value: dict[str, float]) -> str:
        return f"{value['mean']:+.1e} ± {value['standard_error']:.0e}"

    for name, found in result["same_weights"].items():
        parts = [f"{mean(found[of])} | {found[of]['rms']:.1e}" for of in ("entropy", "phi")]
        gradient = f"{found['gradient error']['rms']:.1e} | {mean(found['gradient along'])}"
        rows.append(f"| on the same weights | {name} | {' | '.join(parts)} | {gradient} |")
    for name, found in result["trainings_apart"].items():
        parts = [f"{mean(found[f'means {of}'])} | {found[f'means {of}']['rms']:.1e}" for of in ("entropy", "phi")]
        rows.append(f"| between trainings | {name} | {' | '.join(parts)} | | |")
    return "\n".join(rows) + "\n"


def page(text: str) -> str:
    """The page with the tables between its marks."""
    before, _, rest = text.partition(BEGIN)
    results = [json.loads((RESULTS / name).read_text()) for name in ("head_cpu.json", "drift_cpu.json")]
    return f"{before}{BEGIN}\n{heads(results[0])}\n{drift(results[1])}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    path = Path(__file__).with_name("benchmarks.md")
    path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")
