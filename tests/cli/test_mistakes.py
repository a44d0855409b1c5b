"""Typical mistakes over all verbs: the right exit code, one short message that names what is wrong, no traceback."""

import argparse
import json
import re
from pathlib import Path

import pytest

from megatron_idft.integration.platform.flag_checks import remarks
from tests.cli.remedies import foreign_flags
from tests.launch import ROOT, forked_codes
from tests.tiny_tokenizers import train_tokenizer

MODEL = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --max-position-embeddings 48"
DATA = "--sft-data {folder}/train.jsonl --tokenizer-model {folder}/tokenizer.model --chat-template chatml"
STEPS = "--micro-batch-size 2 --global-batch-size 4 --train-iters 2"
LENGTH = "--seq-length 48"
TRAIN = f"train {MODEL} {DATA} {STEPS} {LENGTH} --lr 1e-3"
INPUT = DATA.replace("--sft-data", "--data") + " --output {folder}/out"
OFFLINE = f"{MODEL} {INPUT} {LENGTH}"
PREPARE = "prepare --output {folder}/packs --chat-template chatml --no-progress"
TP2 = "--tensor-model-parallel-size 2"
SCRIPT = ROOT / "tests/integration/stock_pretrain.py"

# name -> command, what the message must hold, and, unless they are 2 and 1, exit code and ranks.
MISTAKES: dict[str, tuple] = {
    "verb": ("trian", "did you mean train"),
    "flag for a verb": ("--sft-loss idft", "no verb"),
    # train
    "typo": (f"{TRAIN} --sft-los idft", r"--sft-los is not a flag; did you mean --sft-loss\?"),
    "stray words": (f"{TRAIN} --save a b", "b: no flag takes these words"),
    "not a number": (f"{TRAIN} --min-lr small", "--min-lr.*small"),
    "no value": (f"{TRAIN} --save", "--save.*expected one argument"),
    "no sequence length": (TRAIN.replace(LENGTH, ""), "pass --seq-length"),
    "no micro batch": (TRAIN.replace("--micro-batch-size 2", ""), "pass --micro-batch-size"),
    "no learning rate": (TRAIN.replace("--lr 1e-3", ""), "pass --lr"),
    "no model": (TRAIN.replace(MODEL, ""), "no model.*--hf-model"),
    "half a model": (TRAIN.replace("--hidden-size 32", ""), "no model.*--hidden-size"),
    "no data": (TRAIN.replace("--sft-data {folder}/train.jsonl", ""), "pass --sft-data"),
    "no tokenizer": (TRAIN.replace("--tokenizer-model {folder}/tokenizer.model", ""), "pass --tokenizer-model"),
    "no tokenizer beside": (
        f"score {MODEL} --data {{folder}}/train.jsonl --output {{folder}}/out {LENGTH} --load {{folder}}/hf",
        "pass --tokenizer-model.*left out where --load DIR has one in DIR/tokenizer.*none in {folder}/hf/tokenizer",
    ),
    "no length": (TRAIN.replace("--train-iters 2", ""), "pass --train-epochs"),
    "two lengths": (f"{TRAIN} --train-epochs 1", "pass one of them"),
    "no template": (TRAIN.replace("--chat-template chatml", ""), "--chat-template"),
    "data path": (f"{TRAIN} --sft-valid-data {{folder}}/nosuch.jsonl", "--sft-valid-data: there is no .*nosuch.jsonl"),
    "training data path": (TRAIN.replace("train.jsonl", "nosuch.jsonl"), "--sft-data: there is no .*nosuch.jsonl"),
    "tokenizer path": (TRAIN.replace("tokenizer.model", "nosuch.model"), "nosuch.model"),
    "evaluation without end": (f"{TRAIN} --eval-iters -1", "--eval-iters -1: drop the flag"),
    "too long": (TRAIN.replace(LENGTH, "--seq-length 96"), "--seq-length 96 is more than the 48 positions"),
    "uneven heads": (
        TRAIN.replace("heads 4", "heads 9").replace("size 32", "size 36") + f" {TP2}",
        "--tensor-model-parallel-size 2 does not divide the 9 attention heads of the model .--num-attention-heads.:",
    ),  # though there is one rank: with more it would be as wrong
    "uneven feed-forward layers": (
        f"{TRAIN} --ffn-hidden-size 33 {TP2}",
        "--tensor-model-parallel-size 2 does not divide the 33 columns .* .--ffn-hidden-size.:",
    ),
    "uneven heads of a folder": (
        f"score {INPUT} {LENGTH} --hf-model {{folder}}/hf --tensor-model-parallel-size 8",
        "size 8 does not divide the 4 attention heads of the model .num_attention_heads of {folder}/hf/config.json.:",
    ),
    "hidden size": (TRAIN.replace("heads 4", "heads 5"), "--num-attention-heads does not divide --hidden-size"),
    "uneven layers": (
        TRAIN.replace("layers 2", "layers 3") + " --pipeline-model-parallel-size 2",
        "--pipeline-model-parallel-size does not divide the layers",
        2,
        2,
    ),
    "too few ranks": (
        f"{TRAIN} {TP2}",
        "error: --tensor-model-parallel-size 2: .* one process was started: torchrun --nproc-per-node 2",
    ),
    "uneven ranks": (f"{TRAIN} {TP2}", "does not divide the 3 ranks", 2, 3),
    "uneven batch": (
        TRAIN.replace("--global-batch-size 4", "--global-batch-size 3"),
        "--global-batch-size 3 .*is no multiple of --micro-batch-size 2 x 1 data-parallel ranks: take 4",
    ),
    "uneven evaluation": (f"{TRAIN} --eval-global-batch-size 3", "--eval-global-batch-size"),
    "no batch": (TRAIN.replace("--micro-batch-size 2", "--micro-batch-size 0"), "--micro-batch-size 0"),
    "no log": (f"{TRAIN} --log-interval 0", "--log-interval 0"),
    "negative rate": (f"{TRAIN} --lr -1", "--lr -1"),
    "minimum above": (f"{TRAIN} --min-lr 1", "--min-lr 1 is larger than --lr"),
    "long warm-up": (f"{TRAIN} --lr-warmup-iters 9", "--lr-warmup-iters 9 is as long"),
    "loss": (f"{TRAIN} --sft-loss idft2", "Choose one of ce, dft, idft, entropy"),
    "beta alone": (f"{TRAIN} --idft-beta 2", "Add --sft-loss idft"),
    "two losses": (f"{TRAIN} --sft-loss idft --cross-entropy-loss-fusion", "Drop --cross-entropy-loss-fusion"),
    "no checkpoint": (f"{TRAIN} --load {{folder}}/nosuch", "--load: there is no folder .*nosuch"),
    "Hugging Face folder as checkpoint": (f"{TRAIN} --pretrained-checkpoint {{folder}}/hf", "pass it as --hf-model"),
    "no Hugging Face folder": (TRAIN.replace(MODEL, "--hf-model {folder}/nosuch"), "nosuch.*no config.json"),
    "other model": (TRAIN.replace(MODEL, "--hf-model {folder}/hf --num-layers 3"), "--num-layers 3 .the model is"),
    "other vocabulary": (TRAIN.replace(MODEL, "--hf-model {folder}/hf --vocab-size 32000"), "--vocab-size 32000"),
    "export without save": (f"{TRAIN} --save-hf final", "pass --save DIR"),
    "not JSON": (TRAIN.replace("train.jsonl", "broken.jsonl"), "broken.jsonl, line 2: not JSON"),
    "nothing left": (TRAIN.replace(LENGTH, "--seq-length 4"), "no record is left.*--seq-length"),
    # run
    "no script": ("run {folder}/nosuch.py --sft-loss idft", "there is no script"),
    "flags before the script": ("run --sft-loss idft {folder}/train.py", "expected a script"),
    "typo in run": (f"run {SCRIPT} {MODEL} --sft-los idft", r"did you mean --sft-loss\?"),
    "script's own error": ("run {folder}/failing.py", "ZeroDivisionError.*failing.py, line 2.*a bug", 1),
    "no sequence length in run": (f"run {SCRIPT} {MODEL} {STEPS} --lr 1e-3 --sft-loss idft", "pass --seq-length"),
    # score
    "no output": (f"score {OFFLINE.replace('--output {folder}/out', '')} --load x", "--output DIR"),
    "typo in score": (f"score {OFFLINE} --calibrat 3", "did you mean --calibrate"),
    "data path in score": (f"score {OFFLINE.replace('train', 'nosuch')} --load {{folder}}", "--sft-data: there is no"),
    "output below a file": (
        f"score {OFFLINE} --load {{folder}}".replace("{folder}/out", "{folder}/train.jsonl/out"),
        r"train\.jsonl is a file\. Pass another folder",
    ),
    "no checkpoint in score": (f"score {OFFLINE} --load {{folder}}", "holds no checkpoint"),
    "too long in score": (
        f"score {OFFLINE} --load {{folder}}".replace(LENGTH, "--seq-length 96"),
        "--seq-length 96 is more than the 48 positions",
    ),
    "too few ranks in score": (f"score {OFFLINE} --load {{folder}} {TP2}", "torchrun --nproc-per-node 2"),
    "no batch in score": (f"score {OFFLINE} --load x --tokens-per-batch 0", "--tokens-per-batch 0"),
    "report on no scores": ("score report {folder}", "no manifest.json"),
    "status of nothing": ("score status {folder}/nosuch", "nosuch"),
    "expression": ("score select {folder} --keep phi_men>1 --data x --output {folder}/y.jsonl", "mean 'phi_mean'"),
    # realign
    "typo in realign": (f"realign {OFFLINE} --rollout-sample 3", "did you mean --rollout-samples"),
    "no model in realign": (f"realign {OFFLINE}", "pass a Hugging Face folder as --hf-model"),
    "merge of nothing": ("realign merge {folder}/nosuch --output {folder}/y.jsonl", "nosuch"),
    "merge without output": ("realign merge {folder}", "--output"),
    "choice": (f"realign {OFFLINE} --mix cubic", "--mix.*cubic"),
    # prepare
    "prepare without data": (
        f"{PREPARE} --tokenizer-model {{folder}}/tokenizer.model --seq-length 48",
        "no record files .* --sft-data",
    ),
    "typo in prepare": (f"{PREPARE} {{data}} --seq-length 48 --trunkation drop", "did you mean --sft-truncation"),
    "data path in prepare": (f"{PREPARE} {{data}} --seq-length 48 --data {{folder}}/nosuch", "nosuch"),
    # convert
    "direction": ("convert to-torch a b", "to-torch"),
    "no folder to convert": ("convert to-megatron {folder}/nosuch {folder}/x", "nosuch"),
    "no checkpoint to convert": ("convert to-hf {folder} {folder}/x", "{folder}"),
    # plan
    "plan without a model": ("plan --gpus 8", "no model.*--hf-model"),
    "plan without GPUs": (f"plan {MODEL} {STEPS} {LENGTH} --lr 1e-3", "--gpus N"),
    "typo in plan": ("plan --gpuz 8", "did you mean --gpu"),
    "uneven heads in plan": (
        f"plan --gpus 2 {MODEL} {STEPS} {LENGTH} --lr 1 {TP2}".replace("heads 4", "heads 9"),
        "does not divide the 9 attention heads",
    ),
    "too few GPUs in plan": (f"plan --gpus 3 {MODEL} {STEPS} {LENGTH} --lr 1 {TP2}", "--gpus 3 is no mul"),
    "too long in plan": (f"plan --gpus 1 {MODEL} {STEPS} --seq-length 96 --lr 1", "more than the 48 positions"),
    "uneven batch in plan": (f"plan --gpus 8 {MODEL} {STEPS} {LENGTH} --lr 1", "--global-batch-size 4 .*take 16"),
    # the others
    "doctor's flags": ("doctor --json", "usage"),
    "init without folder": ("init", "DIR"),
}  # fmt: skip

