"""The decode engine on real converted models, against transformers and a decoder without cache, batch or shards."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tiny_models
from tests.inference import reference_decoding as reference
from tests.launch import forked

PROBE = Path(__file__).with_name("engine_probe.py")
LAYOUTS = {
    "qwen2": ["", "--tensor-model-parallel-size 2", "--hybrid-layer-pattern *-*-*-*-"],
    "qwen3": ["--tensor-model-parallel-size 2"],  # 257 rows: the second shard is mostly padding
    "llama": [""],
    "mistral": [""],
    "llama-tied": [""],
    "qwen3_moe": [
        "--tensor-model-parallel-size 2 --expert-model-parallel-size 2 --expert-tensor-parallel-size 1",
        "",
    ],
}
CASES = [(name, layout) for name, layouts in LAYOUTS.items() for layout in layouts]
# Where the rows that are decoded together change too: for a dense model, and for experts, which rows share.
REGROUPED = [("qwen2", ""), ("qwen3_moe", LAYOUTS["qwen3_moe"][0])]
SLOPE = 0.6  # these models are unsure of everything: with the authors' 3, the hint share would be 0
STOP = 3


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="session")
def huggingface(folder):
    """name -> (model of transformers, its folder); logits of the next token in float64."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = (tiny_models.save(name, folder / name), folder / name)
        return made[name]

    return get


def next_logits(model):
    def logits(ids):
        with torch.no_grad():
            return model(torch.tensor([list(ids)])).logits[0, -1].double().numpy()

    return logits


def probe(folder, model_folder, layout, cases):
    return told_and_found(folder, model_folder, layout, cases)[1]


def told_and_found(folder, model_folder, layout, cases):
    """What the engine says to a person, and what it finds for each case."""
    ranks = 2 if "size 2" in layout else 1
    name = f"{model_folder.name}-{abs(hash((layout, json.dumps(cases))))}"
    (folder / f"{name}.json").write_text(json.dumps(cases))
    out = folder / f"{name}.out.json"
    words = ["--hf-model", model_folder, "--hf-cache", folder / "cache", "--tokenizer-model", model_folder]
    forked([PROBE, folder / f"{name}.json", out, *words, *layout.split()], nproc=ranks)
    return json.loads(out.read_text())


def pairs(vocab, count=7, seed=0):
    """Hinted prompts longer and shorter than the plain ones; a prompt of one token."""
    rng = np.random.default_rng(seed)
    lengths = [(5, 17), (8, 9), (3, 40), (1, 23), (30, 2), (2, 1), (12, 12)]
    return [
        {
            "id": f"r{i}",
            "prompt": rng.integers(0, vocab, lengths[i % 7][0]).tolist(),
            "hinted": rng.integers(0, vocab, lengths[i % 7][1]).tolist(),
        }
        for i in range(count)
    ]


def expected(logits, vocab, request, follow=(), **settings):
    defaults = {"max_tokens": 12, "stop_ids": [STOP]}
    return reference.decode(
        logits,
        request["prompt"],
        request.get("hinted"),
        lambda entropy: 1 - min(max(SLOPE * entropy / np.log(vocab), 0), 1),
        identity=request["id"],
        seed=request.get("seed", 0),
        follow=follow,
        **(defaults | settings),
    )


