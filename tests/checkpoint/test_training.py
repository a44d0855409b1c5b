"""`train --hf-model … --save-hf …`: from a Hugging Face folder to a Hugging Face folder, by the real trainer."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch

from megatron_idft.checkpoint import convert as conversion
from megatron_idft.checkpoint.cache import build_cached_checkpoint, cached_checkpoint
from megatron_idft.checkpoint.convert import to_hf, to_megatron
from megatron_idft.cli.convert import main as convert
from megatron_idft.errors import ArgumentError, ConversionError
from megatron_idft.integration.platform.compatibility import megatron_version
from megatron_idft.integration.platform.hf_model import expand
from megatron_idft.integration.platform.model_class import CLASS_VARIABLE
from megatron_idft.integration.platform.own_tokenizer import own_tokenizer_flags
from tests import tiny_models
from tests.checkpoint.test_round_trip import assert_same, tensors
from tests.launch import ROOT, forked

ROWS = 310  # of the embedding; the tokenizer has fewer tokens, as Qwen's


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Additions, and two models with a tokenizer trained on them."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(5)
    pairs = [(rng.randrange(20), rng.randrange(20)) for _ in range(24)]
    (folder / "train.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{a} + {b}?", "response": f"{a + b}."}) + "\n" for a, b in pairs)
    )
    for name in ("qwen2", "qwen3_moe"):
        tiny_models.save(name, folder / name, vocab_size=ROWS)
        _save_tokenizer(folder / "train.jsonl", folder / name)
    return folder


def _save_tokenizer(text: Path, folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["[user]", "[assistant]", "[end]", "[eos]", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(text)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[eos]", pad_token="[eos]")
    fast.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ '[end]' if m.role == 'assistant' }}{% endfor %}"
        "{{ '[assistant]' if add_generation_prompt }}"
    )
    fast.save_pretrained(folder)


def command(corpus: Path, model: str, flags: str) -> list[str]:
    words = (
        f"--sft-data {corpus / 'train.jsonl'} --hf-model {corpus / model} --seq-length 32 --micro-batch-size 2"
        f" --global-batch-size 8 --lr-decay-style constant --log-interval 1 {flags}"
    )
    return ["-m", "megatron_idft", "train", *words.split()]


def test_a_tuned_model_generates_the_same_text_in_transformers_and_in_megatron(corpus, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save = tmp_path / "save"
    flags = f"--train-iters 20 --lr 6e-3 --sft-loss ce --save {save} --load {save} --save-hf final"
    output = forked(command(corpus, "qwen2", f"{flags} --tensor-model-parallel-size 2"), nproc=2)
    assert f"vocabulary {ROWS} of 384 padded rows" in output, "the true size is the model's, not the tokenizer's"
    assert [path.name for path in (save / "hf").iterdir()] == ["iter_0000020"]
    exported = save / "hf" / "iter_0000020"

    tuned = AutoModelForCausalLM.from_pretrained(exported)
    before = tensors(corpus / "qwen2")
    moved = [name for name, value in tensors(exported).items() if not torch.equal(value, before[name])]
    assert len(moved) == len(before), "every tensor was trained"
    tokenizer = AutoTokenizer.from_pretrained(exported)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "3 + 4?"}], add_generation_prompt=True, return_dict=False
    )
    with torch.no_grad():
        ids = tuned.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=None)

    # The same from Megatron, at another layout than it was trained in, by flags made from the exported folder.
    model_flags = expand(["--hf-model", str(exported), "--hf-cache", str(tmp_path / "unused")])[4:]
    at = model_flags.index("--pretrained-checkpoint")
    case = {"flags": [*model_flags[:at], "--load", str(save)], "vocab": ROWS, "prompt": prompt, "steps": 12}
    (tmp_path / "cases.json").write_text(json.dumps({"greedy": case}))
    forked([ROOT / "tests" / "checkpoint" / "logits.py", tmp_path / "cases.json", tmp_path])
    megatron = torch.load(tmp_path / "greedy.pt")
    assert tokenizer.decode(megatron[0]) == tokenizer.decode(ids[0])
    assert torch.equal(megatron, ids) and len(set(ids[0, len(prompt) :].tolist())) > 1


def test_the_same_command_goes_on_and_every_checkpoint_is_written(corpus, tmp_path):
    save = tmp_path / "save"
    flags = f"--lr 1e-3 --save {save} --load {save} --save-hf every --save-interval 2 --hf-cache {tmp_path / 'cache'}"
    flags += " --hf-model-class hybrid"
    first = forked(command(corpus, "qwen2", f"{flags} --train-iters 2"))
    again = forked(command(corpus, "qwen2", f"{flags} --train-iters 6 --override-opt_param-scheduler"))
    assert "converting qwen2" in first and "converting qwen2" not in again, "converted once"
    assert "iteration        1/" not in again and "iteration        3/" in again, "continued where it was"
    assert sorted(path.name for path in (save / "hf").iterdir()) == [f"iter_000000{i}" for i in (2, 4, 6)]
    assert not list((save / "hf").glob(".*")) and len(list((tmp_path / "cache").iterdir())) == 1
    two, six = (tensors(save / "hf" / f"iter_000000{i}") for i in (2, 6))
    assert not torch.equal(two["model.norm.weight"], six["model.norm.weight"])
    # Finished, and started again for what it did not write: as torchrun does it when the export has failed.
    (save / "hf" / "iter_0000006").rename(tmp_path / "six")
    last = forked(command(corpus, "qwen2", f"{flags} --train-iters 6 --save-hf final"))
    assert f"> training is finished: {save} holds iteration 6 of 6." in last and "sft iteration" not in last
    assert all(torch.equal(value, six[name]) for name, value in tensors(save / "hf" / "iter_0000006").items())


def test_experts_that_learned_nothing_come_out_as_they_went_in(corpus, tmp_path):
    """Learning rate 0, bf16: every tensor passes through Megatron's training and checkpoint with one rounding."""
    cache = f"--hf-cache {tmp_path / 'cache'}"
    flags = f"--bf16 --train-iters 1 --lr 0 --min-lr 0 --save {tmp_path} --save-hf final --chat-template chatml {cache}"
    model = shutil.copytree(corpus / "qwen3_moe", tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"strange": 7, "unsloth_version": "2025.3"}
    (model / "config.json").write_text(json.dumps(config))
    output = forked(command(corpus, str(model), f"{flags} --ignore-config strange"))
    assert output.count("ignored by --ignore-config: strange") == 1 == output.count("model computes: unsloth_version")
    exported = tmp_path / "hf" / "iter_0000001"
    dtype = "dtype" if "dtype" in config else "torch_dtype"  # transformers 5 or 4
    assert json.loads((exported / "config.json").read_text()) == config | {dtype: "bfloat16"}
    to_hf(tmp_path, tmp_path / "again", progress=False)  # the checkpoint knows what was ignored
    assert "<|im_start|>" in (exported / "chat_template.jinja").read_text(), "the template that was trained"
    assert tiny_models.dtype_of(exported) == "bfloat16"
    got, want = tensors(exported), tensors(corpus / "qwen3_moe")
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value.bfloat16()), name


