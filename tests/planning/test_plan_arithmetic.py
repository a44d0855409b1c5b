"""The formulas by themselves, against published ones and against counting by hand."""

from dataclasses import replace

import pytest

from megatron_idft.errors import PlanError
from megatron_idft.planning.activations import kept_by
from megatron_idft.planning.head import head
from megatron_idft.planning.layouts import fitting_layouts
from megatron_idft.planning.memory import forward_passes, plan_memory, worst
from megatron_idft.planning.parameters import model_count, stage_count
from megatron_idft.planning.shape import Batch, Implementation, Layout, Model, Precision, Recompute, Training
from megatron_idft.planning.text import _duration
from megatron_idft.planning.throughput import Machine, checkpoint_bytes

S, B, H, HEADS = 2048, 2, 1024, 16
GPT = Model(
    layers=(("attention", "mlp"),) * 8,
    hidden=H, ffn=4 * H, heads=HEADS, groups=HEADS, head_dim=H // HEADS, vocab=32768, tied=True, gated=False,
    rms_norm=False, linear_bias=True, qkv_bias=False, qk_norm=False, rope=False, learned_positions=S,
    attention_dropout=0.1, hidden_dropout=0.1,
)  # fmt: skip
GPU = Machine("GPU", memory=80 * 2**30, peak=1e15, reserve=6 * 2**30)


def training(**changes) -> Training:
    return replace(Training(GPT, Layout(gpus=8), Batch(S, B, 64)), **changes)


@pytest.mark.parametrize("tensor", [1, 2, 8])
def test_a_transformer_engine_layer_keeps_34_sbh(tensor):
    """arXiv 2205.05198, table 2: with sequence parallelism, 34 s b h / t without the 5 a s^2 b that flash attention
    drops. Row statistics, which the paper leaves out, are below 1 %."""
    case = training(layout=Layout(gpus=8, tensor=tensor, sequence_parallel=tensor > 1))
    kept = kept_by(case, "attention").bytes + kept_by(case, "mlp").bytes
    assert kept == pytest.approx(34 * S * B * H / tensor, rel=0.01) and kept >= 34 * S * B * H / tensor


def test_fp8_halves_the_inputs_of_matrices():
    """Of 34 s b h: two norms' results 2 to 1 each, the second matrix's input 8 to 4; the first of attention's result
    stays in 16 bits, and the matrix behind it keeps a copy in 8. 2 bytes more of a layer's parameters."""
    fp8 = Precision(matrix_input=1, weight_copies=2)
    bf16, case = training(), training(precision=fp8)
    kept = [sum(kept_by(each, sublayer).bytes for sublayer in ("attention", "mlp")) for each in (bf16, case)]
    assert kept[0] - kept[1] == (1 + 1 + 4 - 1) * S * B * H
    weights = [plan_memory(each)[0].items["weights"] for each in (bf16, case)]
    assert weights[1] - weights[0] == 2 * 8 * (12 * H * H + 13 * H)
    assert head(bf16) == head(case), "the output layer is no matrix of Transformer Engine's"


def test_local_attention_keeps_scores_and_recompute_drops_them():
    local = Implementation(transformer_engine=False, fused_rope=False)
    case = training(implementation=local)
    flash = kept_by(training(), "attention").bytes
    scores = B * HEADS * S * S
    # 16-bit probabilities before and after dropout, one byte of mask: the paper's 5 a s^2 b. And the causal mask.
    assert kept_by(case, "attention").bytes - flash == pytest.approx(5 * scores + S * S, rel=0.02)
    recomputed = replace(case, recompute=Recompute("selective", modules=frozenset({"core_attn"})))
    assert kept_by(recomputed, "attention").bytes < 1.05 * flash
    assert kept_by(recomputed, "attention").extra > 4 * 2 * scores


