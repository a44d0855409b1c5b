"""The hint share from the entropy of the hinted stream, against the formulas in numpy."""

import numpy as np
import pytest
import torch

from megatron_idft.errors import InputError
from megatron_idft.hinted_decoding.mixing import EntropyMixing

VOCAB = 1000
ENTROPY = np.linspace(0, np.log(VOCAB), 301)
NORMALIZED = ENTROPY / np.log(VOCAB)

FORMULAS = {
    "linear 3": (EntropyMixing(VOCAB), 1 - np.minimum(3 * NORMALIZED, 1)),
    "linear 0": (EntropyMixing(VOCAB, slope=0), np.ones(301)),
    "linear .7": (EntropyMixing(VOCAB, "linear", 0.7), 1 - 0.7 * NORMALIZED),
    "sigmoid": (EntropyMixing(VOCAB, "sigmoid", 7.0), 1 / (1 + np.exp(7 * (NORMALIZED - 0.5)))),
    "sigmoid, center": (EntropyMixing(VOCAB, "sigmoid", 2.0, center=0.2), 1 / (1 + np.exp(2 * (NORMALIZED - 0.2)))),
    "piecewise": (EntropyMixing(VOCAB, "piecewise"), np.interp(NORMALIZED, [0.3, 0.7], [1, 0])),
    "piecewise, limits": (
        EntropyMixing(VOCAB, "piecewise", low=0.1, high=0.2),
        np.interp(NORMALIZED, [0.1, 0.2], [1, 0]),
    ),
    "fixed": (EntropyMixing(VOCAB, "fixed", hint_share=0.6), np.full(301, 0.6)),
    "hinted alone": (EntropyMixing(VOCAB, "fixed", hint_share=1.0), np.ones(301)),
    "plain alone": (EntropyMixing(VOCAB, "fixed", hint_share=0.0), np.zeros(301)),
    "padded vocabulary": (EntropyMixing(4 * VOCAB), 1 - np.minimum(3 * ENTROPY / np.log(4 * VOCAB), 1)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas(name):
    mixing, expected = FORMULAS[name]
    found = mixing.plain_share(torch.tensor(ENTROPY, dtype=torch.float32))
    assert found.dtype == torch.float32 and found.shape == (301,)
    np.testing.assert_allclose(1 - found.numpy(), expected, atol=1e-5)


def test_a_retry_scales_the_slope_and_nothing_else():
    for mode in ("linear", "sigmoid"):
        mixing = EntropyMixing(VOCAB, mode, 2.0, first_token_hinted=False)
        assert mixing.scaled(0.25) == EntropyMixing(VOCAB, mode, 0.5, first_token_hinted=False)
    for mixing in (EntropyMixing(VOCAB, "piecewise"), EntropyMixing(VOCAB, "fixed", hint_share=0.5)):
        assert mixing.scaled(0.25) == mixing


def test_the_description_names_what_the_mode_uses():
    described = EntropyMixing(VOCAB, "piecewise", first_token_hinted=False).describe()
    expected = {"mode": "piecewise", "low": 0.3, "high": 0.7, "first_token": "mixed", "entropy_vocab_size": VOCAB}
    assert described == expected
    assert EntropyMixing(VOCAB).describe()["first_token"] == "hinted"


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"mode": "cubic"}, "none of linear"),
        ({"slope": -1.0}, "from 0"),
        ({"slope": float("nan")}, "from 0"),
        ({"entropy_vocab_size": 1}, "from 2"),
        ({"low": 0.7}, "low < high"),
        ({"mode": "fixed"}, "--hint-share"),
        ({"hint_share": 0.5}, "--hint-share"),
        ({"mode": "fixed", "hint_share": 1.5}, "from 0 to 1"),
    ],
)
def test_values_outside_their_range_are_refused(changes, remedy):
    with pytest.raises(InputError, match=remedy):
        EntropyMixing(**({"entropy_vocab_size": VOCAB} | changes))
