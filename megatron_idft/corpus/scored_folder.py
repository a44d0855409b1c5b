"""A scored corpus: its parts merged into one file in input order, and rows read back from it."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_idft.corpus.copying import copy_records, record_lines, suffix_of
from megatron_idft.corpus.ledger.manifest import read_manifest
from megatron_idft.corpus.lint.thresholds import MIN_RECORDS, can_tell
from megatron_idft.corpus.records import check_files
from megatron_idft.corpus.report.builder import ReportBuilder
from megatron_idft.corpus.scores.estimates import ClusterSums
from megatron_idft.corpus.scores.rows import RECORD_SCHEMA, TOKEN_SCHEMA, ScoredRow
from megatron_idft.corpus.scores.selection import compile_selection
from megatron_idft.errors import InputError
from megatron_idft.files import complete_file

SCORES = "scores.parquet"
OWN_SAMPLES = "own_samples"  # folder of the ledger of `score --calibrate`: chunk i has temperature i
OWN_SAMPLE_TEMPERATURES = (1.0, 0.3)  # the null itself, and what sampling below T = 1 looks like


def merge_parts(output: Path, parts: Sequence[Path], *, per_token: bool) -> Path:
    """Write `output`/scores.parquet from the parts, in their order, with or without the columns per token.

    Memory: one part. The file appears complete or not at all.
    """
    schema = TOKEN_SCHEMA if per_token else RECORD_SCHEMA
    with (
        complete_file(output / SCORES) as building,
        pq.ParquetWriter(building, schema, compression="zstd") as writer,
    ):
        for part in parts:
            writer.write_table(pq.read_table(part, columns=schema.names).cast(schema))
    return output / SCORES


def read_scored(output: Path, *, per_token: bool = False) -> Iterator[ScoredRow]:
    """Rows of a finished or unfinished output folder, in input order.

    Args:
        output: the folder.
        per_token: with the lists per token, if kept.

    Raises:
        InputError: nothing is scored.
    """
    parts = sorted((output / "parts").glob("chunk-*.parquet"))
    if not parts:
        raise InputError(f"{output}: no scored records there; it should be the --output folder of `score`")
    columns = (TOKEN_SCHEMA if per_token else RECORD_SCHEMA).names
    for part in parts:
        for batch in pq.ParquetFile(part).iter_batches(batch_size=256, columns=columns):
            yield from pa.Table.from_batches([batch]).to_pylist()


def finish_scores(output: Path, parts: Sequence[Path], *, per_token: bool) -> str:
    """Merge the parts and say what came out, for a person."""
    path = merge_parts(output, parts, per_token=per_token)
    table = pq.read_table(path, columns=["phi_sum", "num_tokens", "log_prob_sum"])
    tokens = sum(table["num_tokens"].to_pylist())
    phi = sum(table["phi_sum"].to_pylist()) / tokens
    log_prob = sum(table["log_prob_sum"].to_pylist()) / tokens
    return (
        f"> {table.num_rows:,} records, {tokens:,} response tokens: phi {phi:+.4f}, log p {log_prob:.4f} per token;"
        f" {path}\n> next: megatron-idft score report {output}; megatron-idft score select {output} --keep EXPRESSION"
        " --sft-data FILE … --output FILE.jsonl"
    )


def read_own_samples(output: Path) -> dict[float, list[ScoredRow]]:
    """Scored rows of the model's own answers by temperature; empty without `--calibrate`."""
    found = {}
    for chunk, temperature in enumerate(OWN_SAMPLE_TEMPERATURES):
        path = output / OWN_SAMPLES / "parts" / f"chunk-{chunk:06d}.parquet"
        if path.exists():
            found[temperature] = pq.read_table(path).to_pylist()
    return found


def describe_own_samples(output: Path) -> str:
    """The mean of phi at each temperature with its standard error, each answer being one draw, for a person.

    As in the report (`can_tell`), a few answers have no error that could be trusted.
    """
    lines = []
    for temperature, rows in read_own_samples(output).items():
        sums = ClusterSums()
        for row in rows:
            sums.add({"tokens": row["num_tokens"], "phi": row["phi_sum"]})
        mean = sums.ratio("phi")
        assert mean is not None
        over = f"over {sums.records} answers, {sums['tokens']:,.0f} tokens"
        if can_tell(sums.records, mean):
            over = f"standard error {mean.se:.4f}, {over}"
        else:
            over = f"{over}: too few to tell whether it is 0, --calibrate {MIN_RECORDS} or more answers can"
        lines.append(f"> own samples at temperature {temperature:g}: phi {mean.value:+.4f} per token, {over}")
    return "\n".join(lines)


