"""SwAV against the original's values and against a literal float64 transcription of its equations."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from methods.parts.assignment import sinkhorn
from methods.parts.contract import Progress, RunFacts
from methods.parts.schedules import warmup_cosine
from methods.parts.views import Views
from methods.swav import SwAV, SwAVConfig

EXACT, SINGLE = 1e-9, 2e-5


def literal_sinkhorn(scores: np.ndarray, epsilon: float, iterations: int) -> np.ndarray:
    """The algorithm box: Q normalised whole, then prototypes and samples in turn."""
    q = np.exp(scores / epsilon)
    q /= q.sum()
    samples, prototypes = q.shape
    for _ in range(iterations):
        for k in range(prototypes):
            q[:, k] /= q[:, k].sum()
            q[:, k] /= prototypes
        for b in range(samples):
            q[b] /= q[b].sum()
            q[b] /= samples
    return q * samples


def literal_loss(scores: np.ndarray, codes: list[np.ndarray], temperature: float, crops: int) -> float:
    """Mean over the two global crops of the mean over the other crops of the cross entropy, sample by sample."""
    batch = len(scores) // crops
    total = 0.0
    for g, q in enumerate(codes):
        for v in range(crops):
            if v == g:
                continue
            for i in range(batch):
                logits = scores[v * batch + i] / temperature
                log_p = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
                total -= (q[i] * log_p).sum() / batch / (crops - 1) / len(codes)
    return total


class Same(nn.Module):
    """A backbone that hands its input on."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.num_features = features

    def forward(self, x: Tensor) -> Tensor:
        return x


def swav(prototypes: int, dim: int, batch: int, dtype: torch.dtype = torch.float64, **settings: float) -> SwAV:
    config = SwAVConfig(num_prototypes=prototypes, projection_dim=dim, **{"queue_start_epoch": 0, **settings})
    method = SwAV(config, Same(dim), RunFacts(global_batch_size=batch, steps_per_epoch=10, total_steps=100))
    method.projector = nn.Identity()
    return method.to(dtype)


def views(embeddings: Tensor, batch: int, large: int) -> Views:
    small = len(embeddings) // batch - large
    stacks = {"global": embeddings[: large * batch], "local": embeddings[large * batch :]}
    ids = torch.arange(batch)
    return Views(stacks=stacks, counts={"global": large, "local": small}, roles={"local": "local"}, image_ids=ids, labels=ids)


def progress(step: int = 0) -> Progress:
    return Progress(step=step, total_steps=100, steps_per_epoch=10)


# ---------------------------------------------------------------------------- codes


@pytest.mark.parametrize("epsilon", [0.25, 0.05, 0.02, 0.01, 0.002])
@pytest.mark.parametrize("shape", [(16, 8), (6, 40), (33, 7)])
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_codes_equal_the_algorithm_box(epsilon: float, shape: tuple[int, int], iterations: int) -> None:
    """Both forms: at small epsilon the exponents may span more than 80 and logarithms take over; and logarithms throughout."""
    scores = np.random.default_rng(0).uniform(-1, 1, shape)
    want = literal_sinkhorn(scores, epsilon, iterations)
    for span in (2.0, math.inf):
        got = sinkhorn(torch.from_numpy(scores), epsilon, iterations, span=span)
        np.testing.assert_allclose(got.numpy(), want, atol=EXACT)
        single = sinkhorn(torch.from_numpy(scores).float(), epsilon, iterations, span=span)
        np.testing.assert_allclose(single.numpy(), want, atol=SINGLE if epsilon >= 0.01 else 2e-4)


def test_codes_equal_the_original(golden) -> None:
    values = golden("swav_sinkhorn")
    for i, (_, _, epsilon, iterations) in enumerate(values["cases"]):
        scores = torch.from_numpy(values[f"scores_{i:02d}"])
        for dtype, tolerance in ((torch.float64, EXACT), (torch.float32, SINGLE)):
            codes = sinkhorn(scores.to(dtype), float(epsilon), int(iterations), span=2.0)
            np.testing.assert_allclose(codes.numpy(), values[f"q_{i:02d}"], atol=tolerance)
    collapsed = sinkhorn(torch.from_numpy(values["scores_collapsed"]), 0.05, 3, span=2.0)
    np.testing.assert_allclose(collapsed.numpy(), values["q_collapsed"], atol=EXACT)


def test_codes_have_balanced_rows_and_follow_a_permutation() -> None:
    scores = torch.rand(24, 9, dtype=torch.float64)
    codes = sinkhorn(scores, 0.05, 3)
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(24, dtype=torch.float64), atol=1e-12, rtol=0)
    order = torch.randperm(24)
    torch.testing.assert_close(sinkhorn(scores[order], 0.05, 3), codes[order], atol=1e-12, rtol=0)
    torch.testing.assert_close(sinkhorn(scores + 7.5, 0.05, 3), codes, atol=1e-10, rtol=0)  # a constant cancels


