"""What features keep: the decoder learns a distribution and not its mean, looks see what they say, shares by hand, the picture."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from methods.parts.backbones import BackboneConfig, build_backbone
from pipeline.figures import inversion, style
from pipeline.figures.inversion_pictures import Looks, alike, draw, explained
from tests.test_figures import LIME, RED, near, plain, read

CPU = torch.device("cpu")


def test_the_energy_score_is_lowest_for_the_right_distribution() -> None:
    """Of c ~ N(0, 1): sqrt(2 / pi) for its mean, 1 / sqrt(pi) for c's own distribution; too wide is worse, too."""
    torch.manual_seed(0)
    c, a, b = (torch.randn(200_000, 1) for _ in range(3))
    score = {width: float(inversion.energy_score(c, width * a, width * b, torch.ones(1))) for width in (0.0, 0.5, 1.0, 2.0)}
    assert score[0.0] == pytest.approx((2 / np.pi) ** 0.5, abs=0.01)
    assert score[1.0] == pytest.approx(np.pi**-0.5, abs=0.01)
    assert min(score, key=lambda width: score[width]) == 1.0


def bars(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images 8 x 8 of one of two colours, which the features tell, with a dark half above or below, which they do not."""
    draw = torch.Generator().manual_seed(seed)
    red, above = (torch.rand(count, generator=draw) < 0.5 for _ in range(2))
    images = torch.full((count, 3, 8, 8), 0.2)
    images[:, 0] += 0.6 * red.float().view(-1, 1, 1)
    images[:, 2] += 0.6 * (~red).float().view(-1, 1, 1)
    images[above, :, :4] *= 0.25
    images[~above, :, 4:] *= 0.25
    return torch.stack([red.float(), torch.randn(count, generator=draw)], dim=1), images


def test_samples_share_what_features_hold_and_differ_in_the_rest() -> None:
    features, images = bars(600, 0)
    state = torch.get_rng_state()
    fitted = inversion.fit(features[None], images, steps=150, seconds=200, batch=32, device=CPU)
    assert torch.equal(torch.get_rng_state(), state) and fitted.steps == 150
    asked, _ = bars(40, 1)
    samples = fitted.decoder.sample(asked[None], each=16)[0]  # (16, 40, 3, 8, 8)
    red = asked[:, 0] == 1
    warm = samples[:, :, 0].mean(dim=(2, 3)) > samples[:, :, 2].mean(dim=(2, 3))
    assert (warm == red).float().mean() > 0.95
    above = samples[..., :4, :].mean(dim=(2, 3, 4)) < samples[..., 4:, :].mean(dim=(2, 3, 4))
    assert 0.25 < above.float().mean() < 0.75
    assert ((above.float().mean(dim=0) - 0.5).abs() < 0.45).float().mean() > 0.8, "each image gets both halves"


def test_training_is_repeatable_and_ends_with_its_time() -> None:
    features, images = bars(50, 0)
    first, again = (inversion.fit(features[None], images, steps=3, seconds=200, batch=8, device=CPU) for _ in range(2))
    assert first.loss == again.loss
    assert inversion.fit(features[None], images, steps=10**6, seconds=0.1, batch=8, device=CPU).steps < 10**4


class Sums(nn.Module):
    """Features that are the sums of the colours."""

    num_features = 3

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(dim=(2, 3))


SUBJECT = SimpleNamespace(device=CPU, config=SimpleNamespace(data=SimpleNamespace(mean=(0.0,) * 3, std=(1.0,) * 3)))


def test_a_vit_sees_half_of_its_patches_and_nothing_of_the_rest() -> None:
    vit = build_backbone(BackboneConfig(name="vit_tiny_patch16_224", width=0.125, depth=(1,), image_size=16, patch_size=4))
    images = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8)
    looks = Looks(SUBJECT, seed=0)
    features = looks.of(vit, images, 2)
    assert features.shape == (2, 3, vit.num_features) and len(looks.seen) == 2
    hidden = looks.seen[0].isnan()
    assert hidden.float().mean() == 0.5
    assert torch.equal(looks.seen[0][~hidden], (images.float() / 255)[~hidden])
    other = torch.where(hidden, 255 - images, images)
    torch.testing.assert_close(Looks(SUBJECT, seed=0).of(vit, other, 2)[0], features[0])
    assert not torch.allclose(Looks(SUBJECT, seed=0).of(vit, other, 2)[1], features[1])


def test_other_networks_see_a_box() -> None:
    images = torch.randint(0, 256, (20, 24, 24, 3), dtype=torch.uint8)
    looks = Looks(SUBJECT, seed=0)
    features = looks.of(Sums(), images, 1)[0]
    (seen,) = looks.seen
    shares = (~seen.isnan()).float().mean(dim=(1, 2, 3))
    assert ((shares > 0.2) & (shares <= 0.5)).all() and shares.unique().numel() > 3
    means = torch.nanmean(seen.flatten(1, 2), dim=1)  # enlarging keeps the mean colour, nearly
    torch.testing.assert_close(features / 24**2, means, atol=0.06, rtol=0)
    few = Looks(SUBJECT, seed=0).of(Sums(), torch.cat([images] * 40), 1, seconds=0)
    assert few.shape[1] == 256  # what took too long is left out, but for the first batch


def test_shares_by_hand() -> None:
    images = torch.rand(50, 3, 4, 4)
    colours = images.mean(dim=(2, 3), keepdim=True).expand_as(images)
    assert explained(images, images) == (1, 1)
    assert explained(images, colours) == pytest.approx((1, 0), abs=0.05)
    assert explained(images, images.mean(dim=0).expand_as(images)) == pytest.approx((0, 0), abs=1e-5)

    same = images.expand(5, *images.shape)
    assert alike(same) == 1 and alike(torch.rand(5, 500, 3, 4, 4)) == pytest.approx(0, abs=0.02)


def test_the_picture_has_a_row_for_each_image_and_a_block_for_each_backbone(tmp_path: Path) -> None:
    seen = np.full((2, 4, 8, 8, 3), np.nan)
    samples = {"trained": np.full((2, 4, 8, 8, 3), (0, 1, 0)), "untrained": np.full((2, 4, 8, 8, 3), (0, 0, 1.2))}
    words = {"trained": ["kept: a", "b", "c"], "untrained": ["kept: d"]}
    picture = read(draw(np.stack([plain(8, 8, RED)] * 2), seen, samples, words, tmp_path / "keeps.png"))
    assert near(picture, LIME).sum() == pytest.approx(near(picture, (0, 0, 255)).sum(), rel=0.02)
    assert near(picture, LIME).sum() == pytest.approx(4 * near(picture, RED).sum(), rel=0.05)
    assert near(picture, style.BLUE).any()
