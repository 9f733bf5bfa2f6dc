"""The crops of a method: their declaration (`CropGroup`) and their values in one step (`Views`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from methods.parts.errors import ConfigError, require
from methods.parts.fields import SearchRange, at_least, check_limits, fraction, searchable

Range = tuple[float, float]
# global: shows most of the image; local: a small part of it; target: only for the network that gives the targets
Role = Literal["global", "local", "target"]
ROLES_BY_NAME: dict[str, Role] = {"local": "local", "focal": "local", "target": "target"}  # of groups in files without roles; else global


@dataclass(frozen=True, kw_only=True)
class CropGroup:
    """Crops that share one recipe of augmentation, in the order crop, flip, jitter, grayscale, blur, solarize."""

    role: Role = "global"  # the part that the crops have in the method: global, local, or target (MSN: of the target encoder alone)
    #: crops of this kind per image
    count: int = at_least(0, 2, SearchRange(scale="choice", choices=(2, 4, 6), reason="more small crops help, at a cost"))
    size: int = at_least(4, 224)  # side of a finished crop, pixels
    #: area of the box as a fraction of the image's area
    scale: tuple[float, float] = searchable(
        (0.08, 1.0), SearchRange(scale="choice", choices=((0.08, 1.0), (0.2, 1.0), (0.4, 1.0)), reason="small pictures want larger crops")
    )
    ratio: Range = (3 / 4, 4 / 3)  # width / height of the box, drawn log-uniformly
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    flip: float = fraction(0.5)  # probability of a horizontal flip
    jitter: tuple[float, float, float, float] = (0.8, 0.8, 0.8, 0.2)  # brightness, contrast, saturation, hue
    jitter_probability: float = fraction(0.8)
    grayscale: float = fraction(0.2, SearchRange(0.0, 0.5, "linear", reason="0 where colour matters"))  # probability
    grayscale_first: bool = False  # before the jitter (MoCo v1)
    blur: float = fraction(0.5, SearchRange(0.0, 1.0, "linear", reason="0 on small pictures"))  # probability
    blur_sigma: Range = (0.1, 2.0)  # standard deviation in pixels, drawn uniformly
    blur_taps: int | None = None  # odd width of the kernel, pixels (SimCLR and BYOL at 224: 23); None = four of the largest sigma each way
    solarize: float = fraction(0.0)  # probability
    solarize_threshold: float = fraction(0.5)  # in [0, 1]; values at or above are inverted

    def __post_init__(self) -> None:
        check_limits(self)
        require(0 < self.scale[0] <= self.scale[1] <= 1, "scale", self.scale, "use 0 < low <= high <= 1, e.g. 0.14 1.0")
        require(0 < self.ratio[0] <= self.ratio[1], "ratio", self.ratio, "use 0 < low <= high, e.g. 0.75 1.3333")
        require(all(j >= 0 for j in self.jitter) and self.jitter[3] <= 0.5, "jitter", self.jitter, "use strengths >= 0, hue at most 0.5")
        taps = self.blur_taps
        require(taps is None or (taps % 2 == 1 and taps < 2 * self.size), "blur_taps", taps, "use an odd number below twice the size")
        require(0 < self.blur_sigma[0] <= self.blur_sigma[1], "blur_sigma", self.blur_sigma, "use 0 < low <= high, in pixels")

    def describe(self) -> str:
        """Return the declaration as one readable line."""
        parts = [f"{self.count} x {self.size} px", f"scale {self.scale[0]:g}-{self.scale[1]:g}"]
        if self.flip:
            parts.append(f"flip {self.flip:g}")
        if self.interpolation != "bilinear":
            parts.insert(1, self.interpolation)
        if any(self.jitter) and self.jitter_probability:
            parts.append(f"jitter ({', '.join(f'{j:g}' for j in self.jitter)}) p {self.jitter_probability:g}")
        if self.grayscale:
            parts.insert(len(parts) - self.grayscale_first, f"gray {self.grayscale:g}")
        if self.blur:
            taps = f" {self.blur_taps} taps" if self.blur_taps else ""
            parts.append(f"blur {self.blur_sigma[0]:g}-{self.blur_sigma[1]:g} px{taps} p {self.blur:g}")
        if self.solarize:
            parts.append(f"solarize {self.solarize:g}")
        return ", ".join(parts)


ViewsConfig = dict[str, CropGroup]


@dataclass
class Views:
    """All crops of one micro-batch, finished and on the training device.

    Attributes:
        stacks: the crops of each group, `(V_g * B, 3, H, W)`; row `v * B + i` is crop `v` of image `i`.
        counts: V_g, crops of each group per image.
        image_ids: `(B,)` int64.
        labels: `(B,)` int64; -1 = unknown.
        roles: the role of each group; a group that is not there has the role `global`.
        host_ids: the image ids on the CPU.

    Raises:
        ConfigError: a stack does not have V_g * B rows.
    """

    stacks: dict[str, Tensor]
    counts: Mapping[str, int]
    image_ids: Tensor
    labels: Tensor
    roles: Mapping[str, Role] = field(default_factory=dict)
    joined: dict[tuple[str, ...], Tensor] = field(default_factory=dict, repr=False)  # stacks of equal size, joined once for all networks
    host_ids: Tensor = None  # type: ignore[assignment]  # given with image ids on a GPU, which only a wait could read

    def __post_init__(self) -> None:
        batch = len(self.image_ids)
        self.host_ids = self.image_ids if self.host_ids is None else self.host_ids
        if len(self.host_ids) != batch:
            raise ConfigError(f"host_ids: {len(self.host_ids)} for {batch} images; give those of these images, or none on a CPU")
        for name, stack in self.stacks.items():
            if len(stack) != self.counts[name] * batch:
                raise ConfigError(f"views.{name}: {len(stack)} rows for {self.counts[name]} crops of {batch} images")

    @property
    def groups(self) -> dict[str, list[int]]:
        """The positions of each group's crops in `crops`."""
        positions, first = {}, 0
        for name in self.stacks:
            positions[name] = list(range(first, first + self.counts[name]))
            first += self.counts[name]
        return positions

    @property
    def crops(self) -> list[Tensor]:
        """Every crop, each `(B, 3, H, W)`, in the declared order."""
        return [crop for name, stack in self.stacks.items() if self.counts[name] for crop in stack.chunk(self.counts[name])]

    def positions(self, role: Role) -> list[int]:
        """Return the positions in `crops` of all crops of a role."""
        return [i for name, places in self.groups.items() if self.roles.get(name, "global") == role for i in places]

    def of(self, *roles: Role) -> Views:
        """Return the same images with the crops of these roles only."""
        stacks = {name: s for name, s in self.stacks.items() if self.counts[name] and self.roles.get(name, "global") in roles}
        return replace(self, stacks=stacks)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return the two crops, each `(B, 3, H, W)`, for a method that compares two.

        Raises:
            ConfigError: there are more or fewer.
        """
        crops = self.crops
        if len(crops) != 2:
            counts = ", ".join(f"views.{name}.count={count}" for name, count in self.counts.items())
            raise ConfigError(f"{counts}: {len(crops)} crops, but this method compares two; use one group of 2 or two groups of 1")
        return crops[0], crops[1]

    def by_resolution(self) -> list[Tensor]:
        """Return the stacks, those of consecutive groups of one size joined to one; the order of crops is kept."""
        runs: list[list[str]] = []
        for name, stack in self.stacks.items():
            if not self.counts[name]:
                continue
            if runs and self.stacks[runs[-1][-1]].shape[-2:] == stack.shape[-2:]:
                runs[-1].append(name)
            else:
                runs.append([name])
        return [self._join(tuple(run)) for run in runs]

    def _join(self, names: tuple[str, ...]) -> Tensor:
        if len(names) == 1:
            return self.stacks[names[0]]
        if names not in self.joined:
            self.joined[names] = torch.cat([self.stacks[name] for name in names])
        return self.joined[names]

    def map_crops(self, network: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a network to every crop, in one forward pass for each run of crops of one size: `(V * B, D)`, crop by crop."""
        return torch.cat([network(stack) for stack in self.by_resolution()])

    def split(self, rows: Tensor) -> list[Tensor]:
        """Split rows by crop: `(V * B, D)` -> V times `(B, D)`."""
        return list(rows.split(len(self.image_ids)))
