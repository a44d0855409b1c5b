"""NCCL's all-reduces of tensor parallelism inside CUDA graphs, and the allocator they do not get on with.

NCCL registers the buffers of captured collectives. With expandable segments it then reads memory that has been
unmapped: illegal accesses, or a hang (megatron/core/transformer/cuda_graphs.py asserts the same; pytorch#158029).
NCCL_GRAPH_REGISTER=0 leaves them unregistered. It is read when the first communicator is made.
"""

import os

from megatron_idft.console import say
from megatron_idft.errors import GraphRegistrationError

_VARIABLE = "NCCL_GRAPH_REGISTER"
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch 2.9 renamed it and reads both


def leave_graphs_unregistered(program: str) -> None:
    """Set NCCL_GRAPH_REGISTER=0 in this process unless it is set, and say so on rank 0.

    Raises:
        GraphRegistrationError: it is set to another value and segments are expandable.
    """
    if _VARIABLE not in os.environ:
        os.environ[_VARIABLE] = "0"
        if os.environ.get("RANK", "0") == "0":
            say(f"{program}: added: {_VARIABLE}=0, for collectives in CUDA graphs")
    require_unregistered_graphs()


def require_unregistered_graphs() -> None:
    """Refuse an environment in which captured collectives are not safe.

    Raises:
        GraphRegistrationError: NCCL would register the graphs' memory, and segments are expandable.
    """
    expandable = [name for name in _ALLOCATOR if "expandable_segments:true" in os.environ.get(name, "").lower()]
    if expandable and os.environ.get(_VARIABLE) != "0":
        found = os.environ.get(_VARIABLE)
        raise GraphRegistrationError(
            f"{_VARIABLE} is {'not set' if found is None else found} and {expandable[0]} has expandable_segments:True:"
            " tensor-parallel collectives in CUDA graphs would read unmapped memory or hang. Export"
            f" {_VARIABLE}=0, or take expandable_segments out of {expandable[0]}"
        )
