"""Write the table of docs/architecture.md: every name of Megatron that we change.

python docs/changes.py
"""

from pathlib import Path

from megatron_idft.integration.platform.upstream import CHANGES

MARK = "<!-- made by docs/changes.py -->\n"


def table() -> str:
    rows = ["| upstream name | programs | our function | without it |", "|---|---|---|---|"]
    for change in CHANGES:
        target = change.target.removeprefix("megatron.").replace(":", " : ")
        event = f" Where Megatron has training callbacks, `{change.event}` does it." if change.event else ""
        rows.append(f"| `{target}` | {change.where} | {change.why} | {change.without}.{event} |")
    return "\n".join(rows) + "\n"


def page(text: str) -> str:
    """The page with the table after its mark, which is the last part."""
    return text.partition(MARK)[0] + MARK + "\n" + table()


if __name__ == "__main__":
    path = Path(__file__).with_name("architecture.md")
    path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")
