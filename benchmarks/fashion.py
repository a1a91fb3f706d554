"""Fashion-MNIST and a ResNet-20 for it: what pruning of channels is measured on."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dwindle.frontends.assets import FASHION, AssetError, fetch

TRAIN, BATCH, EPOCHS = 30_000, 128, 4
RATE, WEIGHT_DECAY, SMOOTHED = 0.2, 5e-4, 0.9  # of SGD, which has momentum


@dataclass(frozen=True)
class Pictures:
    """Standardised grey values (N, 1, 28, 28), fp32, and classes (N,), int64."""

    images: Tensor
    classes: Tensor


def load_fashion(*, quiet: bool = False) -> tuple[Pictures, Pictures]:
    """The first TRAIN pictures of the training set, and the 10,000 of the test set. Raises AssetError."""
    folder = (fetch(FASHION, quiet=quiet) / FASHION.key).parent
    train, test = (_pictures(folder, part) for part in ("train", "t10k"))
    mean, deviation = train.images.mean(), train.images.std()
    scaled = [Pictures((part.images - mean) / deviation, part.classes) for part in (train, test)]
    return Pictures(scaled[0].images[:TRAIN], scaled[0].classes[:TRAIN]), scaled[1]


def _pictures(folder: Path, part: str) -> Pictures:
    images = _idx(folder / f"{part}-images-idx3-ubyte.gz", 3).float().unsqueeze(1)
    return Pictures(images, _idx(folder / f"{part}-labels-idx1-ubyte.gz", 1).long())


def _idx(file: Path, dims: int) -> Tensor:
    """An IDX file: two zero bytes, 8 for uint8, the number of dimensions, each as big-endian int32, the values."""
    content = gzip.decompress(file.read_bytes())
    if content[:4] != bytes((0, 0, 8, dims)):
        raise AssetError(f"{file.name} is no IDX file of bytes", required=f"{dims} dimensions", found=content[:4].hex())
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    return torch.frombuffer(bytearray(content[4 + 4 * dims :]), dtype=torch.uint8).reshape(shape)


class Block(nn.Module):
    """Two 3x3 convolutions with batch norms beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if (before, stride) != (after, 1):
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        """(N, before, H, W) to (N, after, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet20(nn.Module):
    """He et al. 2016 (arXiv 1512.03385), section 4.2, n = 3, with a stem of stride 2: 272 thousand parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        widths = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
        self.blocks = nn.Sequential(*(Block(*width) for width in widths))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 28, 28) to logits (N, 10)."""
        x = self.blocks(F.relu(self.bn(self.stem(x))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def make_resnet(seed: int) -> ResNet20:
    """With random weights that the seed decides."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ResNet20()


def train_fashion(
    model: nn.Module,
    data: Pictures,
    *,
    seed: int,
    epochs: int = EPOCHS,
    rate: float = RATE,
    after_step: Callable[[int, Tensor], Any] | None = None,
) -> int:
    """SGD on a OneCycle schedule; returns the steps. after_step(step, loss) comes before gradients are cleared."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=rate, momentum=SMOOTHED, weight_decay=WEIGHT_DECAY, nesterov=True)
    steps = epochs * (len(data.classes) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for step, (images, classes) in enumerate(_batches(data, epochs, seed), 1):
        loss = F.cross_entropy(model(images), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if after_step is not None:
            after_step(step, loss.detach())
    model.eval()
    return steps


def _batches(data: Pictures, epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(data.classes), generator=generator)
        for rows in torch.split(order[: len(order) // BATCH * BATCH], BATCH):
            yield data.images[rows], data.classes[rows]


@torch.no_grad()
def right(model: Callable[[Tensor], Tensor], data: Pictures) -> Tensor:
    """bool (N,): whether each picture's class is found."""
    found = [model(part).argmax(1) for part in torch.split(data.images, 500)]
    return torch.cat(found) == data.classes
