"""The trial of prompts: what it measures, which prompts it chooses, and that the choice is one for all launches."""

import json

import pyarrow as pa
import pytest

from megatron_idft.corpus.records import Record
from megatron_idft.corpus.verification.leaks import LeakFilter
from megatron_idft.corpus.verification.verifier import Verifier
from megatron_idft.errors import InputError, SettingsMismatch
from megatron_idft.hinted_decoding.mixing import EntropyMixing
from megatron_idft.hinted_decoding.named_prompts import PACKAGED, NamedPrompts, named_prompt, named_prompts
from megatron_idft.hinted_decoding.output.outcomes import OUTCOME_SCHEMA
from megatron_idft.hinted_decoding.output.status import describe_status
from megatron_idft.hinted_decoding.prompt_trial import (
    TRIAL,
    choose,
    chosen_templates,
    describe_trial,
    measure,
    read_choice,
    trial_indices,
    trial_settings,
    trial_size,
)
from megatron_idft.hinted_decoding.prompts import HintTemplate
from megatron_idft.hinted_decoding.settings import RealignSettings
from megatron_idft.hinted_decoding.stages.pipeline import Realigner
from megatron_idft.hinted_decoding.stages.tasks import RealignInput
from megatron_idft.integration.offline.realign_prompts import (
    RememberingEngine,
    prompts_of_folder,
    try_in_launch,
    try_in_ledger,
)
from megatron_idft.integration.offline.replica import Replica
from tests.hinted_decoding.scripted import ScriptedEngine, make_tokenizer

PLAIN = HintTemplate("plain", "---\n{{ question }} {{ answer }}")
OTHER = HintTemplate("other", "---\n{{ answer }} {{ question }}")
ANALYSIS = HintTemplate("marked", "marker: X\n---\n{{ question }} {{ answer }} X")
LONG = "First I take 3 and then I add 4 to it, which is one more than 6. The answer is 7."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def settings(**changes) -> RealignSettings:
    defaults = {"seed": 5, "max_positions": 400, "max_tokens": 90, "templates": (ANALYSIS, PLAIN), "rollout_samples": 2}
    return RealignSettings(**(defaults | {"mixing": EntropyMixing(600)} | changes))


def record(identity: str, *turns: str, answer=None) -> Record:
    messages = []
    for text in turns:
        messages += [{"role": "user", "content": "3 + 4?"}, {"role": "assistant", "content": text}]
    return Record(messages, identity, "data.jsonl", 3, answer, None, {})


def tried(tokenizer, template, script, *records, **changes):
    """Rows of a trial of one prompt, through the schema that they are written with."""
    engine = ScriptedEngine(tokenizer, script)
    realigner = Realigner(
        engine, tokenizer, trial_settings(settings(**changes), template), Verifier(), LeakFilter(), {"versions": {}}
    )
    rows = realigner.realign([RealignInput(i, r) for i, r in enumerate(records)])
    assert {request.seed for request in engine.requests.values()} == {5 + 1_000_003}
    return pa.Table.from_pylist(rows, OUTCOME_SCHEMA).to_pylist()


def test_a_trial_measures_one_hinted_try_of_every_turn(tokenizer):
    """No own response and no retry is asked for, and a turn that fails does not end the record."""
    script = {
        "a/0/hinted": LONG,  # kept
        "a/1/hinted": "The answer is 8.",  # wrong, and the next turn is tried all the same
        "a/2/hinted": "7",  # right and bare: the original is long, so not kept
        "b/0/hinted": ("on and on", "length"),
        "c/0/hinted": "By the reference answer, the answer is 7.",  # a leak
    }
    records = [
        record("a", "It is \\boxed{7}", "It is \\boxed{7}", LONG),
        record("b", "It is \\boxed{7}"),
        record("c", "anything", answer="7"),
        record("d", "nobody can check this"),
    ]
    found = measure(PLAIN, tried(tokenizer, PLAIN, script, *records, retries=2))
    assert (found["records"], found["turns"], found["turns_with_answer"]) == (4, 5, 5)
    shares = {key: found[key]["value"] for key in ("right", "kept", "bare")}
    assert shares == {"right": 3 / 5, "kept": 1 / 5, "bare": 1 / 5}
    assert found["kept"]["se"] > 0 and found["phi"]["value"] != 0
    assert found["tokens"] == 5 * found["tokens_per_turn"]["value"] > 0
    assert (found["name"], found["sha256"], found["analysis"]) == ("plain", PLAIN.sha256, False)


