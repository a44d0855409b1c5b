"""`train`: chat records through Megatron's trainer, in real processes; killed and resumed to the bit."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.launch import ROOT, forked, forked_codes, forking_python, torchrun
from tests.run_outputs import differences, load_checkpoint, load_scalars
from tests.tiny_corpora import additions, write_records
from tests.tiny_tokenizers import train_tokenizer

MODEL = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 48 --max-position-embeddings 48
    --micro-batch-size 2 --position-embedding-type rope --lr 1e-3 --lr-decay-style constant --chat-template chatml
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Additions of one and two turns, and a sentencepiece model trained on them."""
    folder = tmp_path_factory.mktemp("corpus")
    records = additions(30, [1, 2])
    write_records(folder / "train.jsonl", records[:22])
    write_records(folder / "valid.jsonl", records[22:])
    train_tokenizer(folder)
    return folder


def command(corpus: Path, folder: Path, flags: str) -> list[str]:
    data = f"--sft-data {corpus / 'train.jsonl'} --tokenizer-model {corpus / 'tokenizer.model'}"
    words = f"{MODEL} {data} --sft-cache {corpus / 'cache'} --tensorboard-dir {folder / 'tensorboard'} {flags}"
    return ["-m", "megatron_idft", "train", *words.split()]


def train(corpus: Path, folder: Path, flags: str, nproc: int = 1, launch: Callable[..., str] = forked) -> str:
    return launch(command(corpus, folder, flags), nproc=nproc)


def test_an_epoch_trains_every_token_once_and_validation_reads_every_record_once(corpus, tmp_path):
    # 22 records in batches of 8: the last batch is filled up with samples that count for nothing. Learning rate 0, so
    # that every evaluation must give the same value, whatever batch it is cut into: 8 records by 8, and by 3 x 2.
    valid = f"--sft-valid-data {corpus / 'valid.jsonl'} --eval-interval 4 --lr 0 --sft-loss idft"
    flags = f"--train-epochs 2 --global-batch-size 8 {valid}"
    output = train(corpus, tmp_path / "a", flags, launch=partial(torchrun, python=forking_python()))
    train(corpus, tmp_path / "b", f"--train-iters 4 --global-batch-size 6 --micro-batch-size 3 {valid}")
    assert "2 epochs of 22 records: 6 iterations" in output
    cache = next(path for path in (corpus / "cache").iterdir() if f"tokenized records {path}" in output)
    counts = json.loads((cache / "records.json").read_text())["counts"]
    first, second = load_scalars(tmp_path / "a" / "tensorboard"), load_scalars(tmp_path / "b" / "tensorboard")
    assert counts["kept"] in (22, 8)
    trained = {c["kept"]: c["trained_tokens"] for c in _counts(corpus)}
    assert sum(first["trained tokens"].values()) == 2 * trained[22]
    values = [*first["lm loss validation"].values(), *second["lm loss validation"].values()]
    assert len(values) >= 3
    for value in values:
        assert value == pytest.approx(values[0], rel=1e-5)


def _counts(corpus: Path) -> list[dict]:
    return [json.loads(path.read_text())["counts"] for path in (corpus / "cache").glob("tokens-*/records.json")]


def test_start_shows_the_data_and_the_resolved_loss(corpus, tmp_path):
    output = train(
        corpus,
        tmp_path,
        "--train-iters 1 --global-batch-size 4 --sft-loss entropy --sft-loss-exempt-tokens end-of-turn <|im_end|> 5",
    )
    sample = output[output.index("first sample") :].splitlines()
    assert re.search(r"⟦\d+\.<\|im_end\|>⟧", "\n".join(sample[1:8])), "answer and end of turn are marked as trained"
    assert not any(re.search(r"⟦[^⟧]*\?", line) for line in sample[1:8]), "the question is not"
    assert output.count("train.jsonl: 22 records in the ") == 1
    assert re.search(r"records read +22\n", output) and "truncated" in output
    line = next(line for line in output.splitlines() if line.startswith("> sft loss: "))
    for part in ("objective entropy", "exempt tokens [5]", "end of turn [5]", "backend reference", "per-token-loss on"):
        assert part in line
    assert "vocabulary 60 of 128 padded rows" in line or re.search(r"vocabulary \d+ of 128 padded rows", line)
    summary = [line for line in output.splitlines() if re.match(r"> this training|>   \S| sft iteration", line)]
    assert summary[:-1] == [
        "> this training",
        ">   model: random weights, float32, on 1 rank: DP 1",
        f">   data: {corpus / 'train.jsonl'}",
        ">   batch: 4 records of 48 tokens a step: 2 micro-batches of 2 on each of 1 data-parallel ranks",
        ">   steps: 1; learning rate 0.001, constant",
        ">   loss: entropy, per trained token",
        ">   evaluation: none (--sft-valid-data adds one)",
        ">   checkpoints: none, for want of --save",
    ]
    assert summary[-1].startswith(" sft iteration"), "the step comes after it"