def assert_same(found, wanted):
    assert found["tokens"] == wanted.tokens
    for name in ("log_prob", "entropy", "hint_share"):
        np.testing.assert_allclose(found[name], getattr(wanted, name), atol=5e-5, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_greedy_pairs_equal_the_reference_and_plain_rows_transformers(folder, huggingface, name, layout):
    model, path = huggingface(name)
    vocab = model.config.vocab_size
    both = pairs(vocab)
    plain = [{"id": f"p{i}", "prompt": request["prompt"]} for i, request in enumerate(both)]
    common = {"sampling": {"temperature": 0}, "stopping": {"stop_ids": [STOP], "max_tokens": 12}}
    hinted = common | {"slope": SLOPE, "stopping": common["stopping"] | {"stop_on_first_token": False}}
    shuffled = random.Random(1).sample(both, len(both))
    cases = {
        "pairs": {"requests": both, "max_rows": 3, **hinted},
        "mixed with plain": {"requests": [r for two in zip(both, plain, strict=True) for r in two], **hinted},
        "plain": {"requests": plain, **common},
        "score": {"decode": False, "prompts": [r["prompt"] for r in both if len(r["prompt"]) > 1]},
    }
    if name != "qwen3_moe":
        cases["through the modules"] = cases["pairs"] | {"modules": True}
    groups = {"single": (both, 1), "all at once, other order": (shuffled, 7)} if (name, layout) in REGROUPED else {}
    for case, (requests, rows) in groups.items():
        cases[case] = {"requests": requests, "max_rows": rows, **hinted}
    found = probe(folder, path, layout, cases)
    logits = next_logits(model)
    ties = 0
    for request, got in zip(both, found["pairs"], strict=True):
        wanted = expected(logits, vocab, request, follow=got["tokens"])
        ties += len(wanted.near_ties)
        assert_same(got, wanted)
    print(f"{ties} near ties")
    shares = np.concatenate([got["hint_share"][1:] for got in found["pairs"]])
    assert ((shares > 0.1) & (shares < 0.9)).mean() > 0.8, "the streams are really mixed"
    assert ties <= 1  # 84 tokens; the reference follows at a tie, so many would prove nothing
    by_id = {request["id"]: got for request, got in zip(both, found["pairs"], strict=True)}
    for case, (requests, _) in groups.items():
        for request, got in zip(requests, found[case], strict=True):
            assert got["tokens"] == by_id[request["id"]]["tokens"], (case, request["id"])
    for got, other in zip(found["pairs"], found.get("through the modules", []), strict=False):
        assert got["tokens"] == other["tokens"]
        np.testing.assert_allclose(got["log_prob"], other["log_prob"], atol=5e-5)
    assert [got["tokens"] for got in found["mixed with plain"][::2]] == [g["tokens"] for g in found["pairs"]]
    assert [got["tokens"][1:] for got in found["mixed with plain"][1::2]] == [g["tokens"][1:] for g in found["plain"]]
    for request, got in zip(plain, found["plain"], strict=True):
        with torch.no_grad():
            ids = torch.tensor([request["prompt"]])
            whole = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=12,
                do_sample=False,
                eos_token_id=STOP,
                pad_token_id=STOP,
            )
        assert got["tokens"] == whole[0, ids.shape[1] :].tolist()
        assert set(got["hint_share"]) == {0.0} and got["hinted_entropy"] == [None] * len(got["tokens"])
    prompts = cases["score"]["prompts"]
    for prompt, got in zip(prompts, found["score"], strict=True):
        with torch.no_grad():
            log_probs = model(torch.tensor([prompt])).logits[0, :-1].double().log_softmax(-1)
        wanted_log_prob = log_probs.gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0]
        np.testing.assert_allclose(got["log_prob"], wanted_log_prob, atol=5e-5)
        np.testing.assert_allclose(got["entropy"], -(log_probs.exp() * log_probs).sum(-1), atol=5e-5)


@pytest.fixture(scope="module")
def small(folder, huggingface):
    model, path = huggingface("qwen2")
    return model, path, model.config.vocab_size


