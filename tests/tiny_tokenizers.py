"""Tiny tokenizers of the kinds that exist, made on the spot: nothing is downloaded."""

from collections.abc import Callable, Iterable
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = [
    "<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>", "<|START_OF_TURN|>", "<|END_OF_TURN|>",
    "<|END_RESPONSE|>",
]  # fmt: skip
TEXTS = [
    "user assistant system model tool", "What is the capital of France? It is Paris.",
    "  indented\n\n\ttext ", "3 + 4 = 7",
    "héllo wörld naïve 你好,世界。 😀 🤖", "the quick brown fox jumps over the lazy dog",
    "You are a helpful assistant.", "a aa aaa hello hello Hello world World answer question",
] * 20  # fmt: skip


def byte_level() -> Tokenizer:
    """GPT-2, Llama-3, Qwen. Offsets come trimmed, as these families configure them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    add_bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), add_bos])
    return tokenizer


def metaspace() -> Tokenizer:
    """Mistral, Gemma: blanks are part of the pieces, unknown characters are bytes."""
    tokenizer = old_metaspace()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def old_metaspace() -> Tokenizer:
    """Llama-2: the same with a blank put in front, behind each special token too, which decoding gives back."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL + [f"<0x{i:02X}>" for i in range(256)], show_progress=False
    )
    tokenizer.train_from_iterator([text.replace("😀", "").replace("好", "") for text in TEXTS], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "metaspace": metaspace,
    "old metaspace": old_metaspace,
}


def save_tokenizer(folder: Path, template: str | None = None, kind: str = "byte-level", **special: str | None) -> Path:
    """Write FOLDER as transformers does; special: other special tokens than these, or None for none."""
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"} | special
    named = {name: token for name, token in tokens.items() if token}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=KINDS[kind](), **named)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


SUMS = [f"user assistant {a} + {a + 3}? {a}." for a in range(100)]


def train_tokenizer(folder: Path, lines: Iterable[str] = SUMS, vocab_size: int = 60) -> Path:
    """Write FOLDER/tokenizer.model, with ChatML's markers; lines: whose characters it must know."""
    text = folder / "text"
    text.write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        split_digits=True,
        control_symbols=["<|im_start|>", "<|im_end|>"],
        user_defined_symbols=["\n"],
        pad_id=3,
        minloglevel=2,
    )
    return folder / "tokenizer.model"
