"""Run under torchrun or forked: score fixed sequences under the layout that the flags name, and save what comes out.

    scoring_probe.py OUT.npz <flags of `score`>

In one process the float64 statistics of the model's whole logits are saved beside them.
"""

import sys

import numpy as np
import torch

from megatron_idft.integration.platform import start

VOCAB = 61  # of the tokenizer that test_score.py trains


def sequences() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB - 1, size=n) for n in (5, 40, 17, 2, 33, 12, 12, 48, 7)]


def masks() -> list[np.ndarray]:
    """Two spans of the longer ones, and at least the last token."""
    return [(np.arange(len(ids)) % 11 >= 8) | (np.arange(len(ids)) == len(ids) - 1) for ids in sequences()]


def expected(model: torch.nn.Module, vocab_size: int) -> list[np.ndarray]:
    """log_prob, entropy and the log-probabilities of the whole vocabulary [n - 1, V] of each sequence."""
    found = []
    for ids in sequences():
        tokens = torch.tensor(ids[:-1])[None]
        with torch.no_grad():
            logits = model(tokens, torch.arange(tokens.shape[1])[None], None)[0].double()[:, :vocab_size]
        log_probs = logits.log_softmax(-1)
        found.append(log_probs.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].numpy())
        found.append(-(log_probs.exp() * log_probs).sum(-1).numpy())
        found.append(log_probs.numpy())
    return found


def main() -> None:
    out, *flags = sys.argv[1:]
    start.prepare_process("megatron-idft score", flags, force_cpu=True)
    from megatron_idft.integration.offline import score as scoring_program

    args = scoring_program._parse()
    scorer = scoring_program._load_scorer(args)
    found, masked = scorer.score(sequences()), scorer.score(sequences(), masks())
    if found is None or masked is None or not scoring_program._leads():
        return
    arrays = {
        f"{name}{i}": array
        for name, pairs in (("found", found), ("masked", masked))
        for i, array in enumerate(value for pair in pairs for value in pair[:2])
    }
    arrays |= {f"top{i}": array for i, array in enumerate(value for found in masked for value in found[2:])}
    arrays["one_row"] = np.array(scorer.documents.served)
    if torch.distributed.get_world_size() == 1:
        wanted = expected(scorer.model[0], args.sft_loss_vocab_size)
        arrays |= {f"expected{2 * (i // 3) + i % 3}": array for i, array in enumerate(wanted) if i % 3 < 2}
        arrays |= {f"whole{i}": array for i, array in enumerate(wanted[2::3])}
    np.savez(out, **arrays)


if __name__ == "__main__":
    main()
