"""The report's page. Everything on it comes from the JSON that stands beside it."""

from __future__ import annotations

from typing import Any

from megatron_idft.corpus.report.document import document, image
from megatron_idft.corpus.report.findings import estimate
from megatron_idft.corpus.report.html_text import escaped
from megatron_idft.hinted_decoding.output.outcomes import UNVERIFIED, describe_methods
from megatron_idft.hinted_decoding.report.example_html import EXAMPLE_STYLE, render_examples
from megatron_idft.hinted_decoding.report.figures import fate_figure, phi_figure, sources_figure
from megatron_idft.hinted_decoding.report.mixing_figures import lengths_figure, mixing_figure
from megatron_idft.hinted_decoding.report.outcome import STAGES
from megatron_idft.hinted_decoding.report.own_samples import FAILED, NOT_CHECKED
from megatron_idft.hinted_decoding.report.tables import (
    lengths_table,
    mixing_table,
    names_table,
    paired_table,
    phi_table,
    settings_table,
    source_tables,
    split_table,
    stage_tables,
    turn_table,
)

_LEAD = (
    "What Hinted Decoding made of a corpus: what was kept and why, and how far the text lies from the model’s own"
    " distribution before and after, by φ = log p + entropy of each token under the plain prompt, in nats: 0 on average"
    " for what the model samples itself, far below 0 for tokens that are improbable although the model was certain."
)


def render_page(data: dict[str, Any]) -> str:
    """The whole document. Needs matplotlib."""
    sections = [
        ("outcome", "What became of the records", _outcome(data)),
        ("stages", "Stages and accuracy", _stages(data)),
        ("phi", "φ before and after", _phi(data)),
        ("lengths", "Lengths", _lengths(data)),
        ("mixing", "λ and entropy along the response", _mixing(data)),
        ("sources", "Sources", _sources(data)),
        ("examples", "Examples", _examples(data)),
        ("settings", "Settings", settings_table(data["settings"])),
        ("reading", "What these numbers do not prove", _READING),
    ]
    return document(data["title"], _LEAD, sections, EXAMPLE_STYLE)


def _outcome(data: dict[str, Any]) -> str:
    part = data["corpus"]
    if not part["records"]["total"]:
        return "<p>No records.</p>"
    reasons = {"dropped": part["reasons"]["dropped"], "error": part["reasons"]["error"]}
    text = turn_table(part) + _kept_turns(part) + names_table("Why records were not kept", reasons)
    if part["responses_not_finite"]:
        text += (
            f"<p>{part['responses_not_finite']:,} responses came without finite scores; they are counted here, but in"
            " no number on φ.</p>"
        )
    text += names_table("Why turns were not rewritten: the last stage", {"turns": part["turn_reasons"]})
    return text + names_table("… and each stage by itself", part["failures"])


def _kept_turns(part: dict[str, Any]) -> str:
    methods = part["kept_turns"]
    if not methods:
        return ""
    text = f"<p>{escaped(describe_methods(methods))}.</p>"
    if methods.get(UNVERIFIED):
        text += (
            f"<p><b>Nothing says that the {methods[UNVERIFIED]:,} UNVERIFIED turns are right:</b> they had no"
            " reference, or could not be compared with it, and were taken because of --unverified keep.</p>"
        )
    return text


def _stages(data: dict[str, Any]) -> str:
    part = data["corpus"]
    if not part["turns"]["total"]:
        return ""
    text = (
        '<p class="soft">Candidates by what the verifier said and what became of them. Accuracy: right among those that'
        " were compared with an answer; unknown verdicts count as not right. “Turns kept”: of the turns that came to"
        " this stage, those whose text in the output is from it. A leak is a phrase that betrays the hint; unfinished"
        " is what did not end by itself. Standard errors are over records.</p>"
    )
    stages = part["stages"]
    text += stage_tables(part) + image(fate_figure(data), "Turns by stage and accuracy by stage and source")
    for title, key in (
        ("Finish reasons, all candidates", "finish_reasons"),
        ("Finish reasons, accepted candidates", "finish_reasons_of_accepted"),
        ("Why candidates were rejected", "rejected_because"),
        ("Verified by", "verified_by"),
        ("Phrases that betray the hint", "leaks"),
    ):
        text += names_table(title, {stage: stages[stage][key] for stage in STAGES})
    return text


