"""The moving average of a network, and the gather that carries gradients."""

from __future__ import annotations

import torch
from torch import nn

from methods.parts import ema


def test_parameters_are_averaged_and_statistics_are_not() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    average = ema.frozen_copy(network)
    assert not any(p.requires_grad for p in average.parameters()) and all(p.requires_grad for p in network.parameters())
    before = [p.clone() for p in average.parameters()]
    network(torch.randn(8, 3).double())
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p))
    ema.update(average, network, 0.9)
    for old, new, p in zip(before, average.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * p, rtol=1e-14, atol=1e-14)
    assert int(average[1].num_batches_tracked) == 0 and float(average[1].running_mean.abs().sum()) == 0
    ema.update(average, network, 1.0)
    torch.testing.assert_close(next(iter(average.parameters())), 0.9 * before[0] + 0.1 * network[0].weight)
