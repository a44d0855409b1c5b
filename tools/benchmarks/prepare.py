"""Tokens per second of `prepare` on this machine, beside the raw tokenizer and Megatron-LM's own preprocessing.

Over two generated corpora of conversations (source text of Python's library, one to three turns, a long tail of
lengths; about 700 and about 100 tokens for each record) and a byte-level BPE of 32,000 tokens trained on the same text,
or with `--tokenizer` a real model's (its template included):

    raw             the tokenizer's `encode_batch` on the rendered texts, in batches of 128, and nothing else
    raw, fast       the same with `encode_batch_fast`, which computes no offsets
    prepare         JSON in, templates rendered, masks proven, tokens and masks out, packed
    prepare, log q  the same with log q of a reference model for each trained token, from a file of another engine
    preprocess_data Megatron-LM's tools/preprocess_data.py on the rendered texts, where MEGATRON_LM is a checkout: it
                    knows neither templates nor masks

Each in the same number of processes. Compared are tokens per second of processor time of all processes together, once
they have started: that is the speed per core, and other programs disturb it less than time on the wall. `prepare`
counts with everything: the reading process, packing and writing. preprocess_data's start is measured on a single text
and subtracted. The variants take turns; the median over the rounds counts. The goal is 0.9 of `raw`, printed as hit or
MISS for each corpus.

Expected before the first run, of the long records: JSON, rendering and masks cost some 20 % of the tokenizer's time,
and not computing offsets gives 15 % back, so `prepare` reaches about 0.9 to 1.0 of `raw`, and 0.8 of `raw, fast`;
preprocess_data, which encodes one text at a time through Python, about 0.6 of `raw`. Of the short ones: what a record
costs beside its tokens counts seven times as much, 0.8 to 0.9 of `raw`, and less than half for preprocess_data.

log q is read as lists, matched by record, id and position, and written beside the tokens: expected to cost a quarter of
`prepare` more (a try had shown that) and 4 bytes a token, and nothing to speak of where training opens the packs and
takes a sample. No goal; the figures are printed.

Packing is compared on lengths drawn from a long-tailed mix: best-fit decreasing, first-fit in the order of the input,
and one record to a pack as stock `--sft` has it. Expected: 0.99, 0.98 and 0.2, at less than a second for a million
documents. (A smoke run had shown about these.) The goal is 0.97.

    MEGATRON_LM=/path/to/checkout python tools/benchmarks/prepare.py --json RESULTS.json [--tokenizer DIR]
"""

import argparse
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout needs no installation

from megatron_idft.data.packed.dataset import PackedDataset
from megatron_idft.data.packed.pack_settings import PrepareSettings
from megatron_idft.data.packed.packing import best_fit_decreasing, efficiency, first_fit
from megatron_idft.data.packed.prepare import prepare
from megatron_idft.data.packed.store import PackedStore
from megatron_idft.data.reference.columns import ReferenceColumns
from megatron_idft.data.reference.settings import ReferenceSettings

SEQ_LENGTH = 32_768
MIN_SHARE_OF_RAW, MIN_EFFICIENCY = 0.9, 0.97
ROLES = ("user", "assistant")
# Of the logarithms of a question's and an answer's characters, the mean; and the most characters.
CORPORA = {"long records": ((5, 2000), (7, 12_000)), "short records": ((4, 500), (4.3, 2000))}
SHORT_FOR_A_LONG = 5  # records, so that both corpora take about as long
SPLIT = r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=12_000, help="long ones; of the short, five times as many")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--tokenizer", type=Path, help="a Hugging Face folder with a chat template")
    parser.add_argument("--documents", type=int, default=1_000_000, help="to pack")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def library() -> list[str]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [path.read_text(encoding="utf-8", errors="ignore") for path in sorted(folder.glob("*.py"))]


