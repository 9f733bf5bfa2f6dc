"""DINO's head against the original, and what it does with lengths and types."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods.parts.dino_head import DINOHead
from tests.parity.common import SINGLE
from tests.parity.dino_cases import dino, images, progress

HEAD_NAMES = {
    "prototypes.lengths": "last_layer.weight_g",
    "prototypes.directions": "last_layer.weight_v",
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, {"rtol": 1e-6, "atol": 1e-9}), (torch.float32, SINGLE)])
@pytest.mark.parametrize("kind", ["fixed", "free"])
def test_head_equals_the_original(golden, kind: str, dtype: torch.dtype, tolerance: dict) -> None:
    values = {name.removeprefix(f"{kind}_"): torch.from_numpy(v) for name, v in golden("dino_head").items() if name.startswith(kind)}
    head = DINOHead(8, 10, hidden_features=16, bottleneck=6, unit_prototypes=kind == "fixed").to(dtype)
    names = {name: HEAD_NAMES.get(name, name) for name, _ in head.named_parameters()}
    with torch.no_grad():
        for name, p in head.named_parameters():
            p.copy_(values[f"param.{names[name]}"])
    x = values["x"].to(dtype).requires_grad_()
    y = head(x)
    (y * values["out_weight"].to(dtype)).sum().backward()
    np.testing.assert_allclose(y.detach().numpy(), values["y"].numpy(), **tolerance)
    np.testing.assert_allclose(x.grad.numpy(), values["grad_x"].numpy(), **tolerance)
    assert {names[n] for n, p in head.named_parameters() if p.grad is not None} == {n[5:] for n in values if n.startswith("grad.")}
    for name, p in head.named_parameters():
        if p.grad is not None:
            np.testing.assert_allclose(p.grad.numpy(), values[f"grad.{names[name]}"].numpy(), **tolerance)


def test_head_begins_as_the_original_does() -> None:
    """MLP weights near 0.02 and never beyond two units, zero biases, g = 1, directions as torch draws a Linear."""
    torch.manual_seed(0)
    head = DINOHead(64, 100, hidden_features=256, bottleneck=32)
    weights = [m.weight for m in head.mlp if isinstance(m, nn.Linear)]
    assert [tuple(w.shape) for w in weights] == [(256, 64), (256, 256), (32, 256)]
    assert all(0.018 < float(w.detach().std()) < 0.022 for w in weights)
    assert not any(m.bias.any() for m in head.mlp if isinstance(m, nn.Linear))
    assert torch.equal(head.prototypes.lengths, torch.ones(100, 1)) and not head.prototypes.lengths.requires_grad
    bound = 1 / math.sqrt(32)
    assert 0.9 * bound < float(head.prototypes.directions.detach().abs().max()) <= bound
    assert DINOHead(8, 10, unit_prototypes=False).prototypes.lengths.requires_grad
    with_norm = DINOHead(8, 10, hidden_features=16, batch_norm=True).mlp
    assert [type(m).__name__ for m in with_norm] == ["Linear", "BatchNorm1d", "GELU"] * 2 + ["Linear"]


def test_scores_of_unit_prototypes_are_cosines_whatever_their_length() -> None:
    head = DINOHead(8, 10, hidden_features=16, bottleneck=6).double()
    x = torch.randn(40, 8, dtype=torch.float64)
    scores = head(x)
    assert float(scores.detach().abs().max()) <= 1 + 1e-12
    with torch.no_grad():
        head.prototypes.directions.mul_(torch.rand(10, 1) * 9 + 0.1)
    torch.testing.assert_close(head(x), scores, rtol=0, atol=1e-12)


def test_prototypes_and_loss_are_computed_in_float32_under_autocast() -> None:
    method, views = dino().float(), images(0)
    views.stacks = {name: stack.float() for name, stack in views.stacks.items()}
    z = method.head.mlp(method.backbone(views.stacks["global"]).detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = method(views, progress())
        scores = method.head(method.backbone(views.stacks["global"]))
    assert scores.dtype == out.loss.dtype == torch.float32 and out.outputs["mean"].dtype == torch.float32
    exact = F.normalize(z) @ F.normalize(method.head.prototypes.directions).T
    assert 0 < float((scores - exact).detach().abs().max()) < 0.05  # the MLP is in bf16
    out.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in method.parameters() if p.requires_grad)
