"""The data of a script under `run`, by all of Megatron's flags for it: ids that have no row."""

import argparse
import json

import numpy as np
import pytest
import torch

from megatron_idft.errors import InputError
from megatron_idft.integration.platform.hf_model import recorded_vocab_size
from megatron_idft.integration.platform.script_data import check_script_data

ROWS = 100


def arguments(**given) -> argparse.Namespace:
    flags = ("data_path", "train_data_path", "valid_data_path", "test_data_path", "data_args_path")
    names = (*flags, "per_split_data_args_path", "tokenizer_model")
    return argparse.Namespace(**(dict.fromkeys(names) | {"sft_loss_vocab_size": ROWS} | given))


@pytest.fixture
def corpora(tmp_path) -> dict[str, str]:
    """Prefixes of indexed datasets: three sequences; the second one of `over` begins with a token without a row."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefixes = {}
    for name, id_of_second in (("sound", ROWS - 1), ("over", ROWS)):
        prefix = prefixes[name] = str(tmp_path / name)
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
        for ids in ([1, 2, 3], [id_of_second, 4], [ROWS - 1]):
            builder.add_item(torch.tensor(ids))
            builder.end_document()
        builder.finalize(f"{prefix}.idx")
    return prefixes


def test_ids_without_a_row_are_named_by_file_and_sequence(corpora, tmp_path):
    sound, over = corpora["sound"], corpora["over"]
    words, splits = tmp_path / "words", tmp_path / "splits.json"
    words.write_text(f"1 {sound} 2 {over}\n")
    splits.write_text(json.dumps({"train": [sound], "valid": ["0.5", over], "test": None}))
    for given in (
        {"data_path": [over]},
        {"data_path": ["0.3", sound, "0.7", over]},
        {"train_data_path": [sound], "valid_data_path": [over]},
        {"data_args_path": str(words)},
        {"per_split_data_args_path": str(splits)},
    ):
        with pytest.raises(InputError, match=rf"--\S+ {over}: sequence 1 holds the token id 100, .*100 rows"):
            check_script_data(arguments(**given))
        check_script_data(arguments(**given, sft_loss_vocab_size=ROWS + 1))
        check_script_data(arguments(**given, sft_loss_vocab_size=None))  # the tokenizer's own size
    check_script_data(arguments(data_path=[sound]))
    check_script_data(arguments())


def test_what_is_no_indexed_dataset_is_the_scripts(tmp_path):
    (tmp_path / "records.jsonl").write_text("{}")
    (tmp_path / "words").write_text("[")
    for given in (
        {"data_path": ["0.5", "hub/name", str(tmp_path / "records.jsonl")]},
        {"data_path": ["s3://bucket/prefix"]},
        {"data_args_path": "nosuch"},
        {"per_split_data_args_path": str(tmp_path / "words")},
    ):
        check_script_data(arguments(**given))


def test_the_rows_of_a_script_are_those_of_the_config_beside_its_checkpoint(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "config.json").write_text(json.dumps({"vocab_size": 90}))
    assert recorded_vocab_size(argparse.Namespace(load=str(tmp_path), pretrained_checkpoint=None)) == 90