def save_tokenizer(texts: list[str], vocab: int, folder: Path) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from megatron_idft.data.chat.template import BUILTIN_TEMPLATES

    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    saved.chat_template = BUILTIN_TEMPLATES["chatml"]
    saved.save_pretrained(folder)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer's files, without a model's weights."""
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja") and not file.name.startswith(("model", "config")):
            shutil.copy(file, folder)


def conversations(texts: list[str], count: int, sizes: Any) -> list[dict[str, Any]]:
    rng = random.Random(0)

    def piece(mean: float, longest: int) -> str:
        text, size = rng.choice(texts), int(min(longest, max(20, rng.lognormvariate(mean, 1))))
        begin = rng.randrange(max(1, len(text) - size))
        return "." + text[begin : begin + size] + "."

    rows = []
    for _ in range(count):
        turns = [[piece(*size) for size in sizes] for _ in range(rng.choice([1, 1, 1, 2, 3]))]
        messages = [{"role": role, "content": text} for turn in turns for role, text in zip(ROLES, turn, strict=True)]
        rows.append({"messages": messages})
    return rows


def encode_raw(work: tuple[str, str, bool]) -> tuple[int, float]:
    """Tokens and processor seconds of one process. work: tokenizer.json, a JSON list of texts, fast."""
    tokenizer_file, texts_file, fast = work
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(tokenizer_file)
    texts = json.loads(Path(texts_file).read_text(encoding="utf-8"))
    encode = tokenizer.encode_batch_fast if fast else tokenizer.encode_batch
    tokens, begin = 0, time.process_time()
    for at in range(0, len(texts), 128):
        tokens += sum(map(len, encode(texts[at : at + 128], add_special_tokens=False)))
    return tokens, time.process_time() - begin


def raw(folder: Path, workers: int, fast: bool) -> tuple[int, float]:
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        works = [(str(folder / "tokenizer/tokenizer.json"), str(folder / f"{i}.json"), fast) for i in range(workers)]
        done = pool.map(encode_raw, works, chunksize=1)
    return sum(tokens for tokens, _ in done), sum(seconds for _, seconds in done)


def prepared(
    folder: Path, workers: int, tokenizer: Any, output: Path, reference: ReferenceSettings | None = None
) -> tuple[int, float]:
    settings = PrepareSettings((str(folder / "records.jsonl"),), SEQ_LENGTH, chunk_bytes=4 << 20, reference=reference)
    begin = time.process_time()
    done = prepare(settings, tokenizer, output, workers=workers, progress=False)
    return done.tokens, done.cpu_seconds + time.process_time() - begin


def write_scores(folder: Path, tokenizer: Any) -> Path:
    """log q of each trained token of the records, as another engine would write them: random numbers."""
    settings = PrepareSettings((str(folder / "records.jsonl"),), SEQ_LENGTH, packing=False)
    store = prepare(settings, tokenizer, folder / "plain", workers=0, progress=False).store
    rng = np.random.default_rng(0)
    rows: dict[str, list[Any]] = {"file": [], "line": [], "token_ids": [], "log_prob": []}
    for index in range(len(store)):
        pack = store.pack(index)
        trained = pack.ids[1:][pack.mask[1:] == 1]
        [(_, line)] = store.origins(index)
        values = ("records.jsonl", line, trained, -rng.exponential(size=len(trained)).astype(np.float32))
        for column, value in zip(rows.values(), values, strict=True):
            column.append(value)
    pq.write_table(pa.table(rows), folder / "scores.parquet")
    return folder / "scores.parquet"


def opening(prefix: Path, reference: ReferenceColumns | None) -> float:
    """Seconds until training has opened the packs and taken its first sample."""
    begin = time.perf_counter()
    dataset = PackedDataset({"packs": PackedStore(prefix)}, SEQ_LENGTH, 0, reference=reference)
    dataset[0]
    return time.perf_counter() - begin


def preprocess_data(folder: Path, workers: int, checkout: Path, records: str, output: Path) -> float:
    """Processor seconds of Megatron-LM's tool, its start included."""
    flags = f"--input {folder / records} --output-prefix {output} --workers {workers} --json-keys text"
    flags += f" --tokenizer-type HuggingFaceTokenizer --tokenizer-model {folder / 'tokenizer'} --append-eod"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, str(checkout / "tools" / "preprocess_data.py"), *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(checkout)})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def packing(documents: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    figures: dict[str, Any] = {"documents": documents}
    for capacity in (4096, 32_768):
        lengths = np.clip(rng.lognormal(6.2, 1.1, documents), 8, capacity).astype(np.int64)
        begin = time.perf_counter()
        packs = len(best_fit_decreasing(lengths, capacity, seed=0))
        seconds = time.perf_counter() - begin
        some = lengths[:200_000]
        figures[str(capacity)] = {
            "seconds": seconds,
            "best_fit_decreasing": efficiency(lengths, packs, capacity),
            "first_fit": efficiency(some, first_fit(some.tolist(), capacity), capacity),
            "one_record_per_pack": efficiency(lengths, len(lengths), capacity),
        }
    return figures


def measure(
    folder: Path, rows: list[dict[str, Any]], tokenizer: Any, checkout: Path | None, options: argparse.Namespace
) -> dict[str, Any]:
    """Every variant over these records, in turns."""
    from megatron_idft.data.chat.conversations import render_conversation

    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    rendered = [render_conversation(tokenizer, row["messages"]).text for row in rows]
    for i in range(options.workers):
        (folder / f"{i}.json").write_text(json.dumps(rendered[i :: options.workers]), encoding="utf-8")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rendered))
    (folder / "one.jsonl").write_text(json.dumps({"text": "one"}) + "\n")
    reference = ReferenceSettings(str(write_scores(folder, tokenizer)))
    seconds: dict[str, list[float]] = {}
    tokens = 0
    for number in range(options.rounds):
        for name, fast in (("raw", False), ("raw, fast", True)):
            tokens, spent = raw(folder, options.workers, fast)
            seconds.setdefault(name, []).append(spent)
        for name, of in (("prepare", None), ("prepare, log q", reference)):
            same, spent = prepared(folder, options.workers, tokenizer, folder / f"{name}-{number}", of)
            assert same == tokens, (same, tokens)
            seconds.setdefault(name, []).append(spent)
        if checkout is not None:
            start = preprocess_data(folder, options.workers, checkout, "one.jsonl", folder / f"one-{number}")
            spent = preprocess_data(folder, options.workers, checkout, "texts.jsonl", folder / f"theirs-{number}")
            seconds.setdefault("preprocess_data", []).append(spent - start)
    rates = {name: tokens / statistics.median(values) for name, values in seconds.items()}
    share = rates["prepare"] / rates["raw"]
    return {
        "records": len(rows),
        "tokens": tokens,
        "cpu_seconds": seconds,
        "tokens_per_cpu_second": rates,
        "share_of_raw": share,
        "log_q_over_prepare": rates["prepare"] / rates["prepare, log q"],
        "log_q_bytes_per_token": (folder / "prepare, log q-0.reference.bin").stat().st_size / tokens,
        "opening_seconds": {
            "prepare": opening(folder / "prepare-0", None),
            "prepare, log q": opening(folder / "prepare, log q-0", ReferenceColumns()),
        },
        "goal_hit": share >= MIN_SHARE_OF_RAW,
    }