def test_sampling_stops_and_baselines(folder, small):
    """What one launch can show beside greedy decoding, each against the reference or a hand-made expectation."""
    model, path, vocab = small
    both, logits = pairs(vocab), next_logits(model)
    stopping = {"stop_ids": [STOP], "max_tokens": 12, "stop_on_first_token": False}
    paper = {"temperature": 0.3, "top_p": 0.95, "cut_before_temperature": True}
    usual = {"temperature": 0.7, "top_p": 0.8, "cut_before_temperature": False}
    everything = list(range(vocab))
    hot = {"temperature": 1.0}
    cases = {
        "paper": {"requests": both, "slope": SLOPE, "sampling": paper, "stopping": stopping},
        "usual": {"requests": both, "slope": SLOPE, "sampling": usual, "stopping": stopping},
        "top-k": {"requests": both, "slope": SLOPE, "sampling": {"temperature": 1.5, "top_k": 5}, "stopping": stopping},
        "whole": {"requests": both, "slope": SLOPE, "sampling": hot, "stopping": stopping},
        "hinted alone": {"requests": both, "hint_share": 1.0, "sampling": hot, "stopping": stopping},
        "plain alone": {
            "requests": both,
            "hint_share": 0.0,
            "first_token_hinted": False,
            "sampling": hot,
            "stopping": stopping,
        },
        "plain": {"requests": [r | {"hinted": None} for r in both], "sampling": hot, "stopping": stopping},
        "first may stop": {
            "requests": both,
            "slope": SLOPE,
            "sampling": hot,
            "stopping": stopping | {"stop_ids": everything, "stop_on_first_token": True},
        },
        "second stops": {
            "requests": both,
            "slope": SLOPE,
            "sampling": hot,
            "stopping": stopping | {"stop_ids": everything},
        },
        "context": {
            "requests": both,
            "slope": SLOPE,
            "sampling": hot,
            "stopping": stopping | {"stop_ids": [], "max_tokens": 1000},
        },
        "repetition": {
            "requests": both,
            "hint_share": 1.0,
            "sampling": {"temperature": 0},
            "stopping": {
                "stop_ids": [],
                "max_tokens": 60,
                "repetition": {"ngram": 1, "count": 2, "every": 10},
            },
        },
        "other seed": {
            "requests": [r | {"seed": 5} for r in both],
            "slope": SLOPE,
            "sampling": hot,
            "stopping": stopping,
        },
    }
    found = probe(folder, path, "", cases)
    shared = {"stop_ids": [STOP], "max_tokens": 12}
    for name in ("paper", "usual", "top-k", "whole"):
        settings = {"cut_before_temperature": False} | cases[name]["sampling"]
        ties = 0
        for request, got in zip(both, found[name], strict=True):
            wanted = expected(logits, vocab, request, follow=got["tokens"], **settings, **shared)
            ties += len(wanted.near_ties)
            assert_same(got, wanted)
        assert ties <= 1, name
    for request, got in zip(both, found["hinted alone"], strict=True):
        swapped = {"id": request["id"], "prompt": request["hinted"]}
        assert got["tokens"] == expected(logits, vocab, swapped, temperature=1.0, **shared).tokens
        assert set(got["hint_share"]) == {1.0}
    assert [g["tokens"] for g in found["plain alone"]] == [g["tokens"] for g in found["plain"]]
    assert [g["tokens"] for g in found["other seed"]] != [g["tokens"] for g in found["whole"]]
    assert all(len(g["tokens"]) == 1 and g["finish_reason"] == "eos" for g in found["first may stop"])
    assert all(len(g["tokens"]) == 2 and g["finish_reason"] == "eos" for g in found["second stops"])
    for request, got in zip(both, found["context"], strict=True):
        assert got["finish_reason"] == "context"
        assert len(got["tokens"]) == 96 - max(len(request["prompt"]), len(request["hinted"]))
    for got in found["repetition"]:
        repeats = [n for n in range(10, 61, 10) if len(set(got["tokens"][:n])) < n]
        assert (len(got["tokens"]), got["finish_reason"]) == ((repeats[0], "repetition") if repeats else (60, "length"))
    assert any(got["finish_reason"] == "repetition" for got in found["repetition"])


def test_after_the_splitter_the_plain_stream_runs_alone(folder, small):
    model, path, vocab = small
    both, logits = pairs(vocab, 14), next_logits(model)
    stopping = {"stop_ids": [STOP], "max_tokens": 16, "stop_on_first_token": False}
    case = {"requests": both, "slope": SLOPE, "sampling": {"temperature": 0}, "max_rows": 4}
    [free] = probe(folder, path, "", {"free": case | {"stopping": stopping}}).values()
    splitting = next(got["tokens"][5] for got in free if len(got["tokens"]) > 8)
    cases = {"split": case | {"stopping": stopping | {"splitter": f"<{splitting}>"}}}
    for layout in ("", "--tensor-model-parallel-size 2"):
        found = probe(folder, path, layout, cases)["split"]
        assert any(got["split_at"] for got in found)
        for request, got in zip(both, found, strict=True):
            wanted = expected(logits, vocab, request, follow=got["tokens"], max_tokens=16, split_after=[splitting])
            assert_same(got, wanted)
            at = got["tokens"].index(splitting) + 1 if splitting in got["tokens"] else None
            assert got["split_at"] == at
            assert [h is None for h in got["hinted_entropy"]] == [
                at is not None and i >= at for i in range(len(got["tokens"]))
            ]


