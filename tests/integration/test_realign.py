"""`realign`: from a checkpoint that the trainer wrote to records that the trainer reads, in any number of launches."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from megatron_idft.corpus.ledger.ledger import status_of
from megatron_idft.corpus.ledger.manifest import read_manifest
from megatron_idft.corpus.records import read_records
from megatron_idft.data.chat.conversations import encode_conversation
from megatron_idft.data.chat.tokenizer import load_tokenizer
from megatron_idft.hinted_decoding.output.merge import merge
from megatron_idft.hinted_decoding.output.results import read_outcomes, retry_folders
from tests.held_chunk import lines_of_one_that_waits
from tests.launch import ROOT, forked, forking_python, start
from tests.tiny_tokenizers import train_tokenizer

MODEL = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 96 --max-position-embeddings 96
    --position-embedding-type rope --chat-template chatml
"""
HINT = "---\n{{ question }} {{ solution }}\n"
RECORDS = 48


def write_records(path: Path, numbers: range, seed: int) -> list[dict]:
    """Additions of one or two turns; the references are boxed, the model below has learned another form."""
    rng = random.Random(seed)
    records = []
    for number in numbers:
        messages = []
        for _ in range(1 + number % 2):
            a, b = rng.randrange(3), rng.randrange(3)
            messages.append({"role": "user", "content": f"{a} + {b}?"})
            messages.append({"role": "assistant", "content": f"\\boxed{{{a + b}}}."})
        columns = in_a_form(number, messages)
        records.append(columns | {"id": f"r{number}", "source": "even" if number % 2 else "odd", "n": number})
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return records


