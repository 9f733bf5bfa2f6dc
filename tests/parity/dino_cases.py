"""What the tests of DINO share: small networks and crops, and a step as the loop makes it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.dino import DINO, DINOConfig
from methods.parts.contract import Progress, RunFacts
from methods.parts.distributed import average_gradients
from methods.parts.views import Role, Views
from pipeline.config import OptimConfig
from pipeline.resolve import Resolved
from pipeline.train.optim import build_optimizer, prepare_step
from tests.parity.common import Same

TOTAL, EPOCH = 12, 3  # steps of a test run, and of its epochs
FACTS = RunFacts(global_batch_size=4, steps_per_epoch=EPOCH, total_steps=TOTAL)
SMALL = {"num_prototypes": 7, "projector_hidden": 9, "projection_dim": 4}


class Encoder(nn.Module):
    """Mean over pixels plus a token, Linear, GELU: takes crops of any size; has a matrix, a vector and a token of three dimensions."""

    def __init__(self, features: int = 5) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.full((1, 1, 3), 0.5))
        self.linear = nn.Linear(3, features)
        self.num_features = features

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.linear(x.mean((2, 3)) + self.token[0]))


class Given(nn.Module):
    """Hands out what was given, whatever the input."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        return self.output


def dino(backbone: nn.Module | None = None, facts: RunFacts = FACTS, **settings: Any) -> DINO:
    torch.manual_seed(0)
    method = DINO(DINOConfig(**{**SMALL, **settings}), backbone or Encoder(), facts).double()
    with torch.no_grad():  # a head drawn at 0.02 gives features of length zero, to which every test would be blind
        for module in (method.head.mlp, method.backbone):
            for p in module.parameters():
                p.add_(torch.randn_like(p) * 0.5)
        for mine, his in zip(method.teacher.parameters(), method.student().parameters(), strict=True):
            mine.copy_(his + 0.1 * torch.randn_like(his) * his.requires_grad)
    return method


ROLES: dict[str, Role] = {"local": "local"}


def progress(step: int = 0) -> Progress:
    return Progress(step=step, total_steps=TOTAL, steps_per_epoch=EPOCH)


def images(seed: int, batch: int = 4, large: int = 2, small: int = 3) -> Views:
    draw = torch.Generator().manual_seed(seed)
    stacks = {
        "global": torch.randn(batch * large, 3, 6, 6, dtype=torch.float64, generator=draw),
        "local": torch.randn(batch * small, 3, 4, 4, dtype=torch.float64, generator=draw),
    }
    ids, counts = torch.arange(batch), {"global": large, "local": small}
    return Views(stacks=stacks, counts=counts, roles=ROLES, image_ids=ids, labels=ids)


def rows_of(views: Views, rows: slice) -> Views:
    """The same crops of some of the images."""
    stacks = {n: torch.cat([c[rows] for c in s.chunk(views.counts[n])]) for n, s in views.stacks.items()}
    return Views(stacks=stacks, counts=views.counts, roles=views.roles, image_ids=views.image_ids[rows], labels=views.labels[rows])


def of_scores(student: Tensor, teacher: Tensor, large: int, batch: int, **settings: Any) -> tuple[DINO, Views]:
    """A method whose student and teacher give these scores, `(V B, K)` and `(G B, K)`."""
    k = student.shape[1]
    method = dino(Same(k), **{"num_prototypes": k, **settings}).to(student.dtype)
    method.head = nn.Identity()
    method.teacher = nn.Sequential()
    method.teacher.add_module("backbone", Given(teacher))
    method.teacher.add_module("head", nn.Identity())
    stacks = {"global": student[: large * batch], "local": student[large * batch :]}
    counts = {"global": large, "local": len(student) // batch - large}
    return method, Views(stacks=stacks, counts=counts, roles=ROLES, image_ids=torch.arange(batch), labels=torch.arange(batch))


def plan(base: float = 0.02) -> Resolved:
    settings = {"lr": base, "start_lr": 0.0, "final_lr": 1e-3, "warmup_steps": 3, "weight_decays": (0.04, 0.4)}
    return Resolved(facts=FACTS, chunk=1, window=1, checkpoint_every=1, knn_every=1, **settings)


def fresh_optimizer(method: DINO) -> torch.optim.Optimizer:
    return build_optimizer(OptimConfig(name="adamw", base_lr=0.02, weight_decay=0.04, final_weight_decay=0.4), method.param_groups())


def advance(method: DINO, optimizer: torch.optim.Optimizer, parts: list[Views], step: int, clip: float = 0.3) -> float:
    """One optimizer step as the loop makes it."""
    at, outputs = progress(step), []
    method.before_step(at)
    for part in parts:
        out = method(part, at)
        (out.loss / len(parts)).backward()
        outputs.append(out)
    average_gradients(method.parameters())
    prepare_step(optimizer, plan(), step, clip, "tensor")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    method.after_step([out.outputs for out in outputs], at)
    return sum(out.loss.item() for out in outputs) / len(parts)
