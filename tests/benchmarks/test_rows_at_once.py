"""Rows at once in blocks, by the allocator's own count, beside the calculation for slots."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools" / "benchmarks"))

import rows_at_once


def test_a_7b_decodes_more_than_three_times_as_many_pairs_in_64_gib():
    before = rows_at_once.in_slots(64, hinted=True)
    assert before == 62  # 1.1 GB each: (8,448 + 10,752) positions of 57,344 bytes
    found = rows_at_once.in_blocks(64, hinted=True, size=64, mean=30)
    # All that a pair holds for itself: 2,500 - 576 positions of the hint, 120 of the question, and the response twice.
    most = (64 << 30) / 57344 / (2500 - 576 + 120 + 2 * 15)
    assert 3 * before < 0.7 * most < found.mean <= most
    assert found.fewest > 3 * before
