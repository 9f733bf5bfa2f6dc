"""The picture of masks, and that it shows what methods hide."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from methods.parts.contract import registered
from methods.parts.views import Views
from methods.parts.vit import ViT
from pipeline.figures import masks
from tests.test_figures import near, plain, read
from tests.test_methods import built, progress

MASKED = [name for name, entry in registered().items() if entry.method.hides_patches]
ORANGE = (230, 120, 0)


def test_methods_with_masks_are_known() -> None:
    assert MASKED == ["dinov2", "ibot", "mae", "msn"]


@pytest.mark.parametrize("name", MASKED)
def test_what_is_hidden_does_not_reach_the_blocks_and_the_rest_does(name: str) -> None:
    method, views = built(f"{name}-small")
    drawn = method.draw_masks(views, progress(3))
    assert drawn is not None
    hidden = method.hidden_patches(views, drawn)
    large = views.positions("global")
    assert list(hidden) == large and all(h.dtype == torch.bool and 0 < h.float().mean() < 1 for h in hidden.values())

    student = next(m for m in method.modules() if isinstance(m, ViT) and next(m.parameters()).requires_grad)
    seen: list[torch.Tensor] = []
    student.blocks[0].register_forward_pre_hook(lambda _, x: seen.append(x[0].detach()))

    def tokens(of: Views) -> torch.Tensor:
        """Return what the first block is given of each global crop, but for CLS: `(V B, n, D)`."""
        seen.clear()
        method(of, progress(3), drawn)
        return next(x for x in seen if len(x) == len(large) * len(of.image_ids))[:, 1:]

    size = student.patch_embed.patch_size[0]
    before = tokens(views)
    for hide in (True, False):
        changed = [crop.clone() for crop in views.crops]
        for place, patches in hidden.items():
            side = changed[place].shape[-1] // size
            area = patches.view(-1, 1, side, side).repeat_interleave(size, 2).repeat_interleave(size, 3).expand_as(changed[place])
            changed[place][area if hide else ~area] += 1.0
        stacks, first = {}, 0
        for group, count in views.counts.items():
            stacks[group], first = torch.cat(changed[first : first + count]), first + count
        other = Views(stacks=stacks, counts=views.counts, roles=views.roles, image_ids=views.image_ids, labels=views.labels)
        moved = (tokens(other) != before).any(dim=-1).sum(dim=1)  # of each crop
        shown = torch.cat([(~patches).sum(dim=1) for patches in hidden.values()])
        assert torch.equal(moved, torch.zeros_like(shown) if hide else shown)


def test_the_picture_greys_the_hidden_patches_out(tmp_path: Path) -> None:
    """Of one crop the upper left quarter is hidden, of the other nothing; what is hidden can still be made out."""
    crops = [np.full((1, 32, 32, 3), np.array(ORANGE) / 255) for _ in range(2)]
    grids = [np.zeros((1, 4, 4), bool) for _ in range(2)]
    grids[0][0, :2, :2] = True
    picture = read(masks.draw([plain(32, 32, (0, 0, 255))], crops, grids, tmp_path / "m.png", source="planted images"))
    side, top = round(1.9 * 150), round(0.95 * 150)
    first, second = (picture[top : top + side, round(150 * x) : round(150 * x) + side] for x in (2.2, 4.2))
    assert near(second, ORANGE).mean() > 0.98
    assert near(first, ORANGE).mean() == pytest.approx(3 / 4, abs=0.02)
    quarter = first[8 : side // 2 - 8, 8 : side // 2 - 8]
    veiled = masks.VEIL * 127.5 + (1 - masks.VEIL) * np.array(ORANGE)
    assert near(quarter, tuple(veiled), tolerance=3).all()