def _phi(data: dict[str, Any]) -> str:
    numbers = phi_table(data)
    if not numbers:
        return ""
    text = f"<p>{_null(data)}</p>{numbers}"
    text += paired_table(data["corpus"])
    text += '<p class="soft">The first and the last bin of each histogram are open, so nothing is left out.</p>'
    return text + image(phi_figure(data), "Histograms of phi of turns, of paired differences and of tokens")


def _null(data: dict[str, Any]) -> str:
    null = data["null"]
    if not null["own_samples"]:
        return (
            f"There are no own samples to compare with: {escaped(null['why'])}. What remains is the theory: the mean φ"
            " of the model’s own samples at temperature 1 is 0."
        )
    mean = estimate(data["corpus"]["phi"]["rollouts"]["phi_mean"], sign=True)
    text = f"The null are the model’s own samples: {escaped(null['why'])}. Their mean φ is {mean}; it should be 0. "
    if null["check"] == FAILED:
        return (
            f"{text}<b>It is not, by more than four standard errors: sampling and scoring disagree, and no φ on this"
            " page can be trusted until they do not.</b>"
        )
    if null["check"] == NOT_CHECKED:
        return f"{text}There are too few records to tell."
    return f"{text}It is, within four standard errors."


def _lengths(data: dict[str, Any]) -> str:
    numbers = lengths_table(data["corpus"])
    if not numbers:
        return ""
    text = '<p class="soft">Tokens of each response, with the token that ends it.</p>'
    return text + numbers + image(lengths_figure(data), "Histogram of response lengths before and after")


def _mixing(data: dict[str, Any]) -> str:
    numbers, splits = mixing_table(data["corpus"]), split_table(data["corpus"])
    if not numbers and not splits:
        return ""
    text = (
        '<p class="soft">Only tokens that were drawn from two streams, of accepted candidates: λ is the share of the'
        " plain stream, 1 − λ that of the hinted one. A first token that comes from the hinted stream alone has λ = 0."
        " Behind the splitter the model writes alone, so late places hold fewer tokens, and those of other responses."
        " Bands are standard errors over records.</p>"
    )
    return text + numbers + splits + image(mixing_figure(data), "Lambda and entropies along the response")


def _sources(data: dict[str, Any]) -> str:
    return source_tables(data) + image(sources_figure(data), "Mean phi before and after by source")


def _examples(data: dict[str, Any]) -> str:
    examples = render_examples(data["examples"])
    if not examples:
        return ""
    text = (
        '<p class="soft">Rewritten turns, no turn twice; turns with fewer than 16 tokens on one side are ranked only'
        " where nothing longer is left. Hold the pointer over a token for λ, φ and the entropies.</p>"
    )
    return text + examples


_READING = """
<p><b>φ alone does not make data good or bad.</b> A higher mean φ says that the model finds the text more like its own,
not that the text is more correct, clearer or more useful. A model learns only from what it would not have written, so a
corpus at φ = 0 may teach nothing. For text from another distribution q the mean of φ is H(p) − H(q) − KL(q‖p): foreign
text can come out at 0, and text sampled below temperature 1, as Hinted Decoding mostly is, comes out above 0 without
being the model’s own.</p>
<p><b>Accepted rollouts are not own samples any more:</b> the verifier has chosen among them. The null is therefore all
rollouts, right or wrong.</p>
<p><b>Before and after are compared on the turns that were rewritten.</b> Records that were dropped are in neither; they
are mostly the hard ones, so the output is an easier corpus than the input. Whether training on it helps, only training
tells.</p>
<p><b>Accuracy is that of the verifier:</b> whether the final answers agree, not whether the reasoning does. A right
answer may stand under wrong steps, above all where a hint named it. Unknown verdicts are neither right nor wrong: the
verifier found no answer or could not compare; with many of them, accuracy says little.</p>
<p><b>Leaks</b> are found by their phrases; a text that betrays the hint in other words is not found.</p>
<p><b>Standard errors</b> treat a record as one draw, because its tokens, turns and candidates depend on each other.
Records that are copies of each other make them too small.</p>
"""