def in_a_form(number: int, messages: list[dict]) -> dict:
    """These messages as people write them."""
    if number % 3 == 1:
        names = {"user": "human", "assistant": "gpt"}
        return {"conversations": [{"from": names[said["role"]], "value": said["content"]} for said in messages]}
    if number % 3 == 2 and len(messages) == 2:
        return {"instruction": messages[0]["content"], "input": "", "output": messages[1]["content"]}
    return {"messages": messages}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("realign")
    write_records(folder / "data.jsonl", range(RECORDS), seed=5)
    rng, lines = random.Random(6), []
    for _ in range(300):
        a, b = rng.randrange(3), rng.randrange(3)
        # Alone it often errs; shown the reference it mostly copies the result.
        hinted = rng.random() < 0.6
        question = f"{a} + {b}?" + (f" \\boxed{{{a + b}}}." if hinted else "")
        result = a + b if hinted else rng.choice((a + b, a, b))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": f"answer: {result}"}]
        lines.append(json.dumps({"messages": messages}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "hint.txt").write_text(HINT)
    lines = [f"user assistant {a} + {a + 3}? \\boxed{{{a}}}. answer: {a}" for a in range(9)]
    train_tokenizer(folder, lines, vocab_size=70)
    flags = f"{MODEL} --sft-data {folder / 'train.jsonl'} --tokenizer-model {folder / 'tokenizer.model'}"
    flags += f" --train-iters 200 --micro-batch-size 16 --global-batch-size 16 --lr 1e-2 --save {folder / 'model'}"
    flags += " --lr-decay-style constant --seed 1"  # so small a model learns to copy with about every other seed
    forked(["-m", "megatron_idft", "train", *flags.split()])
    return folder


def flags(folder: Path, output: Path | str, more: str = "") -> list[str]:
    words = f"{MODEL} --data {folder / 'data.jsonl'} --tokenizer-model {folder / 'tokenizer.model'}"
    words += f" --load {folder / 'model'} --output {output} --no-analysis --hint-prompt {folder / 'hint.txt'}"
    return f"{words} --max-new-tokens 16 --kv-memory-gb 0.1 --retries 1 {more}".split()


def auto(words: list[str]) -> list[str]:
    """The same with a trial of the packaged prompts and the hint."""
    at = words.index("--no-analysis")  # the hint follows it
    return [*words[:at], "--hint-prompt", "auto", *words[at + 2 :]]


def realign(folder: Path, output: Path, more: str = "", nproc: int = 1) -> list[dict]:
    forked(["-m", "megatron_idft", "realign", *flags(folder, output, more)], nproc=nproc)
    return list(read_outcomes(output))


@pytest.fixture(scope="module")
def realigned(folder) -> list[dict]:
    return realign(folder, folder / "whole")


def test_every_record_is_there_once_and_what_is_kept_is_right(folder, realigned):
    assert [row["index"] for row in realigned] == list(range(RECORDS))
    assert [row["id"] for row in realigned] == [f"r{i}" for i in range(RECORDS)]
    stages = {turn["stage"] for row in realigned if row["status"] == "kept" for turn in row["turns"]}
    assert stages >= {"rollout", "hinted"} and {row["status"] for row in realigned} == {"kept", "dropped"}
    tokenizer = load_tokenizer(folder / "tokenizer.model", chat_template="chatml")
    for row in realigned:
        for turn in row["turns"]:
            for candidate in turn["candidates"]:
                assert candidate["finish_reason"] in ("eos", "length")
        if row["status"] == "dropped":
            assert row["record"] is None and row["turns"][-1]["stage"] is None
            continue
        record = json.loads(row["record"])
        assert record["n"] == row["index"] and record["source"] == row["source"]
        assert record.keys().isdisjoint({"conversations", "instruction", "input", "output"})  # nothing of the old text
        for question, answer in zip(record["messages"][::2], record["messages"][1::2], strict=True):
            a, b = question["content"].rstrip("?").split(" + ")
            assert answer["content"].split()[-1] == str(int(a) + int(b))
        ids, mask = encode_conversation(tokenizer, record["messages"])
        assert row["token_ids"][: row["turns"][0]["num_prompt_tokens"]] == ids[: np.flatnonzero(mask)[0]].tolist()
        assert tokenizer.decode(row["token_ids"]) == tokenizer.decode(ids).removesuffix("\n")


def test_hinted_decoding_makes_right_what_the_model_alone_gets_wrong(realigned):
    tried = {"rollout": [], "hinted": []}
    for row in realigned:
        for turn in row["turns"]:
            for candidate in turn["candidates"]:
                tried.get(candidate["stage"], []).append(candidate["verdict"] == "right")
    # Although only those are hinted whose rollouts were all wrong.
    assert len(tried["hinted"]) > 10 and np.mean(tried["hinted"]) > np.mean(tried["rollout"])


def test_statistics_are_those_that_score_gives_for_the_merged_file(folder, realigned, tmp_path):
    merged = tmp_path / "data.jsonl"
    counts = merge(folder / "whole", merged)
    assert counts["kept"] == sum(row["status"] == "kept" for row in realigned) > 5
    words = f"{MODEL} --tokenizer-model {folder / 'tokenizer.model'} --load {folder / 'model'}".split()
    for data, output in ((merged, tmp_path / "after"), (folder / "data.jsonl", tmp_path / "before")):
        forked(["-m", "megatron_idft", "score", *words, "--data", data, "--output", output])
    before, after = (pq.read_table(tmp_path / name / "scores.parquet").to_pylist() for name in ("before", "after"))
    kept = [row for row in realigned if row["status"] == "kept"]
    for row, scored in zip(kept, after, strict=True):
        accepted = [next(c for c in turn["candidates"] if c["accepted"]) for turn in row["turns"]]
        assert scored["id"] == row["id"] and scored["num_tokens"] == sum(c["num_tokens"] for c in accepted)
        for name in ("log_prob_sum", "phi_sum"):
            assert scored[name] == pytest.approx(sum(c[name] for c in accepted), abs=1e-4)
    for row, scored in zip(realigned, before, strict=True):
        if len(row["turns"]) == 1 and row["index"] % 2 == 0:  # of later turns the history is another one
            assert scored["phi_sum"] == pytest.approx(row["turns"][0]["original_phi_sum"], abs=1e-4)

    # And the trainer reads it, with those ids.
    train = [*words, "--sft-data", str(merged), "--train-iters", "2", "--micro-batch-size", "2", "--lr", "1e-3"]
    text = forked(["-m", "megatron_idft", "train", *train, "--finetune", "--log-interval", "1"])
    assert "iteration        2/" in text
    meta = json.loads(next(tmp_path.glob(".megatron-idft-cache/tokens-*/records.json")).read_text())
    assert meta["counts"]["pretokenized"] == meta["counts"]["kept"] == len(kept)


def responses(rows: list[dict]) -> list:
    return [(row["id"], row["status"], row["token_ids"]) for row in rows]


def assert_same(rows: list[dict], expected: list[dict]) -> None:
    """But for a draw that falls on a rounding difference."""
    equal = sum(a == b for a, b in zip(responses(rows), responses(expected), strict=True))
    assert equal >= RECORDS - 2, equal


@pytest.mark.parametrize(
    ("nproc", "more"),
    [
        (2, "--tensor-model-parallel-size 2"),
        (2, "--chunk-records 5"),  # two replicas
        (1, "--chunk-records 7 --max-rows 3"),
    ],
)
def test_layout_chunks_and_batches_do_not_change_the_records(folder, realigned, tmp_path, nproc, more):
    assert_same(realign(folder, tmp_path / "again", more, nproc), realigned)


def join(words: list, errors: Path) -> subprocess.Popen:
    """A launch of one process, which nothing but the output folder joins to others."""
    with open(errors, "wb") as file:
        return start(["-m", "megatron_idft", "realign", *words], subprocess.DEVNULL, file)


def test_several_launches_one_of_them_killed_and_one_stopped(folder, realigned, tmp_path):
    output = tmp_path / "shared"
    words = flags(folder, output, "--chunk-records 1 --lease-seconds 3")
    launches = [join(words, tmp_path / f"errors{number}") for number in range(2)]
    try:
        for launch, number in zip(launches, (signal.SIGKILL, signal.SIGTERM), strict=True):
            before, deadline = len(list(output.glob("parts/*.parquet"))), time.monotonic() + 120
            while len(list(output.glob("parts/*.parquet"))) < before + 3:
                assert time.monotonic() < deadline and launch.poll() is None
                time.sleep(0.002)
            launch.send_signal(number)
            launch.wait(60)
    finally:
        for launch in launches:
            if launch.poll() is None:
                launch.kill()
    assert launches[0].returncode == -signal.SIGKILL and launches[1].returncode == 143
    assert "the same command goes on from there" in (tmp_path / "errors1").read_text()
    state = status_of(output)
    # The killed one may hold a chunk whose record has ended, unwritten, and the one after it; the other gives back.
    left = [*state.leased, *state.stale]
    assert 6 <= state.finished < RECORDS and len(left) <= 2
    assert len({lease.owner.pid for lease in left}) <= 1
    assert_same(realign(folder, output, "--chunk-records 1 --lease-seconds 3 --max-rows 2"), realigned)
    assert len(list(output.glob("parts/*.parquet"))) == RECORDS


def test_a_launch_says_that_it_waits_for_others(folder, realigned, tmp_path):
    output = tmp_path / "held"
    realign(folder, output, "--chunk-records 16")
    words = ["-m", "megatron_idft", "realign", *flags(folder, output, "--chunk-records 16")]
    lines = lines_of_one_that_waits(output, 1, words, "waiting for", tmp_path / "shown")
    waiting = [line for line in lines if "waiting for chunks that others work on" in line]
    assert re.match(r"realigning:  67%.*, 32/48 records, 0 tokens here, waiting", waiting[0]), waiting
    done = [line for line in lines if line.startswith("realigning: 100%")]
    assert "waiting" not in done[-1] and "48/48 records" in done[-1]
    assert_same(list(read_outcomes(output)), realigned)


def test_killed_at_random_moments_again_and_again(folder, tmp_path):
    """Two launches at any time; one after the other is killed, at its start or in the middle of a chunk, and replaced.

    REALIGN_KILLS says how often; the more, the more records.
    """
    kills = int(os.environ.get("REALIGN_KILLS", "3"))
    count = 32 * (kills + 1)
    data, output = tmp_path / "data.jsonl", tmp_path / "out"
    write_records(data, range(count), seed=7)
    rng = random.Random(8)
    words = flags(folder, output, f"--chunk-records 2 --lease-seconds 2 --max-rows 2 --data {data}")
    running, killed = [join(words, tmp_path / f"errors{number}") for number in range(2)], 0
    try:
        while killed < kills:
            before, deadline = len(list(output.glob("parts/*.parquet"))), time.monotonic() + 120
            early = rng.random() < 0.25
            while not early and len(list(output.glob("parts/*.parquet"))) < before + 2:
                assert time.monotonic() < deadline
                time.sleep(0.002)
            time.sleep(rng.random() * (1 if early else 0.3))
            launch = running.pop(0)
            if launch.poll() is None:
                launch.kill()
                killed += 1
            launch.wait(60)
            assert launch.returncode in (0, -signal.SIGKILL), (tmp_path / "errors0").read_text()
            running.append(join(words, tmp_path / f"errors{killed + 1}"))
    finally:
        for launch in running:
            launch.kill()
            launch.wait(60)
    finished = len(list(output.glob("parts/*.parquet")))
    rows = realign(folder, output, f"--chunk-records 2 --lease-seconds 2 --max-rows 2 --data {data}")
    print(f"{killed} launches killed, {finished} of {count // 2} chunks finished before the last launch")
    assert [row["id"] for row in rows] == [f"r{i}" for i in range(count)]
    merge(output, tmp_path / "merged.jsonl")
    merged = [json.loads(line)["id"] for line in (tmp_path / "merged.jsonl").read_text().splitlines()]
    assert merged == [row["id"] for row in rows if row["status"] == "kept"]


def test_the_model_analyses_the_reference_itself(folder, tmp_path):
    """With a marker that this model always writes; what it wrote before that and the marker end the hinted prompt."""
    template = tmp_path / "analysis.txt"
    template.write_text('marker: answer\nafter-marker: ":"\n---\n{{ question }} {{ solution }} answer\n')
    words = [word for word in flags(folder, tmp_path / "out") if word != "--no-analysis"]
    at = words.index("--hint-prompt")
    words[at : at + 2] = ["--analysis-prompt", str(template), "--rollout-samples", "0", "--analysis-max-tokens", "8"]
    forked(["-m", "megatron_idft", "realign", *words])
    rows = list(read_outcomes(tmp_path / "out"))
    first_turns = [row["turns"][0] for row in rows]
    hinted = [turn for turn in first_turns if turn["candidates"]]
    assert len(hinted) > len(rows) / 2
    assert {hint["marker"] for turn in first_turns for hint in turn["hints"]} <= {"model", "appended"}
    tokenizer = load_tokenizer(folder / "tokenizer.model", chat_template="chatml")
    as_expected = 0
    for record, turn in zip(read_records(folder / "data.jsonl"), first_turns, strict=True):
        question, solution = (message["content"] for message in record.messages[:2])
        asked = [{"role": "user", "content": f"{question} {solution} answer"}]
        text = tokenizer.template.render(asked, add_generation_prompt=True) + "answer:"
        as_expected += turn["hints"][0]["num_prompt_tokens"] == len(tokenizer.encode_batch([text], [[]])[0].ids)
        if turn["candidates"]:
            assert turn["candidates"][0]["stage"] == "hinted" and 0 < turn["hints"][0]["analysis_tokens"] <= 8
    assert as_expected > len(rows) / 2  # where the marker is the first that it wrote


def test_replicas_choose_prompts_together(folder, tmp_path):
    """The hint that the model has learnt is the best, far from the packaged ones, most of which do not even fit."""
    output = tmp_path / "out"
    words = auto(flags(folder, output, "--prompt-trial-records 6 --limit 6 --chunk-records 3"))
    text = forked(["-m", "megatron_idft", "realign", *words], nproc=2)
    assert "> trying 7 prompts on 6 of 6 records each" in text and text.count("<- first") == 1
    choice = json.loads((output / "prompts.json").read_text())
    assert choice["order"][0] == str(folder / "hint.txt") and len(choice["prompts"]) == 7
    settings = read_manifest(output)["settings"]
    assert [prompt["sha256"] for prompt in settings["prompts"]] == [chosen["sha256"] for chosen in choice["chosen"]]
    assert choice["prompts"][-1]["kept"]["value"] > 0
    assert len(list((output / "prompt_trial" / "parts").glob("*.parquet"))) == 7
    assert len(list(read_outcomes(output))) == 6

    # A launch that finds a prompt in others' hands says so.
    held, trial = tmp_path / "held", tmp_path / "held" / "prompt_trial"
    shutil.copytree(output / "prompt_trial", trial)
    words = ["-m", "megatron_idft", "realign", *words, "--output", held]
    said = "> all prompts are tried or being tried: waiting for the others' trials"
    assert lines_of_one_that_waits(trial, 6, words, said, tmp_path / "shown").count(said) == 1
    assert json.loads((held / "prompts.json").read_text())["order"] == choice["order"]


def test_regeneration_needs_no_reference_and_its_records_are_trained(folder, tmp_path):
    """Two samples of each record, by two replicas."""
    data, output = tmp_path / "data.jsonl", tmp_path / "out"
    records = write_records(data, range(8), seed=9)
    with open(data, "a") as file:
        file.write(json.dumps({"messages": [{"role": "user", "content": "1 + 1?"}], "id": "open"}) + "\n")
    words = f"{MODEL} --data {data} --tokenizer-model {folder / 'tokenizer.model'} --load {folder / 'model'}"
    words += f" --output {output} --max-new-tokens 16 --kv-memory-gb 0.1 --chunk-records 4 --regenerate"
    text = forked(["-m", "megatron_idft", "realign", *words.split(), "--rollout-samples", "2"], nproc=2)
    rows = list(read_outcomes(output))
    counted = sum(row["status"] == "kept" for row in rows)
    assert f"records: {counted} kept" in text and "kept turns" not in text
    assert [row["id"] for row in rows] == [f"{r['id']}#{i}" for r in [*records, {"id": "open"}] for i in (0, 1)]
    assert [row["index"] for row in rows] == list(range(18)) and status_of(output).finished == 5
    texts = [tuple(turn["candidates"][0]["text"] for turn in row["turns"]) for row in rows]
    assert any(one != other for one, other in zip(texts[::2], texts[1::2], strict=True))
    with pytest.raises(AssertionError, match="was begun with --regenerate --rollout-samples 2: pass the same"):
        forked(["-m", "megatron_idft", "realign", *words.split(), "--retry-errors"])
    kept = merge(output, tmp_path / "merged.jsonl")["kept"]
    merged = list(read_records(tmp_path / "merged.jsonl"))
    assert len(merged) == kept == counted > 8
    assert all(record.messages[-1]["role"] == "assistant" for record in merged)
    tokenizer = load_tokenizer(folder / "tokenizer.model", chat_template="chatml")
    for record in merged:
        text = tokenizer.template.render(record.messages)
        assert tokenizer.decode(record.extra["token_ids"]) == text.removesuffix("\n")


def test_other_settings_are_refused_on_the_same_folder(folder, realigned):
    for more, name in (("--chunk-records 3", "chunk_records"), ("--seed 3", "seed")):
        with pytest.raises(AssertionError, match=name):
            realign(folder, folder / "whole", more)
    settings = read_manifest(folder / "whole")["settings"]
    assert settings["rollouts"]["samples"] == 1 and settings["mixing"]["mode"] == "linear"


def test_a_folder_and_a_flag_of_before_the_hint_share_are_understood(folder, realigned, tmp_path):
    """The folder has no difference to these settings but the slope."""
    shutil.copytree(folder / "whole", tmp_path / "whole")
    manifest = json.loads((tmp_path / "whole" / "manifest.json").read_text())
    settings = manifest["settings"]
    settings["mixing"]["beta"] = settings["mixing"].pop("slope")
    retry = {"retries": 1, "beta_factor": settings["retry"].pop("slope_factor"), "after_retries": "drop"}
    settings |= {"fallback": "retry", "retry": retry, "prompt": settings.pop("prompts")[0]}
    del settings["more_room"], settings["original_weight"], settings["bare_below"]  # which are younger
    (tmp_path / "whole" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(AssertionError) as refused:
        realign(folder, tmp_path / "whole", "--mix-beta 2 --fallback retry")
    text = str(refused.value)
    assert text.count("> --mix-beta is now --mix-slope: write --mix-slope 2.0") == 1
    assert text.count(" in the folder, ") == 1 and "mixing.slope: 3.0 in the folder, 2.0 now" in text


def test_errors_are_tried_again_in_a_ledger_of_their_own(folder, realigned, tmp_path):
    rollouts = [{"id": "r1", "response": "answer: 0"}, {"id": "r2", "response": "answer: 0"}]
    (tmp_path / "rollouts.jsonl").write_text("\n".join(json.dumps(row) for row in rollouts) + "\n")
    output = tmp_path / "out"
    rows = realign(folder, output, f"--rollouts {tmp_path / 'rollouts.jsonl'}")
    assert [row["id"] for row in rows if row["status"] == "error"] == ["r1"] and 'add "turn"' in rows[1]["reason"]
    assert rows[2]["turns"][0]["candidates"][0]["text"] == "answer: 0"
    for more, what in (
        ("--limit 3", "--sft-data and --limit are not those"),
        ("--chat-template plain", "chat template are"),
    ):
        with pytest.raises(AssertionError, match=what):
            realign(folder, output, f"--retry-errors {more}")
    rows = realign(folder, output, "--retry-errors")
    assert [path.name for path in retry_folders(output)] == ["001"]
    assert not [row for row in rows if row["status"] == "error"]
    assert responses(rows[1:2]) == responses(realigned[1:2]) and len(rows) == RECORDS
    text = forked(["-m", "megatron_idft", "realign", *flags(folder, output, "--retry-errors")])
    assert "nothing to try again" in text


def test_verbs_without_a_model(folder, realigned, tmp_path):
    verbs = [forking_python(), "-m", "megatron_idft", "realign"]
    status = subprocess.run([*verbs, "status", folder / "whole"], check=True, cwd=ROOT, capture_output=True, text=True)
    assert "1 of 1 chunks finished" in status.stdout and " kept" in status.stdout
    subprocess.run([*verbs, "report", folder / "whole", "--output", tmp_path], check=True, cwd=ROOT)
    assert json.loads((tmp_path / "report.json").read_text())["settings"]["retry"]["retries"] == 1
    merging = [*verbs, "merge", folder / "whole", "--output", tmp_path / "a.parquet"]
    done = subprocess.run(merging, check=True, cwd=ROOT, capture_output=True, text=True)
    assert json.loads(done.stdout)["kept"] == pq.read_table(tmp_path / "a.parquet").num_rows
    assert subprocess.run(merging, cwd=ROOT, capture_output=True).returncode == 2


def test_dry_run_and_estimate_write_nothing(folder, tmp_path):
    output = tmp_path / "out"
    text = forked(["-m", "megatron_idft", "realign", *flags(folder, output, "--dry-run")])
    assert (
        "> data.jsonl: 1 record in the messages form (messages)\n" in text
        and "> plain prompt" in text
        and "> hinted prompt (" in text
        and "> reference answer:" in text
    )
    analysis = [word for word in flags(folder, output, "--dry-run") if word != "--no-analysis"]
    at = analysis.index("--hint-prompt")
    text = forked(["-m", "megatron_idft", "realign", *analysis[:at], *analysis[at + 2 :]])
    assert "> analysis prompt (analysis):" in text and "the model's analysis, and then:\n# CoT\n" in text
    assert "a trial before the run chooses among these: solve-again, " in text and "> hinted prompt (explain):" in text
    words = auto(flags(folder, output, "--prompt-trial-records 2 --estimate"))
    text = forked(["-m", "megatron_idft", "realign", *words], nproc=2)
    assert text.count("> prompts tried on 2 records") == 1 and text.count("<- first") == 1
    assert text.count("> data.jsonl: 16 records in the ShareGPT form (conversations)\n") == 1
    assert f"{RECORDS} of {RECORDS} records" in text and "on 2 replicas" in text and "hours" in text
    assert "before" in text and "after" in text
    assert not output.exists()


@pytest.mark.parametrize(
    ("more", "remedy"),
    [
        ("--pipeline-model-parallel-size 2", "weights load under any layout"),
        ("--rollouts nowhere.jsonl", "No such file"),
        ("--verifier-plugin nowhere:check", "nowhere"),
    ],
)
def test_flags_that_cannot_be_used_are_refused_with_the_remedy(folder, tmp_path, more, remedy):
    with pytest.raises(AssertionError, match=remedy):
        realign(folder, tmp_path / "out", more)
