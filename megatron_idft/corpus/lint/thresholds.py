"""The linter's thresholds, each with its source. Our own say how they were chosen."""

from megatron_idft.corpus.scores.estimates import Estimate

LOGS = (
    "training logs of the authors of DDT and IDFT (arXiv 2602.12222, github.com/zhangmiaosen2000/Towards-On-Policy-SFT)"
)

# The same alarms as in training (integration/loss/metrics.py).
PHI_MEAN_ALARM, PHI_STD_ALARM = -2.0, 5.0
ALARM_SOURCE = (
    f"{LOGS}: healthy runs began at a mean of -0.25 to +0.11 and a spread of 0.3 to 1.7; a run with a broken chat"
    " template showed -8 and 6.5. The lines between are ours, as in the training metrics"
)
# A third-party guide to DDT stops where more than half of the tokens lie below -5, and warns of a mean above 0.5.
SHARE_BELOW_5_ALARM, PHI_MEAN_HIGH = 0.5, 0.5

# Spread of phi: 0.27 to 0.48 on data that models had written themselves, 1.26 to 1.69 on NuminaMath.
IN_DISTRIBUTION_STD, FOREIGN_STD = 0.48, 1.26
FOREIGN_STD_LINE = 0.78  # ours: the geometric middle of the two
OUT_OF_DISTRIBUTION_MEAN = -0.1  # the authors' HintedDecoding/README calls a mean below it out-of-distribution
STD_RATIO = 1.5  # ours: well below the smallest published ratio of foreign to own data, 1.26 / 0.48 = 2.6
DISTANCE_SOURCE = (
    f"{LOGS}: the spread was {IN_DISTRIBUTION_STD} or less on data that the model had written itself, {FOREIGN_STD} or"
    f" more on foreign data; {FOREIGN_STD_LINE} is ours, the geometric middle. A mean below"
    f" {OUT_OF_DISTRIBUTION_MEAN} is what their HintedDecoding/README calls out-of-distribution; a third-party guide"
    f" warns of a mean above {PHI_MEAN_HIGH}."
    f" The ratio {STD_RATIO} is ours: chosen well below the smallest published one, 2.6"
)
STANDARD_ERRORS = 4.0  # ours: chosen so that hardly one of ten thousand comparisons is flagged by chance
MIN_RECORDS = 20  # ours: chosen so that standard errors over records can be trusted; fewer are not compared


def can_tell(records: int, estimate: Estimate) -> bool:
    """Whether so many records are enough for the estimate's standard error, which is over records, to be trusted."""
    return records >= MIN_RECORDS and estimate.se is not None


ERRORS_SOURCE = (
    f"ours: {STANDARD_ERRORS:g} standard errors over at least {MIN_RECORDS} records, chosen so that hardly one of ten"
    " thousand comparisons is flagged by chance"
)

FIRST_TOKENS_LOOK, FIRST_TOKENS_PROBLEM = -1.0, -2.0  # ours: a model's own samples have 0 at every position
END_OF_TURN_LOOK, END_OF_TURN_PROBLEM = (
    -3.0,
    -5.0,
)  # ours, at levels known: the authors' demo counts tokens below -1, -3 and -5

# Shares of records. "look" begins above the first, "problem" above the second.
FEW_SOURCE = "ours: chosen so that a single record is shown, and one in twenty counts as the corpus's habit"
FEW = (0.0, 0.05)  # ours: as FEW_SOURCE says
PROMPT_IN_SPAN = (0.01, 0.2)  # ours: answers that restate the question are common, a whole corpus of them is not
PROMPT_RUN_TOKENS, PROMPT_RUN_SHARE = 16, 0.2  # ours: chosen so that a quoted name or first sentence does not count
REPEATED_RECORDS = (0.001, 0.05)  # ours: chosen so that one accident in a thousand passes
REPEATED_RESPONSES = (0.05, 0.5)  # ours: refusals and set phrases are repeated on purpose in ordinary corpora
REPEATED_RESPONSE_TOKENS = 8  # ours: chosen so that "Yes." and numbers do not count
SHORT_TOKENS = 2  # ours: trained tokens besides the end of turn
SHORT = (0.05, 0.5)  # ours: chosen so that a few short answers pass; a corpus of labels is asked about
