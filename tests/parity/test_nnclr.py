"""NNCLR against reference values, worked values, and a literal float64 transcription over steps with the support set."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from methods.nnclr import NNCLR, NNCLRConfig
from methods.parts.contract import RunFacts
from methods.parts.distributed import all_gather_rows, average_gradients
from methods.parts.norms import average_statistics, convert_sync_batchnorm
from tests.parity.common import EXACT, SINGLE, Same, in_processes, progress, two_views


def nnclr(features: int, dim: int, batch: int, rows: int, **settings: Any) -> NNCLR:
    torch.manual_seed(0)
    config = NNCLRConfig(**{"projection_dim": dim, "support_set_size": rows, "projector_hidden": 8, "predictor_hidden": 8, **settings})
    return NNCLR(config, Same(features), RunFacts(global_batch_size=batch, steps_per_epoch=10, total_steps=100)).double()


class FirstHalf(nn.Module):
    """A projector that hands on z of rows [z, p] and keeps p for the predictor, first in, first out."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        z, p = x.chunk(2, dim=1)
        self.kept.append(p)
        return z


class Kept(nn.Module):
    """A predictor that gives what the projector kept."""

    def __init__(self, projector: FirstHalf) -> None:
        super().__init__()
        self.kept = projector.kept

    def forward(self, z: Tensor) -> Tensor:
        return self.kept.pop(0)


def given(dim: int, batch: int, queue: np.ndarray, **settings: Any) -> NNCLR:
    """A method whose projections and predictions are the two halves of its input, with a given support set."""
    method = nnclr(2 * dim, dim, batch, len(queue), **settings)
    method.projector = FirstHalf()
    method.predictor = Kept(method.projector)
    method.support_set.rows.copy_(torch.from_numpy(queue))
    return method


def halves(z: np.ndarray, p: np.ndarray) -> Tensor:
    return torch.from_numpy(np.concatenate([z, p], axis=-1)).requires_grad_()


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


# ---------------------------------------------------------------------------- one step


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, SINGLE)])
@pytest.mark.parametrize("column_term", [False, True])
def test_loss_and_gradients_equal_the_reference(golden, dtype: torch.dtype, tolerance: dict, column_term: bool) -> None:
    values = golden("contrastive_nnclr")
    method = given(16, 8, values["queue"], temperature=0.1, column_term=column_term).to(dtype)
    x1, x2 = (halves(values[f"z{v}"], values[f"p{v}"]).detach().to(dtype).requires_grad_() for v in (1, 2))
    out = method(two_views(x1, x2), progress())
    out.loss.backward()
    suffix = "_with_col" if column_term else ""
    np.testing.assert_allclose(out.loss.item(), values["loss_with_col_terms" if column_term else "loss"], **tolerance)
    for v, x in ((1, x1), (2, x2)):
        np.testing.assert_allclose(x.grad[:, 16:].numpy(), values[f"grad_p{v}{suffix}"], **tolerance)
        assert float(x.grad[:, :16].abs().max()) == 0  # the look-up carries no gradient
    assert abs(out.loss.item() - values["lightly_variant_loss"]) > 0.3  # N candidates, not 2N - 1


def test_with_negatives_of_their_own_kind_neighbours_and_predictions_have_simclrs_loss(golden) -> None:
    values = golden("contrastive_nnclr")
    method = given(16, 8, values["queue"], temperature=0.1, column_term=True, own_kind_negatives=True)
    x1, x2 = halves(values["z1"], values["p1"]), halves(values["z2"], values["p2"])
    loss = method(two_views(x1, x2), progress()).loss
    np.testing.assert_allclose(loss.item(), 2 * values["lightly_variant_loss"], **EXACT)  # the sum of both terms, not their mean
    loss.backward()
    q1, q2 = (torch.from_numpy(values[name]).requires_grad_() for name in ("p1", "p2"))
    (nt_xent(torch.from_numpy(values["nn1"]), unit(q2), 0.1) + nt_xent(torch.from_numpy(values["nn2"]), unit(q1), 0.1)).backward()
    for x, q in ((x1, q1), (x2, q2)):
        np.testing.assert_allclose(x.grad[:, 16:].numpy(), q.grad.numpy(), **EXACT)


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """SimCLR eq. 1 over the 2N rows of both, as a literal double loop."""
    rows, n = [*a, *b], len(a)
    terms = []
    for i, row in enumerate(rows):
        weights = [torch.exp(row @ other / temperature) for k, other in enumerate(rows) if k != i]
        terms.append(torch.log(torch.stack(weights).sum()) - row @ rows[(i + n) % (2 * n)] / temperature)
    return torch.stack(terms).mean()


