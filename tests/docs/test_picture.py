"""The README's picture shows what the package computes."""

import re
import runpy
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


def curves(picture: Path) -> dict[str, list[float]]:
    """Coordinates of the curves, in points, by the objective's name."""
    found = {}
    for group in ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}g"):
        if re.match("ce$|dft$|idft-", group.get("id", "")):
            found[group.get("id")] = [float(word) for word in re.findall(r"-?[\d.]+", group[0].get("d"))]
    return found


def test_the_script_draws_the_curves_of_the_picture(tmp_path):
    drawn = tmp_path / "drawn.svg"
    runpy.run_path(str(DOCS / "draw_weights.py"))["draw"](drawn)
    expected, there = curves(drawn), curves(DOCS / "token_weights.svg")
    assert len(there) == 5 and there.keys() == expected.keys()
    for name, coordinates in there.items():
        assert coordinates == pytest.approx(expected[name], abs=0.05), name
    assert (DOCS / "token_weights.svg").stat().st_size < 100_000
