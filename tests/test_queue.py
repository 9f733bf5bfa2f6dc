"""A queue of features against a plain list, and batch norm in parts against each part by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from methods.parts.norms import SplitBatchNorm, convert_split_batchnorm, convert_sync_batchnorm
from methods.parts.queue import FeatureQueue


@pytest.mark.parametrize("sizes", [[4] * 7, [3, 5, 1, 10, 2, 7], [10, 10], [25, 4, 13, 11]])
def test_rows_are_those_of_a_list_that_wraps(sizes: list[int]) -> None:
    """Batches that divide the ten rows, that do not, and that are longer."""
    torch.manual_seed(0)
    queue = FeatureQueue(10, 3).double()
    assert torch.allclose(queue.rows.norm(dim=1), torch.ones(10).double(), atol=1e-6)
    want, born, written = list(queue.rows.clone()), [-1] * 10, 0
    for push, size in enumerate(sizes):
        batch = torch.randn(size, 3, dtype=torch.float64) * 5
        places = queue.push(batch)
        for row in batch:
            want[written % 10], born[written % 10] = row / row.norm(), push
            written += 1
        torch.testing.assert_close(queue.rows, torch.stack(want), rtol=1e-14, atol=1e-14)
        assert int(queue.pointer) == written % 10 and int(queue.filled) == min(10, written)
        assert places.tolist() == [(written - min(size, 10) + i) % 10 for i in range(min(size, 10))]
        ages = [push + 1 - b for b in born if b >= 0]
        assert float(queue.age) == pytest.approx(sum(ages) / len(ages))
        assert float(queue.fill) == pytest.approx(min(10, written) / 10) and bool(queue.full) == (written >= 10)


def test_a_push_writes_in_place_and_goes_on_after_a_restart() -> None:
    queue = FeatureQueue(6, 4)
    address, before = queue.rows.data_ptr(), queue.rows.clone()
    queue.push(torch.randn(4, 4, dtype=torch.float16))
    assert queue.rows.data_ptr() == address and queue.rows.dtype == torch.float32
    assert torch.equal(queue.rows[4:], before[4:])  # nothing else moves
    again = FeatureQueue(6, 4)
    again.load_state_dict(queue.state_dict())
    for one in (queue, again):
        one.push(torch.ones(4, 4))
    assert all(torch.equal(a, b) for a, b in zip(queue.state_dict().values(), again.state_dict().values(), strict=True))
    assert float(FeatureQueue(3, 2).age) == 0


@pytest.mark.parametrize(("groups", "rows"), [(4, 8), (3, 10), (1, 6), (8, 4)])
def test_grouped_norm_is_each_part_by_hand(groups: int, rows: int) -> None:
    """Uneven parts too; of so few rows that a part would hold one alone, there are fewer parts."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(5)).double()
    nn.init.normal_(net[0].weight)
    plain = copy.deepcopy(net[0])
    net = convert_split_batchnorm(net, groups)
    assert isinstance(net[0], SplitBatchNorm) and list(net.state_dict()) == ["0." + name for name in plain.state_dict()]
    x = torch.randn(rows, 5, 3, 3, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = x.detach().clone().requires_grad_()
    out = net(x)
    parts = y.tensor_split(min(groups, rows // 2))
    means, variances = torch.stack([p.mean((0, 2, 3)) for p in parts]), torch.stack([p.var((0, 2, 3)) for p in parts])
    scaled = [
        (p - p.mean((0, 2, 3), keepdim=True)) / (p.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt() * plain.weight.view(1, 5, 1, 1)
        for p in parts
    ]
    want = torch.cat(scaled)
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(net[0].running_mean, 0.1 * means.mean(0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(net[0].running_var, 0.9 + 0.1 * variances.mean(0), rtol=1e-10, atol=1e-12)
    assert int(net[0].num_batches_tracked) == 1
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (want * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-9)
    assert isinstance(convert_sync_batchnorm(net)[0], SplitBatchNorm)  # parts are wanted: they stay
