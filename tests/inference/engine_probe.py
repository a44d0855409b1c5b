"""Run under torchrun or forked: decode the cases of a file with the engine under the layout that the flags name.

    engine_probe.py CASES.json OUT.json <flags of `score`>

A case: requests (one may have settings of its "own"), fed (True: by a feed, not as a list), sampling, stopping, mixing
(a fixed hint share, or the slope of the paper's linear form), max_rows, memory_bytes, block (positions of one), graphs
(False: none), counted (True: what the engine counted is told, too, after a fresh start), decode (False: score the
prompts), cudnn (whether attention may be cuDNN's; the answer then tells what attention saw, too), modules (True: the
layers' modules run where else their weights would be read), refused (the answer
is what the engine says). Runs on a GPU where there is one. Only one rank writes; the ranks' results are compared first.
"""

import itertools
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

from megatron_idft.errors import UserError
from megatron_idft.integration.platform import start
from megatron_idft.integration.platform.hf_model import expand

POSITIONS = 96  # unless the flags have a --seq-length


class Linear:
    def __init__(self, slope: float, vocab_size: int, first_token_hinted: bool) -> None:
        self.slope, self.log_vocab, self.first_token_hinted = slope, float(np.log(vocab_size)), first_token_hinted

    def plain_share(self, hinted_entropy: torch.Tensor) -> torch.Tensor:
        return (self.slope * hinted_entropy / self.log_vocab).clamp(0, 1)


class Fixed:
    def __init__(self, hint_share: float, first_token_hinted: bool) -> None:
        self.hint_share, self.first_token_hinted = hint_share, first_token_hinted

    def plain_share(self, hinted_entropy: torch.Tensor) -> torch.Tensor:
        return torch.full_like(hinted_entropy, 1 - self.hint_share)


def run(engine, case, vocab_size):
    if case.get("refused"):
        try:
            answers(engine, case, vocab_size)
        except UserError as error:
            return str(error)
        raise AssertionError(f"served: {case}")
    if case.get("modules"):
        direct, engine.model.direct = engine.model.direct, None
        assert direct is not None, "the layers' modules ran in all cases"
        found = answers(engine, case, vocab_size)
        engine.model.direct = direct
        return found
    if "cudnn" not in case:
        return answers(engine, case, vocab_size)
    seen = set()
    attention = engine.model.attentions[0].core_attention
    hook = attention.register_forward_pre_hook(lambda *_: seen.add(torch.backends.cuda.cudnn_sdp_enabled()))
    engine.cache.cudnn, before = case["cudnn"], engine.cache.cudnn
    found = answers(engine, case, vocab_size)
    hook.remove()
    engine.cache.cudnn = before
    return {"found": found, "seen": sorted(seen), "after": torch.backends.cuda.cudnn_sdp_enabled(), "default": before}


def answers(engine, case, vocab_size):
    from megatron_idft.inference.requests import Request

    if not case.get("decode", True):
        pairs = engine.score([np.array(prompt) for prompt in case["prompts"]])
        return [{"log_prob": a.tolist(), "entropy": b.tolist()} for a, b in pairs]
    settings = settings_of(case, vocab_size)
    requests = [
        Request(
            r["id"],
            np.array(r["prompt"]),
            r.get("hinted") and np.array(r["hinted"]),
            r.get("seed", 0),
            settings_of(case | r["own"], vocab_size) if "own" in r else None,
        )
        for r in case["requests"]
    ]
    engine.max_rows = case.get("max_rows", 4)
    engine._forward.graphs = engine._forward.graphs and case.get("graphs", True)
    engine.cache.memory_bytes = case.get("memory_bytes", 1 << 28)
    if engine.model.device.type == "cpu":
        engine.cache.block_size = case.get("block", 8)  # a GPU's kernels have sizes of their own
    if case.get("interrupted"):
        earlier = engine.decode(requests, settings)
        next(earlier)
        list(engine.decode(requests[:1], settings))
        try:
            list(earlier)
        except RuntimeError as error:
            return str(error)
        return "the earlier one went on"
    if case.get("counted"):
        engine.cache.pool = None  # nothing is known from the cases before
    found = {}
    for completion in served(engine, requests) if case.get("fed") else engine.decode(requests, settings):
        found[completion.request.id, completion.request.seed] = {
            "tokens": completion.token_ids.tolist(),
            "finish_reason": completion.finish_reason,
            "log_prob": completion.log_prob.tolist(),
            "entropy": completion.entropy.tolist(),
            "hint_share": completion.hint_share.tolist(),
            "hinted_entropy": [None if np.isnan(h) else float(h) for h in completion.hinted_entropy],
            "split_at": completion.split_at,
        }
    listed = [found[request.id, request.seed] for request in requests]
    if not case.get("counted"):
        return listed
    counts = {"prompt": engine.prompt_tokens, "found": engine.found_tokens, "preempted": engine.preempted}
    return {"answers": listed, "counts": counts}