def test_samples_follow_the_exact_mixed_distribution(folder, small):
    """Thousands of draws of one token from one mix of two streams: chi-square against the reference's distribution."""
    from scipy.stats import chisquare  # test_engine_gpu.py imports this module where there is no scipy

    model, path, vocab = small
    logits = next_logits(model)
    [request] = pairs(vocab, 1)
    count = 2000
    requests = [request | {"id": f"draw {i}"} for i in range(count)]
    other, plain = (reference.log_softmax(logits(request[name])) for name in ("hinted", "prompt"))
    share = 1 - min(SLOPE * reference.entropy(other) / np.log(vocab), 1) * 0.4  # well inside (0, 1)
    mixed = share * other + (1 - share) * plain
    cases, wanted = {}, {}
    for name, sampling in {
        "whole": {"temperature": 1.0},
        "paper": {"temperature": 0.3, "top_p": 0.95, "cut_before_temperature": True},
        "usual": {"temperature": 1.3, "top_p": 0.7, "cut_before_temperature": False},
        "top-k": {"temperature": 1.0, "top_k": 9},
    }.items():
        cases[name] = {
            "requests": requests,
            "hint_share": share,
            "first_token_hinted": False,
            "sampling": sampling,
            "stopping": {"stop_ids": [], "max_tokens": 1},
            "max_rows": 1000,
        }
        wanted[name] = reference.cut_and_temper(
            mixed,
            sampling["temperature"],
            sampling.get("top_p", 1.0),
            sampling.get("top_k", 0),
            sampling.get("cut_before_temperature", False),
        )
    found = probe(folder, path, "--tensor-model-parallel-size 2", cases)
    for name, probs in wanted.items():
        drawn = np.bincount([got["tokens"][0] for got in found[name]], minlength=vocab)
        assert drawn[probs == 0].sum() == 0, name
        rare = probs * count < 5
        observed = [*drawn[~rare], drawn[rare].sum()]
        frequencies = np.array([*probs[~rare], probs[rare].sum()]) * count
        if frequencies[-1] == 0:
            observed, frequencies = observed[:-1], frequencies[:-1]
        assert len(frequencies) > 3
        assert chisquare(observed, frequencies * (sum(observed) / frequencies.sum())).pvalue > 1e-3, name
    # The test can tell: the plain stream alone is another distribution.
    drawn = np.bincount([got["tokens"][0] for got in found["whole"]], minlength=vocab)
    assert chisquare(drawn, np.exp(plain) * count).pvalue < 1e-6


def test_repetition_counts_overlapping_ngrams_and_ends_at_the_count():
    from megatron_idft.inference.engine import _repeats
    from megatron_idft.inference.requests import Repetition

    tokens = [7, 8, 7, 8, 7, 1, 2, 7, 8, 7]  # 7 8 7 stands there three times
    assert _repeats(tokens, Repetition(3, 3, 1)) and not _repeats(tokens, Repetition(3, 4, 1))
    assert not _repeats(tokens, Repetition(11, 1, 1))
    # 256 and 1 share bytes, which are no n-gram.
    assert not _repeats([256, 1, 65536, 256], Repetition(1, 3, 1))


@pytest.mark.parametrize(
    ("layout", "remedy"),
    [
        ("--tensor-model-parallel-size 2 --sequence-parallel", "drop --sequence-parallel"),
        ("--pipeline-model-parallel-size 2", "drop the pipeline flags"),
    ],
)
def test_layouts_that_are_not_served_are_refused_with_the_remedy(folder, small, layout, remedy):
    _, path, _ = small
    with pytest.raises(AssertionError, match=remedy):
        probe(folder, path, layout, {})