# What only tokenizing finds, when Megatron has told its 800 arguments.
LATE = {"no template", "not JSON", "nothing left"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    record = json.dumps({"prompt": "user 1 + 3?", "response": "4."})
    (folder / "train.jsonl").write_text(f"{record}\n" * 8)
    (folder / "broken.jsonl").write_text(f"{record}\n{{\n")
    (folder / "failing.py").write_text("def fail():\n    return 1 / 0\nfail()\n")
    train_tokenizer(folder)
    (folder / "hf").mkdir()
    shape = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "hf" / "config.json").write_text(json.dumps(shape))
    return folder


def test_a_flag_of_another_verb_is_seen_in_a_message():
    assert foreign_flags(["realign", "--hf-model"], "drop --sft-last-turn-only, or --bf16") == {"--sft-last-turn-only"}
    assert foreign_flags(["score", "select", "x"], "pass --sft-data, not --bf16") == {"--bf16"}
    assert (
        foreign_flags(["train", "--nosuch"], "--nosuch is no flag; `megatron-idft prepare --pad-multiple 2`") == set()
    )


def test_there_are_60_mistakes():
    assert len(MISTAKES) >= 60


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_short_message(folder, name):
    command, expected, *others = MISTAKES[name]
    code, nproc = [*others, 2, 1][:2] if len(others) != 1 else (others[0], 1)
    data = f"--data {folder / 'train.jsonl'} --tokenizer-model {folder / 'tokenizer.model'}"
    words = command.replace("{data}", data).replace("{folder}", str(folder)).split()
    codes, output = forked_codes(["-m", "megatron_idft", *words], nproc, alone=nproc == 1)
    told = [line for line in output.splitlines() if line.startswith("megatron-idft") and "error: " in line]
    message = told[-1] if told else output
    assert code in codes and set(codes) <= {code, -9}, output[-3000:]
    said = output[output.index(message) :]  # some messages have several lines
    assert re.search(expected.replace("{folder}", str(folder)), said), output[-3000:]
    assert "Traceback (most recent call last)" not in output
    assert not foreign_flags(words, message), "a remedy names a flag that this verb does not have"
    assert len(message) < 600 and (name in LATE or len(output.splitlines()) < 40), output
    last = output.splitlines()[-25 if name in LATE else -4 :]
    assert told == [] or message in last


def test_without_torchrun_train_score_and_realign_are_one_process(folder):
    model = MODEL.replace("embeddings 48", "embeddings 96")
    steps = f"{STEPS} --seq-length 64 --lr 1e-3 --save {{folder}}/model"
    commands = {
        f"train {model} {DATA} {steps}": "> one process",
        f"score {model} {INPUT} --seq-length 64 --load {{folder}}/model": "8 records",
        f"realign {model} {INPUT}-2 --seq-length 64 --load {{folder}}/model --max-new-tokens 4": "> next: ",
    }
    for command, expected in commands.items():
        words = command.replace("{folder}", str(folder)).split()
        codes, output = forked_codes(["-m", "megatron_idft", *words], alone=True)
        assert codes == [0] and expected in output, output[-3000:]


def test_what_is_hardly_meant_is_remarked():
    args = argparse.Namespace(skip_train=False, lr=0.0, save=None)
    assert [text.split(":")[0] for text in remarks(args)] == ["--lr 0", "no --save DIR"]
    assert remarks(argparse.Namespace(skip_train=False, lr=1e-5, save="x")) == []
