"""Train a sentencepiece model on chat records: `python train_tokenizer.py OUT.model CORPUS.jsonl …`."""

import io
import sys
from pathlib import Path

import sentencepiece

from megatron_idft.corpus.records import read_records


def main(out: str, *corpora: str) -> None:
    texts = (message["content"] for record in read_records(corpora) for message in record.messages)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["user", "assistant", *texts]),
        model_writer=model,
        vocab_size=240,
        model_type="bpe",
        split_digits=True,
        normalization_rule_name="identity",  # keeps newlines
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        user_defined_symbols=["<|im_start|>", "<|im_end|>", "\n"],
        pad_id=3,
        minloglevel=2,
    )
    Path(out).write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    print(f"{out}: {pieces.get_piece_size()} pieces")


if __name__ == "__main__":
    main(*sys.argv[1:])
