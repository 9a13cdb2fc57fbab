"""Small data sets on disk, of real images, in the formats that the data modules read."""

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

FASHION = Path("/usr/share/datasets/fashion-mnist")
MNIST_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def real_images(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Real grey images uint8 `[count, 32, 32]` and labels `[count]`: Fashion-MNIST if installed, else digits."""
    if FASHION.is_dir():
        with gzip.open(FASHION / "train-images-idx3-ubyte.gz") as file:
            pixels = np.frombuffer(file.read(16 + count * 784)[16:], np.uint8)
        with gzip.open(FASHION / "train-labels-idx1-ubyte.gz") as file:
            labels = np.frombuffer(file.read(8 + count)[8:], np.uint8)
        return np.pad(pixels.reshape(count, 28, 28), ((0, 0), (2, 2), (2, 2))), labels
    digits = load_digits()
    images = (digits.images[:count] * 255 / 16).round().astype(np.uint8)
    return images.repeat(4, axis=1).repeat(4, axis=2), digits.target[:count].astype(np.uint8)


def python2_pickle(entries: dict[str, Any]) -> bytes:
    """A dictionary as Python 2 with numpy 1 pickled it by protocol 2: text is bytes, arrays come by `_reconstruct`."""
    return b"\x80\x02}(" + b"".join(_text(key) + _value(value) for key, value in entries.items()) + b"u."


def _text(text: str) -> bytes:
    return b"U" + bytes([len(text)]) + text.encode()


def _integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, list):
        return b"](" + b"".join(map(_value, value)) + b"e"
    if isinstance(value, int):
        return _integer(value)
    shape = b"(" + b"".join(map(_integer, value.shape)) + b"t"
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + _text("b") + b"\x87R"
    state = b"(K\x03" + _text("|") + b"NNN" + _integer(-1) * 2 + b"K\x00tb"
    dtype = b"cnumpy\ndtype\n" + _text("u1") + b"K\x00K\x01\x87R" + state
    content = b"T" + struct.pack("<i", value.nbytes) + value.tobytes()
    return empty + b"(K\x01" + shape + dtype + b"\x89" + content + b"tb"


def write_cifar(folder: Path, num_classes: int = 10, per_batch: int = 200, test: int = 100) -> dict[str, Any]:
    """Writes real images in CIFAR's on-disk format below a folder.

    CIFAR-10 becomes five batches of `per_batch` images, CIFAR-100 one training file of as many; CIFAR-100's fine labels
    are 10 times the coarse ones. The colours differ: the second is half as bright as the first, the third inverted.

    Returns:
        `images` uint8 `[N, 3, 32, 32]` and `labels` `[N]` of training and test images together, in the order written.
    """
    grey, coarse = real_images(5 * per_batch + test)
    images = np.stack([grey, grey // 2, 255 - grey], axis=1)
    labels = coarse.astype(int) * (num_classes // 10)
    sizes = [per_batch] * 5 if num_classes == 10 else [5 * per_batch]
    names = [f"data_batch_{i + 1}" for i in range(5)] + ["test_batch"] if num_classes == 10 else ["train", "test"]
    below = folder / ("cifar-10-batches-py" if num_classes == 10 else "cifar-100-python")
    below.mkdir(parents=True)
    start = 0
    for name, size in zip(names, [*sizes, test], strict=True):
        part = slice(start, start + size)
        start += size
        entries = {
            "batch_label": name,
            "labels" if num_classes == 10 else "fine_labels": labels[part].tolist(),
            "data": images[part].reshape(size, -1),
            "filenames": [f"{number}.png" for number in range(size)],
        }
        (below / name).write_bytes(python2_pickle(entries))
    return {"images": images, "labels": labels}


def write_mnist(folder: Path, train: int = 60, test: int = 20, compress: bool = False) -> dict[str, Any]:
    """Writes real 28x28 images as the four IDX files.

    Returns:
        `images` uint8 `[N, 28, 28]` and `labels` `[N]` of training and test images together, in the order written.
    """
    images, labels = real_images(train + test)
    images = images[:, 2:30, 2:30]
    arrays = (images[:train], labels[:train], images[train:], labels[train:])
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(MNIST_FILES, arrays, strict=True):
        header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
        content = header + array.tobytes()
        path = folder / (f"{name}.gz" if compress else name)
        path.write_bytes(gzip.compress(content) if compress else content)
    return {"images": images, "labels": labels}
