"""Our kernels compiled without a GPU, by the very calls that a GPU would see; what their code does.

A driver that only names the device stands in for CUDA, and every launch compiles its kernel and stops there. So the
logits can have their full size: nobody touches their memory. Triton's own wheel has the compiler and the disassembler.

Each kernel's main loop is found in the machine code as the first loop that reads global memory. What one lane reads and
writes in an iteration, over the elements that it covers there, is the bytes per element as the hardware will see them.
"""

import re
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.backends.nvidia
from emulated_group import emulated_groups
from implementations import ours
from measure import OutputLayer
from objectives import every_objective, top_k_bytes
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGET = 90  # the compute capability that gpu.sh's machines have
DISASSEMBLER = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"


class _OnlyATarget:
    """What Triton asks of a driver in order to compile.

    Args:
        capability: such as 90. Triton keeps a target for each device, so it is the device's number, too.
    """

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Launch(NamedTuple):
    kernel: str
    compiled: Any
    constants: dict[str, Any]


def compile_all(cases: list[Any], result: dict[str, Any]) -> bool:
    """Fill in result["cases"] and ["kernels"]. Whether a kernel spills."""
    from loss import takes_part

    launches = record_launches()
    compile_for(TARGET)
    groups = emulated_groups()
    kernels: dict[str, dict[str, Any]] = {}
    result["target"] = f"sm_{TARGET}"
    result["cases"] = []
    for case in cases:
        group = groups[case.tp]
        record = {**case._asdict(), "implementations": []}
        result["cases"].append(record)
        for one in ours() + every_objective():
            if not one.name.startswith("triton") or not takes_part(one, case):
                continue
            group.reset()
            group.set_empty_state(torch.tensor(one.empty_state))
            launches.clear()
            shape = (case.tokens, case.columns, case.torch_dtype.itemsize)
            beside = top_k_bytes(one.formula, partial(call_loss, one, case, group), *shape)
            if not beside:
                call_loss(one, case, group)
            for launch in launches:
                name = launch.compiled.hash
                if name not in kernels:
                    kernels[name] = read_kernel(launch, case.torch_dtype)
                kernels[name]["columns"] = sorted({*kernels[name]["columns"], case.columns})
            width = case.torch_dtype.itemsize
            entry = {
                "name": one.name,
                "formula": one.formula,
                **beside,
                "collectives": list(group.calls),
                "bytes_sent": round(group.bytes_sent),
            }
            entry["forward_bytes_per_element"] = one.forward_bytes(width, case.trained)
            if one.formula != "statistics":
                entry["backward_bytes_per_element"] = one.backward_bytes(width, case.trained)
            entry["kernels"] = [launch.compiled.hash[:12] for launch in launches]
            record["implementations"].append(entry)
    result["kernels"] = {name[:12]: kernel for name, kernel in kernels.items()}
    print_kernels(list(result["kernels"].values()))
    print_counts(result["cases"])
    return any(kernel["spilled_bytes"] for kernel in kernels.values())


def compile_for(capability: int) -> None:
    """From here on, launches compile for this compute capability."""
    driver.set_active(_OnlyATarget(capability))