def test_a_converted_checkpoint_by_its_flags_and_load(corpus, tmp_path):
    """HybridModel with experts in parallel, without --hf-model; its checkpoint becomes a folder by the verb, too."""
    to_megatron(corpus / "qwen3_moe", tmp_path / "base", "hybrid", progress=False)
    model_flags = json.loads((tmp_path / "base" / "conversion.json").read_text())["megatron_flags"]
    flags = (
        f"--train-iters 2 --lr 0 --min-lr 0 --load {tmp_path / 'base'} --save {tmp_path / 'tuned'} --save-hf final"
        " --expert-model-parallel-size 2 --sft-loss idft"
        " --moe-token-dispatcher-type alltoall"
    )
    words = [*command(corpus, "qwen3_moe", flags), *model_flags]
    del words[words.index("--hf-model") : words.index("--hf-model") + 2]
    output = forked(words, nproc=2)
    assert f"vocabulary {ROWS} of 384 padded rows" in output
    assert output.count(f"> --tokenizer-model {tmp_path / 'base' / 'tokenizer'}: the tokenizer kept beside") == 1
    to_hf(tmp_path / "tuned", tmp_path / "by hand", progress=False)
    for exported in (tmp_path / "tuned" / "hf" / "iter_0000002", tmp_path / "by hand"):
        assert_same(corpus / "qwen3_moe", exported)
        assert (exported / "tokenizer.json").read_bytes() == (corpus / "qwen3_moe" / "tokenizer.json").read_bytes()


def test_a_failed_export_ends_the_training(corpus, tmp_path):
    (tmp_path / "hf").write_text("in the way")
    flags = f"--train-iters 2 --lr 1e-3 --save {tmp_path} --save-interval 1 --save-hf every"
    with pytest.raises(AssertionError, match=r"exit codes \[2\]"):
        forked(command(corpus, "qwen2", flags))