REGISTERED = """
import sys

import torch

from megatron_idft import Objective
from megatron_idft.__main__ import main
from megatron_idft.objectives import register


@register
def quarter():
    return Objective("quarter", lambda statistics: torch.full_like(statistics.log_prob, 0.25))


if __name__ == "__main__":
    sys.exit(main())
"""


def test_a_registered_objective_trains_by_its_name(corpus, tmp_path):
    (tmp_path / "script.py").write_text(REGISTERED)
    words = command(corpus, tmp_path, "--train-iters 2 --global-batch-size 4 --sft-loss quarter")
    output = forked([tmp_path / "script.py", *words[2:]])
    assert "objective quarter" in output
    scalars = load_scalars(tmp_path / "tensorboard")
    assert scalars["sft weight mean"] == {1: 0.25, 2: 0.25}
    assert scalars["sft loss"] == pytest.approx({step: value / 4 for step, value in scalars["lm loss"].items()})


def test_the_triton_backend_trains_like_the_reference(corpus, tmp_path):
    for loss in ("idft", "ce"):
        scalars = []
        for backend in ("reference", "triton"):  # interpreted, where there is no GPU
            folder = tmp_path / loss / backend
            flags = "--train-iters 2 --global-batch-size 2 --tensor-model-parallel-size 2 --sequence-parallel"
            output = train(corpus, folder, f"{flags} --cpu --sft-loss {loss} --sft-loss-backend {backend}", nproc=2)
            assert f"backend {backend}" in output
            scalars.append(load_scalars(folder / "tensorboard"))
        for name in ("lm loss", "sft loss", "grad-norm", "ddt/phi mean", "ddt/entropy", "sft weight mean"):
            assert scalars[1][name] == pytest.approx(scalars[0][name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("loss", ["power", "chord", "deft", "cll"])
def test_each_objective_of_the_probability_trains(corpus, tmp_path, loss):
    flags = "--train-iters 3 --global-batch-size 4 --lr 1e-2 --tensor-model-parallel-size 2"
    output = train(corpus, tmp_path, f"{flags} --sft-loss {loss}", nproc=2)
    line = next(line for line in output.splitlines() if line.startswith("> sft loss: "))
    assert f"objective {loss}" in line and ("q 0.5" in line) == (loss == "power")
    scalars = load_scalars(tmp_path / "tensorboard")
    assert all(0 < weight < 1 for weight in scalars["sft weight mean"].values())
    assert all(0 < scalars["sft loss"][step] < value for step, value in scalars["lm loss"].items())
    assert scalars["lm loss"][3] < scalars["lm loss"][1], "each of them lowers cross-entropy from random weights"


def test_a_killed_run_resumes_to_the_bit(corpus, tmp_path):
    """Dropout on, lambda moving, tensor parallel; killed without warning after a save, resumed by the same command."""
    flags = (
        "--train-iters 8 --global-batch-size 4 --save-interval 4 --tensor-model-parallel-size 2 --hidden-dropout 0.1"
        " --attention-dropout 0.1 --sft-loss idft --idft-lambda-warmup 0.25 --idft-lambda-ramp 0.5"
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(corpus, whole, f"{flags} --save {whole} --load {whole}", nproc=2)
    again = f"{flags} --save {broken} --load {broken}"
    _kill_after(corpus, broken, again, "iteration        6/")
    assert (broken / "latest_checkpointed_iteration.txt").read_text() == "4"
    output = train(corpus, broken / "resumed", again, nproc=2)
    assert "WARNING: this run continues" not in output

    expected, got = load_scalars(whole / "tensorboard"), load_scalars(broken / "resumed" / "tensorboard")
    for key in ("sft loss", "ddt/phi mean", "idft/lambda", "grad-norm", "lm loss", "learning-rate", "trained tokens"):
        assert sorted(got[key]) == [5, 6, 7, 8]
        assert got[key] == {step: expected[key][step] for step in got[key]}, key
    assert [expected["idft/lambda"][step] for step in (2, 4, 8)] == [0.0, 0.25, 1.0]
    assert expected["idft/gamma mean"][2] == 1.0 != expected["idft/gamma mean"][4], "lambda reaches the loss"
    want, have = load_checkpoint(whole, 8), load_checkpoint(broken, 8)
    assert differences(want, have) == []
    moved = differences(load_checkpoint(whole, 4), want)
    for part in ("layers", "exp_avg", "rng"):
        assert any(part in name for name in moved), f"the comparison must see {part}"


def _kill_after(corpus: Path, folder: Path, flags: str, text: str) -> None:
    words = command(corpus, folder, flags)
    process = subprocess.Popen(
        [forking_python(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    assert process.stdout is not None
    seen, deadline = "", time.monotonic() + 120
    for line in process.stdout:
        seen += line
        if text in line or time.monotonic() > deadline:
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert text in seen, seen[-3000:]


def test_another_loss_than_the_checkpoints_is_pointed_out(corpus, tmp_path):
    flags = f"--global-batch-size 4 --save {tmp_path} --load {tmp_path} --sft-loss idft"
    train(corpus, tmp_path, f"{flags} --train-iters 1")
    output = train(corpus, tmp_path, f"{flags} --train-iters 2 --override-opt_param-scheduler --idft-beta 2")
    assert (
        "WARNING: this run continues a checkpoint with another loss: --idft-beta: 1.0 in the checkpoint, 2.0 now"
        in output
    )


def test_a_forgotten_flag_is_pointed_out(corpus, tmp_path):
    flags = f"--global-batch-size 4 --save {tmp_path} --load {tmp_path}"
    train(corpus, tmp_path, f"{flags} --train-iters 1 --sft-loss idft")
    output = train(corpus, tmp_path, f"{flags} --train-iters 2 --override-opt_param-scheduler")
    assert "another loss: --sft-loss: idft in the checkpoint, None now" in output
    assert "continues a checkpoint that was trained on" not in output
    output = train(corpus, tmp_path, f"{flags} --train-iters 3 --override-opt_param-scheduler --sft-truncation drop")
    assert "WARNING: this run continues a checkpoint that was trained on data-" in output


def test_another_schedule_than_the_checkpoints_is_explained_and_each_remedy_works(corpus, tmp_path):
    save = tmp_path / "saved"

    rest = "--global-batch-size 4 --use-distributed-optimizer --sft-loss idft --min-lr 1e-5"

    def run(flags: str, where: Path = save) -> str:
        return train(corpus, tmp_path, f"{rest} --save {where} {flags}")

    def refused(flags: str) -> str:
        codes, text = forked_codes(command(corpus, tmp_path, f"{rest} --save {save} {flags}"))
        assert codes == [2] and "Traceback" not in text, text[-3000:]
        return text.rstrip().splitlines()[-1]

    def rates() -> dict[int, float]:
        return load_scalars(tmp_path / "tensorboard")["learning-rate"]

    run("--train-iters 1")
    told = refused("--train-iters 2 --lr 2e-3 --global-batch-size 6")
    for change in ("--lr: 0.001 in", "--train-iters: 1 in the checkpoint, 2 now", "--global-batch-size: 4 in"):
        assert change in told
    assert "--min-lr" not in told and "--use-checkpoint" not in told, "that would not find the other rate"
    run("--train-iters 2 --lr 2e-3 --override-opt_param-scheduler")
    assert rates()[2] == pytest.approx(2e-3)
    assert "--min-lr: 1e-05 in the checkpoint, 0.0001 now" in refused("--train-iters 2 --lr 2e-3 --min-lr 1e-4")

    told = refused("--train-iters 3 --lr 2e-3")
    assert f"--load {save} continues" in told and "--train-iters: 2 in the checkpoint, 3 now. Pass" in told
    assert "or --use-checkpoint-opt_param-scheduler to keep its schedule" in told
    run("--train-iters 3 --lr 2e-3 --lr-decay-style linear --use-checkpoint-opt_param-scheduler")
    assert rates()[3] == pytest.approx(2e-3), "as the checkpoint says: constant"
    assert f"--save with --load {save} --finetune begins" in told
    output = run(f"--train-iters 1 --lr 3e-3 --load {save} --finetune", tmp_path / "other")
    assert "successfully loaded checkpoint" in output and rates()[1] == pytest.approx(3e-3)


def test_a_finished_training_says_so_and_its_last_step_is_evaluated_once(corpus, tmp_path):
    flags = (
        f"--global-batch-size 4 --train-iters 2 --save {tmp_path / 'saved'} --sft-valid-data {corpus / 'valid.jsonl'}"
    )
    output = train(corpus, tmp_path, f"{flags} --eval-interval 1 --start-eval-at-iter 1 --lr 0 --sft-loss dft")
    assert output.count("lm loss value") == 2, "each iteration once, the last one too"
    assert "--lr 0: the model will not change" in output and "no --save DIR" not in output
    for parallel, nproc in (("", 1), ("--tensor-model-parallel-size 2", 2)):
        output = train(corpus, tmp_path, f"{flags} --lr 0 --sft-loss dft {parallel}", nproc=nproc)
        assert f"> training is finished: {tmp_path / 'saved'} holds iteration 2 of 2." in output
        assert "lm loss" not in output
    with pytest.raises(AssertionError, match="is at iteration 2 of 2, so nothing is left to train: add --finetune"):
        train(corpus, tmp_path, f"{flags} --lr 0 --load {tmp_path / 'saved'} --save {tmp_path / 'other'}")


def test_a_bad_record_stops_the_run_and_is_named(corpus, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text((corpus / "train.jsonl").read_text() + '{"messages": [{"role": "user"}]}\n')
    flags = f"--train-iters 1 --global-batch-size 4 --sft-data {bad}"
    with pytest.raises(AssertionError, match=r"bad\.jsonl, line 23"):
        train(corpus, tmp_path, flags)
    output = train(corpus, tmp_path, f"{flags} --sft-bad-records skip")
    assert re.search(r"bad, skipped +1 ", output) and re.search(r"kept +22 ", output)


def test_a_hugging_face_folder_brings_its_template_and_its_end_of_turn(corpus, tmp_path):
    folder = tmp_path / "tokenizer"
    _save_hugging_face_tokenizer(corpus / "train.jsonl", folder)
    flags = f"--train-iters 2 --global-batch-size 4 --sft-loss idft --tokenizer-model {folder}"
    words = command(corpus, tmp_path, flags)
    del words[words.index("--chat-template") : words.index("--chat-template") + 2]
    output = forked(words)
    assert re.search(r"\[user\]\d+ \+ \d+\?\[assistant\]⟦\d+\.\[end\]⟧", output), "the mask under the folder's template"
    size, end = re.search(r"end of turn \[(\d+)\], vocabulary (\d+) of", output).group(2, 1)
    scalars = load_scalars(tmp_path / "tensorboard")
    assert int(end) < int(size) and sorted(scalars["sft weight end of turn"]) == [1, 2]


def _save_hugging_face_tokenizer(text: Path, folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["[user]", "[assistant]", "[end]", "[eos]"]
    tokenizer.train([str(text)], trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[eos]", pad_token="[eos]")
    fast.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ '[end]' if m.role == 'assistant' }}{% endfor %}"
        "{{ '[assistant]' if add_generation_prompt }}"
    )
    fast.save_pretrained(folder)
