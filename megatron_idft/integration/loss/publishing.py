"""Metrics to where Megatron puts its own: the console, TensorBoard, W&B."""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

import torch

from megatron_idft.integration.loss.metrics import GAMMA_EDGES, PHI_EDGES, WEIGHT_EDGES, MetricsReport, format_report

_HISTOGRAM_EDGES = {"ddt/phi": PHI_EDGES, "idft/gamma": GAMMA_EDGES, "sft weight": WEIGHT_EDGES}


def print_rank_last(text: str) -> None:
    """Print on the last rank, which logs in Megatron, in one write: two ranks' lines would run into each other."""
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def publish_training(iteration: int, train_iters: int, report: MetricsReport) -> None:
    """One log interval: all of it, then each source under `KEY source-NAME`."""
    head = f"iteration {iteration:8d}/{train_iters:8d}"
    print_rank_last(format_report(head, report.scalars))
    for source, scalars in report.by_source.items():
        print_rank_last(format_report(f"{head} | source {source}", scalars))
    _write(report.scalars | _keyed(report.by_source, ""), iteration, report.histograms)


def publish_evaluation(iteration: int, suffix: str, report: MetricsReport) -> dict[str, float]:
    """One evaluation of one validation set, under `KEY validation…`, as Megatron names its own.

    Args:
        iteration: of the training.
        suffix: appended by Megatron to `validation`: nothing, or `-NAME` of the set.
        report: of the evaluation.

    Returns:
        the values by key, with `lm loss`, which Megatron itself writes.
    """
    head, ending = f"validation{suffix} at iteration {iteration}", f" validation{suffix}"
    scalars = evaluation_scalars(report.scalars)
    by_source = {source: evaluation_scalars(values) for source, values in report.by_source.items()}
    print_rank_last(format_report(head, scalars))
    for source, values in by_source.items():
        print_rank_last(format_report(f"{head} | source {source}", values))
    written = {f"{key}{ending}": value for key, value in scalars.items()} | _keyed(by_source, ending)
    _write(written, iteration, {})
    measured = {} if report.lm_loss is None else {f"lm loss{ending}": report.lm_loss}
    return measured | written


def evaluation_scalars(scalars: dict[str, float]) -> dict[str, float]:
    """The keys that do not depend on an objective: evaluation is cross-entropy."""
    kept = ("lm loss", "trained tokens")
    return {key: value for key, value in scalars.items() if key in kept or key.startswith("ddt/")}


def _keyed(by_source: dict[str, dict[str, float]], ending: str) -> dict[str, float]:
    return {
        f"{key}{ending} source-{source}": value
        for source, scalars in by_source.items()
        for key, value in scalars.items()
        if key != "idft/lambda"  # the same for all
    }


def _write(scalars: dict[str, float], iteration: int, histograms: dict[str, list[int]]) -> None:
    from megatron.training import get_tensorboard_writer, get_wandb_writer

    writer, wandb = get_tensorboard_writer(), get_wandb_writer()
    if writer:
        for key, value in scalars.items():
            writer.add_scalar(key, value, iteration)
        for key, counts in histograms.items():
            _write_histogram(writer, key, counts, iteration)
    if wandb:
        pictures = {
            f"{key} histogram": wandb.Histogram(np_histogram=(counts, _finite_edges(key)))
            for key, counts in histograms.items()
        }
        wandb.log(scalars | pictures, iteration)


def _finite_edges(key: str) -> list[float]:
    """Edges of all bins. Both writers want finite ones, so the open tails are drawn one bin wide."""
    edges = _HISTOGRAM_EDGES[key]
    width = edges[1] - edges[0]
    return [edges[0] - width, *edges, edges[-1] + width]


def _write_histogram(writer: Any, key: str, counts: list[int], iteration: int) -> None:
    edges = _finite_edges(key)
    centers = [(low + high) / 2 for low, high in pairwise(edges)]
    writer.add_histogram_raw(
        f"{key} histogram",
        min=edges[0],
        max=edges[-1],
        num=sum(counts),
        sum=sum(count * center for count, center in zip(counts, centers, strict=True)),
        sum_squares=sum(count * center**2 for count, center in zip(counts, centers, strict=True)),
        bucket_limits=edges[1:],
        bucket_counts=counts,
        global_step=iteration,
    )
