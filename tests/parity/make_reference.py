"""Write `reference/NAME.npz`: start, crops and losses of a short run of every method, from literal float64 equations alone.

    python -m tests.parity.make_reference

Start and crops come from a seeded generator and are rounded to float32. The losses come from the transcriptions of
`tests/parity/test_NAME.py` and from the formulas below; no loss, schedule, queue or average of `methods/` is called.
Change a file only together with the entry of CHANGELOG.md that says why the loss has another value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from methods.coke import CoKeConfig
from tests.parity import test_coke, test_deepcluster
from tests.parity.reference_cases import CASES, FOLDER, Case
from tests.parity.test_barlow_twins import literal as barlow_twins_loss
from tests.parity.test_byol import normalised
from tests.parity.test_dino_steps import literal_scores
from tests.parity.test_dinov2 import literal_koleo
from tests.parity.test_ibot import literal_head
from tests.parity.test_mae import literal_loss as mae_loss
from tests.parity.test_msn import literal_encoder, literal_tokens
from tests.parity.test_simclr import literal_anchor, unit
from tests.parity.test_swav import literal_sinkhorn
from tests.parity.test_vicreg import literal as vicreg_loss

Weights = dict[str, Tensor]
Batch = SimpleNamespace  # crops by group `(V, B, ...)`, ids `(B,)`, keep `(B, m)`, masked `(V B, N)`
Run = Generator["Tensor | float", Weights, None]  # gives the loss of a step, takes the weights after it

# ---------------------------------------------------------------------------- networks


def norm(x: Tensor, scale: Tensor | float = 1.0, shift: Tensor | float = 0.0) -> Tensor:
    return normalised(x, scale, shift, [torch.zeros(x.shape[1]), torch.ones(x.shape[1])])


def head(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Linears and batch norms in their order; a ReLU behind every batch norm but the last module."""
    modules = list(dict.fromkeys(key.rpartition(".")[0] for key in w if key.startswith(f"{name}.")))
    for module in modules:
        scale, shift = w[f"{module}.weight"], w.get(f"{module}.bias", 0.0)
        if scale.ndim == 2:
            x = x @ scale.T + shift
        else:
            x = norm(x, scale, shift)
            x = x if module == modules[-1] else torch.relu(x)
    return x