def test_too_little_memory_for_one_response_is_an_error_and_less_than_for_all_changes_nothing(folder, small):
    _, path, vocab = small
    both = pairs(vocab)
    case = {
        "requests": both,
        "slope": SLOPE,
        "sampling": {"temperature": 0},
        "stopping": {"stop_ids": [STOP], "max_tokens": 12},
    }
    block = 8 * 4 * 2 * 2 * 16 * 4  # positions, layers, keys and values, heads, head size, bytes
    longest = 1 + 2 + 7  # blocks: nobody's, and those of the pair of 3 and 40 tokens and 12 more each
    [described, first, *more], found = told_and_found(
        folder,
        path,
        "",
        {
            "interrupted": case | {"interrupted": True, "max_rows": 2},
            "room for one": case | {"max_rows": 7, "memory_bytes": longest * block, "counted": True},
            "too little": case | {"memory_bytes": (longest - 1) * block, "refused": True},
            "no more": case
            | {"memory_bytes": (longest - 1) * block, "stopping": case["stopping"] | {"must_fit": 5, "max_tokens": 12}},
            "room for all": case | {"max_rows": 7, "counted": True},
        },
    )
    assert "use one at a time" in found["interrupted"]  # its keys and values were written over
    one, everyone = (found[f"room for {name}"]["answers"] for name in ("one", "all"))
    assert [got["tokens"] for got in one] == [got["tokens"] for got in everyone]
    assert found["room for one"]["counts"]["preempted"] > 0 == found["room for all"]["counts"]["preempted"]
    assert f"{block // 8:,} bytes per token in blocks of 128" in described
    blocks = 1 + 2 * 2 * 96 // 8
    assert f"{blocks * block / 2**20:.2f} MiB for keys and values" in first and f"{blocks} blocks of 8 posi" in first
    assert len(more) == 3, "a line for each change"
    assert "raise --kv-memory-gb" in found["too little"]
    cut = [got["tokens"] for got in found["no more"]]
    assert cut == [got["tokens"][: 5 if i == 2 else 12] for i, got in enumerate(everyone)]
    assert len(everyone[2]["tokens"]) > 5, "only the longest pair has less than it asks for"


@pytest.mark.parametrize("layout", ["", "--tensor-model-parallel-size 2"])
def test_rows_of_different_settings_from_a_feed_go_through_one_forward_pass(folder, small, layout):
    _, path, vocab = small
    both = pairs(vocab)
    stopping = {"stop_ids": [STOP], "max_tokens": 12, "stop_on_first_token": False}
    own = [
        {"slope": SLOPE, "sampling": {"temperature": 0.3, "top_p": 0.95, "cut_before_temperature": True}},
        {"slope": 2 * SLOPE, "sampling": {"temperature": 1.0}, "stopping": stopping | {"max_tokens": 5}},
        {"hint_share": 0.5, "sampling": {"temperature": 0}, "first_token_hinted": False},
        {"sampling": {"temperature": 1.3, "top_k": 7}},
    ]
    own = [{"stopping": stopping} | settings for settings in own]
    requests = [request | {"own": own[i % 4]} for i, request in enumerate(both)]
    requests = [r if i % 4 != 3 else r | {"hinted": None} for i, r in enumerate(requests)]
    cases = {"fed": {"requests": requests, "fed": True, "max_rows": 3, "sampling": {}, "stopping": stopping}}
    cases |= {r["id"]: {"requests": [{k: v for k, v in r.items() if k != "own"}], **r["own"]} for r in requests}
    found = probe(folder, path, layout, cases)
    for request, got in zip(requests, found["fed"], strict=True):
        [single] = found[request["id"]]
        assert got["tokens"] == single["tokens"] and got["finish_reason"] == single["finish_reason"]
        np.testing.assert_allclose(got["hint_share"], single["hint_share"], atol=1e-4)
    assert {got["finish_reason"] for got in found["fed"]} >= {"length"}
    assert len({len(got["tokens"]) for got in found["fed"]}) > 1


