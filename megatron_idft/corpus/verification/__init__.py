"""Is a response right: its final answer against the reference, and phrases that betray a hint."""

from megatron_idft.corpus.verification.answers import final_answer
from megatron_idft.corpus.verification.leaks import DEFAULT_LEAK_PHRASES, LeakFilter
from megatron_idft.corpus.verification.numbers import same_number
from megatron_idft.corpus.verification.texts import same_text
from megatron_idft.corpus.verification.verifier import Verdict, Verification, Verifier

__all__ = [
    "DEFAULT_LEAK_PHRASES",
    "LeakFilter",
    "Verdict",
    "Verification",
    "Verifier",
    "final_answer",
    "same_number",
    "same_text",
]