def test_half_precision_scores_are_promoted() -> None:
    scores = torch.rand(16, 8) * 2 - 1
    for dtype in (torch.float16, torch.bfloat16):
        codes = sinkhorn(scores.to(dtype), 0.05, 3)
        assert codes.dtype == torch.float32
        assert bool(codes.isfinite().all())
        torch.testing.assert_close(codes, sinkhorn(scores.to(dtype).float(), 0.05, 3))


# ---------------------------------------------------------------------------- loss


@pytest.mark.parametrize(("large", "small"), [(2, 0), (2, 4)])
def test_loss_equals_the_equations(large: int, small: int) -> None:
    batch, prototypes, dim = 6, 10, 5
    rng = np.random.default_rng(1)
    raw = rng.normal(size=((large + small) * batch, dim))
    weights = rng.normal(size=(prototypes, dim))
    z = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    c = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    scores = z @ c.T
    codes = [literal_sinkhorn(scores[g * batch : (g + 1) * batch], 0.05, 3) for g in range(2)]
    method = swav(prototypes, dim, batch)
    with torch.no_grad():
        method.prototypes.weight.copy_(torch.from_numpy(weights))
    method.before_step(progress())
    out = method(views(torch.from_numpy(raw), batch, large), progress())
    assert out.loss.item() == pytest.approx(literal_loss(scores, codes, 0.1, large + small), abs=EXACT)


@pytest.mark.parametrize(("case", "large"), [("two", 2), ("mc", 2)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, SINGLE)])
def test_loss_and_gradients_equal_the_original(golden, case: str, large: int, dtype: torch.dtype, tolerance: float) -> None:
    values = golden("swav_loss")
    embeddings = torch.from_numpy(values[f"{case}_emb_raw"]).to(dtype).requires_grad_()
    weights = torch.from_numpy(values[f"{case}_proto_raw"]).to(dtype)
    method = swav(len(weights), weights.shape[1], 12, dtype)
    with torch.no_grad():
        method.prototypes.weight.copy_(weights)
    method.before_step(progress())
    out = method(views(embeddings, 12, large), progress())
    out.loss.backward()
    np.testing.assert_allclose(out.loss.item(), values[f"{case}_loss"], atol=tolerance)
    np.testing.assert_allclose(embeddings.grad.numpy(), values[f"{case}_grad_emb_raw"], atol=tolerance)
    np.testing.assert_allclose(method.prototypes.weight.grad.numpy(), values[f"{case}_grad_proto_normed"], atol=tolerance)


def test_uniform_scores_give_ln_k() -> None:
    method = swav(prototypes=11, dim=4, batch=5)
    same = torch.ones(10, 4, dtype=torch.float64)
    with torch.no_grad():
        method.prototypes.weight.copy_(torch.ones(11, 4))
    method.before_step(progress())
    out = method(views(same, 5, 2), progress())
    assert out.loss.item() == pytest.approx(np.log(11), abs=1e-12)
    facts = RunFacts(global_batch_size=5, steps_per_epoch=10, total_steps=100)
    assert method.config.hints(facts).chance_loss == (pytest.approx(np.log(11)), "ln K")
    assert float(out.metrics["code_entropy"]) == pytest.approx(1, abs=1e-12)
    assert float(out.metrics["embedding_std"]) == pytest.approx(0, abs=1e-9)


# ---------------------------------------------------------------------------- queue