@pytest.mark.parametrize("layout", ["", "--tensor-model-parallel-size 2"])
def test_what_prompts_share_is_computed_once(folder, small, layout):
    """Samples of one prompt, instructions before each hint, a question that both streams begin with."""
    model, path, vocab = small
    rng = np.random.default_rng(3)
    question, instructions = rng.integers(0, vocab, 21).tolist(), rng.integers(0, vocab, 18).tolist()
    samples = [{"id": f"s{i}", "prompt": question} for i in range(4)]
    others = [rng.integers(0, vocab, 5 + i).tolist() for i in range(3)]
    hinted = [
        {"id": f"h{i}", "prompt": other, "hinted": instructions + other + question} for i, other in enumerate(others)
    ]
    hinted.append({"id": "both", "prompt": question, "hinted": question + others[0]})
    common = {"sampling": {"temperature": 1.0}, "slope": SLOPE, "counted": True, "max_rows": 8}
    stopping = {"stop_ids": [STOP], "max_tokens": 12, "stop_on_first_token": False}
    cases = {
        "together": common | {"requests": samples + hinted, "stopping": stopping},
        "one by one": common | {"requests": samples + hinted, "stopping": stopping, "max_rows": 1},
    }
    found = probe(folder, path, layout, cases)
    logits = next_logits(model)
    for name in cases:
        for request, got in zip(samples + hinted, found[name]["answers"], strict=True):
            sampling = {"temperature": 1.0, "cut_before_temperature": False}
            wanted = expected(logits, vocab, request, follow=got["tokens"], **sampling)
            assert not wanted.near_ties
            assert_same(got, wanted)
    counts = found["together"]["counts"]
    assert counts["prompt"] == 4 * 20 + sum(len(r["prompt"]) + len(r["hinted"]) - 2 for r in hinted)
    # Blocks of 8: of the question all 20, as its last part is copied; of the instructions 16.
    assert counts["found"] == 3 * 20 + 2 * 16 + 20 + 16
    # There are blocks for a single response then, and those of earlier ones give way.
    assert 3 * 20 + 2 * 16 < found["one by one"]["counts"]["found"] <= counts["found"]


def test_attention_that_plans_for_each_shape_is_left_out_unless_asked_for(folder, small):
    _, path, vocab = small
    both = pairs(vocab)
    decode = {
        "requests": both,
        "slope": SLOPE,
        "sampling": {"temperature": 0},
        "stopping": {"stop_ids": [STOP], "max_tokens": 12},
    }
    score = {"decode": False, "prompts": [r["prompt"] for r in both if len(r["prompt"]) > 1]}
    kinds = {"decode": decode, "score": score}
    cases = {f"{name} {on}": case | {"cudnn": on} for name, case in kinds.items() for on in (False, True)}
    found = probe(folder, path, "", cases)
    for name in kinds:
        without, allowed = found[f"{name} False"], found[f"{name} True"]
        assert without["default"] is False
        assert without["seen"] == [False] and without["after"], "only attention itself, and there always"
        assert allowed["seen"] == [True]
        assert without["found"] == allowed["found"]


def test_the_switch_of_cudnn_is_0_or_1(monkeypatch):
    from megatron_idft.inference.cache import cudnn_allowed

    for value, allowed in (("1", True), ("0", False)):
        monkeypatch.setenv("MEGATRON_IDFT_CUDNN_ATTENTION", value)
        assert cudnn_allowed() is allowed
    monkeypatch.setenv("MEGATRON_IDFT_CUDNN_ATTENTION", "yes")
    with pytest.raises(ValueError, match="set it to 1 or 0"):
        cudnn_allowed()


def test_prompts_that_cannot_be_continued_are_named(folder, small):
    _, path, vocab = small
    case = {
        "slope": SLOPE,
        "sampling": {"temperature": 0},
        "stopping": {"stop_ids": [STOP], "max_tokens": 12},
        "refused": True,
    }
    cases = {
        name: case | {"requests": [*pairs(vocab, 2), pairs(vocab, 1)[0] | change | {"id": "the one"}]}
        for name, change in {
            "no prompt": {"prompt": []},
            "a long prompt": {"prompt": list(range(96))},
            "a long hint": {"hinted": list(range(96))},
        }.items()
    }
    for name, message in probe(folder, path, "", cases).items():
        assert re.search("the one.*leave no room", message), (name, message)