def test_flags_that_say_otherwise_are_all_named(corpus):
    source = str(corpus / "qwen2")
    words = "--num-layers 3 --hidden-size 64 --qk-layernorm --normalization LayerNorm --squared-relu --rotary-base 5"
    with pytest.raises(ArgumentError) as caught:
        expand(["--hf-model", source, *words.split(), "--load", "x", "--finetune", "--use-checkpoint-args"])
    message = str(caught.value)
    for text in (
        "--num-layers 3 (the model is --num-layers 4)",
        "--qk-layernorm (the model is without --qk-layernorm)",
        "--normalization LayerNorm (the model is --normalization RMSNorm)",
        "--squared-relu",
        "--rotary-base 5",
        "--finetune (with --load",
        "--use-checkpoint-args",
    ):
        assert text in message
    assert "--hidden-size" not in message, "the same value is no conflict"
    with pytest.raises(ArgumentError, match=r"--num-layers, |--num-layers$"):
        expand(["--hf-model", source, "--num-layers", "4", "--hybrid-layer-pattern", "*-*-*-*-"])
    with pytest.raises(ArgumentError, match=r"the model is \*-\*-\*-\*-"):
        expand(["--hf-model", source, "--hybrid-layer-pattern", "*-*-"])


def test_what_is_given_stays_and_what_is_missing_is_added(corpus):
    source = str(corpus / "qwen2")
    expanded = expand(
        ["--hf-model", source, "--max-position-embeddings=64", "--tokenizer-model", "t", "--sft-loss", "ce"]
    )
    assert expanded.count("--max-position-embeddings") == 0 and expanded.count("--tokenizer-model") == 1
    assert expanded[expanded.index("--sft-loss-vocab-size") + 1] == str(ROWS)
    size = ["--num-layers", "4"] if "--num-layers" in expanded else ["--hybrid-layer-pattern", "*-*-*-*-"]
    assert expanded[expanded.index(size[0]) + 1] == size[1] and "--swiglu" in expanded
    assert expand(["--num-layers", "2"]) == ["--num-layers", "2"]
    piped = expand(["--hf-model", source, "--hybrid-layer-pattern", "*-*-|*-*-"])
    assert "--num-layers" not in piped and piped.count("--hybrid-layer-pattern") == 1
    with pytest.raises(ConversionError, match="has no config"):
        expand(["--hf-model", str(corpus)])


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("", "usual"),
        ("--hf-model-class hybrid", "hybrid"),
        ("--hf-model-class gpt", "gpt"),
        ("--hybrid-layer-pattern *-*-|*-*-", "hybrid"),
        ("--num-layers 4", "gpt"),
        ("--num-virtual-stages-per-pipeline-rank 2", "gpt"),
    ],
)
def test_the_class_that_is_asked_for_or_that_the_flags_fit(corpus, monkeypatch, capsys, words, wanted):
    monkeypatch.delenv(CLASS_VARIABLE, raising=False)
    installed = "hybrid" if megatron_version() >= (0, 20) else "gpt"
    for asked in ("", "gpt", "hybrid"):
        if asked:
            monkeypatch.setenv(CLASS_VARIABLE, asked)
        expanded = expand(["--hf-model", str(corpus / "qwen2"), *words.split()])
        expected = (asked or installed) if wanted == "usual" else wanted
        assert ("--hybrid-layer-pattern" in expanded) == (expected == "hybrid")
        assert ("--num-layers" in expanded) == (expected == "gpt")
        # Said where no flag shows it.
        assert ("as a HybridModel" in capsys.readouterr().out) == (expected == "hybrid" and "pattern" not in words)


