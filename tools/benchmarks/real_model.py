"""SmolLM2-135M-Instruct as a shape for benchmarks: the model, records for it, and what the processor reaches on it.

With a folder that `examples/real_model/fetch.py` made, the weights, tokenizer and template are the real ones, and the
records are those of a file (`examples/real_model/problems.py` makes some) or of the questions below. Without one, the
weights are random and so are the tokens, of lengths like theirs: then nothing that depends on what the model says is
measured, such as a cut of its distribution.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
CONFIG: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
SMOKE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}
POSITIONS = 1024
Ids = NDArray[np.int64]


class Conversation(NamedTuple):
    """Token ids of the prompt, of prompt and response, and of the prompt with the response as a hint."""

    prompt: Ids
    whole: Ids
    hinted: Ids

    @property
    def mask(self) -> NDArray[np.uint8]:
        return (np.arange(len(self.whole)) >= len(self.prompt)).astype(np.uint8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hf-model", type=Path, help="real weights: the folder of examples/real_model/fetch.py")
    parser.add_argument("--records-file", type=Path, help="with it: JSONL of `messages`, of examples/real_model")


def model_folder(given: Path | None, shape: str, scratch: Path) -> Path:
    """The folder given, or one with random weights of the shape."""
    if given is not None:
        return given
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **(CONFIG if shape == "smollm2" else SMOKE),
        max_position_embeddings=POSITIONS,
        rope_theta=100_000.0,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(scratch / "model")
    return scratch / "model"


def conversations(options: argparse.Namespace, count: int, vocab: int) -> list[Conversation]:
    """So many, of the file, or random ones of the lengths of gsm_symbolic's under SmolLM2's template."""
    if options.hf_model is None:
        rng = np.random.default_rng(0)
        lengths = np.clip(np.stack([rng.normal(115, 25, count), rng.normal(100, 60, count)]), 16, 400).astype(int)
        ids = [rng.integers(3, vocab, n) for n in lengths.sum(0)]
        return [Conversation(w[:n], w, np.concatenate([w, w[:40]])) for w, n in zip(ids, lengths[0], strict=True)]
    if options.records_file is None:
        raise SystemExit("--records-file: pass records for the real weights, as examples/real_model/problems.py makes")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.hf_model)

    def render(messages: list[dict[str, str]], **more: bool) -> Ids:
        return np.array(tokenizer.apply_chat_template(messages, return_dict=True, **more)["input_ids"])

    found = []
    for line in options.records_file.read_text(encoding="utf-8").splitlines()[:count]:
        question, answer = json.loads(line)["messages"]
        hint = f"{question['content']}\n\nHere is a worked solution:\n{answer['content']}\n\nNow solve the problem."
        prompt, hinted = (
            render([{"role": "user", "content": text}], add_generation_prompt=True)
            for text in (question["content"], hint)
        )
        found.append(Conversation(prompt, render([question, answer]), hinted))
    if len(found) < count:
        raise SystemExit(f"--records-file: {options.records_file} has {len(found)} records, {count} are measured")
    return found


def load_scorer(folder: Path, scratch: Path, tokens_per_batch: int) -> Any:
    """The scorer of `score --hf-model`, set up by the program itself."""
    from megatron_idft.integration.offline import score as scoring_program
    from megatron_idft.integration.platform.hf_model import expand
    from megatron_idft.integration.platform.start import prepare_process

    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    flags = f"--hf-model {folder} --hf-cache {scratch / 'cache'} --tokenizer-model {folder} --output unused"
    flags += f" --data {folder / 'config.json'} --seq-length {POSITIONS} --tokens-per-batch {tokens_per_batch}"
    flags += f" --tokenizer-type NullTokenizer --vocab-size {vocab}"
    sys.argv = sys.argv[:1]
    prepare_process("benchmark", expand(flags.split()), force_cpu=not torch.cuda.is_available())
    return scoring_program._load_scorer(scoring_program._parse())


def load_transformers(folder: Path) -> Any:
    """The same weights in transformers, with its SDPA attention."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


class Products:
    """The model's matrix products and nothing else, as torch multiplies them."""

    def __init__(self, model: Any) -> None:
        layers = [module.weight for module in model.model.modules() if isinstance(module, torch.nn.Linear)]
        self.layers, self.head = [weight.detach() for weight in layers], model.lm_head.weight.detach()
        self.bytes = sum(weight.nbytes for weight in (*self.layers, self.head))

    def seconds(self, rows: int, head_rows: int, repeats: int = 5) -> float:
        """The least of some passes over `rows` hidden states, of which `head_rows` meet the output layer."""
        inputs = {width: torch.randn(rows, width) for width in {weight.shape[1] for weight in self.layers}}
        last = torch.randn(head_rows, self.head.shape[1])

        def multiply() -> None:
            for weight in self.layers:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)
            torch.nn.functional.linear(last, self.head)

        with torch.inference_mode():
            return least_seconds(multiply, repeats)

    def packed_seconds(self, rows: int, repeats: int = 5) -> float:
        """The same for as many rows in all products, with copies of the weights that oneDNN has re-ordered."""
        reorder, multiply = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
        with torch.inference_mode():
            inputs = {width: torch.randn(rows, width) for width in {weight.shape[1] for weight in self.layers}}
            packed = [(inputs[weight.shape[1]], reorder(weight, rows)) for weight in (*self.layers, self.head)]

            def run() -> None:
                for states, weight in packed:
                    multiply(states, weight, None, "none", [], "")

            return least_seconds(run, repeats)

    def read_seconds(self) -> float:
        """Of reading all these weights once."""
        weights = [weight.flatten() for weight in (*self.layers, self.head)]
        with torch.inference_mode():
            return least_seconds(lambda: [weight.sum() for weight in weights], 5)


def least_seconds(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):  # the first warms up
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the wall, and of processor time of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def surroundings(options: argparse.Namespace) -> dict[str, Any]:
    """Hardware, versions, and what was measured."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": model.group(1) if model else platform.machine(),
        "processors": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: importlib.metadata.version(name) for name in ("transformers", "megatron-core", "numpy")},
        "weights": "random" if options.hf_model is None else options.hf_model.name,
        "commit": git("rev-parse", "HEAD"),
        "changed_since_commit": bool(git("status", "--porcelain", "--untracked-files=no")),
    }


def goal(name: str, value: float, least: float) -> dict[str, Any]:
    """A goal and whether it is hit, printed."""
    hit = value >= least
    print(f"{'hit ' if hit else 'MISS'}  {name}: {value:.2f} (goal {least:g})", flush=True)
    return {"name": name, "value": value, "goal": least, "hit": hit}
