"""All that a person sees of each verb, line by line; the rest is in the log, and comes back with --verbose."""

import json
import re
from pathlib import Path

import pytest

from tests import tiny_models
from tests.checkpoint.test_training import ROWS, _save_tokenizer
from tests.launch import forked, forked_codes

# In every run of Megatron's, printed by its functions, its loggers and its list of arguments.
MEGATRON = ("using world size: ", "setting random seeds to 1234", "rerun_state_machine", "  adam_beta1 ...")
HYBRID = r"> --hf-model {folder}/qwen2: as a HybridModel .*"  # from Megatron 0.20 on
BEGIN = [
    HYBRID + "*?",
    r"> megatron \S+ \(core and training\) from \S+",
    r"megatron-idft \S+: no GPU in use, running on the CPU; added: .*",
    r"> model: {folder}/qwen2, float32, on {ranks}",
    r"> data: {folder}/train.jsonl, the first 4 records",
]
LOG = r"> log of Megatron and the libraries(?:, one for each rank)?: {output}/logs/\d{{8}}-\d{{6}}-\S+-\d+-rank0.log"
ENGINE = r"> decode engine: .*"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("console")
    records = [{"prompt": f"{a} + {a}?", "response": f"{2 * a}.", "answer": f"{2 * a}"} for a in range(8)]
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tiny_models.save("qwen2", folder / "qwen2", vocab_size=ROWS)
    _save_tokenizer(folder / "train.jsonl", folder / "qwen2")
    forked(["-m", "megatron_idft", "convert", "to-megatron", folder / "qwen2", folder / "megatron"])
    return folder


def offline(folder: Path, output: Path, more: str) -> list[str]:
    data = f"--hf-model {folder / 'qwen2'} --hf-cache {folder / 'cache'} --sft-data {folder / 'train.jsonl'}"
    return f"{data} --seq-length 32 --limit 4 --output {output} {more}".split()


def assert_lines(text: str, expected: list[str], **names: object) -> None:
    """Each line is as one of `expected`, in their order; those that end in a * may come any number of times."""
    left = list(expected)
    for line in text.splitlines():
        while left and not (fits := re.fullmatch(left[0].removesuffix("*?").format(**names), line)):
            assert left[0].endswith("*?"), f"{line!r} is not {left[0]!r} in:\n{text}"
            del left[0]
        assert left, f"{line!r} is too much in:\n{text}"
        if fits and not left[0].endswith("*?"):
            del left[0]
    assert not [line for line in left if not line.endswith("*?")], text


def assert_log(log: Path) -> None:
    text = log.read_text()
    assert [part for part in MEGATRON if part not in text] == []
    assert not [line for line in text.splitlines() if line.startswith(("scoring:", "realigning:", "> decode"))]


def test_score(folder, tmp_path):
    output = tmp_path / "out"
    words = offline(folder, output, "--calibrate 2 --calibrate-max-tokens 4 --tensor-model-parallel-size 2")
    text = forked(["-m", "megatron_idft", "score", *words], nproc=2)
    expected = [
        *BEGIN, LOG,
        r"(tokenizing|packing): +\d+%, .*" + "*?",
        r"tokenized records \S+", r"  .*" + "*?",
        r"converting qwen2: .*" + "*?",
        r"> \S+ is verified by sizes and checksums: .*",
        r"scoring:   0%, \? left, 0/4 records, 0/\d+ tokens, 00:00 so far",
        r"scoring: 100%, 00:00 left, 4/4 records, (\d+)/\1 tokens, [\d,]+ tokens/s, 00:0\d so far",
        r"> 4 records, \d+ response tokens: phi \S+, log p \S+ per token; {output}/scores.parquet",
        r"> next: megatron-idft score report {output}; .*",
        ENGINE + "*?",
        r"own samples: .*" + "*?", ENGINE + "*?", r"own samples: .*" + "*?",
        r"> own samples at temperature 1: .*",
        r"> own samples at temperature 0.3: .*",
    ]  # fmt: skip
    assert_lines(text, expected, folder=folder, output=output, ranks="2 ranks: TP 2, DP 1")
    logs = sorted((output / "logs").iterdir(), key=lambda path: path.stem[-1])
    assert [path.stem[-5:] for path in logs] == ["rank0", "rank1"]
    assert_log(logs[0])


