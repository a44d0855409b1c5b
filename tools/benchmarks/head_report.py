"""Goals and tables of the benchmark of the output head: head.py."""

from typing import Any

from loss import MIB

MAX_OVER_PRODUCTS = 1.10
MIN_TOKENS_OF_CHUNK = 3000
MAX_OVER_PRODUCTS_LEAN = 1.30
MAX_SHARE_OF_LOGITS = 0.126  # buffers of an eighth, and numbers per token beside them
MAX_MS, TIMED_SHAPE = 36.0, (8192, 4096, 131072)
FEW_TOKENS = 2048
CPU_MEMORY = 1 / 8
CPU_TIME = 1.0


Goal = tuple[str, float, float]  # name, value, limit: hit where the value is no larger


def judge(records: list[dict[str, Any]], device: str, on_cpu: bool) -> list[dict[str, Any]]:
    """Each goal on each case it is about: value, limit, hit."""
    goals = []
    for record in records:
        entries = {one["name"]: one for one in record["heads"] if one["status"] == "measured"}
        if "fused" not in entries or "materialised, overwriting" not in entries:
            continue
        found = _on_cpu(entries) if on_cpu else [*_of_products(record, entries), *_of_time(record, entries, device)]
        for name, value, limit in found:
            goals.append({"goal": name, "case": record["name"], "value": value, "limit": limit, "hit": value <= limit})
    return goals


def _on_cpu(entries: dict[str, dict[str, Any]]) -> list[Goal]:
    mine, kept = entries["fused"], entries["materialised, overwriting"]
    return [
        ("memory, of the materialised head's", mine["extra_bytes"] / kept["extra_bytes"], CPU_MEMORY),
        ("time, of the materialised head's", mine["total_ms"] / kept["total_ms"], CPU_TIME),
    ]


def _of_products(record: dict[str, Any], entries: dict[str, dict[str, Any]]) -> list[Goal]:
    """How near the matrix products alone."""
    goals: list[Goal] = []
    chunked = [one for one in entries.values() if one["kind"] == "forward"]
    if record["trained"] == 1 and record["tokens"] >= FEW_TOKENS:
        goals += [
            (f"products, {one['name']} / three", one["over_products"], MAX_OVER_PRODUCTS)
            for one in chunked
            if one["chunk"] >= MIN_TOKENS_OF_CHUNK
        ]
    if record["trained"] == 1 and record["tokens"] == 8192 and record["compared"] == "all":
        lean = [one for one in chunked if one["extra_over_logits"] <= MAX_SHARE_OF_LOGITS]
        if lean:
            one = min(lean, key=lambda one: one["total_ms"])
            goals.append((f"memory of 1/8, {one['name']} / three", one["over_products"], MAX_OVER_PRODUCTS_LEAN))
        else:
            least = min(one["extra_over_logits"] for one in chunked)
            goals.append(("memory of 1/8: of no chunk", least, MAX_SHARE_OF_LOGITS))
    if "fused, frozen head" in entries:
        goals.append(("frozen head / two", entries["fused, frozen head"]["over_products"], MAX_OVER_PRODUCTS))
    return goals


def _of_time(record: dict[str, Any], entries: dict[str, dict[str, Any]], device: str) -> list[Goal]:
    """Against other libraries, by the default head; in milliseconds, by the best chunk."""
    goals: list[Goal] = []
    others = [one for one in entries.values() if not one["ours"]]
    if others:
        rival = min(others, key=lambda one: one["total_ms"])
        goals.append((f"fastest, against {rival['name']}", entries["fused"]["total_ms"] / rival["total_ms"], 1.0))
    shape = (record["tokens"], record["width"], record["columns"] * record["tp"])
    if shape == TIMED_SHAPE and record["trained"] == 1 and "H200" in device:
        best = min((one for one in entries.values() if one["kind"] == "forward"), key=lambda one: one["total_ms"])
        goals.append((f"time, {best['name']}, ms x tp", best["total_ms"] * record["tp"], MAX_MS))
    return goals


def print_case(record: dict[str, Any]) -> None:
    products = ", ".join(f"{count}: {value:.2f}" for count, value in record["products_ms"].items())
    print(
        f"\n{record['name']} ({record['source']}): [{record['tokens']}, {record['width']}] x {record['columns']} "
        f"{record['dtype']}, {record['trained_tokens']} trained; logits {record['logits_bytes'] / MIB:.0f} MiB; "
        f"ms of products alone, {products}"
    )
    print(
        f"  {'':34}{'loss':>6}{'forward':>10}{'backward':>10}{'ms in all':>10}{'min-max':>20}{'x ours':>8}"
        f"{'/ products':>11}{'MiB more':>10}{'/ logits':>9}{'calls':>6}{'KiB sent':>9}{'error':>9}"
    )
    for one in record["heads"]:
        error = max((one.get(f"{name}_error", 0.0) for name in ("loss", "hidden", "weight")), default=0.0)
        if one["status"] != "measured":
            print(f"  {one['name']:34}{one['status']}: {one['reason']}" + (f", error {error:.1e}" if error else ""))
            continue
        low, high = one["total_ms_min_max"]
        ratio = f"{one['time_over_ours']:.2f}" if "time_over_ours" in one else ""
        memory = "not counted"
        if "extra_bytes" in one:
            memory = f"{one['extra_bytes'] / MIB:.1f}{one['extra_over_logits']:9.3f}"
        print(
            f"  {one['name']:34}{one['formula']:>6}{one['forward_ms']:10.3f}{one['backward_ms']:10.3f}"
            f"{one['total_ms']:10.3f}{f'{low:.2f}-{high:.2f}':>20}{ratio:>8}"
            f"{one['over_products']:6.2f} of {one['products']}{memory:>19}"
            f"{len(one['collectives']):6}{one['bytes_sent'] / 1024:9.0f}{error:9.0e}"
        )
        if "shares_ms" in one:
            whole = sum(one["shares_ms"].values()) or 1.0
            parts = [(name, value / whole) for name, value in one["shares_ms"].items() if value]
            shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in parts)
            print(f"  {'':34}of its time: {shares}")
