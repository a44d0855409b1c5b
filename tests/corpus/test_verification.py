"""Verdicts: what each comparison decides, and workers that hang, crash, fill the memory or make noise."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_idft.corpus.verification.verifier import Verdict, Verification, Verifier
from megatron_idft.errors import InputError, UserError, WorkerError

RIGHT, WRONG, UNKNOWN = Verdict.RIGHT, Verdict.WRONG, Verdict.UNKNOWN
PLUGIN = "verification_plugin:choose"


@pytest.fixture(scope="module")
def math():
    with Verifier(timeout_seconds=20) as verifier:
        yield verifier


@pytest.fixture(autouse=True)
def plugin_folder(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def alive(pid: int) -> bool:
    """Not dead, and no zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    "response, reference, verdict, by",
    [
        (r"\boxed{42}", "42", RIGHT, "exact"),
        (r"\boxed{42}", 42, RIGHT, "exact"),
        (r"\boxed{0.5}", 0.5, RIGHT, "exact"),
        (r"\boxed{(C)}", "C", RIGHT, "exact"),
        (r"\boxed{B}", "C", WRONG, "exact"),
        (r"\boxed{\text{yes}}", "Yes", RIGHT, "exact"),
        (r"\boxed{\text{yes}}", "no", WRONG, "exact"),
        (r"\boxed{\frac{1}{2}}", "0.5", RIGHT, "number"),
        (r"\boxed{0.333}", "1/3", WRONG, "number"),
        (r"\boxed{18\text{ dollars}}", "18", RIGHT, "number"),
        (r"first \boxed{1}, no: \boxed{2}", "1", WRONG, "number"),
        # The reference is a whole solution.
        ("The answer is 72.", "24+48 = 72\n#### 72", RIGHT, "exact"),
        (r"\boxed{3}", r"Adding, $\boxed{\frac{6}{2}}$.", RIGHT, "number"),
        # No final answer.
        ("42", "42", RIGHT, "exact"),
        ("0.50", "1/2", RIGHT, "number"),
        ("It is forty", "The sum", WRONG, "exact"),
        # The last sentence.
        ("It is 42", "42", RIGHT, "number, last in text"),
        ("It is 42", "43", WRONG, "number, last in text"),
        ("It is 42 or 43", "43", UNKNOWN, "number, last in text"),
        ("", "42", WRONG, "exact"),
        (r"\boxed{4", "4", WRONG, "exact"),
        # No reference.
        (r"\boxed{4}", None, UNKNOWN, None),
        (r"\boxed{4}", " ", UNKNOWN, None),
        (r"\boxed{4}", [4], UNKNOWN, None),
    ],
)
def test_without_computer_algebra(math, response, reference, verdict, by):
    (found,) = math.verify([(response, reference)])
    assert found.verdict == verdict
    assert found.verified_by == by


def test_reasons(math):
    found = math.verify([("It is so", "an x"), (r"\boxed{4}", None), (r"\boxed{4}", {"a": 1}), (r"\boxed{4}", "4")])
    assert found[0] == Verification(WRONG, "exact", None, "no final answer in the response")
    assert found[1] == Verification(UNKNOWN, None, "4", "no reference answer")
    assert "dict" in found[2].reason and found[3] == Verification(RIGHT, "exact", "4", None)


