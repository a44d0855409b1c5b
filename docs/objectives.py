"""Write the table of docs/loss.md: every named objective.

python docs/objectives.py
"""

from pathlib import Path

from megatron_idft.objective_table import OBJECTIVES

BEGIN, END = "<!-- made by docs/objectives.py -->\n", "<!-- end -->\n"


def table() -> str:
    rows = ["| name | weight of a token | what it is for | source |", "|---|---|---|---|"]
    for name, one in OBJECTIVES.items():
        source = f"[arXiv {one.paper}](https://arxiv.org/abs/{one.paper})" if one.paper else ""
        rows.append(f"| `{name}` | {one.weight} | {one.purpose} | {source} |")
    return "\n".join(rows) + "\n"


def page(text: str) -> str:
    """The page with the table between its marks."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    path = Path(__file__).with_name("loss.md")
    path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")