def test_a_class_that_the_flags_or_the_model_contradict(corpus, tmp_path, monkeypatch):
    source = str(corpus / "qwen2")
    for words, text in {
        "--hf-model-class bert": "pass gpt or hybrid",
        "--hf-model-class gpt --hybrid-layer-pattern *-*-*-*-": "a GPTModel has no --hybrid-layer-pattern",
        "--hf-model-class hybrid --num-layers 4": "drop --num-layers",
    }.items():
        with pytest.raises(ArgumentError, match=re.escape(text)):
            expand(["--hf-model", source, *words.split()])
    monkeypatch.setenv(CLASS_VARIABLE, "mamba")
    with pytest.raises(ArgumentError, match="MEGATRON_IDFT_MODEL_CLASS=mamba: set it to gpt or hybrid"):
        expand(["--hf-model", source])
    # A wish of the environment stops at what HybridModel cannot be, one of a flag is refused.
    monkeypatch.setenv(CLASS_VARIABLE, "hybrid")
    llama = str(tmp_path / "llama")
    tiny_models.save("llama", tmp_path / "llama")
    assert "--num-layers" in expand(["--hf-model", llama])
    with pytest.raises(ConversionError, match=r"no Llama-3 rope scaling .*--hf-model-class gpt"):
        expand(["--hf-model", llama, "--hf-model-class", "hybrid"])
    assert convert(["to-megatron", source, str(tmp_path / "usual")]) == 0
    assert "--hybrid-layer-pattern" in (tmp_path / "usual" / "model_flags.sh").read_text()


@pytest.mark.parametrize("flag", ["--load", "--pretrained-checkpoint"])
def test_the_tokenizer_beside_the_checkpoint_is_taken_where_none_is_given(corpus, tmp_path, capsys, flag):
    beside = tmp_path / "tokenizer"
    words = [flag, str(tmp_path), "--num-layers", "2"]
    assert expand(words) == words, "no folder"
    shutil.copytree(corpus / "qwen2", beside)
    assert expand(words) == [*words, "--tokenizer-model", str(beside)]
    told = capsys.readouterr().out
    assert f"> --tokenizer-model {beside}: the tokenizer kept beside the checkpoint of {flag}" in told
    given = [*words, "--tokenizer-model=another"]
    assert expand(given) == given and not capsys.readouterr().out
    script = own_tokenizer_flags({flag: str(tmp_path)}, of_script=True)
    assert script == [], "another script's flags stay as they are"
    asked = {flag: str(tmp_path), "--tokenizer-type": "HuggingFaceTokenizer"}
    assert own_tokenizer_flags(asked, of_script=True) == ["--tokenizer-model", str(beside)]


def test_a_sentencepiece_model_beside_the_checkpoint_is_taken_with_its_template(tmp_path):
    beside = tmp_path / "tokenizer"
    beside.mkdir()
    (beside / "config.json").write_text("{}")
    words = ["--load", str(tmp_path)]
    assert expand(words) == words, "no tokenizer in it"
    (beside / "tok.model").write_bytes(b"model")
    assert expand(words) == [*words, "--tokenizer-model", str(beside / "tok.model")]
    (beside / "chat_template.jinja").write_text("{{ messages }}")
    template = ["--chat-template", str(beside / "chat_template.jinja")]
    assert expand(words) == [*words, "--tokenizer-model", str(beside / "tok.model"), *template]
    assert expand([*words, "--chat-template", "chatml"])[4:] == ["--tokenizer-model", str(beside / "tok.model")]


def test_the_cache_follows_the_files(corpus, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(corpus / "qwen2", folder)
    first = cached_checkpoint(folder, tmp_path, "gpt")
    assert first == cached_checkpoint(folder, tmp_path, "gpt") != cached_checkpoint(folder, tmp_path, "hybrid")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert cached_checkpoint(folder, tmp_path, "gpt") != first


@pytest.mark.parametrize("step", ["check_tied", "copy_companions"], ids=["before the folder", "with the folder begun"])
def test_of_two_launches_on_one_cache_the_slower_takes_the_folder_of_the_faster(corpus, tmp_path, monkeypatch, step):
    source = corpus / "qwen2"
    target = cached_checkpoint(source, tmp_path, "gpt")
    slow = getattr(conversion, step)

    def overtaken(*arguments):
        monkeypatch.undo()
        build_cached_checkpoint(source, target, "gpt", progress=False)
        return slow(*arguments)

    monkeypatch.setattr(conversion, step, overtaken)
    build_cached_checkpoint(source, target, "gpt", progress=False)
    assert list(tmp_path.iterdir()) == [target], "what the slower one built is gone"
    to_hf(target, tmp_path / "back", companions=source)
    assert_same(source, tmp_path / "back")


def test_a_conversion_into_the_cache_that_fails_says_so_and_leaves_nothing(corpus, tmp_path):
    source = tmp_path / "model"
    shutil.copytree(corpus / "qwen2", source)
    (source / "model.safetensors").write_bytes(b"no weights")
    target = cached_checkpoint(source, tmp_path / "cache", "gpt")
    with pytest.raises(ConversionError, match=r"model\.safetensors"):
        build_cached_checkpoint(source, target, "gpt", progress=False)
    assert not target.exists()