def body(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    x = x @ w[f"{name}.linear.weight"].T + w[f"{name}.linear.bias"]
    return torch.relu(norm(x, w[f"{name}.norm.weight"], w[f"{name}.norm.bias"]))


def part_of(w: Mapping[str, Tensor], name: str) -> Weights:
    return {key.removeprefix(f"{name}."): value.detach() for key, value in w.items() if key.startswith(f"{name}.")}


def average(slow: Weights, w: Weights, momentum: float) -> Weights:
    return {name: momentum * slow[name] + (1 - momentum) * w[name] for name in slow}


def rising(start: float, step: int, steps: int) -> float:
    """From `start` at step 0 to 1 at the end, half a cosine."""
    return 1 - (1 - start) * (math.cos(math.pi * step / steps) + 1) / 2


def balanced(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    return torch.from_numpy(literal_sinkhorn(scores.detach().numpy(), epsilon, iterations))


# ---------------------------------------------------------------------------- two views


def redundancy(loss_of: Callable[..., Tensor], *weights: object) -> Callable[[Case, Weights, list[Batch]], Run]:
    def run(case: Case, w: Weights, batches: list[Batch]) -> Run:
        for batch in batches:
            w = yield loss_of(*(head(w, "projector", body(w, "backbone", x)) for x in batch.crops["global"]), *weights)

    return run


def simsiam(case: Case, w: Weights, batches: list[Batch]) -> Run:
    for batch in batches:
        z = [norm(head(w, "projector", body(w, "backbone", x))) for x in batch.crops["global"]]
        p = [unit(head(w, "predictor", z_v)) for z_v in z]
        w = yield -sum((p[v] * unit(z[1 - v]).detach()).sum(1).mean() for v in (0, 1)) / 2


def byol(case: Case, w: Weights, batches: list[Batch]) -> Run:
    xi = part_of(w, "target")
    for step, batch in enumerate(batches):
        views = [batch.crops["first"][0], batch.crops["second"][0]]
        p = [unit(head(w, "predictor", head(w, "projector", body(w, "backbone", x)))) for x in views]
        y = [unit(head(xi, "projector", body(xi, "backbone", x))) for x in views]
        w = yield sum(((p[v] - y[1 - v]) ** 2).sum(1).mean() for v in (0, 1))
        xi = average(xi, {name: w[name].detach() for name in xi}, rising(0.8, step, case.steps))


def moco(case: Case, w: Weights, batches: list[Batch]) -> Run:
    slow, queue, pointer = part_of(w, "key"), w["queue.rows"].detach().clone(), 0

    def network(w: Weights, x: Tensor, parts: list[list[int]]) -> Tensor:
        h = torch.empty(len(x), 10, dtype=torch.float64)
        for rows in parts:
            h[rows] = body(w, "backbone", x[rows])
        h = torch.relu(h @ w["projector.0.weight"].T + w["projector.0.bias"])
        return unit(h @ w["projector.2.weight"].T + w["projector.2.bias"])

    for step, batch in enumerate(batches):
        query = {name: w[f"query.{name}"] for name in slow}
        slow = average(slow, {name: value.detach() for name, value in query.items()}, 0.8)
        order = torch.randperm(8, generator=torch.Generator().manual_seed(step)).tolist()
        q = network(query, batch.crops["global"][0], [[0, 1, 2, 3], [4, 5, 6, 7]])
        k = network(slow, batch.crops["global"][1], [order[:4], order[4:]])
        positive, negative = torch.exp((q * k).sum(1) / 0.3), torch.exp(q @ queue.T / 0.3).sum(1)
        w = yield -torch.log(positive / (positive + negative)).mean()
        pointer = write(queue, pointer, k)


def moco_v3(case: Case, w: Weights, batches: list[Batch]) -> Run:
    slow = part_of(w, "key")

    def network(w: Weights, x: Tensor) -> Tensor:
        return norm(head(w, "projector", body(w, "backbone", x)))

    for step, batch in enumerate(batches):
        query = {name: w[f"query.{name}"] for name in slow}
        slow = average(slow, {name: value.detach() for name, value in query.items()}, rising(0.6, step, case.steps))
        q = [unit(norm(head(w, "predictor", network(query, x)))) for x in batch.crops["global"]]
        k = [unit(network(slow, x)) for x in batch.crops["global"]]
        terms = [torch.exp(q[v] @ k[1 - v].T / 0.3) for v in (0, 1)]
        w = yield -2 * 0.3 * sum(torch.log(e.diagonal() / e.sum(1)).mean() for e in terms)


def simclr(case: Case, w: Weights, batches: list[Batch]) -> Run:
    slow, memory, pointer = part_of(w, "slow_network"), w["memory.rows"].detach().clone(), 0

    def network(w: Weights, x: Tensor) -> Tensor:
        return unit(head(w, "projector", body(w, "backbone", x)))

    for batch in batches:
        fast = {name: w[f"network.{name}"] for name in slow}
        slow = average(slow, {name: value.detach() for name, value in fast.items()}, 0.8)
        x = batch.crops["global"]
        z = network(fast, x.flatten(0, 1))
        w = yield sum(literal_anchor(z, i, 0.4, memory) for i in range(len(z))) / len(z)
        pointer = write(memory, pointer, network(slow, x[1]))


def nnclr(case: Case, w: Weights, batches: list[Batch]) -> Run:
    rows, pointer = w["support_set.rows"].detach().clone(), 0
    for batch in batches:
        z = [head(w, "projector", body(w, "backbone", x)) for x in batch.crops["global"]]
        p = [unit(head(w, "predictor", z_v)) for z_v in z]
        u = [unit(z_v.detach()) for z_v in z]
        neighbours = [torch.stack([rows[(rows - row).norm(dim=1).argmin()] for row in u_v]) for u_v in u]
        terms = [torch.exp(neighbours[v] @ p[1 - v].T / 0.4) for v in (0, 1)]
        w = yield -sum(torch.log(e.diagonal() / e.sum(1)).mean() for e in terms) / 2
        pointer = write(rows, pointer, u[0])


def write(queue: Tensor, pointer: int, rows: Tensor) -> int:
    """Row after row, around the end."""
    for row in rows.detach():
        queue[pointer] = row
        pointer = (pointer + 1) % len(queue)
    return pointer


# ---------------------------------------------------------------------------- clusters


def swav(case: Case, w: Weights, batches: list[Batch]) -> Run:
    queues: list[list[Tensor]] = [[], []]
    for batch in batches:
        h = torch.cat([body(w, "backbone", crops.flatten(0, 1)) for crops in batch.crops.values()])
        z = unit(head(w, "projector", h)).unflatten(0, (5, 8))
        w["prototypes.weight"] = c = unit(w["prototypes.weight"].detach()).requires_grad_()
        scores, terms = z @ c.T, []
        for g in range(2):
            seen = torch.cat([scores[g], *(old @ c.T for old in queues[g])] if len(queues[g]) == 2 else [scores[g]])
            q = balanced(seen, 0.05, 3)[:8]
            terms += [-(q * torch.log_softmax(scores[v] / 0.1, dim=1)).sum(1).mean() for v in range(5) if v != g]
        w = yield sum(terms) / len(terms)
        queues = [[z[g].detach(), *queues[g]][:2] for g in range(2)]


def dino(case: Case, w: Weights, batches: list[Batch]) -> Run:
    slow, center = part_of(w, "teacher"), torch.zeros(7, dtype=torch.float64)
    for step, batch in enumerate(batches):
        crops = [*batch.crops["global"], *batch.crops["local"]]
        s = [torch.stack([literal_scores(w, x) for x in crop]) / 0.1 for crop in crops]
        t = [torch.stack([literal_scores(slow, x) for x in crop]) for crop in crops[:2]]
        q = [torch.softmax((t_g - center) / (0.04, 0.07)[step // 3], dim=1) for t_g in t]
        terms = [-(q[g] * torch.log_softmax(s[v], dim=1)).sum(1).mean() for g in range(2) for v in range(4) if v != g]
        w = yield sum(terms) / len(terms)
        slow = average(slow, {name: w[name].detach() for name in slow}, rising(0.8, step, case.steps))
        center = 0.9 * center + 0.1 * torch.cat(t).mean(0)


def masked_prediction(case: Case, w: Weights, batches: list[Batch]) -> Run:
    """iBOT, and DINOv2, whose second centre is the mean of masked patches only, and which has KoLeo."""
    slow, c, c2, koleo = part_of(w, "teacher"), torch.zeros(7).double(), torch.zeros(5).double(), case is CASES["dinov2"]

    def scores(w: Weights, name: str, x: Tensor) -> Tensor:
        return torch.stack([literal_head(w, name, row) for row in x])

    for step, batch in enumerate(batches):
        crops, masked = batch.crops["global"].flatten(0, 1), batch.masked
        seen, whole = literal_tokens(w, crops, masked=masked), literal_tokens(slow, crops)
        cls = [*seen[:, 0].chunk(2), *literal_tokens(w, batch.crops["local"].flatten(0, 1))[:, 0].chunk(1)]
        s = [scores(w, "head", x) / 0.1 for x in cls]
        t = scores(slow, "head", whole[:, 0])
        q = torch.softmax((t - c) / 0.05, dim=1).chunk(2)
        pairs = [-(q[g] * torch.log_softmax(s[v], dim=1)).sum(1).mean() for g in range(2) for v in range(3) if v != g]
        t_patch = scores(slow, "patch_head", whole[:, 1:].flatten(0, 1)).unflatten(0, (-1, 16))
        patches = torch.zeros((), dtype=torch.float64)
        for i in range(len(crops)):
            for n in range(16):
                if masked[i, n]:
                    p = torch.log_softmax(literal_head(w, "patch_head", seen[i, 1 + n]) / 0.1, dim=0)
                    patches = patches - (torch.softmax((t_patch[i, n] - c2) / 0.05, dim=0) * p).sum() / masked[i].sum()
        loss = sum(pairs) / len(pairs) + 0.6 * patches / len(crops)
        w = yield loss + 0.1 * sum(literal_koleo(x) for x in cls[:2]) if koleo else loss
        slow = average(slow, {name: w[name].detach() for name in slow}, rising(0.8, step, case.steps))
        c, c2 = 0.9 * c + 0.1 * t.mean(0), 0.9 * c2 + 0.1 * (t_patch[masked] if koleo else t_patch.flatten(0, 1)).mean(0)


def msn(case: Case, w: Weights, batches: list[Batch]) -> Run:
    slow = part_of(w, "target")
    for step, batch in enumerate(batches):
        anchor = {name: w[f"anchor.{name}"] for name in slow}
        x = batch.crops
        z = torch.cat([literal_encoder(anchor, x["random"][0], batch.keep), literal_encoder(anchor, x["focal"].flatten(0, 1), None)])
        c = unit(w["prototypes"])
        p = torch.softmax(unit(z) @ c.T / 0.2, dim=1)
        targets = torch.softmax(unit(literal_encoder(slow, x["target"][0], None)) @ c.T / 0.025, dim=1)
        r = balanced(targets.log(), 1.0, 3)
        mean = p.mean(0)
        w = yield -(r.repeat(3, 1) * p.log()).sum(1).mean() + (mean * mean.log()).sum() + math.log(10)
        share = step / (1.25 * case.steps)  # the schedule ends at 1.25 times the run
        slow = average(slow, {name: w[f"anchor.{name}"].detach() for name in slow}, 0.6 + 0.4 * share)


def coke(case: Case, w: Weights, batches: list[Batch]) -> Run:
    """Without learning, for which the transcription has no gradient; centres, duals, labels and averages move."""
    centers = [w[f"clusters.{h}.current"].detach().numpy() for h in range(2)]
    literal = test_coke.Literal(centers, w["predictor.weight"].detach().numpy(), case.num_images, CoKeConfig(**case.settings))
    for step, batch in enumerate(batches):
        h = torch.cat([body(w, "backbone", crops.flatten(0, 1)) for crops in batch.crops.values()])
        z = head(w, "projector", h).unflatten(0, (3, 8)).detach().numpy()
        epoch = step // case.steps_per_epoch
        loss = literal.step(z, batch.ids.tolist(), 2, epoch)
        yield loss if epoch else math.nan
        if (step + 1) % case.steps_per_epoch == 0:
            literal.end_epoch(epoch)


def deepcluster(case: Case, w: Weights, batches: list[Batch]) -> Run:
    seen: set[int] = set()
    starts = {}
    for epoch in range(3):
        starts[epoch] = test_deepcluster.first_centroids(epoch, sorted(seen)) if seen else []
        seen |= {int(n) for batch in batches[4 * epoch : 4 * epoch + 4] for n in batch.ids}
    for loss, _, _ in test_deepcluster.literal(w["projector.weight"].detach().numpy(), starts):
        yield math.nan if loss is None else loss


# ---------------------------------------------------------------------------- pixels


def mae(case: Case, w: Weights, batches: list[Batch]) -> Run:
    for batch in batches:
        w = yield mae_loss(w, batch.crops["global"][0], batch.keep, True)


EQUATIONS: dict[str, Callable[[Case, Weights, list[Batch]], Run]] = {
    "barlow-twins": redundancy(barlow_twins_loss, 0.005),
    "byol": byol,
    "coke": coke,
    "deepcluster-v2": deepcluster,
    "dino": dino,
    "dinov2": masked_prediction,
    "ibot": masked_prediction,
    "mae": mae,
    "moco": moco,
    "moco-v3": moco_v3,
    "msn": msn,
    "nnclr": nnclr,
    "simclr": simclr,
    "simsiam": simsiam,
    "swav": swav,
    "vicreg": redundancy(vicreg_loss),
}
KEPT_PATCHES = {"mae": 4, "msn": 11}  # of 16

# ---------------------------------------------------------------------------- files


def drawn_start(name: str, draw: np.random.RandomState) -> dict[str, np.ndarray]:
    """Weights, queues and centres of other sizes than those a method begins with, so that none hides behind 0 or 1."""
    method, start = CASES[name].build(name), {}
    trained = {n for n, _ in method.named_parameters()} - set(CASES[name].fixed)
    for key, value in method.state_dict().items():
        if key in trained:
            matrix = value.ndim > 1 or key == "prototypes"
            noise = draw.normal(size=value.shape) / (math.sqrt(value[0].numel()) if matrix else 5)
            ones = not matrix and key.endswith("weight")  # of norms
            start[key] = noise + ones
        elif key.endswith((".rows", ".current")):
            rows = draw.normal(size=value.shape)
            start[key] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
            if key.endswith(".current"):
                start[key.replace(".current", ".previous")] = start[key]
    return start


def drawn_inputs(name: str, draw: np.random.RandomState) -> dict[str, np.ndarray]:
    case = CASES[name]
    if name == "deepcluster-v2":  # whose transcription has batches of its own
        views = [test_deepcluster.batch_of(step) for step in range(case.steps)]
        crops = {g: np.stack([v.stacks[g].unflatten(0, (count, -1)).numpy() for v in views]) for g, (count, _) in case.crops.items()}
        return {"ids": np.stack([v.image_ids.numpy() for v in views])} | {f"crops.{g}": value for g, value in crops.items()}
    epochs = -(-case.steps // case.steps_per_epoch)
    inputs = {"ids": np.concatenate([draw.permutation(case.num_images)[: case.steps_per_epoch * case.batch] for _ in range(epochs)])}
    inputs["ids"] = inputs["ids"].reshape(-1, case.batch)[: case.steps]
    rows = {shape: draw.normal(size=(case.num_images, *shape)) for _, shape in case.crops.values()}
    for group, (count, shape) in case.crops.items():
        noise = draw.normal(size=(case.steps, count, case.batch, *shape))
        inputs[f"crops.{group}"] = rows[shape][inputs["ids"]][:, None] + 0.5 * noise  # crops of one image resemble each other
    if name in ("dinov2", "ibot"):  # two of the crops are masked
        inputs |= {key: np.round(4 * value) / 4 for key, value in inputs.items() if key.startswith("crops.")}
        inputs["masked"] = np.zeros((case.steps, 2 * case.batch, 16), bool)
        for mask in inputs["masked"]:
            for row, count in zip(draw.permutation(len(mask))[:2], (4, 7), strict=True):
                mask[row, draw.permutation(16)[:count]] = True
    if name in KEPT_PATCHES:
        kept = [[sorted(draw.permutation(16)[: KEPT_PATCHES[name]]) for _ in range(case.batch)] for _ in range(case.steps)]
        inputs["keep"] = np.array(kept)
    return inputs


def losses(name: str, values: Mapping[str, np.ndarray]) -> list[float]:
    """The losses by the equations; plain gradient descent between them."""
    case = CASES[name]
    inputs = {key: torch.from_numpy(value).double() for key, value in values.items()}
    w = {key.removeprefix("start."): value.requires_grad_() for key, value in inputs.items() if key.startswith("start.")}
    batches = [
        Batch(
            crops={group: inputs[f"crops.{group}"][step] for group in case.crops},
            ids=inputs["ids"][step].long(),
            keep=inputs["keep"][step].long() if "keep" in inputs else None,
            masked=inputs["masked"][step] != 0 if "masked" in inputs else None,
        )
        for step in range(case.steps)
    ]
    run, found = EQUATIONS[name](case, w, batches), []
    loss: Tensor | float | None = next(run)
    while loss is not None:
        found.append(float(loss.detach()) if isinstance(loss, Tensor) else loss)
        if isinstance(loss, Tensor):
            gradients = torch.autograd.grad(loss, list(w.values()), allow_unused=True)
            moved = {key: value - case.lr * g for (key, value), g in zip(w.items(), gradients, strict=True) if g is not None}
            w = {key: moved.get(key, value).detach().requires_grad_() for key, value in w.items()}
        try:
            loss = run.send(w)
        except StopIteration:
            loss = None
    return found


def make(name: str) -> dict[str, np.ndarray]:
    """The arrays of one file: `start.PARAMETER`, `crops.GROUP` `(steps, V, B, ...)`, `ids` `(steps, B)`, masks, `losses` `(steps,)`."""
    draw = np.random.RandomState(sum(name.encode()))  # whose numbers stay the same in every version of NumPy
    values = {f"start.{key}": value.astype(np.float32) for key, value in drawn_start(name, draw).items()}
    if name in ("dinov2", "ibot", "msn"):  # few digits take little room
        values = {key: np.round(16 * value) / 16 for key, value in values.items()}
    values |= {key: value.astype(np.float32 if value.dtype == np.float64 else np.int16) for key, value in drawn_inputs(name, draw).items()}
    return values | {"losses": np.array(losses(name, values))}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in CASES:
        np.savez_compressed(FOLDER / f"{name}.npz", **make(name))
        print(f"{name}: {(FOLDER / f'{name}.npz').stat().st_size / 1000:.0f} kB")