def test_queue_equals_the_original(golden) -> None:
    """Six steps: the queue of three batches is used from the fourth on, and filled after use."""
    values = golden("swav_loss")
    method = swav(prototypes=20, dim=16, batch=12, queue_length=36)
    for step in range(6):
        with torch.no_grad():
            method.prototypes.weight.copy_(torch.from_numpy(values["queue_proto_raw"][step]))
        method.before_step(progress(step))
        assert bool(method.queues[0].full) == bool(values["queue_used"][step])
        embeddings = torch.from_numpy(values["queue_emb_raw"][step])
        out = method(views(embeddings, 12, 2), progress(step))
        np.testing.assert_allclose(out.loss.item(), values["queue_loss"][step], atol=EXACT)
        for crop in range(2):
            z = nn.functional.normalize(embeddings[crop * 12 : (crop + 1) * 12])
            codes = method.codes(crop, method.prototypes(z))
            np.testing.assert_allclose(codes.detach().numpy(), values["queue_q"][step, crop], atol=EXACT)
        method.after_step([out.outputs], progress(step))
        for queue, want in zip(method.queues, values[f"queue_after_step{step}"], strict=True):
            held = queue.rows.view(3, 12, -1).roll(-int(queue.pointer) // 12, 0).flip(0).flatten(0, 1)  # newest batch first
            written = int(queue.filled)
            np.testing.assert_allclose(held[:written].numpy(), want[:written], atol=EXACT)
            assert written == min(36, 12 * (step + 1))


def test_queue_waits_for_its_epoch_and_survives_a_restart() -> None:
    method = swav(prototypes=6, dim=4, batch=5, queue_length=10, queue_start_epoch=1)
    for step in range(12):
        out = method(views(torch.randn(10, 4, dtype=torch.float64), 5, 2), progress(step))
        method.after_step([out.outputs], progress(step))
        assert int(method.queues[1].filled) == (0 if step < 10 else 5 * (step - 9))
    again = swav(prototypes=6, dim=4, batch=5, queue_length=10, queue_start_epoch=1)
    again.load_state_dict(method.state_dict())
    batch = views(torch.randn(10, 4, dtype=torch.float64), 5, 2)
    assert again.queues[0].full and again.queues[1].full
    assert torch.equal(again(batch, progress(12)).loss, method(batch, progress(12)).loss)


# ---------------------------------------------------------------------------- learning rate


def test_learning_rate_equals_the_original(golden) -> None:
    values = golden("clustering_schedules_optim")
    per_epoch, epochs, warmup, start, base, final = values["swav_cfg"]
    settings = {"total_steps": int(per_epoch * epochs), "warmup_steps": int(per_epoch * warmup)}
    rates = [warmup_cosine(i, start=start, base=base, final=final, **settings) for i in range(settings["total_steps"])]
    np.testing.assert_allclose(rates, values["swav_lr"], atol=1e-12)


def test_learning_rate_touches_both_ends_of_the_warmup() -> None:
    rates = [warmup_cosine(i, total_steps=20, warmup_steps=5, start=0.3, base=4.8, final=0.01) for i in range(20)]
    assert rates[0] == 0.3
    assert rates[4] == rates[5] == 4.8
    assert all(a > b for a, b in pairwise(rates[5:]))
    assert rates[-1] > 0.01


# ---------------------------------------------------------------------------- prototypes and codes


def test_hard_codes_are_the_rounded_soft_ones() -> None:
    torch.manual_seed(0)
    scores = torch.rand(9, 6, dtype=torch.float64)
    soft = literal_sinkhorn(scores.numpy(), 0.05, 3)
    hard = swav(prototypes=6, dim=4, batch=9, hard_codes=True).codes(0, scores)
    np.testing.assert_array_equal(hard.numpy(), np.eye(6)[soft.argmax(axis=1)])


def test_prototypes_are_dead_when_no_code_prefers_them_for_an_epoch() -> None:
    """Steps since each was used, counted by hand over ten-step epochs; a restart keeps the count."""
    torch.manual_seed(0)
    method = swav(prototypes=40, dim=4, batch=5)
    unused = np.zeros(40, dtype=int)
    for step in range(25):
        method.before_step(progress(step))
        embeddings = nn.functional.normalize(torch.randn(10, 4, dtype=torch.float64))
        out = method(views(embeddings, 5, 2), progress(step))
        assert float(out.metrics["prototypes_dead"]) == pytest.approx((unused >= 10).mean())
        scores = (embeddings @ method.prototypes.weight.detach().T).numpy()
        best = [literal_sinkhorn(part, 0.05, 3).argmax(axis=1) for part in (scores[:5], scores[5:])]
        unused += 1
        unused[np.concatenate(best)] = 0
        method.after_step([out.outputs], progress(step))
    assert 0 < (unused >= 10).mean() < 1
    np.testing.assert_array_equal(method.state_dict()["unused_steps"].numpy(), unused)


def test_prototypes_that_are_copies_are_counted_once() -> None:
    method = swav(prototypes=8, dim=4, batch=5)
    weights = torch.tensor(
        [[1.0, 0, 0, 0], [0, 1, 0, 0], [2, 0.01, 0, 0], [0, 0, 1, 0], [3, 0, 0.01, 0], [0, 0, 0, 5], [-1, 0, 0, 0], [1, 1, 0, 0]]
    )
    with torch.no_grad():
        method.prototypes.weight.copy_(weights)
    method.start_epoch(progress())
    assert float(method.distinct) == pytest.approx(6 / 8)  # rows 2 and 4 resemble row 0


def test_advice_names_what_works_badly_together() -> None:
    facts = RunFacts(global_batch_size=64, steps_per_epoch=10, total_steps=100, num_images=1000)
    said = {
        name: list(SwAVConfig(num_prototypes=k, **settings).hints(facts).warnings)
        for name, k, settings in (
            ("fits", 64, {}),
            ("batch", 100, {}),
            ("images", 128, {"queue_length": 64}),
            ("epsilon", 64, {"epsilon": 0.1}),
        )
    }
    assert said["fits"] == []
    assert ["queue_length=64" in s for s in said["batch"]] == [True]
    assert [s.endswith("1000 images; use 100 or fewer") for s in said["images"]] == [True]
    assert ["epsilon=0.1" in s for s in said["epsilon"]] == [True]