def report_on(folders: Sequence[Path], output: Path, title: str) -> tuple[Path, Path]:
    """Write report.html and report.json on scored folders into `output`; own samples of the same model are their null.

    Raises:
        InputError: a folder holds no scores.
    """
    builder = ReportBuilder(title)
    manifests = [read_manifest(folder)["settings"] for folder in folders]
    labels = _labels([(settings["model"], settings["iteration"], settings["hf_model"]) for settings in manifests])
    seen: set[tuple[str, float]] = set()
    for folder, settings, label in zip(folders, manifests, labels, strict=True):
        for temperature, rows in read_own_samples(folder).items():
            if (label, temperature) not in seen:
                builder.add_null(label, temperature, rows)
                seen.add((label, temperature))
        builder.add_corpus(", ".join(settings["data"]), label, read_scored(folder, per_token=True))
    output.mkdir(parents=True, exist_ok=True)
    return builder.build().save(output)


def _labels(models: Sequence[tuple[str, int, str | None]]) -> list[str]:
    """The page's name of each (checkpoint, iteration, Hugging Face folder): short, unless that fits two of them."""
    short = [name or f"{Path(path).name}, iteration {iteration}" for path, iteration, name in models]
    long = [f"{label} ({path})" for label, (path, _, _) in zip(short, models, strict=True)]
    meant: dict[str, set[tuple[str, int]]] = {}
    for label, (path, iteration, _) in zip(short, models, strict=True):
        meant.setdefault(label, set()).add((path, iteration))
    return [label if len(meant[label]) == 1 else full for label, full in zip(short, long, strict=True)]


def select_records(folder: Path, expression: str, data: Sequence[str], output: Path) -> dict[str, int]:
    """Copy the records of `data` whose scores fulfil `expression` to a new file, as they were; see `copy_records`.

    Returns:
        "scored", the rows of the scores; "kept", the copied records; "unscored", the records of `data` without a row,
        which are left out.

    Raises:
        SelectionError: the expression cannot be used.
        InputError: the output exists or has another suffix than record files, or the scores are not of this data.
    """
    suffix = suffix_of(output)
    keep = compile_selection(expression, RECORD_SCHEMA.names)
    files = check_files(data)
    scored, kept = (defaultdict[str, set[int]](set) for _ in range(2))
    for row in read_scored(folder):
        scored[row["file"]].add(row["line"])
        if keep(row):
            kept[row["file"]].add(row["line"])
    if scored and not scored.keys() & set(map(str, files)):
        first = sorted(scored)[0]
        raise InputError(
            f"{folder} has no score of any record of {', '.join(data)}: pass the files that it was scored from, by the"
            f" same paths, such as {first} ({len(scored)} in all)"
        )
    wanted = sum(map(len, kept.values()))
    output.parent.mkdir(parents=True, exist_ok=True)
    with complete_file(output) as building:
        written = copy_records([(file, kept[str(file)]) for file in files], building, suffix)
        if written != wanted:
            raise InputError(
                f"{wanted - written} of {wanted} selected records are not in {', '.join(data)}: pass the files that"
                f" {folder} was scored from"
            )
        unscored = sum(line not in scored[str(file)] for file in files for line in record_lines(file))
    return {"scored": sum(map(len, scored.values())), "kept": written, "unscored": unscored}


def describe_unscored(counts: Mapping[str, int], folder: Path) -> str:
    """Says why records are left out of a selection, for a person; empty where all have a score."""
    if not counts["unscored"]:
        return ""
    return (
        f"{counts['unscored']:,} records of --sft-data have no score in {folder} and are left out: `score --limit`,"
        " chunks not finished yet (`megatron-idft score status`), records skipped as bad, dropped as too long or with"
        " nothing to train leave such"
    )