def test_each_loss_makes_the_copies_that_it_says():
    logits = S * B * GPT.vocab
    small = S * B * 4 * H  # labels, statistics, the gradient of the hidden states

    def worst_logits(loss, weight):
        case = training(implementation=Implementation(loss=loss), precision=Precision(weight=weight))
        return head(case).logits

    assert worst_logits("triton", 2) == pytest.approx(2 * logits, abs=small)
    # --output-logit-dtype fp32: twice the bytes, and bf16 once more when the gradient goes back.
    wide = head(training(implementation=Implementation(loss="triton"), precision=Precision(logits=4)))
    assert wide.logits == pytest.approx(4 * logits, abs=small)
    assert wide.after == pytest.approx(6 * logits, abs=small)
    assert worst_logits("megatron", 2) == pytest.approx(6 * logits, abs=small)
    assert worst_logits("megatron", 4) == pytest.approx(4 * logits, abs=small)
    assert worst_logits("reference", 2) == pytest.approx(2 * logits + 2 * 2**26, abs=small)


def test_micro_batches_in_flight():
    """1F1B: as many as stages are still to come. Interleaved, 4 stages of 2 chunks: 2 (p - r - 1) + (v - 1) p + 1."""
    plain = training(layout=Layout(gpus=8, pipeline=4))
    assert [len(forward_passes(plain, stage)) for stage in range(4)] == [4, 3, 2, 1]
    interleaved = training(layout=Layout(gpus=8, pipeline=4, virtual=2))
    assert forward_passes(interleaved, 0) == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0]
    assert [len(forward_passes(interleaved, stage)) for stage in range(4)] == [11, 9, 7, 5]
    few = training(layout=Layout(gpus=8, pipeline=4), batch=Batch(S, 2, 8))
    assert [len(forward_passes(few, stage)) for stage in range(4)] == [2, 2, 2, 1]


def test_states_are_18_bytes_and_the_distributed_optimizer_divides_12_of_them():
    parameters = model_count(GPT)
    embedding, layer = GPT.vocab * H, 12 * H * H + 13 * H
    assert parameters == embedding + S * H + 8 * layer + 2 * H
    plain, divided = training(), training(layout=Layout(gpus=8, distributed_optimizer=True))
    for case, each in ((plain, 18), (divided, 6 + 12 / 8)):
        items = plan_memory(case)[0].items
        states = items["weights"] + items["gradients"] + items["optimizer"]
        assert states == pytest.approx(each * parameters, rel=1e-9)
    assert checkpoint_bytes(plain) == (2 * parameters, 14 * parameters)


def test_experts_are_divided_by_their_own_sizes():
    experts = replace(
        GPT, layers=(("attention", "moe"),) * 8, experts=16, experts_per_token=2, expert_ffn=512, linear_bias=False
    )
    layout = Layout(gpus=8, tensor=2, expert=4, expert_tensor=1, sequence_parallel=True, distributed_optimizer=True)
    count = stage_count(experts, layout, 0)
    assert count.expert == 8 * 16 * 2 * H * 512 // 4 and layout.data == 4 and layout.expert_data == 2
    items = plan_memory(training(model=experts, layout=layout))[0].items
    assert items["optimizer"] == 12 * count.dense // 4 + 12 * count.expert // 2


def test_uneven_pipelines_and_chunks_cut_the_layers_as_megatron_does():
    layers = tuple((name,) for name in ("attention", "mlp") * 8)

    def sizes(**changes):
        return [[len(chunk) for chunk in stage] for stage in Layout(gpus=8, **changes).chunks(layers)]

    assert sizes(pipeline=4) == [[4], [4], [4], [4]]
    assert sizes(pipeline=4, first_stage_layers=2, last_stage_layers=4) == [[2], [5], [5], [4]]
    assert sizes(pipeline=2, virtual=2) == [[4, 4], [4, 4]]
    assert sizes(pipeline=2, pieces=(10, 6)) == [[10], [6]]
    assert sizes(pipeline=3, embedding_counts=True, loss_counts=True) == [[5], [6], [5]]
    cut = Layout(gpus=8, pipeline=2, virtual=2).chunks(tuple((str(number),) for number in range(8)))
    assert [[layer for (layer,) in chunk] for chunk in cut[1]] == [["2", "3"], ["6", "7"]]
    with pytest.raises(PlanError, match="--pipeline-model-parallel-size"):
        sizes(pipeline=3)