def record_launches() -> list[Launch]:
    """From here on a launch compiles its kernel and ends; the list gets one entry for each."""
    from megatron_idft.loss import triton_backend

    triton_backend.INTERPRETED = True  # lets tensors on the CPU pass; nothing runs
    launches: list[Launch] = []
    launch = JITFunction.run

    def compile_instead(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = launch(self, *args, grid=grid, warmup=True, **options)
        launches.append(Launch(self.__name__, compiled, options))
        return compiled

    JITFunction.run = compile_instead
    return launches


def call_loss(one: Any, case: Any, group: Any) -> None:
    """Forward and backward of an implementation, on logits that nobody touches."""
    batch = 4 if case.tokens % 4 == 0 else 1
    shape = (case.tokens // batch, batch)
    group_or_none = group if case.tp > 1 else None
    labels = torch.zeros(shape, dtype=torch.int64)
    logits = torch.empty(*shape, case.columns, dtype=case.torch_dtype)
    if one.formula == "statistics":
        one.run(logits, labels, group_or_none)
        return
    intermediate = OutputLayer.apply(torch.zeros((), requires_grad=True), logits.detach)
    values = one.run(intermediate, labels, group_or_none)
    torch.autograd.grad(values, intermediate, torch.ones(shape))


def call_fused_head(tokens: int, columns: int, dtype: torch.dtype) -> None:
    """A block of the fused output head: logits in fp32, their gradient in the dtype of the hidden states."""
    from megatron_idft import idft
    from megatron_idft.loss import triton_backend
    from megatron_idft.loss.shard import vocab_shard

    shard, vocab_size = vocab_shard(columns, None, None)
    logits, labels = torch.empty(tokens, columns), torch.zeros(tokens, dtype=torch.int64)
    states = triton_backend.shard_state(logits, labels, shard, vocab_size, frozenset()).unsqueeze(0)
    results = triton_backend.token_results(states, labels, idft(), vocab_size, True)
    gradient = torch.empty(tokens, columns, dtype=dtype)
    triton_backend.write_gradient(logits, gradient, labels, torch.ones(tokens), results, shard, vocab_size)


def call_paged_attention(heads: int, kv_heads: int, d: int, dtype: torch.dtype) -> None:
    """A step of decoding, in the blocks that the engine has on a GPU without flash-attn."""
    from megatron_idft.inference.cache import _POSITIONS_GPU
    from megatron_idft.inference.paged_attention import paged_attention

    rows, places = 64, 64
    keys, values = torch.empty(2, rows * places, _POSITIONS_GPU, kv_heads, d, dtype=dtype)
    tables, lengths = torch.zeros(rows, places, dtype=torch.int32), torch.zeros(rows, dtype=torch.int64)
    paged_attention(torch.empty(rows, heads, d, dtype=dtype), keys, values, tables, lengths, 0.1)


def read_kernel(launch: Launch, dtype: torch.dtype) -> dict[str, Any]:
    """Resources, and what the main loop does per element."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(launch.compiled.asm["cubin"])
        resources, code = (
            subprocess.run([DISASSEMBLER, flag, cubin], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", resources)}
    instructions = _instructions(code)
    warps = launch.compiled.metadata.num_warps
    constants = {name: value for name, value in launch.constants.items() if name.isupper()}
    constants = {name: list(value) if isinstance(value, tuple) else value for name, value in constants.items()}
    kernel: dict[str, Any] = {
        "kernel": launch.kernel,
        "dtype": str(dtype).removeprefix("torch."),
        "columns": [],
        "constants": constants,
        "warps": warps,
        "registers": used["REG"],
        "spilled_bytes": used["STACK"] + used["LOCAL"],
        "shared_bytes": launch.compiled.metadata.shared,
        "loads_of_16_bytes": sum(name.startswith("LDG") and ".128" in name for _, name, _ in instructions),
        "stores_of_16_bytes": sum(name.startswith("STG") and ".128" in name for _, name, _ in instructions),
        "widest_load": max((_width(name) for _, name, _ in instructions if name.startswith("LDG")), default=0),
        "widest_store": max((_width(name) for _, name, _ in instructions if name.startswith("STG")), default=0),
    }
    elements = _elements_per_lane(constants, warps)
    loop = _main_loop(instructions)
    if elements and loop:
        kernel["main_loop"] = {
            "elements_per_lane": elements,
            "instructions_per_element": round(len(loop) / elements, 2),
            "exponentials_per_element": round(sum(name.startswith("MUFU.EX2") for name in loop) / elements, 2),
            "exchanges_between_lanes": sum(name.startswith(("SHFL", "BAR")) for name in loop),
            "bytes_read_per_element": sum(_width(name) for name in loop if name.startswith("LDG")) / elements,
            "bytes_written_per_element": sum(_width(name) for name in loop if name.startswith("STG")) / elements,
        }
    return kernel


def _instructions(code: str) -> list[tuple[int, str, str]]:
    """(address, name, operands) of each instruction."""
    pattern = r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);"
    return [(int(address, 16), name, rest) for address, name, rest in re.findall(pattern, code)]


def _main_loop(instructions: list[tuple[int, str, str]]) -> list[str]:
    """Instruction names between the target of a backward branch and the branch, for the first with a global load."""
    for address, name, rest in instructions:
        target = re.search(r"0x([0-9a-f]+)\s*$", rest) if name == "BRA" else None
        if target is None or int(target[1], 16) >= address:
            continue
        loop = [other for position, other, _ in instructions if int(target[1], 16) <= position <= address]
        if any(other.startswith("LDG") for other in loop):
            return loop
    return []


def _elements_per_lane(constants: dict[str, Any], warps: int) -> int:
    if "VECTORS" in constants:
        return constants["VECTORS"] * constants["VECTOR"]
    return constants["BLOCK"] // (32 * warps) if "BLOCK" in constants else 0


def _width(name: str) -> int:
    """Bytes that one lane moves."""
    for suffix, width in ((".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".16", 2), (".U8", 1), (".S8", 1)):
        if suffix in name:
            return width
    return 4


def print_kernels(kernels: list[dict[str, Any]]) -> None:
    print(f"\nCompiled for sm_{TARGET}. Of main loops: figures per element, and exchanges between lanes per block")
    print(
        f"  {'kernel':22}{'dtype':10}{'warps':>6}{'registers':>10}{'spilled':>8}{'shared':>7}{'16 B loads':>11}"
        f"{'16 B stores':>12}{'B read':>7}{'written':>8}{'instr.':>7}{'exp':>5}{'lanes':>6}  columns"
    )
    for kernel in kernels:
        loop = kernel.get("main_loop")
        figures = f"{'':33}"
        if loop:
            figures = (
                f"{loop['bytes_read_per_element']:7g}{loop['bytes_written_per_element']:8g}"
                f"{loop['instructions_per_element']:7.1f}{loop['exponentials_per_element']:5.2f}"
                f"{loop['exchanges_between_lanes']:6}"
            )
        print(
            f"  {kernel['kernel']:22}{kernel['dtype']:10}{kernel['warps']:6}{kernel['registers']:10}"
            f"{kernel['spilled_bytes']:8}{kernel['shared_bytes']:7}{kernel['loads_of_16_bytes']:11}"
            f"{kernel['stores_of_16_bytes']:12}{figures}  {', '.join(map(str, kernel['columns']))}"
        )


def print_counts(cases: list[dict[str, Any]]) -> None:
    print("\nCounted per case: bytes per element in forward and backward, collectives, KiB that a rank sends")
    for case in cases:
        variants: dict[str, list[str]] = {}
        for one in case["implementations"]:
            backward = one.get("backward_bytes_per_element")
            figures = (
                f"{one['forward_bytes_per_element']:6.3g}{'' if backward is None else f'{backward:.3g}':>6}"
                f"{', '.join(one['collectives']) or 'none':>12}{one['bytes_sent'] / 1024:8.0f}"
            )
            variants.setdefault(figures, []).append(one["name"])
        for one in case["implementations"]:
            if "token_bytes" in one:
                beside, ratio = one["token_bytes"], one["token_bytes_over_idft"]
                print(f"  {one['name']}: {beside:,.0f} bytes a token beside, {ratio:.3f} times IDFT's in all")
        for figures, names in variants.items():
            print(f"  {case['name']:38}{figures}   {'; '.join(names)}")
