"""Final answers of responses, comparisons without computer algebra, and phrases that betray a hint."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_idft.corpus.verification.answers import final_answer
from megatron_idft.corpus.verification.leaks import DEFAULT_LEAK_PHRASES, LeakFilter
from megatron_idft.corpus.verification.numbers import number, same_number
from megatron_idft.corpus.verification.sentences import last_sentence, states_number
from megatron_idft.corpus.verification.texts import same_text
from megatron_idft.errors import InputError


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{3} and later \boxed{ \frac{1}{2} }", r"\frac{1}{2}"),
        (r"\fbox{a{b{c}}d}", "a{b{c}}d"),
        (r"$\boxed {5}$", "5"),
        (r"thus $\boxed 42$.", "42"),
        (r"{\boxed 42}", "42"),
        (r"\boxed \frac{1}{2}$", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{1, 2\right.}", r"\left\{1, 2\right."),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{x = \fbox{5} + 1}", r"x = \fbox{5} + 1"),
        (r"\boxed{}", None),
        (r"} \boxed{5} {", "5"),
        (r"\boxed{1} hence \boxed{2", None),  # cut off in its answer
        (r"The answer is \boxed{2", None),
        (r"\boxed{ oops \boxed{2}", "2"),
        (r"\boxedness{3}", None),
        (r"\boxed{4}" + "\n#### 5", "5"),  # what is stated last
        ("48/2 = <<48/2=24>>24\n#### 1,072\n", "1,072"),
        ("#### Step 1: think\nThe end", None),
        ("#### 12\nThat is all.", "12"),
        ("#### 3 apples", "3 apples"),
        ("The answer is 3.5. Goodbye", "3.5"),
        ("The answer is: $x=3$.", "$x=3$"),
        ("answer is 1\nThe final answer is 2!\nbye", "2"),
        ("**Answer:** 7 cm", "7 cm"),
        ("**Final Answer**: (B)", "(B)"),
        ("Answer:\n12", "12"),
        ("the answer is:\n$$\n12\n$$", "12"),
        ("My answer was 3", None),
        ("answers: 3", None),
        ("the answer is " + "very " * 200 + "long", None),
        ("the answer is .", None),
        ("no idea", None),
        ("", None),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


balanced = st.recursive(
    st.text("ab1 \\{}", max_size=4).map(lambda text: text.replace("\\", "").replace("{", r"\{").replace("}", r"\}")),
    lambda inner: st.lists(inner, max_size=3).map(lambda parts: "".join(f"{{{part}}}" for part in parts)),
    max_leaves=8,
)


@given(st.text("ab \n$.", max_size=20), balanced, st.text("ab \n$.", max_size=20))
def test_a_box_is_found_whatever_is_in_it_and_around_it(before, content, after):
    assert final_answer(rf"\boxed{{0}} is less. {before}\boxed{{{content}}}{after}") == (content.strip() or None)
    assert final_answer(rf"{before}\boxed{{{content}{after}") is None


def test_hostile_texts_take_linear_time():
    """Each would run for hours if anything took time with the square of its length."""
    size = 1_000_000
    for text in (r"\boxed{" * size, r"\boxed{" * (size // 10) + "}" * (size // 10), "#### 1" + " " * size + "\nx"):
        final_answer(text)
        last_sentence(text)
    for text in ("1" * 1000, "1 " * 500, "one " * 250, "# 1 " * 250, "-" * 1000, "1, feet and " * 80, "(1" * 500):
        states_number(text, "5")
    assert last_sentence("1. " * (size // 20) + "X. " * (size // 20) + "a 5") is not None
    assert not same_text(" " * size + "^" + "\n" * size, "5")
    assert number("1" * size) is None and number("(" * size) is None


@pytest.mark.parametrize(
    "a, b",
    [
        ("5", " $5$ . "),
        (r"\dfrac{1}{2}", r"\frac12"),
        (r"\left( 1, 2 \right)", "(1,2)"),
        (r"\text{Yes}", "yes"),
        ("No", r"\mathrm{no}."),
        ("1,234,567", "1234567"),
        ("1{,}000", "1000"),
        (r"1\,000", "1000"),
        (r"90^\circ", "90°"),
        (r"50\%", "50 %"),
        (r"\$18", "18"),
        ("**(C)**", "C"),
        (r"\(x + 1\)", "x+1"),
        ("−3", "-3"),
        (r"\text{two words}", "Two  words"),
    ],
)
def test_same_text(a, b):
    assert same_text(a, b) and same_text(b, a)


@pytest.mark.parametrize(
    "a, b",
    [
        ("x", "X"),
        ("AB", "ab"),
        ("(1,234)", "(1234)"),
        ("1,23", "123"),
        ("1 1/2", "11/2"),
        ("", ""),
        ("$", "."),
        ("-5", "5"),
        (r"\leftarrow", "arrow"),
        (r"\{1\}", "1"),
    ],
)
def test_different_text(a, b):
    assert not same_text(a, b) and not same_text(b, a)


rationals = st.fractions(max_denominator=10**6)


@given(rationals, st.booleans())
def test_fractions_are_read_exactly(value, latex):
    p, q = value.numerator, value.denominator
    sign = "-" if p < 0 else ""
    text = rf"{sign}\dfrac{{{abs(p)}}}{{{q}}}" if latex else f"{p}/{q}"
    assert number(text) == value
    whole, rest = divmod(abs(value), 1)
    mixed = rf"{sign}{whole}\frac{{{rest.numerator}}}{{{rest.denominator}}}"
    assert number(mixed) == value
    assert number(f"{sign}{whole} {rest.numerator}/{rest.denominator}") == value


@given(st.decimals(allow_nan=False, allow_infinity=False, places=6), st.integers(-30, 30))
def test_decimals_are_read_exactly(value, exponent):
    exact = Fraction(value)
    assert number(f"{value:f}") == exact and number(f"{value:+,f}") == exact
    scaled = exact * Fraction(10) ** exponent
    assert number(f"{value:f}e{exponent}") == scaled
    assert number(rf"{value:f} \times 10^{{{exponent}}}") == scaled


def in_words(value: int, glue: str) -> str:
    """glue: in front of the last number below a hundred, " and " or " "."""
    ones = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    ones = [*ones.split(), "seventeen", "eighteen", "nineteen"]
    if value < 20:
        return ones[value]
    if value < 100:
        tens = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"][value // 10 - 2]
        return f"{tens}-{ones[value % 10]}" if value % 10 else tens
    scale, name = next(pair for pair in ((10**6, "million"), (1000, "thousand"), (100, "hundred")) if value >= pair[0])
    rest = value % scale
    behind = (glue if rest < 100 else " ") + in_words(rest, glue) if rest else ""
    return f"{in_words(value // scale, glue)} {name}{behind}"


@given(st.integers(0, 2500) | st.integers(0, 10**9 - 1), st.sampled_from([" and ", " "]))
def test_words_are_the_number_that_they_say(value, glue):
    assert number(in_words(value, glue)) == value
    assert number(f"Minus {in_words(value, glue).replace('-', ' ')}") == -value


@pytest.mark.parametrize(
    "text",
    ["and", "a", "hundred", "one two", "nineteen ninety", "one hundred hundred", "ten and one", "one, two",
     "five thousand six thousand", "twenty-eleven", "one million and", "zero five", "one thousandfive", "the first one",
     "one of them", "three or four", "twenty ten", "seven hundred thousand million", "minus", "twenty " * 57],
)  # fmt: skip
def test_other_words_are_no_number(text):
    assert number(text) is None


@given(rationals, rationals)
def test_same_number_is_equality_of_fractions(a, b):
    assert same_number(str(a), str(b)) == (a == b)
    assert same_number(str(a), rf"\frac{{{3 * a.numerator}}}{{{3 * a.denominator}}}")


@given(st.text("0123456789.,-+/eE%^{}\\frac()* ", max_size=30))
def test_any_text_is_a_number_or_none(text):
    assert number(text) is None or isinstance(number(text), Fraction)


@pytest.mark.parametrize(
    "a, b, same",
    [
        ("0.5", "1/2", True),
        ("0.333", "1/3", False),
        ("0.1", "0.1000000000000000000000001", False),  # the same in float64
        ("1e-3", "0.001", True),
        ("10^{-3}", "0.001", True),
        (r"3 \cdot 10^8", "300000000", True),
        ("50%", "50", True),
        ("50%", "0.5", True),
        ("0.5", r"50\%", True),
        ("50%", "0.5%", False),
        ("50%", "5", False),
        ("-0", "0", True),
        (".5", "0.5", True),
        ("1/0", "1", None),
        (r"\frac{1}{0}", "1", None),
        ("1/2/3", "1", None),
        ("x", "1", None),
        ("1,5", "15", None),
        ("1e999999999", "1e999999999", None),
        ("1e" + "9" * 390, "1", None),
        ("٣", "3", True),
        ("inf", "nan", None),
        ("1_000", "1000", None),
    ],
)
def test_same_number(a, b, same):
    assert same_number(a, b) is same and same_number(b, a) is same


@given(st.integers(0, 10**9), st.integers(0, 10**9), st.sampled_from(["{}", "{:,}", "{}.00", "${:,}", "**{}**"]))
def test_a_sentence_with_one_number_states_it_and_no_other(stated, wanted, form):
    sentence = f"So she has {form.format(stated)} apples left."
    assert last_sentence(f"There were 7 of them.\n\n{sentence}\n") == sentence
    assert states_number(sentence, str(wanted)) is (stated == wanted)
    assert states_number(sentence, form.format(stated)) is True


@given(st.text("0123456789 .,-+=*/%$ab\n#?", max_size=60), st.integers(0, 99))
def test_a_text_without_the_number_is_never_right(text, wanted):
    if states_number(text, str(wanted)):
        assert str(wanted) in text or "%" in text or "/" in text or "." in text


def test_leaks():
    leaks = LeakFilter()
    assert leaks.find("Comparing with the Reference\n  answer, we see") == "reference answer"
    assert leaks.find("By the pigeonhole principle, 3.") is None
    assert leaks.find("preference answers") is None
    assert leaks.find("As the hint says") == "as the hint"
    assert leaks.find("the reference angle; mix the original solution; the answer is 5") is None
    assert leaks.find("the given answer is 5", question="Is the GIVEN  answer right?") is None
    assert leaks.find("the given answer; reference answer", question="the given answer?") == "reference answer"
    assert LeakFilter(["a.c"]).find("abc") is None
    for phrase in DEFAULT_LEAK_PHRASES:
        assert leaks.find(f"so, {phrase.upper()}, then") is not None


def test_leak_phrases_from_a_file(tmp_path):
    path = tmp_path / "phrases.txt"
    path.write_text("# ours\n\n  oracle says \n\\# CoT\n", encoding="utf-8")
    leaks = LeakFilter.from_file(path)
    assert leaks.phrases == ("oracle says", "# CoT")
    assert leaks.find("Oracle\tsays 5") == "oracle says" and leaks.find("# cot") == "# CoT"
    path.write_text("# nothing\n")
    with pytest.raises(InputError, match=r"phrases\.txt: no phrase"):
        LeakFilter.from_file(path)
    with pytest.raises(InputError, match=r"missing\.txt"):
        LeakFilter.from_file(tmp_path / "missing.txt")
    for phrases in ([], [" "]):
        with pytest.raises(InputError, match="at least one"):
            LeakFilter(phrases)
