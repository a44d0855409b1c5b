"""The packaged prompts, and those that a command names.

A packaged prompt is a file in templates/, known by its name without the suffix; anything else that is named is a file
of the user's. What identifies a prompt everywhere is the sha256 of its content.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from megatron_idft.corpus.scores.display import bounded
from megatron_idft.errors import InputError
from megatron_idft.hinted_decoding.prompts import HintTemplate

AUTO = "auto"
PAPER = "analysis"
# From plain to elaborate: the order in which they are tried, and the first of equals is taken.
PACKAGED = ("solve-again", "explain", "answer-only", "hint", "short-analysis", PAPER)


@dataclass(frozen=True, slots=True)
class NamedPrompts:
    """What --hint-prompt says.

    Attributes:
        templates: with `auto` those to try, else those to use, in order of preference.
        auto: a trial chooses among them.
        extra: those of them that are the user's files, after `auto`.
    """

    templates: tuple[HintTemplate, ...]
    auto: bool = False
    extra: tuple[HintTemplate, ...] = ()

    def without_analysis(self) -> NamedPrompts:
        """For the former flag --no-analysis: `auto` tries fewer prompts.

        Raises:
            InputError: a prompt that was named asks for an analysis.
        """
        asking = [template for template in self.templates if template.marker is not None]
        for template in asking:
            if not self.auto or template in self.extra:
                raise InputError(
                    f"{bounded(template.name)}: with --no-analysis there is no marker: take it out of the header"
                )
        return replace(self, templates=tuple(template for template in self.templates if template not in asking))


def packaged_prompt(name: str) -> HintTemplate:
    """A packaged prompt by its name, one of PACKAGED."""
    folder = resources.files("megatron_idft.hinted_decoding").joinpath("templates")
    return HintTemplate(name, folder.joinpath(f"{name}.txt").read_text("utf-8"))


def named_prompt(name: str) -> HintTemplate:
    """A packaged prompt by its name, or the file of that name.

    Raises:
        InputError: there is neither, or the file cannot be used.
    """
    if name in PACKAGED:
        return packaged_prompt(name)
    try:
        return HintTemplate(name, Path(name).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"prompt template {bounded(name)}: neither a packaged one ({', '.join(PACKAGED)}) nor a file"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompt template {bounded(name)}: {error}; name a UTF-8 text file") from error


def named_prompts(names: Sequence[str]) -> NamedPrompts:
    """`auto`, or one or several prompts in order of preference; after `auto`, more to try beside the packaged ones.

    Raises:
        InputError: a prompt cannot be used, or is named twice.
    """
    auto = AUTO in names
    if auto and names[0] != AUTO:
        raise InputError(
            f"{AUTO} comes first: --hint-prompt {AUTO} [FILE …] tries the files beside the packaged prompts"
        )
    chosen = (*PACKAGED, *names[1:]) if auto else tuple(names)
    templates = tuple(named_prompt(name) for name in chosen)
    first: dict[str, str] = {}
    for template in templates:
        if template.sha256 in first:
            raise InputError(
                f"--hint-prompt: {bounded(template.name)} is the same as {bounded(first[template.sha256])}"
            )
        first[template.sha256] = template.name
    return NamedPrompts(templates, auto, templates[len(PACKAGED) :] if auto else ())