def test_recompute_and_parallelism_only_ever_take_memory_away():
    base = worst(plan_memory(training(layout=Layout(gpus=8, distributed_optimizer=True)))).bytes
    full = Recompute("full", "uniform", 1)
    for changes in (
        {"recompute": full},
        {"recompute": Recompute("full", "block", 4)},
        {"layout": Layout(gpus=8, tensor=2, sequence_parallel=True, distributed_optimizer=True)},
        {"layout": Layout(gpus=8, context=2, distributed_optimizer=True)},
        {"batch": Batch(S, 1, 64)},
    ):
        case = replace(training(layout=Layout(gpus=8, distributed_optimizer=True)), **changes)
        assert worst(plan_memory(case)).bytes < base, changes


def test_layouts_fit_follow_the_rule_and_are_none_where_nothing_fits():
    case = training(layout=Layout(gpus=8))
    roomy = fitting_layouts(case, GPU, 10)
    assert roomy[0].training.layout.tensor == roomy[0].training.layout.pipeline == 1
    assert roomy[0].training.recompute == Recompute()
    need = worst(plan_memory(roomy[0].training)).bytes
    assert roomy[0].bytes == need
    tight = fitting_layouts(case, replace(GPU, memory=GPU.reserve + 0.4 * need), 10)
    assert tight and all(each.bytes <= 0.4 * need for each in tight) and tight[0].training != roomy[0].training
    assert fitting_layouts(case, replace(GPU, memory=GPU.reserve + 2**20), 10) == []


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"layout": Layout(gpus=6, tensor=4)}, "--gpus"),
        ({"batch": Batch(S, 2, 63)}, "multiple of 16"),
        ({"layout": Layout(gpus=8, context=8), "batch": Batch(2040, 1, 64)}, "multiple of 16"),
        ({"layout": Layout(gpus=8, pipeline=4, virtual=2), "batch": Batch(S, 1, 4)}, "virtual stages"),
        ({"model": replace(GPT, heads=12, groups=12), "layout": Layout(gpus=8, tensor=8)}, "attention heads"),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(changes, remedy):
    with pytest.raises(PlanError, match=remedy):
        plan_memory(training(**changes))


def test_a_layout_that_is_nearly_full_comes_after_roomier_ones():
    case = training()
    (alone, *_) = fitting_layouts(case, replace(GPU, memory=GPU.reserve + 2**60), 1)
    tight = fitting_layouts(case, replace(GPU, memory=GPU.reserve + alone.bytes / 0.97), 10)
    marked = [each.is_full for each in tight]
    assert marked == sorted(marked) and not marked[0] and all(each.is_full == (each.share > 0.9) for each in tight)
    first = tight[0].training
    assert (
        (first.layout.tensor, first.layout.pipeline) != (1, 1)
        or first.recompute.granularity != "none"
        or (first.batch.micro < alone.training.batch.micro)
    )


def test_a_small_model_is_not_cut():
    found = fitting_layouts(training(), replace(GPU, memory=GPU.reserve + 2**50), 20)
    assert found and all(each.training.layout.pipeline * each.training.layout.context == 1 for each in found)


@pytest.mark.parametrize(
    ("days", "text"), [(3.25, "3.2 days"), (0.5, "12.0 hours"), (0.002, "2.9 minutes"), (1e-4, "9 seconds")]
)
def test_times_are_told_in_a_unit_that_says_something(days, text):
    assert _duration(days) == text
