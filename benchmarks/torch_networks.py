"""The same networks written in PyTorch, as what people run today: the peers of `train_step` and `inference`."""

import torch
from torch import nn


class SimAM(nn.Module):
    """The formula as one writes it in PyTorch, (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, e_lambda: float = 0.1):
        super().__init__()
        self.e_lambda = e_lambda

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        squared = torch.square(x - x.mean((2, 3), keepdim=True))
        variance = squared.sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3] - 1)
        return x * torch.sigmoid(squared / (4 * (variance + self.e_lambda)) + 0.5)


def _conv(inputs: int, outputs: int, size: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)


def _attention(name: str) -> list[nn.Module]:
    return [SimAM()] if name == "simam" else []


class Residual(nn.Module):
    """activation(body(x) + shortcut(x))."""

    def __init__(self, body: nn.Module, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.body = body
        same = stride == 1 and inputs == outputs
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        )
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.body(x) + self.shortcut(x))


def _basic(inputs: int, width: int, stride: int, attention: str) -> Residual:
    layers = [_conv(inputs, width, 3, stride), nn.BatchNorm2d(width), nn.ReLU(inplace=True), _conv(width, width, 3)]
    return Residual(nn.Sequential(*layers, *_attention(attention), nn.BatchNorm2d(width)), inputs, width, stride)


def _bottleneck(inputs: int, width: int, stride: int, attention: str, groups: int = 1) -> Residual:
    inner, outputs = width * (2 if groups > 1 else 1), 4 * width
    layers = [
        _conv(inputs, inner),
        nn.BatchNorm2d(inner),
        nn.ReLU(inplace=True),
        _conv(inner, inner, 3, stride, groups),
    ]
    layers += [*_attention(attention), nn.BatchNorm2d(inner), nn.ReLU(inplace=True)]
    return Residual(nn.Sequential(*layers, _conv(inner, outputs), nn.BatchNorm2d(outputs)), inputs, outputs, stride)


def _resnet(sizes: tuple[int, ...], attention: str, bottleneck: bool, groups: int = 1) -> nn.Sequential:
    layers = [_conv(3, 64, 7, 2), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for stage, size in enumerate(sizes):
        for i in range(size):
            width, stride = 64 * 2**stage, 2 if stage and not i else 1
            if bottleneck:
                layers.append(_bottleneck(inputs, width, stride, attention, groups))
            else:
                layers.append(_basic(inputs, width, stride, attention))
            inputs = 4 * width if bottleneck else width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


class Inverted(nn.Module):
    """MobileNetV2's block: expansion, depthwise, projection; the input added where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, attention: str):
        super().__init__()
        inner = inputs * expansion
        expand = [_conv(inputs, inner), nn.BatchNorm2d(inner), nn.ReLU6(inplace=True)] if expansion > 1 else []
        layers = [*expand, _conv(inner, inner, 3, stride, inner), *_attention(attention), nn.BatchNorm2d(inner)]
        layers += [nn.ReLU6(inplace=True), _conv(inner, outputs), nn.BatchNorm2d(outputs)]
        self.body, self.adds = nn.Sequential(*layers), stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.adds else self.body(x)


def _mobilenet_v2(attention: str) -> nn.Sequential:
    from simam_jax.models.mobilenet_v2 import STAGES

    layers = [_conv(3, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU6(inplace=True)]
    inputs = 32
    for expansion, width, size, stride in STAGES:
        for i in range(size):
            layers.append(Inverted(inputs, width, 1 if i else stride, expansion, attention))
            inputs = width
    layers += [_conv(inputs, 1280), nn.BatchNorm2d(1280), nn.ReLU6(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000))


def create(name: str, attention: str) -> nn.Module:
    """resnet18, resnet50, resnext50_32x4d or mobilenet_v2, with simam or none, for 1,000 classes."""
    networks = {
        "resnet18": lambda: _resnet((2, 2, 2, 2), attention, bottleneck=False),
        "resnet50": lambda: _resnet((3, 4, 6, 3), attention, bottleneck=True),
        "resnext50_32x4d": lambda: _resnet((3, 4, 6, 3), attention, bottleneck=True, groups=32),
        "mobilenet_v2": lambda: _mobilenet_v2(attention),
    }
    return networks[name]().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
