"""`train` with the fused output head: as with the materialised one, and resumed to the bit."""

import pytest

from tests.integration.test_train import corpus, train  # noqa: F401  a fixture
from tests.run_outputs import differences, load_checkpoint, load_scalars

COMPARED = (
    *("lm loss", "sft loss", "grad-norm", "ddt/phi mean", "ddt/phi std", "ddt/entropy", "idft/gamma mean"),
    *("sft weight mean", "trained tokens", "lm loss validation", "ddt/phi mean validation"),
)


def test_it_trains_as_the_materialised_head_and_resumes_to_the_bit(corpus, tmp_path):  # noqa: F811
    """Packs, four micro-batches a step, dropout, each conversation the same and then each token, lambda moving."""
    flags = (
        "--train-iters 8 --global-batch-size 8 --save-interval 4 --tensor-model-parallel-size 2 --sequence-parallel"
        " --hidden-dropout 0.1 --attention-dropout 0.1 --sft-packing --sft-normalization sample token@6"
        f" --sft-loss idft --idft-lambda-ramp 0.5 --sft-valid-data {corpus / 'valid.jsonl'} --eval-interval 4"
    )
    fused = f"{flags} --sft-loss-head fused --sft-loss-chunk-tokens 20"
    train(corpus, tmp_path / "materialized", flags, nproc=2)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    output = train(corpus, whole, f"{fused} --save {whole}", nproc=2)
    line = next(line for line in output.splitlines() if line.startswith("> sft loss: "))
    assert "head fused, chunks of at most 20 tokens, gradients in forward, weight gradient in fp32 by torch" in line
    assert "computes the logits again" not in output
    again = train(corpus, resumed, f"{fused} --load {whole} --ckpt-step 4 --save {resumed}", nproc=2)
    assert "WARNING: this run continues" not in again

    wanted, got, later = (
        load_scalars(tmp_path / name / "tensorboard") for name in ("materialized", "whole", "resumed")
    )
    for key in COMPARED:
        assert got[key] == pytest.approx(wanted[key], rel=1e-5, abs=1e-6) and got[key], key
        assert later[key] == {step: got[key][step] for step in later[key]} and later[key], key
    assert differences(load_checkpoint(whole, 8), load_checkpoint(resumed, 8)) == []
