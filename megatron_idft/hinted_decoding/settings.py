"""The settings of a realignment: stages, sampling, and the fate of a turn without a right response."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from megatron_idft.hinted_decoding.judge_prompt import judge_sha256
from megatron_idft.hinted_decoding.mixing import EntropyMixing
from megatron_idft.hinted_decoding.prompts import HintTemplate
from megatron_idft.inference.requests import Repetition, Sampling

Fallback = Literal["drop", "original"]
AnalysisMarker = Literal["append", "require"]
Unverified = Literal["drop", "original", "keep"]

GREEDY = Sampling(temperature=0.0)
PAPER_SAMPLING = Sampling(temperature=0.3, top_p=0.95, cut_before_temperature=True)  # of hinted decoding


@dataclass(frozen=True, slots=True)
class RealignSettings:
    """All that decides what the responses are, besides the model, its tokenizer and the records.

    Attributes:
        max_positions: the context in tokens.
        max_tokens: the longest response in tokens.
        templates: of the hint, at least one, in the order in which they are tried. With a marker, the model analyses
            the reference first; without one, the rendered template is the hint.
        rollout_samples: 0 leaves the stage out.
        analysis_marker: "append" closes an analysis without marker by one; "require" gives no hint then, as the paper.
        more_room: a response that `max_tokens` cut gets one more try with so many times as many; 0: none.
        fallback: the fate of a turn for which no candidate was accepted.
        original_weight: of turns that stay as they were, in the loss.
        bare_below: a response with a hint in view and less than this share of the original's tokens is
            rejected; 0: none.
        retries: further tries of hinted decoding by the first template; each with another seed.
        retry_slope_factor: each retry multiplies the slope of the mixing by this once more.
        regenerate: own responses only, one for each input: no hint, and no comparison with a reference, unless
            `only_right`.
        only_right: of regeneration: a turn whose response is not verified right is dropped.
        unverified: the fate of a turn without a reference, or for which nothing was right and something could not be
            compared; "keep" accepts its first such candidate that ended by itself and does not betray the hint.
        model_judge_threshold: the probability of Yes with which a response is right by the model's own judgement, which
            is asked where nothing else decides; None: it is not asked.
    """

    seed: int
    max_positions: int
    max_tokens: int
    templates: tuple[HintTemplate, ...]
    mixing: EntropyMixing
    rollout_samples: int = 1
    rollout_sampling: Sampling = field(default_factory=Sampling)
    analysis_sampling: Sampling = GREEDY
    analysis_max_tokens: int = 2048
    analysis_marker: AnalysisMarker = "append"
    hinted_sampling: Sampling = PAPER_SAMPLING
    splitter: str | None = "\\boxed{"
    repetition: Repetition | None = field(default_factory=Repetition)
    stop_on_first_token: bool = False
    more_room: float = 2.0
    fallback: Fallback = "drop"
    original_weight: float = 1.0
    bare_below: float = 0.25
    retries: int = 2
    retry_slope_factor: float = 0.5
    regenerate: bool = False
    only_right: bool = False
    unverified: Unverified = "drop"
    model_judge_threshold: float | None = None

    def describe(self) -> dict[str, Any]:
        """As plain types, for the manifest: launches on one folder must agree, and the report reads it."""
        analysis = None
        if any(template.marker is not None for template in self.templates):
            analysis = _sampling(self.analysis_sampling)
            analysis |= {"max_tokens": self.analysis_max_tokens, "marker": self.analysis_marker}
        rollouts = _sampling(self.rollout_sampling) | {"samples": self.rollout_samples}
        retry = {"retries": self.retries, "slope_factor": self.retry_slope_factor}
        judge: dict[str, Any] = {}  # absent where it is not asked, as in folders that were begun before there was one
        if self.model_judge_threshold is not None:
            judge["model_judge"] = {"threshold": self.model_judge_threshold, "prompt": judge_sha256()}
        common = {
            "seed": self.seed,
            "seq_length": self.max_positions,
            "max_new_tokens": self.max_tokens,
            "prompts": [{"sha256": template.sha256, "marker": template.marker} for template in self.templates],
            "rollouts": rollouts if self.rollout_samples else None,
            "repetition": None if self.repetition is None else asdict(self.repetition),
            "more_room": self.more_room,
        }
        if self.regenerate:
            return common | {"regenerate": {"only_right": self.only_right}}
        return {
            **common,
            "analysis": analysis,
            "mixing": self.mixing.describe(),
            "hinted": _sampling(self.hinted_sampling)
            | {"splitter": self.splitter, "stop_on_first_token": self.stop_on_first_token},
            "bare_below": self.bare_below,
            "fallback": self.fallback,
            "original_weight": self.original_weight,
            "retry": retry if self.retries else None,
            "unverified": self.unverified,
            **judge,
        }


def _sampling(sampling: Sampling) -> dict[str, Any]:
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "cut_before_temperature": sampling.cut_before_temperature,
    }
