"""FSDP2: each worker holds its share of the weights, gradients, optimizer state and teacher; a step gathers what it needs.

The attention and the MLP of every transformer block, of student, teacher and decoder, are units: gathered for their own forward and
backward pass, and let go of. The rest (embeddings, norms, heads, prototypes) is one unit, whole for the length of a step. Buffers
are whole on every worker, as with DDP. Checkpoints hold whole tensors, so they fit any number of workers and either strategy.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from methods.parts.contract import Method
from methods.parts.distributed import rank, world_size
from methods.parts.vit import attentions_and_mlps
from pipeline.checkpoint import State, map_tensors


class Sharding:
    """Divides a method's parameters among the workers, in place, and gives whole ones where they are needed.

    All workers call every function together. An optimizer is built afterwards, because the parameters are new objects.

    Args:
        method: on the CPU; it moves to the device unit by unit, so that it is never whole there.
        precision: of autocast. In bf16 the weights of attentions and MLPs are gathered in bf16: autocast would keep a copy of all of
            them until the backward pass. Gradients are summed in float32.
    """

    def __init__(self, method: Method, device: torch.device, precision: torch.dtype) -> None:
        self.method = method.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # FSDP takes no other
        self.empty = copy.deepcopy(method).to("meta") if rank() == 0 else None  # a sharded module cannot be copied
        # no operation of a block changes its attention's or MLP's output in place
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
        mesh = init_device_mesh(device.type, (world_size(),))
        policy = MixedPrecisionPolicy(
            param_dtype=None if precision is torch.float32 else precision, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for part in attentions_and_mlps(method):
            fully_shard(part, mesh=mesh, mp_policy=policy)
        fully_shard(method, mesh=mesh)

    @torch.no_grad()
    def whole_method(self) -> Method | None:
        """Return a copy of the method that rank 0 can call alone, on its device, until the next step; None on other ranks.

        A call of the sharded method waits for all workers. The memory of the copy is free when the caller lets go of it.
        """
        state = {name: whole for name, value in self.method.state_dict().items() if (whole := gathered(value)) is not None}
        if self.empty is None:
            return None
        plain = copy.deepcopy(self.empty)
        plain.load_state_dict(state, assign=True)
        return plain

    @torch.no_grad()
    def whole_state(self, state: State) -> State:
        """Return a state with whole tensors, on the CPU of rank 0; other ranks have None in their places."""

        def on_cpu(value: Tensor) -> Tensor | None:
            whole = gathered(value)
            return None if whole is None else whole.to("cpu", copy=True)

        return map_tensors(on_cpu, state)

    @torch.no_grad()
    def own_state(self, state: State, optimizer: Optimizer) -> State:
        """Return a whole state with this worker's shares of the tensors that are sharded here."""
        method = self.method.state_dict()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        moments = {
            i: {key: share(value, parameters[i]) for key, value in entry.items()}
            for i, entry in state["optimizer"]["state"].items()
        }
        return state | {
            "method": {name: share(value, method.get(name)) for name, value in state["method"].items()},
            "optimizer": state["optimizer"] | {"state": moments},
        }


def gathered(value: Tensor) -> Tensor | None:
    """Return the whole of a tensor on rank 0, in a collective call if it is sharded; None on other ranks."""
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    return whole.detach() if rank() == 0 else None


def share(whole: Any, like: Tensor | None) -> Any:
    """Return a tensor sharded like a parameter; every worker takes its rows from its own copy of the whole. Numbers stay whole."""
    if not isinstance(like, DTensor) or not isinstance(whole, Tensor) or whole.ndim == 0:
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