def test_parts_of_the_loss_and_neighbours_equal_the_reference(golden) -> None:
    values = golden("contrastive_nnclr")
    method = given(16, 8, values["queue"], temperature=0.1)
    p1, p2 = (unit(torch.from_numpy(values[name])) for name in ("p1", "p2"))
    for v, p, other in ((1, p2, "loss_nn1_p2"), (2, p1, "loss_nn2_p1")):
        found, _ = method.neighbours(unit(torch.from_numpy(values[f"z{v}"])))
        np.testing.assert_allclose(found.numpy(), values[f"nn{v}"], **EXACT)
        np.testing.assert_allclose(found.numpy(), values["queue"][values[f"top4_idx_z{v}"][:, 0]], **EXACT)
        np.testing.assert_allclose(nn.functional.cross_entropy(*method.logits(found, p)).item(), values[other], **EXACT)
    each = nn.functional.cross_entropy(*method.logits(torch.from_numpy(values["nn1"]), p2), reduction="none")
    np.testing.assert_allclose(each.numpy(), values["per_sample_nn1_p2"], **EXACT)


def test_rows_enter_normalised_so_that_the_nearest_is_so_by_cosine(golden) -> None:
    values = golden("contrastive_nnclr")
    method = nnclr(16, 16, 8, 40)
    method.support_set.push(torch.from_numpy(values["queue_raw"]))
    found, _ = method.neighbours(unit(torch.from_numpy(values["z1"])))
    np.testing.assert_allclose(found.numpy(), values["queue"][values["raw_cos_idx"]], **EXACT)
    assert (values["raw_cos_idx"] != values["raw_l2_idx"]).sum() == 3


def test_worked_value() -> None:
    queue = np.array([[1, 0], [0.6, 0.8], [0, 1], [-1, 0]])
    method = given(2, 2, queue, temperature=1.0)
    found, _ = method.neighbours(unit(torch.tensor([[2, 1.5], [-3, 0.3]], dtype=torch.float64)))
    np.testing.assert_array_equal(found.numpy(), queue[[1, 3]])
    logits, own = method.logits(found, unit(torch.tensor([[1.0, 1], [-1, 0]], dtype=torch.float64)))
    each = nn.functional.cross_entropy(logits, own, reduction="none")
    np.testing.assert_allclose(each.numpy(), [0.18559612, 0.16669157], atol=5e-9)


@pytest.mark.parametrize(("settings", "chance"), [
    ({}, math.log(5)),
    ({"column_term": True}, 2 * math.log(5)),
    ({"column_term": True, "own_kind_negatives": True}, 2 * math.log(9)),
])  # fmt: skip
def test_equal_predictions_and_neighbours_give_the_loss_of_chance(settings: dict[str, bool], chance: float) -> None:
    method = given(3, 5, np.ones((4, 3)) / math.sqrt(3), **settings)
    x = halves(np.random.default_rng(0).normal(size=(5, 3)), np.ones((5, 3)))
    out = method(two_views(x, x), progress())
    facts = RunFacts(global_batch_size=5, steps_per_epoch=1, total_steps=1)
    assert out.loss.item() == pytest.approx(chance, abs=1e-12) == pytest.approx(method.config.hints(facts).chance_loss[0])


# ---------------------------------------------------------------------------- steps


@pytest.mark.parametrize("trace", ["trace", "ragged"])
def test_steps_with_the_support_set_equal_the_reference(golden, trace: str) -> None:
    """Look-up before the rows enter; `ragged` has a batch that does not divide the set, so the pointer wraps inside it."""
    values = {name.removeprefix(f"{trace}_"): value for name, value in golden("contrastive_nnclr").items() if name.startswith(trace)}
    method = given(6, 4, values["queue0"], temperature=0.1)
    for step in range(len(values["loss"])):
        before = method.support_set.rows.clone()
        for v in (1, 2):
            found, _ = method.neighbours(unit(torch.from_numpy(values[f"z{v}"][step])))
            np.testing.assert_allclose(found.numpy(), before[values[f"idx{v}"][step]].numpy(), **EXACT)
        x1, x2 = (halves(values[f"z{v}"][step], values[f"p{v}"][step]) for v in (1, 2))
        out = method(two_views(x1, x2), progress(step))
        np.testing.assert_allclose(out.loss.item(), values["loss"][step], **EXACT)
        assert torch.equal(method.support_set.rows, before)
        method.after_step([out.outputs], progress(step))
        np.testing.assert_allclose(method.support_set.rows.numpy(), values["queues"][step], **EXACT)
        assert int(method.support_set.pointer) == values["ptr"][step]