def test_without_answers_kept_says_nothing_of_right(tokenizer):
    script = {"d/0/hinted": "Something like that, in other words"}
    rows = tried(tokenizer, PLAIN, script, record("d", "nobody can check this"), unverified="keep")
    found = measure(PLAIN, rows)
    assert found["right"] is None and found["turns_with_answer"] == 0 and found["kept"]["value"] == 1
    lines = describe_trial([found], [0])
    assert any("unknown" in line for line in lines) and "nothing says what is right" in lines[-1]


def test_the_tokens_of_analyses_count(tokenizer):
    script = {"a/0/analysis": "short X", "a/0/hinted": LONG}
    with_analysis = measure(ANALYSIS, tried(tokenizer, ANALYSIS, script, record("a", LONG)))
    without = measure(PLAIN, tried(tokenizer, PLAIN, script, record("a", LONG)))
    assert with_analysis["tokens"] > without["tokens"] and with_analysis["analysis"]


def numbers(name: str, share: float, *, se=0.1, phi=0.0, analysis=False):
    estimate = {"value": share, "se": se}
    return {
        "name": name, "sha256": name, "analysis": analysis, "records": 9, "turns": 9, "turns_with_answer": 9,
        "right": estimate, "kept": estimate, "bare": {"value": 0.0, "se": 0.0},
        "phi": None if phi is None else {"value": phi, "se": 0.1}, "tokens_per_turn": None, "tokens": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("found", "order"),
    [
        ([numbers("a", 0.5), numbers("b", 0.7)], [1]),
        ([numbers("a", 0.5), numbers("b", 0.7), numbers("c", 0.1, analysis=True)], [1, 2]),
        ([numbers("a", 0.9), numbers("b", 0.7, analysis=True), numbers("c", 0.4, analysis=True)], [0, 1]),
        ([numbers("a", 0.65, phi=0.3), numbers("b", 0.7, phi=0.1)], [0]),  # within one standard error: nearer
        ([numbers("a", 0.55, phi=0.3), numbers("b", 0.7, phi=0.1)], [1]),
        ([numbers("a", 0.7), numbers("b", 0.7)], [0]),
        ([numbers("a", 0.0, phi=None), numbers("b", 0.0, phi=None, analysis=True)], [0]),  # a second would be in vain
        ([numbers("a", 0.0, phi=None), numbers("b", 0.2, analysis=True)], [1]),
    ],
)
def test_the_choice(found, order):
    assert choose(found) == order
    text = "\n".join(describe_trial(found, order))
    assert text.count("<- first") == 1 and text.count("<- second") == len(order) - 1
    assert ("WARNING" in text) == all(prompt["kept"]["value"] == 0 for prompt in found)


def test_the_sample_is_spread_and_no_more_than_there_is():
    assert [trial_size(total, None) for total in (3, 20, 64, 200, 10**6)] == [3, 4, 8, 25, 32]
    assert trial_size(5, 9) == 5 and trial_size(500, 9) == 9
    assert trial_indices(9, 3) == [0, 4, 8] and trial_indices(2, 2) == [0, 1] and trial_indices(0, 0) == []


class Alone(Replica):
    """One rank."""

    def share(self, value):
        return value

    def print_once(self, text):
        print(text)


@pytest.fixture
def launch(tokenizer, tmp_path):
    """launch(script): a launch's part in the trial of PLAIN and ANALYSIS; what it tried is noted in `launch.tried`."""
    job = {"model": "m"}

    def start(scripts: dict[str, dict]):
        def try_one(template):
            start.tried.append(template.name)
            return tried(tokenizer, template, scripts[template.name], record("a", LONG))

        replica = Alone(0, 1, True)
        return try_in_ledger(tmp_path, [PLAIN, ANALYSIS], try_one, replica, {"seed": 5}, job, 60)

    start.tried = []
    return start


GOOD = {"plain": {"a/0/hinted": LONG}, "marked": {"a/0/analysis": "X", "a/0/hinted": "8"}}


def test_a_trial_that_was_stopped_is_taken_up_and_the_choice_is_made_once(launch, tmp_path, capsys):
    with pytest.raises(KeyError):
        launch({"plain": GOOD["plain"], "marked": {}})  # its second or first prompt fails
    begun = list(launch.tried)
    assert not (tmp_path / "prompts.json").exists()
    assert "trying prompts before the run" in describe_status(tmp_path) and "of 2 chunks" in describe_status(tmp_path)
    assert launch(GOOD) == (PLAIN,)
    finished = [name for name in begun if name != "marked"]
    assert launch.tried[len(begun) :] == [n for n in ("plain", "marked") if n not in finished] or not finished
    first = (tmp_path / "prompts.json").read_text()
    assert "<- first" in capsys.readouterr().out
    launch.tried.clear()
    assert launch({}) == (PLAIN,) and launch.tried == []  # nothing is tried again
    assert (tmp_path / "prompts.json").read_text() == first
    content = json.loads(first)
    assert content["order"] == ["plain"] and content["chosen"] == [{"name": "plain", "sha256": PLAIN.sha256}]
    assert [prompt["name"] for prompt in content["prompts"]] == ["plain", "marked"]
    assert len(list((tmp_path / TRIAL / "parts").glob("*.parquet"))) == 2  # the texts


