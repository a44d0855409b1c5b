"""The real model, real problems, and what several files need of them: made once, for all workers of pytest-xdist."""

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_idft.checkpoint.cache import cached_checkpoint
from megatron_idft.checkpoint.config import read_folder_model
from megatron_idft.checkpoint.convert import to_megatron
from megatron_idft.checkpoint.model_flags import ModelClass
from megatron_idft.integration.platform.model_class import usual_class
from tests.real_model import fetch, problems


@pytest.fixture(scope="session")
def huggingface() -> Path:
    """SmolLM2-135M-Instruct in fp32."""
    folder = fetch.CACHE / fetch.NAME
    if not (folder / "config.json").is_file():
        pytest.skip(f"{folder} is missing: python examples/real_model/fetch.py")
    return folder


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], Any]], Path]:
    """once(name, make): a path in this session, made by make(path) of the worker that asks first."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def get(name: str, make: Callable[[Path], Any]) -> Path:
        path, making = root / name, root / f"{name}.making"
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                make(making)
                making.rename(path)
        return path

    return get


@pytest.fixture(scope="session")
def model_class(huggingface) -> ModelClass:
    """The class that the verbs give the model by themselves."""
    return usual_class(read_folder_model(huggingface))


@pytest.fixture(scope="session")
def cache(huggingface, model_class, once) -> Path:
    """The folder for --hf-cache, which holds the model, converted."""

    def convert(folder: Path) -> None:
        folder.mkdir()
        to_megatron(huggingface, cached_checkpoint(huggingface, folder, model_class), model_class, progress=False)

    return once("smol-cache", convert)


@pytest.fixture(scope="session")
def megatron(huggingface, cache, model_class) -> Path:
    """The converted model."""
    return cached_checkpoint(huggingface, cache, model_class)


@pytest.fixture(scope="session")
def model_flags(megatron) -> list[str]:
    return json.loads((megatron / "conversion.json").read_text())["megatron_flags"]


@pytest.fixture(scope="session")
def verb(huggingface, cache) -> Callable[..., list[str]]:
    """verb(name, *flags): the command line of a verb that begins with the model."""
    common = ["--hf-model", str(huggingface), "--hf-cache", str(cache)]
    return lambda name, *flags: ["-m", "megatron_idft", name, *common, *map(str, flags)]


@pytest.fixture(scope="session")
def records(once) -> list[dict[str, Any]]:
    """Problems with worked solutions, the shortest first: a core here reads about 130 tokens in a second."""
    sizes = {"train": 160, "validation": 0, "held-out": 0}
    folder = once("problems", lambda path: problems.write(path, 1, sizes))
    found = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    return sorted(found, key=lambda record: sum(len(message["content"]) for message in record["messages"]))


@pytest.fixture(scope="module")
def model(huggingface):
    """As transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(huggingface).eval()


@pytest.fixture(scope="session")
def tokenizer(huggingface):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(huggingface)


@pytest.fixture(scope="session")
def shallow(huggingface, tokenizer, once) -> Path:
    """The first two of the thirty layers, for transformers."""
    from transformers import AutoModelForCausalLM

    def save(folder: Path) -> None:
        AutoModelForCausalLM.from_pretrained(huggingface, num_hidden_layers=2).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return once("SmolLM2-two-layers", save)
