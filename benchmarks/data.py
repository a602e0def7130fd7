"""The data sets of the main demo: pictures of handwritten digits as rows of numbers.

    x [images, pixels]  float32, scaled to 0..1, then normalised by mean and deviation of the training images
    y [images]          int64, the digit in the picture

`digits` needs no download: it comes with scikit-learn. `idx` reads MNIST, Fashion-MNIST and their like from
the IDX files they are published as (http://yann.lecun.com/exdb/mnist, at the end of the page).
"""

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

SIDE = 28  # pixels: the digits are enlarged to the size of MNIST's
TRAIN_SHARE = 0.8
IMAGES, LABELS = 3, 1  # an IDX file of images has three dimensions, one of labels has one


class DataError(Exception):
    """A data set that cannot be used; the message is one sentence that names the file."""


@dataclass(frozen=True)
class Dataset:
    """Images to learn and others to test with."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def pixels(self) -> int:
        """Numbers in an image."""
        return self.train_x.shape[1]

    @property
    def classes(self) -> int:
        """Labels are below this."""
        return int(max(self.train_y.max(), self.test_y.max())) + 1

    def to(self, device: torch.device) -> "Dataset":
        """The same images on another device."""
        tensors = (self.train_x, self.train_y, self.test_x, self.test_y)
        return Dataset(self.name, *(tensor.to(device) for tensor in tensors))


def digits(seed: int) -> Dataset:
    """The 1797 digits of scikit-learn, enlarged from 8x8 to 28x28 pixels; `seed` chooses the test images."""
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    x = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", align_corners=False).flatten(1)
    y = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[: int(TRAIN_SHARE * len(x))], order[int(TRAIN_SHARE * len(x)) :]
    return _normalised("digits", x[train], y[train], x[test], y[test])


def idx(folder: Path, classes: int) -> Dataset:
    """The four IDX files in `folder`, plain or gzipped, with labels below `classes`.

    Raises:
        DataError: a file is missing, damaged, or does not fit the others.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder with IDX files")
    train_x, train_y = _pair(folder, "train", classes)
    test_x, test_y = _pair(folder, "t10k", classes)
    if train_x.shape[1:] != test_x.shape[1:]:
        sizes = [f"{images.shape[1]}x{images.shape[2]}" for images in (test_x, train_x)]
        raise DataError(f"{_find(folder, 't10k', IMAGES)}: images of {sizes[0]} pixels, expected {sizes[1]}")
    train_x, test_x = (images.flatten(1).float() / 255 for images in (train_x, test_x))
    return _normalised(folder.resolve().name, train_x, train_y, test_x, test_y)


def _normalised(name: str, train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> Dataset:
    deviation, mean = torch.std_mean(train_x)
    deviation = deviation.clamp_min(1 / 255)  # images all of one grey have none to divide by
    return Dataset(name, (train_x - mean) / deviation, train_y, (test_x - mean) / deviation, test_y)


def _pair(folder: Path, part: str, classes: int) -> tuple[Tensor, Tensor]:
    """Images [count, rows, columns] and labels [count] of one part, "train" or "t10k"."""
    images_file, labels_file = _find(folder, part, IMAGES), _find(folder, part, LABELS)
    images, labels = _read(images_file, IMAGES), _read(labels_file, LABELS).long()
    if len(images) != len(labels):
        raise DataError(
            f"{labels_file}: {len(labels)} labels, but {len(images)} images in {images_file.name}"
        )
    if (highest := int(labels.max())) >= classes:
        raise DataError(f"{labels_file}: holds the label {highest}, expected labels below {classes}")
    return images, labels


def _find(folder: Path, part: str, dimensions: int) -> Path:
    stem = f"{part}-{'images' if dimensions == IMAGES else 'labels'}"
    names = [f"{stem}{mark}idx{dimensions}-ubyte{end}" for end in ("", ".gz") for mark in "-."]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{folder / names[0]}: no such file, expected it plain or as {names[2]}")


def _read(path: Path, dimensions: int) -> Tensor:
    """The bytes of one IDX file, in its own shape.

    An IDX file is a magic number (two zero bytes, the element type, 8 for unsigned bytes, and the number of
    dimensions), a 4-byte big-endian size for each dimension, then the elements, the last index fastest.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: expected a whole gzip file ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error

    start = 4 + 4 * dimensions
    if len(content) < start:
        raise DataError(f"{path}: truncated, expected a header of {start} bytes and found {len(content)}")
    if content[:4] != (magic := bytes([0, 0, 8, dimensions])):
        kind = "images" if dimensions == IMAGES else "labels"
        raise DataError(f"{path}: starts with 0x{content[:4].hex()}, expected 0x{magic.hex()} for {kind}")
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    if 0 in shape:
        raise DataError(f"{path}: holds no elements at all")
    if len(content) != (expected := start + math.prod(shape)):
        damage = "truncated" if len(content) < expected else "oversized"
        sizes = "x".join(map(str, shape))
        raise DataError(f"{path}: {damage}, expected {expected} bytes for {sizes} and found {len(content)}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).reshape(shape)