def literal_norm(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()


@pytest.mark.parametrize("last_norm", [True, False])
def test_training_equals_the_equations(last_norm: bool) -> None:
    """Five steps of SGD through both heads; each view passes the network alone; nine rows, four to a batch."""
    method = nnclr(5, 3, 4, 9, temperature=0.4, projector_last_norm=last_norm)
    trained = [p for p in method.parameters() if p.ndim > 1]  # biases before batch norm do nothing, the last ones stay as drawn
    w, last_bias, prediction_bias = [p.detach().clone() for p in trained], method.projector[6].bias, method.predictor[3].bias
    queue, pointer = method.support_set.rows.clone(), 0
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for step in range(5):
        x1, x2 = torch.randn(2, 4, 5, dtype=torch.float64)
        out = method(two_views(x1, x2), progress(step))
        method.zero_grad()
        out.loss.backward()
        optimizer.step()
        method.after_step([out.outputs], progress(step))

        w = [p.requires_grad_() for p in w]
        z, p = [], []
        for x in (x1, x2):
            h = literal_norm(literal_norm(x @ w[0].T).relu() @ w[1].T).relu()
            h = h @ w[2].T + last_bias.detach()
            z.append(literal_norm(h) if last_norm else h)
            p.append(literal_norm(z[-1] @ w[3].T).relu() @ w[4].T + prediction_bias.detach())
        terms = []
        for a, b in ((0, 1), (1, 0)):
            for i in range(4):
                neighbour = queue[(queue - z[a][i].detach() / z[a][i].detach().norm()).norm(dim=1).argmin()]
                exponents = [torch.exp(neighbour @ p[b][k] / p[b][k].norm() / 0.4) for k in range(4)]
                terms.append(-torch.log(exponents[i] / sum(exponents)))
        loss = sum(terms) / 8
        w = [(v - 0.1 * g).detach() for v, g in zip(w, torch.autograd.grad(loss, w), strict=True)]
        for row in unit(z[0].detach()):
            queue[pointer] = row
            pointer = (pointer + 1) % 9
        np.testing.assert_allclose(out.loss.item(), loss.item(), rtol=1e-8)
        torch.testing.assert_close(method.support_set.rows, queue, rtol=1e-6, atol=1e-7)  # the first rows were drawn in float32
        for value, want in zip(trained, w, strict=True):
            torch.testing.assert_close(value.detach(), want, rtol=1e-6, atol=1e-8)


# ---------------------------------------------------------------------------- the support set


def test_labels_of_neighbours_are_compared_where_both_are_known() -> None:
    method = given(2, 4, np.array([[1.0, 0], [0, 1], [-1, 0], [0, -1], [0.6, 0.8]]))
    z = np.array([[1, 0.1], [0.1, 1], [-1, 0.1], [0.1, -1]])
    x = halves(z, z).detach()
    labels = torch.tensor([3, 4, 5, -1])
    out = method(two_views(x, x, labels), progress())
    assert float(out.metrics["neighbour_agreement"]) == 0  # nothing is known of rows that were drawn
    method.after_step([out.outputs], progress())
    assert method.labels.tolist() == [3, 4, 5, -1, -1]
    out = method(two_views(x, x, torch.tensor([3, 9, -1, 5])), progress())
    assert float(out.metrics["neighbour_agreement"]) == 0.5  # two known pairs, one agrees
    method.after_step([out.outputs], progress())
    assert method.labels.tolist() == [9, -1, 5, -1, 3]
    assert float(out.metrics["queue_age"]) == 1 and float(out.metrics["queue_fill"]) == pytest.approx(0.8)


def test_views_stand_in_until_the_set_is_full() -> None:
    method = given(2, 4, np.eye(2)[[0, 1, 0, 1, 0, 1]], warmup_with_views=True)
    u = unit(torch.randn(4, 2, dtype=torch.float64))
    for full in (False, False, True):
        found, _ = method.neighbours(u)
        nearest = method.support_set.rows[(u @ method.support_set.rows.T).argmax(1)]
        torch.testing.assert_close(found, nearest if full else u)
        method.support_set.push(torch.randn(4, 2))


def test_heads_are_those_of_the_paper() -> None:
    method = nnclr(2048, 256, 4, 4, projector_hidden=2048, predictor_hidden=4096)
    shapes = [tuple(m.weight.shape) for m in method.projector if isinstance(m, nn.Linear)]
    assert shapes == [(2048, 2048), (2048, 2048), (256, 2048)]
    assert [type(m).__name__ for m in method.projector][-3:] == ["ReLU", "Linear", "BatchNorm1d"]
    assert [type(m).__name__ for m in method.predictor] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert type(nnclr(8, 4, 4, 4, projector_last_norm=False).projector[-1]).__name__ == "Linear"
    first, second = NNCLR.default_views().values()
    assert (first.blur, first.solarize, second.blur, second.solarize) == (1.0, 0.0, 0.1, 0.2)


# ---------------------------------------------------------------------------- workers


def _steps(rank: int, world: int) -> dict[str, Any]:
    """Four steps over eight images in `world` workers; eleven rows, so the pointer wraps inside a batch."""
    method = nnclr(6, 4, 8, 11, temperature=0.3, column_term=True, own_kind_negatives=True)
    if world > 1:
        convert_sync_batchnorm(method)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1, momentum=0.9)
    losses, gradients = [], {}
    for step in range(4):
        x1, x2 = torch.randn(2, 8, 6, dtype=torch.float64).chunk(world, dim=1)[rank]
        labels = torch.arange(8).chunk(world)[rank]
        out = method(two_views(x1, x2, labels), progress(step))
        optimizer.zero_grad()
        out.loss.backward()
        average_gradients(method.parameters())
        gradients = {name: p.grad.clone() for name, p in method.named_parameters()}
        optimizer.step()
        method.after_step([out.outputs], progress(step))
        losses.append(float(all_gather_rows(out.loss.detach()[None]).mean()))
    average_statistics(method)
    return {"losses": losses, "gradients": gradients, "state": method.state_dict()}


