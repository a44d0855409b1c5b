"""The fused output head trains as the materialised one does, by Megatron's own schedules, DDP and optimizers."""

import pytest
import torch

from tests.integration.head_checks import CHECKS, run_checks
from tests.integration.head_training import CASES, STEPS, train_cases
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def trained():
    """What each of two ranks found, by case."""
    return run_ranks(train_cases, 2, list(CASES))


@pytest.mark.parametrize("name", CASES)
def test_it_trains_as_the_materialised_head(trained, name):
    case = CASES[name]
    heads = 0
    for rank in trained:
        wanted, got = rank[name]["materialized"], rank[name]["fused"]
        heads += len(got["heads"])
        assert len(got["losses"]) == len(wanted["losses"]) == (STEPS * case.micro_batches if got["heads"] else 0)
        for one, other in zip(got["losses"], wanted["losses"], strict=True):
            torch.testing.assert_close(one, other, rtol=case.close, atol=case.close)
        assert got["norms"] == pytest.approx(wanted["norms"], rel=case.close) and min(got["norms"]) > 1e-3
        assert got["metrics"] == pytest.approx(wanted["metrics"], rel=case.close, abs=case.close)
        assert got["weights"].keys() == wanted["weights"].keys()
        for key, weight in got["weights"].items():
            # Adam divides by the gradient's size: one that is mere rounding moves a weight by up to a step of 0.001.
            largest = 1e-5 if case.dtype == torch.float32 else STEPS * 1e-3
            torch.testing.assert_close(weight, wanted["weights"][key], rtol=0, atol=largest, msg=key)
        assert not got["left"] and not wanted["left"], "uninstall leaves nothing behind"
    assert heads == (1 if "pipeline_model_parallel_size" in case.layout else 2)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_computed_in_forward_where_losses_are_summed(trained, name):
    case = CASES[name]
    summed = case.config.get("calculate_per_token_loss", True)
    for rank in trained:
        for in_forward, on_host, forwards in rank[name]["fused"]["heads"]:
            assert (in_forward, on_host, forwards) == (
                (True, False, STEPS * case.micro_batches) if summed else (False, True, 0)
            ), "after the first step nothing waits for the host"


@pytest.fixture(scope="module")
def checked():
    return run_ranks(run_checks, 1)[0]


@pytest.mark.parametrize("name", CHECKS)
def test_check(checked, name):
    assert not checked[name], checked[name]
