"""The 1,797 real 8x8 digits that come with scikit-learn: no download, trained on in seconds."""

import torch

from clafusion.datamodules.image_set import ImageSet, stratified_split
from clafusion.datamodules.images import ImageDataModule

_TEST_FRACTION = 0.2
_TEST_SEED = 0


class DigitsDataModule(ImageDataModule):
    """Handwritten digits, 1x8x8, ten classes; nothing to download.

    The 17 grey levels of `sklearn.datasets.load_digits` become `round(255 / 16 * level)`. A fixed, stratified fifth of
    the images is the test set. `mean` and `std` are those of the remaining images. The other arguments are those of
    `ImageDataModule`.

    Example:
        >>> data = DigitsDataModule(batch_size=64)
        >>> data.image_shape, data.num_classes
        ((1, 8, 8), 10)
    """

    num_classes = 10
    raw_shape = (1, 8, 8)
    mean = (0.3056,)
    std = (0.3760,)

    def read(self) -> tuple[ImageSet, ImageSet]:
        """Read the digits from the installed scikit-learn and split off the test set."""
        # Imported late: it takes longer than training on the digits.
        from sklearn.datasets import load_digits

        digits = load_digits()
        levels = torch.from_numpy(digits.images).unsqueeze(1)
        whole = ImageSet((levels * 255 / 16).round().to(torch.uint8), torch.from_numpy(digits.target).long())
        rest, test = stratified_split(whole.labels, _TEST_FRACTION, _TEST_SEED)
        return whole.subset(rest), whole.subset(test)