def _reference_ranks(rank: int, world: int) -> dict[str, Tensor]:
    values = dict(np.load(Path(os.environ["MANYVIEWS_REFERENCE"]) / "golden" / "contrastive_nnclr.npz"))
    z1, z2, p1, p2 = (
        values[f"mw_{name}"].reshape(12, 16)[rank * 12 // world : (rank + 1) * 12 // world] for name in ("z1", "z2", "p1", "p2")
    )
    method = given(16, 12, values["queue"], temperature=0.1)
    x1, x2 = halves(z1, p1), halves(z2, p2)
    out = method(two_views(x1, x2), progress())
    out.loss.backward()
    return {"loss": all_gather_rows(out.loss.detach()[None]).mean(), "p1": x1.grad[:, 16:] / world, "p2": x2.grad[:, 16:] / world}


def _all(rank: int, world: int) -> dict[str, Any]:
    return {"steps": _steps(rank, world), "reference": _reference_ranks(rank, world)}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, reference: Path) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MANYVIEWS_REFERENCE", str(reference))
        return in_processes(2, tmp_path_factory.mktemp("two"), _all)


def test_two_workers_equal_one_on_the_joined_batch(two: list[dict[str, Any]]) -> None:
    one = _steps(0, 1)
    for worker in two:
        np.testing.assert_allclose(worker["steps"]["losses"], one["losses"], rtol=1e-9)
        for kind in ("gradients", "state"):
            assert worker["steps"][kind].keys() == one[kind].keys()
            for name, value in one[kind].items():
                torch.testing.assert_close(worker["steps"][kind][name], value, rtol=1e-8, atol=1e-10, msg=name)


def test_two_workers_equal_the_reference(golden, two: list[dict[str, Any]]) -> None:
    values = golden("contrastive_nnclr")
    for worker in two:
        np.testing.assert_allclose(worker["reference"]["loss"].item(), values["mw_loss"], **EXACT)
    for name in ("p1", "p2"):
        got = torch.cat([worker["reference"][name] for worker in two]).numpy()
        np.testing.assert_allclose(got, values[f"mw_grad_{name}"].reshape(12, 16), **EXACT)
