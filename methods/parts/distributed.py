"""Sums, maxima and gathers over workers. Every function is the identity without a process group."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def world_size() -> int:
    """Return the number of workers; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this worker; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_reduce_sum(value: Tensor) -> Tensor:
    """Return the sum over workers, without gradient; the argument is overwritten."""
    if world_size() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.SUM)
    return value


def all_reduce_max(value: Tensor) -> Tensor:
    """Return the maximum over workers, without gradient; the argument is overwritten."""
    if world_size() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def _renamed(name: str, before: str) -> Any:
    """Return a function of `torch.distributed` by its name since torch 2.14, or by the one before."""
    return getattr(dist, name, None) or getattr(dist, before)


def all_gather_rows(value: Tensor) -> Tensor:
    """Join `(B, ...)` of every worker in rank order to `(W * B, ...)`; no gradient. Every worker must bring B rows."""
    if world_size() == 1:
        return value
    value = value.contiguous()  # images may be channels_last; what is gathered then must not be
    joined = value.new_empty((world_size() * len(value), *value.shape[1:]))
    _renamed("all_gather_single", "all_gather_into_tensor")(joined, value)
    return joined


def all_gather_small(value: Tensor) -> Tensor:
    """Join `(C,)` of every worker to `(W, C)`, no gradient; by a sum, which for a few kB takes gloo less time than a gather."""
    rows = value.new_zeros(world_size(), len(value))
    rows[rank()] = value
    return all_reduce_sum(rows)


def gather_with_gradient(value: Tensor) -> Tensor:
    """Join `(B, ...)` of every worker in rank order to `(W * B, ...)`, with gradient. Every worker must bring B rows.

    Backward sums the gradients of all workers and takes the own rows. So a loss that is the mean over local anchors and
    all W * B columns, with the parameter gradients averaged over workers, has the gradient of one process on the joined
    batch, without a further factor.
    """
    return value if world_size() == 1 else _Gather.apply(value)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.rows = len(value)
        return all_gather_rows(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        own = gradient.new_empty((ctx.rows, *gradient.shape[1:]))
        _renamed("reduce_scatter_single", "reduce_scatter_tensor")(own, gradient, op=dist.ReduceOp.SUM)
        return own


def own_shard(value: Tensor) -> Tensor:
    """Return this worker's part of a parameter or gradient that FSDP has sharded, as a view; another tensor as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


def own_columns(value: Tensor) -> tuple[Tensor, int]:
    """Return this worker's columns `(N, D / W)` of `(N, D)`, and the position of its first. Shares differ by one column at most."""
    parts = value.tensor_split(world_size(), dim=1)
    return parts[rank()], sum(part.shape[1] for part in parts[: rank()])


def all_gather_objects(value: Any) -> list[Any]:
    """Return a small picklable value of every worker, in rank order. It is slow: not for every step."""
    if world_size() == 1:
        return [value]
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, value)
    return parts


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Average gradients over workers in one flat buffer in parameter order: the same bits in every run, unlike buckets."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if world_size() == 1 or not gradients:
        return
    flat = all_reduce_sum(torch.cat([g.flatten() for g in gradients])).div_(world_size())
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