FORMULAS = [
    (r"(x+1)^2", "x^2+2x+1", RIGHT),
    (r"(x+1)^2", "x^2+2x+2", WRONG),
    ("x**2 - 1", "(x-1)(x+1)", RIGHT),
    (r"\{2, 1\}", r"\{1,2\}", RIGHT),
    (r"\{2, 1\}", r"\{1,3\}", WRONG),
    ("2, 1", "1,2", RIGHT),
    ("(2,1)", "(1,2)", WRONG),
    ("(1,2)", "[1,2]", WRONG),
    (r"(3,\infty)\cup(-\infty,2)", r"(-\infty,2)\cup(3,\infty)", RIGHT),
    (r"0 \le x < \infty", r"[0,\infty)", RIGHT),
    ("x=5", "5", RIGHT),
    ("5", "x = 5", RIGHT),
    ("x=6", "5", WRONG),
    ("sqrt(2)/2", r"\frac{1}{\sqrt{2}}", RIGHT),
    ("pi/4", r"\frac{\pi}{4}", RIGHT),
    ("exp(2)", "e^2", RIGHT),
    (r"\frac{\pi}{3}", r"\frac{\pi}{4}", WRONG),
    ("4i + 3", "3+4i", RIGHT),
    (r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", RIGHT),
    (r"\begin{bmatrix}1&2\\3&5\end{bmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", WRONG),
    (r"\binom{5}{2}", "10", RIGHT),
    ("not 5 but 6", "5", UNKNOWN),
    # math-verify alone takes each of these for the same.
    ("listen", "silent", UNKNOWN),
    (r"5\text{ cm}", r"5\text{ km}", UNKNOWN),
    ("101_2", "101_3", UNKNOWN),
    ("2023-01-01", "2021", UNKNOWN),
    # It cannot read these.
    (r"\frac{a}{b", "5", UNKNOWN),
    ("1e999999999", "5", UNKNOWN),
    ("(" * 200 + "x" + ")" * 200, "y + 1", UNKNOWN),
]


def test_formulas(math):
    answered = math.verify([(rf"$\boxed{{{given}}}$" if "{b" not in given else f"answer: {given}", wanted)
                            for given, wanted, _ in FORMULAS])  # fmt: skip
    for (given, wanted, verdict), found in zip(FORMULAS, answered, strict=True):
        assert found.verdict == verdict, (given, wanted, found)
        assert (found.reason is not None) == (verdict is UNKNOWN)
        by = "math-verify" if "=" not in given + wanted else None  # x=5 is the number 5
        assert found.verified_by == by or by is None or verdict is UNKNOWN


def test_math_verify_that_never_ends_is_killed_and_costs_only_its_own_answer():
    hopeless = r"\boxed{9^{9^{9^9}} + x}"
    with Verifier(workers=1, timeout_seconds=3) as verifier:
        found = verifier.verify([(r"\boxed{2x}", "x+x"), (hopeless, "5y"), (r"\boxed{3x}", "2x+x")])
    assert [verification.verdict for verification in found] == [RIGHT, UNKNOWN, RIGHT]
    assert found[1].verified_by == "math-verify"
    assert found[1].reason == "timed out after 3 s"


def test_without_math_verify(monkeypatch):
    monkeypatch.setattr("megatron_idft.corpus.verification.verifier.find_spec", lambda name: None)
    with Verifier() as verifier:
        found = verifier.verify([(r"\boxed{2x}", "x+x"), (r"\boxed{1/2}", "0.5"), (r"\boxed{3}", "4")])
        assert "math-verify is not installed" in verifier.describe()
    assert [verification.verdict for verification in found] == [UNKNOWN, RIGHT, WRONG]
    assert 'pip install "megatron-idft[verify]"' in found[0].reason


def test_describe():
    assert "then by math-verify 0." in Verifier().describe()
    assert Verifier(plugin=PLUGIN, workers=3).describe().startswith(f"answers verified by {PLUGIN} (3 processes, 10 s")


def test_a_plugin_decides_alone_and_in_order():
    items = [("x" * (n % 7), "y" * (n % 5)) for n in range(200)]
    with Verifier(plugin="verification_plugin:same_length", workers=3) as verifier:
        found = verifier.verify([*items, ("5", "?"), ("", None), ("same", {1, 2})])
    for (response, reference), verification in zip(items, found[:200], strict=True):
        if reference:
            assert verification.verdict == (RIGHT if len(response) == len(reference) else WRONG)
            assert verification.verified_by == "verification_plugin:same_length"
        else:
            assert verification.reason == "no reference answer"
    assert found[200].verdict is UNKNOWN and "could not tell" in found[200].reason
    assert found[201].reason == "no reference answer"
    assert found[202].verdict is UNKNOWN and "JSON" in found[202].reason


def test_a_plugin_may_do_anything(tmp_path):
    """Each trouble costs its own item, with its reason; those around it are answered, noise or not."""
    troubles = {
        "sleep": "timed out after 1 s",
        "exit": "the verifying process ended, exit status 3",
        "crash": "the verifying process ended, signal SIGABRT",
        "raise": "KeyError: 'what is wrong'",
        "quit": "SystemExit: bye",
        "number": "returned int; it must return True, False or None",
    }
    items = []
    for trouble in troubles:
        items += [(trouble, "x"), ("same", "same"), ("other", "same")]
    with Verifier(plugin=PLUGIN, timeout_seconds=1) as verifier:
        found = verifier.verify(items)
        assert verifier.verify([("modules", "x"), ("ü\ud800", "ü\ud800")]) == [
            Verification(RIGHT, PLUGIN, None), Verification(RIGHT, PLUGIN, None)
        ]  # fmt: skip
    assert [verification.verdict for verification in found] == [UNKNOWN, RIGHT, WRONG] * len(troubles)
    for reason, verification in zip(troubles.values(), found[::3], strict=True):
        assert reason in verification.reason


def test_memory_is_limited():
    with Verifier(plugin=PLUGIN, workers=1, memory_mb=300) as verifier:
        found = verifier.verify([("hog", "x"), ("same", "same")])
    assert [verification.verdict for verification in found] == [UNKNOWN, RIGHT]
    assert found[0].reason == "ran out of memory, 300 MB"


def test_what_a_killed_plugin_started_dies_with_it(tmp_path):
    file = tmp_path / "pid"
    with Verifier(plugin=PLUGIN, workers=1, timeout_seconds=2) as verifier:
        (found,) = verifier.verify([("child", str(file))])
    assert found.reason == "timed out after 2 s"
    child = int(file.read_text())
    for _ in range(100):  # its new parent reaps it
        if not alive(child):
            break
        time.sleep(0.05)
    assert not alive(child)


def test_workers_are_lazy_reused_and_ended():
    math = Verifier()
    assert math.verify([(r"\boxed{5}", "5")])[0].verdict is RIGHT and not math._pool._processes
    with Verifier(plugin=PLUGIN, workers=2) as verifier:
        (worker,) = verifier._pool._processes
        pid = worker.process.pid
        assert [verifier.verify([("process", pid)])[0].verdict for _ in range(3)] == [RIGHT] * 3
        assert alive(pid)
    assert not alive(pid)
    assert verifier.verify([("same", "same")])[0].verdict is RIGHT  # after leaving: new ones
    verifier.close()


def test_a_fork_leaves_the_workers_to_its_parent():
    with Verifier(plugin=PLUGIN, workers=1) as verifier:
        pid = verifier._pool._processes[0].process.pid
        child = os.fork()
        if child == 0:
            code = 1
            try:
                others = verifier.verify([("process", pid), ("same", "same")])
                verifier.close()
                code = 0 if [other.verdict for other in others] == [WRONG, RIGHT] else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert verifier.verify([("process", pid)])[0].verdict is RIGHT


PROGRAM = """
import sys
from megatron_idft.corpus.verification.verifier import Verifier
assert not {"torch", "megatron", "numpy", "sympy"} & set(sys.modules)
verifier = Verifier(plugin="verification_plugin:choose", workers=1)
print(verifier.verify([("same", "same")])[0].verdict)
print(verifier._pool._processes[0].process.pid, flush=True)
"""


@pytest.mark.parametrize(
    "end", ["", "import os; os._exit(0)", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
)
def test_workers_do_not_outlive_the_program(tmp_path, end):
    """Without a guard for __main__: it is not imported again."""
    (tmp_path / "program.py").write_text(PROGRAM + end)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    verdict, pid = done.stdout.split()
    assert verdict == "right" and done.stderr == ""
    for _ in range(100):
        if not alive(int(pid)):
            break
        time.sleep(0.05)
    assert not alive(int(pid))


@pytest.mark.parametrize("plugin", ["module", "module:", ":function", ""])
def test_a_plugin_must_name_a_function(plugin):
    with pytest.raises(InputError, match="module:function"):
        Verifier(plugin=plugin)


@pytest.mark.parametrize(
    "plugin, complaint",
    [
        ("no_such_module:f", "cannot import 'no_such_module'.*PYTHONPATH"),
        ("verification_plugin:missing", "has no function 'missing'"),
        ("verification_plugin:NOT_A_FUNCTION", "has no function 'NOT_A_FUNCTION'"),
    ],
)
def test_a_plugin_that_cannot_be_loaded_stops_the_program(plugin, complaint):
    with pytest.raises(WorkerError, match=complaint) as caught, Verifier(plugin=plugin):
        pass
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize("settings", [{"workers": 0}, {"timeout_seconds": 0.0}, {"timeout_seconds": float("nan")},
                                      {"memory_mb": 0}])  # fmt: skip
def test_settings_that_cannot_be_used(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        Verifier(**settings)


def test_too_little_memory_to_load_stops_the_program():
    with pytest.raises(WorkerError, match="math-verify"):
        Verifier(memory_mb=40).verify([(r"\boxed{2x}", "x+x")])
