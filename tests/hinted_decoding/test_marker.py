"""Where an analysis is cut, and how one without a marker is closed."""

import numpy as np
import pytest

from megatron_idft.hinted_decoding.named_prompts import packaged_prompt
from megatron_idft.hinted_decoding.prompts import HintTemplate
from megatron_idft.hinted_decoding.stages.marker import append_marker, cut_at_marker, without_stop
from tests.hinted_decoding.scripted import make_tokenizer

INLINE = HintTemplate("i", 'marker: answer\nafter-marker: ":"\n---\n{{ question }} {{ solution }} answer')


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def encoded(tokenizer, text: str) -> np.ndarray:
    return tokenizer.encode_batch([text], [[]])[0].ids


@pytest.mark.parametrize(
    ("analysis", "kept"),
    [
        (
            "# Analysis\nThe marker is # CoT here.\n# CoT\nFirst, 3 + 4.",
            "# Analysis\nThe marker is # CoT here.\n# CoT\n",
        ),
        ("short\n# CoT", "short\n# CoT\n\n"),
        ("short\n# CoT  ", "short\n# CoT\n\n"),  # blanks without a line break are none
        ("short\n## CoT\nThe # CoT line", "short\n## CoT\n"),
        ("short\n**# CoT:**\n3 + 4", "short\n**# CoT\n\n"),
        ("short\n2. # CoT\n3 + 4", "short\n2. # CoT\n"),
        ("short\n# CoT\n\n\nmore", "short\n# CoT\n\n\n"),  # two line breaks are one token
        ("short\n# CoT\n  \n  more", "short\n# CoT\n  \n "),  # the last blank belongs to the word
        ("short\r\n# CoT\r\n3 + 4", "short\r\n# CoT\r\n"),
        ("# CoT\nshort\n# CoT\n3 + 4", "# CoT\nshort\n# CoT\n"),
        ("short\n# CoT\nthus\n# CoT\n3 + 4", "short\n# CoT\nthus\n# CoT\n"),
        ("It reads:\n```\n# CoT\n```\nshort\n# CoT\n3 + 4", "It reads:\n```\n# CoT\n```\nshort\n# CoT\n"),
        ("```markdown\n# Analysis\nshort\n# CoT\n3 + 4\n```", "```markdown\n# Analysis\nshort\n# CoT\n"),
    ],
)
def test_an_analysis_ends_behind_its_last_marker(tokenizer, analysis, kept):
    found = cut_at_marker(encoded(tokenizer, analysis), packaged_prompt("analysis"), tokenizer)
    assert found is not None and tokenizer.decode(found) == kept


def test_the_models_own_tokens_are_kept(tokenizer):
    """Letter by letter: not what the tokenizer would make of the text."""
    analysis = "a\n# CoT\nmore"
    ids = np.concatenate([encoded(tokenizer, letter) for letter in analysis])
    assert len(ids) == len(analysis) > len(encoded(tokenizer, analysis))
    found = cut_at_marker(ids, packaged_prompt("analysis"), tokenizer)
    assert found is not None and found.tolist() == ids[: len("a\n# CoT\n")].tolist()


NO_MARKER = [
    "# Cot and #CoT",
    '2. A line "# CoT" with nothing else on it, and below it',
    "short # CoT: 3 + 4",
    "x # CoT",
    'short\n"# CoT"\n3 + 4',
    "short\n> # CoT\n3 + 4",
    "short\n`# CoT`\n3 + 4",
    "short\n```\n# CoT\n```\n3 + 4",
    "short\n~~~\n# CoT\n3 + 4",
    "# CoT\n3 + 4",  # nothing was analysed before
    "1. # Analysis\n2. # CoT\n3 + 4",
    "```\n# CoT\n3 + 4\n```",
    "",
]


@pytest.mark.parametrize("analysis", NO_MARKER)
def test_without_a_marker_on_a_line_of_its_own_after_an_analysis_there_is_no_cut(tokenizer, analysis):
    assert cut_at_marker(encoded(tokenizer, analysis), packaged_prompt("analysis"), tokenizer) is None


@pytest.mark.parametrize("analysis", [*NO_MARKER, "It is seven.\n", "It is seven.\n\n"])
def test_a_marker_is_appended_to_the_tokens_that_the_model_wrote(tokenizer, analysis):
    ids = np.concatenate([encoded(tokenizer, letter) for letter in analysis] or [encoded(tokenizer, "")])
    closed = append_marker(ids, packaged_prompt("analysis"), tokenizer)
    assert closed[: len(ids)].tolist() == ids.tolist() and closed.dtype == np.int32
    line_break = "" if not analysis or analysis.endswith("\n") else "\n"
    assert tokenizer.decode(closed[len(ids) :]) == f"{line_break}# CoT\n\n"


def test_a_marker_that_needs_no_line_of_its_own_may_come_first(tokenizer):
    found = cut_at_marker(encoded(tokenizer, "answer: 7"), INLINE, tokenizer)
    assert found is not None and tokenizer.decode(found) == "answer:"
    assert tokenizer.decode(append_marker(encoded(tokenizer, "It is 7"), INLINE, tokenizer)) == "It is 7\nanswer:"


def test_the_stop_token_is_taken_off_and_nothing_else(tokenizer):
    end, eos = encoded(tokenizer, "<|im_end|>"), tokenizer.eos_id
    stops = {int(end[-1]), eos}
    body = encoded(tokenizer, "It is seven.")
    for ids in (body, np.append(body, end), np.append(body, eos)):
        assert without_stop(ids, end, stops).tolist() == body.tolist()
    two = np.array([1, 2], dtype=np.int32)  # an end of the turn of two tokens
    assert without_stop(np.append(body, two), two, {2, eos}).tolist() == body.tolist()
    assert without_stop(body[:0], end, stops).tolist() == []
