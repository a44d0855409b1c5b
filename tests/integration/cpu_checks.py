"""What the CPU shim promises, checked in a process of its own; run by test_cpu.py."""

import copy
import sys
import threading

import torch

from megatron_idft.errors import UserError
from megatron_idft.integration.platform import cpu

cpu.enable()
compiled = torch.compile
cpu.enable()
assert torch.compile is compiled, "a second enable() installed the shim again"

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec  # noqa: E402
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32, get_grad_norm_fp32  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.spec_utils import build_module  # noqa: E402
from megatron.core.transformer.torch_norm import WrappedTorchNorm  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402


def nobody_else_sees_a_gpu():
    assert not torch.cuda.is_available()
    assert torch.cuda.device_count() == 0
    assert not torch.accelerator.is_available()
    assert torch.zeros(1).type() == "torch.FloatTensor"
    assert not torch.zeros(1, device="cuda").is_cuda
    assert "transformer_engine" in sys.modules and sys.modules["transformer_engine"] is None


def devices_mean_the_cpu_in_every_thread():
    made = {}

    def make():
        made["tensors"] = [
            torch.zeros(2, device="cuda"),
            torch.tensor([1.0], device=torch.cuda.current_device()),
            torch.empty(2, device=torch.device("cuda:0")),
            torch.zeros_like(torch.ones(2), device="cuda"),
            torch.ones(2).new_zeros(2, device="cuda:0"),
            torch.ones(2).to("cuda", torch.bfloat16),
            torch.ones(2).to(device="cuda", non_blocking=True),
            torch.ones(2).cuda(non_blocking=True),
            torch.nn.Linear(2, 2, device="cuda").cuda().to("cuda").weight,
        ]

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert len(made["tensors"]) == 9 and {tensor.device.type for tensor in made["tensors"]} == {"cpu"}
    assert torch.zeros(2, device="meta").device.type == "meta"
    with torch.device("meta"):
        assert torch.zeros(2).device.type == "meta"


class Noise(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.rand(())


def a_data_loader_leaves_the_dropout_stream_alone():
    """Tensor-parallel rank 0 reads data and the others do not: their dropout masks must still agree."""
    model_parallel_cuda_manual_seed(5, tp_rank=0, ep_rank=0, etp_rank=0, force_reset_rng=True)
    before = torch.cuda.get_rng_state()
    drawn = []
    for workers in (0, 0, 1, 1):
        drawn += map(float, torch.utils.data.DataLoader(Noise(), num_workers=workers))
        assert torch.equal(torch.cuda.get_rng_state(), before)
    assert len(drawn) == len(set(drawn)) == 24, "the host's streams must go on"


def draw(tp_rank):
    model_parallel_cuda_manual_seed(5, tp_rank=tp_rank, ep_rank=0, etp_rank=0, force_reset_rng=True)
    tracker = tensor_parallel.get_cuda_rng_tracker()
    ones = torch.ones(64)
    replicated = torch.nn.functional.dropout(ones, 0.5)
    with tracker.fork():
        local = torch.nn.functional.dropout(ones, 0.5)
    return replicated, local, torch.nn.functional.dropout(ones, 0.5), tracker


def dropout_differs_over_tensor_parallel_ranks_where_it_must():
    zero, one = draw(0), draw(1)
    assert torch.equal(zero[0], one[0]) and torch.equal(zero[2], one[2]), "replicated activations"
    assert not torch.equal(zero[1], one[1]), "sharded activations"
    assert not torch.equal(zero[0], zero[2]), "the stream goes on"
    tracker = one[3]
    states = copy.deepcopy(tracker.get_states())
    with tracker.fork():
        expected = torch.rand(3)
    tracker.set_states(states)
    with tracker.fork():
        assert torch.equal(torch.rand(3), expected), "restored"
    try:
        torch.cuda.set_rng_state(torch.zeros(16, dtype=torch.uint8))
    except RuntimeError as error:
        assert "--no-load-rng" in str(error)
    else:
        raise AssertionError("a GPU's random state was taken")


def clipping_scales_to_the_norm():
    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 3.0)
    norm = get_grad_norm_fp32([parameter.grad for parameter in parameters])
    assert abs(norm - 45**0.5) < 1e-6
    clip_grad_by_total_norm_fp32(parameters, 1.0, norm)
    clipped = sum(float(parameter.grad.square().sum()) for parameter in parameters) ** 0.5
    assert abs(clipped - 1.0) < 1e-5, clipped


def norms_mark_their_parameters():
    for kind, count in (("LayerNorm", 2), ("RMSNorm", 1)):
        for sequence_parallel in (False, True):
            config = TransformerConfig(
                num_layers=1, hidden_size=8, num_attention_heads=1, normalization=kind, persist_layer_norm=False,
            )  # fmt: skip
            config.sequence_parallel = sequence_parallel
            norm = WrappedTorchNorm(config=config, hidden_size=8)
            assert [parameter.sequence_parallel for parameter in norm.parameters()] == [sequence_parallel] * count
            assert config.sequence_parallel is sequence_parallel
            assert torch.isfinite(norm(torch.randn(2, 8))).all()


def unserved_hybrid_layers_say_what_they_need():
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, use_cpu_initialization=True)
    for symbol, needs in (("M", "mamba-ssm"), ("G", "flash-linear-attention"), ("D", "Engine"), ("+", "Engine")):
        try:
            build_module(
                hybrid_stack_spec,
                config=config,
                layer_type_list=[symbol],
                pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
            )
        except UserError as error:
            assert f"'{symbol}'" in str(error) and needs in str(error) and "'*'" in str(error), error
        else:
            raise AssertionError(f"{symbol} was built")


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    nobody_else_sees_a_gpu()
    devices_mean_the_cpu_in_every_thread()
    a_data_loader_leaves_the_dropout_stream_alone()
    dropout_differs_over_tensor_parallel_ranks_where_it_must()
    clipping_scales_to_the_norm()
    norms_mark_their_parameters()
    unserved_hybrid_layers_say_what_they_need()
    print("all checks passed")
