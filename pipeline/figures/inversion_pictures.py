"""Picture of the content of features: images that a decoder samples from the features of parts of an image (MSN's fig. 4 and 5).

A decoder (`pipeline/figures/inversion.py`) learns, from training images, to sample whole images from the frozen features of their
parts. Then it samples from the features of several parts of held-out images. The features keep what the samples of a row share with
the image; the differences between samples are lost. The same is drawn for the untrained backbone.

A ViT sees half of its patches, the others are dropped; other networks see an enlarged box of a quarter to half of the image.

Departs:
    MSN (Assran et al. 2022, arXiv:2204.07141) samples from a diffusion model of ImageNet conditioned on features (RCDM,
    arXiv:2112.09164), which takes days on a GPU. This small decoder is trained in minutes on the images of the run. Its samples
    are blurred: only colours and coarse shapes can be read from them.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.parts.counter_random import draw_seed
from methods.parts.masking import num_kept, num_patches, random_keep
from methods.parts.vit import ViT
from pipeline.evaluate.features import Triple, extract
from pipeline.figures import inversion
from pipeline.figures.context import FigureContext
from pipeline.figures.pictures import picture
from pipeline.figures.style import BLUE, GRAY, INK, cell, picture_at, show, write
from pipeline.machine import choose_device

IMAGES, LOOKS = 4000, 2  # training images of a decoder, and looks at each
SHOWN, SAMPLES = 8, 4  # images in the picture, and samples of each
STEPS = 1500  # training steps of a decoder
SECONDS = 60.0  # largest CPU time for the training of each decoder, and for its features
MASKED = 0.5  # fraction of a ViT's patches that a look drops
BOX = (0.25, 0.5)  # area of a box as a fraction of the image
LARGEST = 64  # largest side of a decoded image, pixels


@picture("keeps", every_run=False)
def keeps(subject: FigureContext, path: Path) -> Path:
    """What the features keep of an image: samples of a small decoder from features of its parts; about 2 minutes."""
    found, (held_out, source) = subject.training_images(IMAGES), subject.a_few_images(64)
    side, (_, precision) = min(held_out.shape[1], LARGEST), choose_device(subject.config)
    truth, shown = small(held_out, side), torch.from_numpy(np.linspace(0, len(held_out) - 1, min(SHOWN, len(held_out))).astype(int))
    samples, captions, count, steps = {}, {}, len(found.images), STEPS
    for name, network in (("trained", subject.backbone), ("untrained", subject.calibrated)):
        features = Looks(subject, seed=0).of(network, found.images[:count], LOOKS, seconds=SECONDS)
        count = features.shape[1]
        images, limits = small(found.images[:count], side), {"steps": steps, "seconds": SECONDS}
        fitted = inversion.fit(features, images, device=subject.device, precision=precision, **limits)  # type: ignore[arg-type]
        steps = fitted.steps  # the second decoder has as many steps and images as the first
        looks = Looks(subject, seed=1)
        drawn = fitted.decoder.sample(looks.of(network, held_out, SAMPLES), each=8)  # (S, 8, B, 3, side, side)
        colours, shapes = explained(truth, drawn.flatten(0, 1).mean(dim=0))
        captions[name] = [
            f"kept: {percent(colours)} of colours, {percent(shapes)} of shapes",
            f"samples of a row: {percent(alike(drawn[:, 0]))} alike",
        ]
        captions[name] += [f"decoder stopped at step {fitted.steps} of {STEPS}"] if fitted.steps < STEPS else []
        samples[name] = drawn[:, 0][:, shown].permute(1, 0, 3, 4, 2).numpy()
    seen = torch.stack(looks.seen)[:, shown].transpose(0, 1).numpy()
    return draw(held_out[shown].numpy(), seen, samples, captions, path, source=source)


class Looks:
    """Random looks at parts of images, the same for every network with patches of the same size.

    Attributes:
        seen: the visible part of the last images in each look: float `(N, H, W, 3)` in [0, 1], NaN elsewhere.
    """

    def __init__(self, subject: FigureContext, seed: int) -> None:
        self.device, self.mean, self.std = subject.device, subject.config.data.mean, subject.config.data.std
        self.generator = torch.Generator().manual_seed(seed)
        self.seen: list[Tensor] = []

    def of(self, network: nn.Module, images: Tensor, looks: int, *, seconds: float = float("inf")) -> Tensor:
        """Return the features of `looks` parts of each image, `(N, H, W, 3) -> (looks, n, D)`; n < N if `seconds` have passed."""
        began, features = time.process_time(), []
        for batch in images.split(256):
            self.seen = []
            features.append(torch.stack([self.look(network, batch) for _ in range(looks)]))
            if time.process_time() - began > seconds:
                break
        return torch.cat(features, dim=1)

    def look(self, network: nn.Module, images: Tensor) -> Tensor:
        settings: dict[str, Triple | torch.device] = {"mean": self.mean, "std": self.std, "device": self.device}
        if isinstance(network, ViT):
            vit = network
            patches = num_patches(vit, images.shape[1])
            keep = random_keep(torch.arange(len(images)), patches, num_kept(patches, MASKED), seed=draw_seed(self.generator))
            self.seen.append(only(images, torch.zeros(len(images), patches).scatter_(1, keep, 1.0)))
            return extract(vit, images, forward=lambda x: vit.tokens(x, keep=keep.to(x.device)).cls, **settings)  # type: ignore[arg-type]
        share = BOX[0] + (BOX[1] - BOX[0]) * torch.rand(len(images), generator=self.generator)
        size = (images.shape[1] * share.sqrt()).long().clamp(min=1)
        top, left = (((images.shape[1] - size + 1) * torch.rand(len(images), generator=self.generator)).long() for _ in range(2))
        boxes, inside = [], torch.zeros(images.shape[:3])
        for i, (s, t, w) in enumerate(torch.stack([size, top, left], dim=1).tolist()):
            inside[i, t : t + s, w : w + s] = 1
            boxes.append(small(images[i : i + 1, t : t + s, w : w + s], images.shape[1]))
        self.seen.append(only(images, inside.flatten(1)))
        parts = torch.cat(boxes).mul(255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        return extract(network, parts, **settings)  # type: ignore[arg-type]


def only(images: Tensor, inside: Tensor) -> Tensor:
    """Return images `(N, H, W, 3)` in [0, 1], with NaN in the cells of a square grid `(N, g * g)` that are 0."""
    side = round(inside.shape[1] ** 0.5)
    grid = F.interpolate(inside.view(-1, 1, side, side), size=images.shape[1:3], mode="nearest").permute(0, 2, 3, 1)
    return torch.where(grid > 0, images.float() / 255, torch.nan)


def small(images: Tensor, side: int) -> Tensor:
    """Resize uint8 `(N, H, W, 3)` to `(N, 3, side, side)` in [0, 1]."""
    x = images.permute(0, 3, 1, 2).float() / 255
    return x if x.shape[-1] == side else F.interpolate(x, size=(side, side), mode="bilinear", antialias=True, align_corners=False)


def explained(images: Tensor, means: Tensor) -> tuple[float, float]:
    """Return the explained variance of predictions of images `(B, 3, H, W)`: of their mean colours, and of the rest.

    It is 1 - squared error / variance, and below 0 if predictions are worse than the mean.
    """
    colours, guessed = images.mean(dim=(2, 3), keepdim=True), means.mean(dim=(2, 3), keepdim=True)
    found = []
    for x, y in ((colours, guessed), (images - colours, means - guessed)):
        found.append(float(1 - (x - y).square().mean() / (x - x.mean(dim=0)).square().mean().clamp(min=1e-12)))
    return found[0], found[1]


def alike(samples: Tensor) -> float:
    """Return the fraction of the variance of samples `(S, B, ...)` between images, not between samples of an image."""
    within = samples.var(dim=0).mean()
    return float(1 - within / samples.flatten(0, 1).var(dim=0).mean().clamp(min=1e-12))


def percent(share: float) -> str:
    return f"{100 * max(0.0, share):.0f} %"


def draw(
    images: np.ndarray,
    seen: np.ndarray,
    samples: dict[str, np.ndarray],
    captions: dict[str, list[str]],
    path: Path,
    *,
    source: str = "held-out images",
) -> Path:
    """Draw a row for each image: the image, its visible parts, and the samples of each backbone from each part.

    Args:
        images: uint8 `(B, H, W, 3)`.
        seen: `(B, S, H, W, 3)` in [0, 1], NaN for pixels that are not visible.
        samples: `(B, S, h, w, 3)` by name of the backbone, clipped to [0, 1].
        captions: up to three lines by name of the backbone.
        path: the PNG to write.
        source: description of the images.
    """
    count = seen.shape[1]
    side, step, margin, gap, head = 0.72, 0.76, 0.2, 0.26, 1.62  # inches
    lefts = [margin + step + gap + block * (count * step + gap) for block in range(1 + len(samples))]
    with picture_at(path, lefts[-1] + count * step + margin, head + len(images) * step + margin) as figure:
        write(figure, margin, 0.36, "What the features keep", size=13, weight="bold")
        about = f"{source}; each column: another part of the image, and what a small decoder makes of its features; "
        write(figure, margin, 0.6, about + "what a row has in common is kept, what differs is lost", size=8, color=GRAY)
        write(figure, margin, 0.99, "image", size=8.5, weight="bold")
        write(figure, lefts[0], 0.99, "parts that are seen", size=8.5, weight="bold")
        for left, (name, lines) in zip(lefts[1:], captions.items(), strict=True):
            write(figure, left, 0.99, f"{name} backbone", size=8.5, weight="bold", color=BLUE if name == "trained" else INK)
            for line, text in enumerate(lines):
                write(figure, left, 1.16 + 0.16 * line, text, size=8, color=GRAY)
        for i, image in enumerate(images):
            top = head + i * step
            show(cell(figure, margin, top, side, side), image, side)
            for left, block in zip(
                lefts, (np.nan_to_num(seen[i], nan=0.85), *(part[i].clip(0, 1) for part in samples.values())), strict=True
            ):
                for column, one in enumerate(block):
                    show(cell(figure, left + column * step, top, side, side), one, side)
    return path
