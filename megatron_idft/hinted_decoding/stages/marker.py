"""Where an analysis ends: at the marker that the model wrote, or at one that is appended."""

from __future__ import annotations

import re
from collections.abc import Collection

import numpy as np

from megatron_idft.data.chat.tokenizer import ChatTokenizer
from megatron_idft.hinted_decoding.output.outcomes import MarkerOrigin
from megatron_idft.hinted_decoding.prompts import HintTemplate
from megatron_idft.hinted_decoding.settings import AnalysisMarker
from megatron_idft.hinted_decoding.stages.candidates import Ids
from megatron_idft.hinted_decoding.stages.conversation import encode_after

_FENCE = re.compile(r"^[ \t]*(```|~~~)", re.MULTILINE)
_PROSE = re.compile(r"^(?![ \t]*(?:```|~~~|(?:[0-9]+[.)])?[ \t*]*#)).*\w", re.MULTILINE)  # no heading and no fence


def without_stop(ids: Ids, end_ids: Ids, stop_ids: Collection[int]) -> Ids:
    """The tokens before the end of the turn, or before the stop token, that ended them; all where neither did.

    Args:
        ids: int32 [n].
        end_ids: int32 [e], the template's end of a turn.
        stop_ids: tokens each of which ends a response.
    """
    if 0 < len(end_ids) <= len(ids) and np.array_equal(ids[len(ids) - len(end_ids) :], end_ids):
        return ids[: len(ids) - len(end_ids)]
    return ids[:-1] if len(ids) and int(ids[-1]) in stop_ids else ids


def cut_at_marker(ids: Ids, template: HintTemplate, tokenizer: ChatTokenizer) -> Ids | None:
    """The analysis up to its last marker, followed by the template's after-marker.

    Where the after-marker is line breaks only, the blanks that the model wrote with a line break stay as they are: one
    that was left to the response would be its first token, of which the hinted stream is sure and which the plain one
    does not expect.

    Where the after-marker begins with a line break, a marker counts only if nothing else stands on its line but signs
    of headings, emphasis and lists, if a line that is no heading comes before it, and if it stands in no code fence
    (one that is opened in the analysis's first line, around all of it, does not matter): a model may repeat the prompt,
    which mentions the marker, or begin with it.

    Args:
        ids: int32 [n], the analysis.
        template: one with a marker.
        tokenizer: of the model.

    Returns:
        int32 [m]; the tokens of the after-marker are the model's own as far as it wrote them. None without a marker.
    """
    assert template.marker is not None
    marker, text = template.marker, tokenizer.decode(ids)
    start = _last_marker(text, template)
    if start is None:
        return None
    end = _shortest(ids, tokenizer, marker, text.count(marker, 0, start + len(marker)))
    wanted = template.after_marker

    def behind(n: int) -> str:
        return tokenizer.decode(ids[:n]).rpartition(marker)[2]

    if wanted.isspace():
        blank = end
        while blank < len(ids) and behind(blank + 1).isspace():
            blank += 1
        if "\n" in behind(blank):
            return ids[:blank]
    tail = behind(end)
    while end < len(ids) and len(tail) < len(wanted) and wanted.startswith(tail):
        longer = behind(end + 1)
        if not longer.startswith(wanted) and not wanted.startswith(longer):
            break
        end, tail = end + 1, longer
    missing = wanted[len(tail) :] if wanted.startswith(tail) else ""
    if not missing:
        return ids[:end]
    return np.concatenate([ids[:end], encode_after(tokenizer, marker + tail, missing)])


def close_at_marker(
    ids: Ids, template: HintTemplate, tokenizer: ChatTokenizer, policy: AnalysisMarker
) -> tuple[Ids | None, MarkerOrigin | None]:
    """The analysis through its marker, and who wrote that; None and None where the model had to and did not.

    Args:
        ids, template, tokenizer: as below.
        policy: whether the marker is ours to write.
    """
    cut = cut_at_marker(ids, template, tokenizer)
    if cut is not None:
        return cut, "model"
    if policy == "require":
        return None, None
    return append_marker(ids, template, tokenizer), "appended"


def append_marker(ids: Ids, template: HintTemplate, tokenizer: ChatTokenizer) -> Ids:
    """The analysis, a line break unless it ends with one, the marker and the after-marker.

    Args:
        ids: int32 [n], the analysis without a stop token. These tokens stay as they are.
        template: one with a marker.
        tokenizer: of the model.
    """
    assert template.marker is not None
    text = tokenizer.decode(ids)
    closing = template.marker + template.after_marker
    if text and not text.endswith("\n"):
        closing = "\n" + closing
    return np.concatenate([ids, encode_after(tokenizer, text, closing)]).astype(np.int32)


def _last_marker(text: str, template: HintTemplate) -> int | None:
    """Where the last marker of the text begins; None without one."""
    assert template.marker is not None
    marker = re.escape(template.marker)
    if not template.after_marker.startswith("\n"):
        return max((found.start() for found in re.finditer(marker, text)), default=None)
    # A stop token may follow it.
    line = rf"^[ \t#*]*(?:[0-9]+[.)][ \t#*]*)?({marker})[ \t*:]*(?:<[^\s<>]+>)?\r?$"
    fences = [found.start() for found in _FENCE.finditer(text)]
    around = bool(fences) and not text[: fences[0]].strip()
    for found in reversed(list(re.finditer(line, text, re.MULTILINE))):
        before = sum(fence < found.start() for fence in fences)
        in_fence = before % 2 == 1 and not (around and before == 1)
        if not in_fence and _PROSE.search(text, 0, found.start()):
            return found.start(1)
    return None


def _shortest(ids: Ids, tokenizer: ChatTokenizer, marker: str, count: int) -> int:
    """The fewest first tokens whose text holds the marker `count` times."""
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        if tokenizer.decode(ids[:middle]).count(marker) >= count:
            high = middle
        else:
            low = middle + 1
    return low