def settings_of(case, vocab_size):
    from megatron_idft.inference.requests import DecodeSettings, Repetition, Sampling, Stopping

    stopping = dict(case["stopping"])
    if "repetition" in stopping:
        stopping["repetition"] = Repetition(**stopping["repetition"])
    if "splitter" in stopping:
        stopping["piece"] = lambda token: f"<{token}>"
    mixing, first = None, case.get("first_token_hinted", True)
    if "slope" in case:
        mixing = Linear(case["slope"], vocab_size, first)
    elif "hint_share" in case:
        mixing = Fixed(case["hint_share"], first)
    return DecodeSettings(Sampling(**case["sampling"]), Stopping(**stopping), mixing)


def served(engine, requests):
    """Completions of a feed that has nothing every third time, and the last request only once all others have ended."""
    asked, left, done = itertools.count(1), list(requests), []

    def feed():
        if not left or next(asked) % 3 == 0 or (len(left) == 1 and len(done) < len(requests) - 1):
            return None
        return left.pop(0)

    while left:
        for completion in engine.serve(feed):
            done.append(completion)
            yield completion


def check_settings(model, new_engine):
    """A closed engine leaves modes and flags as they were, and one that another has replaced does not touch them."""
    from megatron.core.utils import get_model_config

    config, training = get_model_config(model), [module.training for module in model.modules()]
    config.apply_rope_fusion = True
    model.train()
    found = dict(vars(config))
    first, second = new_engine(), new_engine()
    first.close()
    assert not config.apply_rope_fusion and not any(module.training for module in model.modules())
    second.close()
    assert vars(config) == found and all(module.training for module in model.modules())
    config.apply_rope_fusion = False
    for module, before in zip(model.modules(), training, strict=True):
        module.training = before


def main() -> None:
    cases, out, *flags = sys.argv[1:]
    config = json.loads(Path(flags[flags.index("--hf-model") + 1], "config.json").read_text())
    common = f"--seq-length {POSITIONS} --no-load-optim --no-load-rng --tokenizer-type NullTokenizer"
    common += f" --vocab-size {config['vocab_size']}"
    flags = [*common.split(), *flags, "--data", cases, "--output", "-"]
    start.prepare_process("engine probe", expand(flags), force_cpu=not torch.cuda.is_available())
    from megatron_idft.inference.engine import DecodeEngine
    from megatron_idft.integration.offline import score as scoring_program

    args = scoring_program._parse()
    scorer = scoring_program._load_scorer(args)
    vocab_size = args.sft_loss_vocab_size
    told: list[str] = []
    new_engine = partial(
        DecodeEngine, scorer.model, vocab_size, max_positions=args.seq_length, max_rows=4, memory_bytes=1 << 28
    )
    engine = new_engine(tell=told.append)
    told.append(engine.describe())
    results = {name: run(engine, case, vocab_size) for name, case in json.loads(Path(cases).read_text()).items()}
    everywhere: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, results)
    assert all(other == results for other in everywhere), "ranks disagree"
    # The engine must leave the model as it was: scoring by the training's own forward pass still works.
    engine.close()
    check_settings(scorer.model[0], new_engine)
    scorer.score([np.arange(5), np.arange(9)])
    if torch.distributed.get_rank() == 0:
        Path(out).write_text(json.dumps([told, results]))


if __name__ == "__main__":
    main()
