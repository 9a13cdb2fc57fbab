"""Padding, augmentation and normalisation of a batch of images on its device."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

PADDING = 4


def pad_to_size(images: Tensor, height: int, width: int) -> Tensor:
    """Zero-pad images on all sides; of an odd number of rows or columns one more goes below or to the right.

    Args:
        images: `[N, C, H, W]`, any dtype.
        height: Rows of the result, at least H.
        width: Columns of the result, at least W.

    Returns:
        `[N, C, height, width]`, the same dtype and device.
    """
    rows, columns = height - images.shape[2], width - images.shape[3]
    return pad(images, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float], channels: int) -> Tensor:
    """Scale bytes to `[0, 1]` and normalise them: `(x / 255 - mean) / std`.

    Args:
        images: uint8 `[N, C, H, W]`.
        mean: One value per channel of the images.
        std: One value per channel of the images.
        channels: Channels of the result: C, or any number for C = 1, whose only channel is then repeated.

    Returns:
        float32 `[N, channels, H, W]` on the same device.
    """
    constants = torch.tensor([mean, std], dtype=torch.float32)
    centre, spread = beside(images, constants).view(2, -1, 1, 1)
    # In place, because new memory for every step would take longer than the arithmetic.
    repeated = images.expand(-1, channels, -1, -1).to(torch.float32, copy=True)
    return repeated.div_(255).sub_(centre).div_(spread)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Crop each image at random after zero padding by 4 pixels, then flip it horizontally with probability 1/2.

    Crop and flip are one gather: `result[n, c, i, j] = padded[n, c, top_n + i, left_n + j]`, with `j` reversed if the
    image is flipped; over flattened pixels it is several times faster than by row and column. The random numbers are
    drawn on the CPU, so that they do not depend on the device of the images.

    Args:
        images: `[N, C, H, W]`, any dtype.
        generator: CPU generator; the result is a pure function of the images and its state.

    Returns:
        A new tensor of the same shape, dtype and device.
    """
    count, channels, height, width = images.shape
    offsets = torch.randint(2 * PADDING + 1, (2, count, 1), generator=generator)
    flips = torch.randint(2, (1, count, 1), generator=generator)
    top, left, flipped = beside(images, torch.cat([offsets, flips]))
    steps = torch.arange(width, device=images.device)
    rows = top + torch.arange(height, device=images.device)
    columns = left + torch.where(flipped > 0, steps.flip(0), steps)
    positions = rows[:, :, None] * (width + 2 * PADDING) + columns[:, None, :]
    padded = pad(images, (PADDING,) * 4).flatten(2)
    crops = padded.gather(2, positions.flatten(1)[:, None].expand(count, channels, height * width))
    return crops.view(images.shape)


def beside(images: Tensor, values: Tensor) -> Tensor:
    """Copy values to the device of the images, without waiting for a GPU that is busy with the batch before.

    Args:
        images: On any device.
        values: On the CPU.
    """
    return values.to(images.device, non_blocking=images.is_cuda)
