"""lightly's heads, losses, memories and moving averages, called through its API: what our methods are measured against."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from methods.parts.backbones import num_features
from methods.parts.views import Views

Parts = tuple[nn.Module, Callable[[Views], Tensor], Callable[[], object]]  # what is trained, the loss, what comes before a step


def lightly_parts(name: str, c: Any, backbone: nn.Module, device: torch.device, total_steps: int = 1) -> Parts | None:
    """lightly's heads, loss and memory for one method, with its settings; None where lightly has none that fit them.

    A network that is evaluated in the place of the trained one is called `teacher`.
    """
    from lightly import loss as losses
    from lightly.models import modules, utils
    from lightly.models.modules import heads
    from lightly.utils.scheduler import cosine_schedule

    width = num_features(backbone)
    hidden = getattr(c, "projector_hidden", None) or width
    if not hasattr(c, "projection_dim"):
        return None  # no head to project with (MAE)
    size = (width, hidden, c.projection_dim)
    three = getattr(c, "projector_layers", 3) == 3

    def averaged(network: nn.Module) -> nn.Module:
        twin = copy.deepcopy(network)
        utils.deactivate_requires_grad(twin)
        return twin

    def joined(**networks: nn.Module) -> nn.ModuleDict:
        return nn.ModuleDict({"backbone": backbone, **networks}).to(device).train()

    def nothing() -> None:
        return None

    if name == "byol":
        net = joined(projector=heads.BYOLProjectionHead(*size), predictor=heads.BYOLPredictionHead(size[2], c.predictor_hidden, size[2]))
        online = nn.Sequential(net["backbone"], net["projector"])
        target, criterion = averaged(online), losses.NegativeCosineSimilarity()

        def byol(views: Views) -> Tensor:
            p = [net["predictor"](online(x)) for x in views.pair()]
            with torch.no_grad():
                y = [target(x) for x in views.pair()]
            return criterion(p[0], y[1]) + criterion(p[1], y[0])  # type: ignore[no-any-return]

        return net, byol, lambda: utils.update_momentum(online, target, c.momentum)
    if name == "simsiam" and three:
        net = joined(
            projector=heads.SimSiamProjectionHead(*size), predictor=heads.SimSiamPredictionHead(size[2], c.predictor_hidden, size[2])
        )
        criterion = losses.NegativeCosineSimilarity()

        def simsiam(views: Views) -> Tensor:
            z = [net["projector"](net["backbone"](x)) for x in views.pair()]
            p = [net["predictor"](z_v) for z_v in z]
            return (criterion(p[0], z[1].detach()) + criterion(p[1], z[0].detach())) / 2  # type: ignore[no-any-return]

        return net, simsiam, nothing
    if (name == "barlow-twins" and three) or name in ("vicreg", "simclr"):
        if name == "barlow-twins":
            head, criterion = heads.BarlowTwinsProjectionHead(*size), losses.BarlowTwinsLoss(c.redundancy_weight)
        elif name == "vicreg":
            weights = (c.invariance_weight, c.variance_weight, c.covariance_weight)
            head, criterion = heads.VICRegProjectionHead(*size, num_layers=c.projector_layers), losses.VICRegLoss(*weights)
        else:
            head, criterion = heads.SimCLRProjectionHead(*size, num_layers=c.projector_layers), losses.NTXentLoss(c.temperature)
        net = joined(projector=head)
        return net, lambda views: criterion(*(net["projector"](net["backbone"](x)) for x in views.pair())), nothing
    if name == "moco":
        net = joined(projector=heads.MoCoProjectionHead(*size, num_layers=c.projector_layers))
        query = nn.Sequential(net["backbone"], net["projector"])
        key, criterion = averaged(query), losses.NTXentLoss(c.temperature, memory_bank_size=(c.queue_length, size[2])).to(device)

        def moco(views: Views) -> Tensor:
            x1, x2 = views.pair()
            with torch.no_grad():
                k = key(x2)
            return criterion(query(x1), k)  # type: ignore[no-any-return]

        return net, moco, lambda: utils.update_momentum(query, key, c.momentum)
    if name == "nnclr":
        net = joined(projector=heads.NNCLRProjectionHead(*size), predictor=heads.NNCLRPredictionHead(size[2], c.predictor_hidden, size[2]))
        bank, criterion = modules.NNMemoryBankModule((c.support_set_size, size[2])).to(device), losses.NTXentLoss(c.temperature)

        def nnclr(views: Views) -> Tensor:
            z = [net["projector"](net["backbone"](x)) for x in views.pair()]
            p = [net["predictor"](z_v) for z_v in z]
            n1, n2 = bank(z[0].detach(), update=False), bank(z[1].detach(), update=True)
            return (criterion(n1, p[1]) + criterion(n2, p[0])) / 2  # type: ignore[no-any-return]

        return net, nnclr, nothing
    if name == "swav" and not c.queue_length:
        net = joined(projector=heads.SwaVProjectionHead(*size), prototypes=heads.SwaVPrototypes(size[2], c.num_prototypes))
        criterion = losses.SwaVLoss(c.temperature, c.sinkhorn_iterations, c.epsilon)

        def swav(views: Views) -> Tensor:
            h = views.map_crops(net["backbone"])
            z = nn.functional.normalize(net["projector"](h))
            scores = net["prototypes"](z).split(len(views.image_ids))
            large = len(views.positions("global"))
            return criterion(scores[:large], scores[large:])  # type: ignore[no-any-return]

        return net, swav, lambda: net["prototypes"].normalize()
    if name == "dino" and three and c.teacher_targets == "centering":
        settings = {"batch_norm": c.projector_batch_norm, "norm_last_layer": c.unit_prototypes}
        projector, other = (heads.DINOProjectionHead(*size, c.num_prototypes, **settings) for _ in range(2))
        other.load_state_dict(projector.state_dict())  # its weight norm cannot be copied
        teacher = nn.ModuleDict({"backbone": copy.deepcopy(backbone), "projector": other})
        utils.deactivate_requires_grad(teacher)
        net = joined(projector=projector, teacher=teacher)
        criterion = losses.DINOLoss(c.num_prototypes, student_temp=c.temperature, center_momentum=c.center_momentum).to(device)
        steps = 0

        def scores(network: nn.Module, views: Views) -> list[Tensor]:
            h = views.map_crops(network["backbone"])  # type: ignore[index]
            return list(network["projector"](h).chunk(len(h) // len(views.image_ids)))  # type: ignore[index]

        def dino(views: Views) -> Tensor:
            with torch.no_grad():
                t = scores(net["teacher"], views.of("global"))
            return criterion(t, scores(net, views), c.teacher_temperature)  # type: ignore[no-any-return]

        def follow() -> None:
            nonlocal steps
            m = cosine_schedule(max(0, steps - 1), total_steps, c.momentum, c.final_momentum) if total_steps > 1 else c.momentum
            for part in ("backbone", "projector"):
                utils.update_momentum(net[part], net["teacher"][part], m)  # type: ignore[index]
            steps += 1

        return net, dino, follow
    if name == "msn" and three and c.sinkhorn and c.final_target_temperature is None and not c.label_smoothing:
        plain = {"weight_initialization": "skip", "pos_embed_initialization": "skip"}
        encoder = modules.MaskedVisionTransformerTIMM(vit=backbone, **plain)  # type: ignore[arg-type]
        net = nn.ModuleDict({"encoder": encoder, "projector": heads.MSNProjectionHead(*size)})
        slow = copy.deepcopy(encoder)
        net["teacher"] = nn.ModuleDict({"encoder": slow, "backbone": slow.vit, "projector": averaged(net["projector"])})
        utils.deactivate_requires_grad(net["teacher"])
        net.register_parameter("prototypes", nn.Parameter(nn.Linear(size[2], c.num_prototypes, bias=False).weight.detach()))
        net.to(device).train()
        criterion = losses.MSNLoss(c.temperature, c.sinkhorn_iterations, c.me_max)

        def msn(views: Views) -> Tensor:
            masked = views.stacks["random"]
            patches = (masked.shape[-1] // int(backbone.patch_embed.patch_size[0])) ** 2  # type: ignore[union-attr,index]
            keep, _ = utils.random_token_mask((len(masked), 1 + patches), mask_ratio=c.mask_ratio, device=masked.device)
            z = [net["projector"](net["encoder"](x, **more)) for x, more in ((masked, {"idx_keep": keep}), (views.stacks["focal"], {}))]
            with torch.no_grad():
                t = net["teacher"]["projector"](net["teacher"]["encoder"](views.stacks["target"]))  # type: ignore[index]
            return criterion(torch.cat(z), t, net.prototypes, c.target_temperature / c.temperature)  # type: ignore[no-any-return]

        def msn_follow() -> None:
            for part in ("encoder", "projector"):
                utils.update_momentum(net[part], net["teacher"][part], c.momentum)  # type: ignore[index]

        return net, msn, msn_follow
    return None