def test_a_folder_keeps_its_choice(launch, tmp_path):
    launch(GOOD)
    auto = NamedPrompts((OTHER, ANALYSIS), auto=True)  # the packaged prompts of a later version
    assert prompts_of_folder(tmp_path, auto, {"model": "m"}) == (PLAIN,)
    with pytest.raises(SettingsMismatch, match="model"):
        prompts_of_folder(tmp_path, auto, {"model": "another"})
    assert prompts_of_folder(tmp_path, auto, None) == (PLAIN,)
    with pytest.raises(InputError, match="other was not among the prompts"):
        prompts_of_folder(tmp_path, NamedPrompts((OTHER,), auto=True, extra=(OTHER,)), None)
    assert prompts_of_folder(tmp_path, NamedPrompts((OTHER,)), None) == (OTHER,)  # named: no choice is asked for
    assert prompts_of_folder(tmp_path / "new", auto, {"model": "m"}) is None
    content = json.loads((tmp_path / "prompts.json").read_text())
    content["sources"][PLAIN.sha256] += " "
    (tmp_path / "prompts.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"prompts\.json cannot be used"):
        read_choice(tmp_path)


def test_a_folder_that_was_begun_with_named_prompts_goes_on_with_them(tmp_path):
    auto = NamedPrompts((PLAIN, OTHER), auto=True)
    manifest = {"settings": {"prompt": {"sha256": OTHER.sha256, "marker": None}}, "format": 1, "num_chunks": 1}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"part_suffix": ".parquet"}))
    assert prompts_of_folder(tmp_path, auto, {"model": "m"}) == (OTHER,)
    with pytest.raises(InputError, match="pass its file as --hint-prompt"):
        prompts_of_folder(tmp_path, NamedPrompts((PLAIN,), auto=True), {"model": "m"})


def test_the_same_originals_are_scored_once(tokenizer):
    script = {"a/0/hinted": LONG, "b/0/hinted": LONG}
    inner = ScriptedEngine(tokenizer, script)
    engine = RememberingEngine(inner)
    rows = []
    for template, records in ((PLAIN, ["a"]), (OTHER, ["a", "b"])):
        realigner = Realigner(
            engine, tokenizer, trial_settings(settings(), template), Verifier(), LeakFilter(), {"versions": {}}
        )
        rows.append(realigner.realign([RealignInput(0, record(name, LONG + name)) for name in records]))
    assert [len(sequences) for sequences in inner.scored] == [1, 1]
    first, again = (found[0]["turns"][0]["original_phi_sum"] for found in rows)
    assert first == again != rows[1][1]["turns"][0]["original_phi_sum"]
    assert engine.decoded_tokens == inner.decoded_tokens > 0


def test_replicas_of_an_estimate_share_the_prompts(tokenizer):
    parts = {}

    def launch_of(number):
        def gather(name, value):
            parts[number] = json.loads(json.dumps(value))
            return [parts.get(0, {}), parts.get(1, {})]

        def try_one(template):
            return tried(tokenizer, template, GOOD[template.name], record("a", LONG))

        return try_in_launch([PLAIN, ANALYSIS], try_one, Alone(number, 2, True), gather)

    with pytest.raises(KeyError):
        launch_of(1)  # the other has not reported yet
    assert launch_of(0) == (PLAIN,)


def test_chosen_templates_are_those_that_were_tried():
    choice = {"chosen": [{"name": "plain", "sha256": PLAIN.sha256}], "sources": {PLAIN.sha256: PLAIN.source}}
    assert chosen_templates(choice) == (PLAIN,)


def test_packaged_prompts_are_known_by_name_and_files_by_path(tmp_path, monkeypatch):
    assert {named_prompt(name).name for name in PACKAGED} == set(PACKAGED)
    assert len({template.sha256 for template in named_prompts(["auto"]).templates}) == len(PACKAGED)
    assert {template.marker is None for template in named_prompts(["auto"]).templates} == {True, False}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hint").write_text(OTHER.source)
    assert named_prompt("hint").source != OTHER.source == named_prompt("./hint").source
