"""Every model, saved by transformers, and converted."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron_idft.checkpoint.convert import to_megatron
from tests import tiny_models


@dataclass
class Converted:
    """A model on both sides. logits: fp32 [2, tiny_models.LENGTH, vocab], as transformers computes them."""

    huggingface: Path
    megatron: dict[str, Path]  # by model class
    vocab: int
    logits: torch.Tensor

    def flags(self, model_class: str) -> list[str]:
        return json.loads((self.megatron[model_class] / "conversion.json").read_text())["megatron_flags"]


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Converted]:
    root = tmp_path_factory.mktemp("models")
    result = {}
    for name in tiny_models.MODELS:
        # In several files with an index, and in one.
        model = tiny_models.save(name, root / name, max_shard_size="100KB" if name == "mistral" else "5GB")
        vocab = model.config.vocab_size
        with torch.no_grad():
            logits = model(tiny_models.tokens(vocab)).logits
        folders = {}
        for model_class in ("gpt", "hybrid"):
            if name == "llama" and model_class == "hybrid":
                continue  # HybridModel has no Llama-3 rope scaling
            folders[model_class] = root / f"{name}.{model_class}"
            to_megatron(root / name, folders[model_class], model_class, progress=False)
        result[name] = Converted(root / name, folders, vocab, logits)
    return result