def surroundings(checkout: Path | None) -> dict[str, Any]:
    """Hardware, versions, and what was measured."""

    def git(*words: str) -> str:
        root = Path(__file__).resolve().parents[2]
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True).stdout.strip()

    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    theirs = None
    if checkout is not None:
        numbers = re.findall(
            r"(?m)^(MAJOR|MINOR|PATCH) = (\d+)", (checkout / "megatron/core/package_info.py").read_text()
        )
        theirs = ".".join(number for _, number in numbers)
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": model.group(1) if model else platform.machine(),
        "processors": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("tokenizers", "transformers", "numpy", "jinja2")},
        "megatron_lm": theirs,
        "commit": git("rev-parse", "HEAD"),
        "changed_since_commit": bool(git("status", "--porcelain", "--untracked-files=no")),
    }


def main() -> None:
    options = parse_arguments()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core for each process
    os.environ["RAYON_NUM_THREADS"] = "1"
    from megatron_idft.data.chat.tokenizer import load_tokenizer

    checkout = Path(os.environ["MEGATRON_LM"]) if os.environ.get("MEGATRON_LM") else None
    result: dict[str, Any] = {"benchmark": "prepare", **surroundings(checkout)}
    result |= {
        "options": {name: value for name, value in vars(options).items() if name not in ("json", "tokenizer")},
        "corpora": {},
    }
    result["tokenizer"] = None if options.tokenizer is None else options.tokenizer.name
    texts = library()
    for corpus, sizes in CORPORA.items():
        count = options.records * (SHORT_FOR_A_LONG if corpus == "short records" else 1)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            if options.tokenizer is None:
                save_tokenizer(texts, options.vocab, folder / "tokenizer")
            else:
                copy_tokenizer(options.tokenizer, folder / "tokenizer")
            tokenizer = load_tokenizer(folder / "tokenizer")
            rows = conversations(texts, count, sizes)
            figures = result["corpora"][corpus] = measure(folder, rows, tokenizer, checkout, options)
        rates, share = figures["tokens_per_cpu_second"], figures["share_of_raw"]
        print(
            f"{count} {corpus} of {figures['tokens'] / count:.0f} tokens, {options.workers} processes,"
            f" {options.rounds} rounds"
        )
        for name, rate in rates.items():
            print(f"{name:18}{rate:14,.0f} tokens/s of processor time{rate / rates['raw']:8.3f} of raw")
        hit = "hit" if figures["goal_hit"] else "MISS"
        before, behind = figures["opening_seconds"].values()
        print(
            f"log q of a reference: {figures['log_q_over_prepare']:.2f} times the processor time of prepare,"
            f" {figures['log_q_bytes_per_token']:g} bytes a token; opened in {1e3 * behind:.1f} ms, {1e3 * before:.1f}"
            " without"
        )
        print(f"{hit}: {corpus}: prepare at {share:.3f} of raw (goal {MIN_SHARE_OF_RAW})", flush=True)
    result["packing"] = packs = packing(options.documents)
    for capacity, figures in packs.items():
        if isinstance(figures, dict):
            hit = "hit" if figures["best_fit_decreasing"] >= MIN_EFFICIENCY else "MISS"
            print(f"{hit}: packs of {capacity}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
