"""The selective-kernel block of SimCLR v2's ResNets. Li et al. 2019, arXiv:1903.06586, in the form of arXiv:2006.10029.

timm's `skresnet` models split the input of the block and dilate one half; these do neither.
"""

from __future__ import annotations

from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from methods.parts.errors import require


class SelectiveKernel(nn.Module):
    """Two streams of one 3x3 convolution, weighed channel by channel: `(B, C, H, W) -> (B, F, H / stride, W / stride)`.

    With x1, x2 the streams after batch norm and ReLU, and g the mean over pixels of x1 + x2:
    a = softmax over the streams of W2 relu(BN(W1 g)), output = a1 x1 + a2 x2.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        narrow = max(channels // 16, 32)
        self.conv = nn.Conv2d(in_channels, 2 * channels, 3, stride=stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(2 * channels)
        self.squeeze = nn.Conv2d(channels, narrow, 1, bias=False)
        self.squeeze_bn = nn.BatchNorm2d(narrow)
        self.weigh = nn.Conv2d(narrow, 2 * channels, 1, bias=False)
        for conv in (self.conv, self.squeeze, self.weigh):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        streams = self.bn(self.conv(x)).relu().unflatten(1, (2, -1))  # (B, 2, F, H, W)
        mean = streams.sum(dim=1).mean(dim=(2, 3), keepdim=True)
        weights = self.weigh(self.squeeze_bn(self.squeeze(mean)).relu()).unflatten(1, (2, -1)).softmax(dim=1)
        mixed: Tensor = (streams * weights).sum(dim=1)
        return mixed


def select_kernels(backbone: nn.Module) -> None:
    """Replace the 3x3 convolution, its norm and its ReLU in every bottleneck of a timm ResNet by a `SelectiveKernel`.

    Raises:
        ConfigError: there are no bottlenecks.
    """
    blocks = [block for block in backbone.modules() if isinstance(block, Bottleneck)]
    require(bool(blocks), "backbone.selective_kernels", True, "needs a ResNet with bottlenecks, e.g. backbone.name=resnet50")
    for block in blocks:
        conv = block.conv2
        block.conv2 = SelectiveKernel(conv.in_channels, conv.out_channels, conv.stride[0])
        block.bn2 = block.act2 = nn.Identity()