def test_realign(folder, tmp_path):
    output = tmp_path / "out"
    words = offline(folder, output, "--hint-prompt hint --max-new-tokens 4 --rollout-samples 1")
    text = forked(["-m", "megatron_idft", "realign", *words])
    expected = [
        *BEGIN, LOG,
        r"reading records: .*" + "*?",
        r"> train.jsonl: 4 records in the prompt-response form \(prompt, response\)",
        r"> answers verified as .*",
        r"converting qwen2: .*" + "*?",
        r"> \S+ is verified by sizes and checksums: .*",
        ENGINE + "*?",
        r"> hint prompt: hint",
        r"realigning:   0%, \? left, 0/4 records, 0 tokens here, 00:00 so far",
        ENGINE + "*?",
        r"realigning: 100%, 00:00 left, 4/4 records, \d+ tokens here, [\d,]+ tokens/s, \d+% kept here, 00:0\d so far",
        r"> prompts had \d+ tokens, .*",
        r"> 1 of 1 chunks finished .*", r"> last part .*", r"> records: .*", r">(?! next).*" + "*?",
        r"> next: megatron-idft realign merge {output} --output FILE.jsonl; megatron-idft realign report {output}",
    ]  # fmt: skip
    assert_lines(text, expected, folder=folder, output=output, ranks="1 rank: DP 1")
    assert_log(next((output / "logs").iterdir()))


@pytest.mark.parametrize("verb", ["score", "realign"])
def test_a_dry_run_shows_the_record_and_leaves_nothing(folder, tmp_path, verb):
    text = forked(["-m", "megatron_idft", verb, *offline(folder, tmp_path / "out", "--dry-run")])
    begin = [line for line in text.splitlines() if re.match(r"> (plain prompt|first record)", line)]
    assert_lines(
        text[: text.index(begin[0])],
        [*BEGIN, r"(> train.jsonl: 1 record|> answers verified as|tokenizing|packing|tokenized records|  ).*" + "*?"],
        folder=folder,
        ranks="1 rank: DP 1",
    )
    assert not [part for part in MEGATRON if part in text] and not (tmp_path / "out").exists()


def test_verbose_brings_everything_back(folder, tmp_path):
    words = offline(folder, tmp_path / "out", "--hint-prompt hint --max-new-tokens 2 --verbose")
    text = forked(["-m", "megatron_idft", "realign", *words])
    assert [part for part in MEGATRON if part not in text] == []
    assert "realigning: 100%" in text and not (tmp_path / "out" / "logs").exists()


def test_plan_prepare_and_convert_print_only_their_results(folder, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    model = f"--hf-model {folder / 'qwen2'} --seq-length 32"
    plan = f"plan --cpu --gpus 1 {model} --micro-batch-size 1 --global-batch-size 1"
    codes, text = forked_codes(["-m", "megatron_idft", *plan.split()], alone=True)
    text = re.sub(HYBRID.format(folder=re.escape(str(folder))) + "\n", "", text)
    assert codes == [0] and text.startswith("needs 3.10 MiB") and not [part for part in MEGATRON if part in text], text
    assert "warn" not in text.partition("\nwarnings\n")[0].lower()

    data = f"--sft-data {folder / 'train.jsonl'} --tokenizer-model {folder / 'qwen2'} --seq-length 32"
    prepare = f"prepare {data} --output {tmp_path / 'packs'} --workers 1"
    text = forked(["-m", "megatron_idft", *prepare.split()])
    assert_lines(
        text, [r"(tokenizing|packing): +\d+%, .*" + "*?", r"packs {output}/packs", r"  .*" + "*?"], output=tmp_path
    )

    text = forked(["-m", "megatron_idft", "convert", "to-hf", folder / "megatron", tmp_path / "hf"])
    expected = [
        r"> \S+ is verified by sizes and checksums: .*",
        r"converting megatron: .*" + "*?",
        r"{output}/hf: open it with transformers' from_pretrained",
    ]
    assert_lines(text, expected, output=tmp_path)
    assert not list((tmp_path / "tmp").iterdir())


def test_an_error_names_the_log_and_a_refusal_leaves_none(folder, tmp_path):
    """A fault at work, of a plug-in, and flags that are refused after Megatron has begun."""
    output = tmp_path / "out"
    words = offline(folder, output, "--hint-prompt hint --max-new-tokens 2")
    cut = folder / "cut.jsonl"
    cut.write_text('{"prompt": "1 + 1?"')
    codes, text = forked_codes(["-m", "megatron_idft", "realign", *words, "--sft-data", str(cut)])
    assert codes == [2] and f"error: {cut}, line 1: not JSON" in text
    assert not output.exists() and "The log is" not in text
    codes, text = forked_codes(["-m", "tests.cli.failing_realign", *words])
    [log] = (output / "logs").iterdir()
    assert codes == [1] and "ZeroDivisionError: of mine" in text and f"The traceback is at the end of {log}" in text
    assert "Traceback" not in text and log.read_text().endswith("ZeroDivisionError: of mine\n")
    assert_log(log)
