"""Tiny tokenizers of the kinds that exist, made on the spot: nothing is downloaded."""

from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

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
