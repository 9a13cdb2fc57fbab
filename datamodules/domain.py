"""Images of another domain: turned or inverted, all of them or a share."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from clafusion.datamodules.arguments import check_whole, from_mapping
from clafusion.datamodules.image_set import LabelledImages, derived_seed, stratified_split
from clafusion.errors import FusionError

Kind = Literal["rotate", "invert"]


@dataclass(frozen=True)
class Domain:
    """A change of the images as they are read, for networks that know different domains.

    - `rotate`: turned counter-clockwise by `degrees`.
    - `invert`: light for dark.

    Attributes:
        kind: `rotate` or `invert`.
        degrees: 90, 180 or 270; of `rotate`.
        share: Share of every class in each of the three parts that is changed, in `(0, 1]`, to the nearest image.
        seed: Selects the images that are changed.

    Raises:
        FusionError: An attribute is missing, is not one of the kind, is of the wrong type or out of range.

    Example:
        >>> from clafusion.datamodules.image_set import ImageSet
        >>> images = ImageSet(torch.tensor([[[[1, 2], [3, 4]]]], dtype=torch.uint8), torch.tensor([0]))
        >>> Domain("rotate", degrees=90).change(images, "test").images.tolist()
        [[[[2, 4], [1, 3]]]]
    """

    kind: Kind
    degrees: int | None = None
    share: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise FusionError(f"Expected kind of domain to be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        known = (90, 180, 270) if self.kind == "rotate" else (None,)
        if self.degrees not in known or type(self.degrees) not in (int, type(None)):
            words = "90, 180 or 270" if self.kind == "rotate" else "no value"
            raise FusionError(
                f"Expected {words} for degrees of a domain of kind {self.kind}, got {self.degrees!r}; change it"
            )
        if type(self.share) not in (int, float) or not 0 < self.share <= 1:
            raise FusionError(f"Expected share of domain in (0, 1], got {self.share!r}; change it")
        check_whole("seed of domain", self.seed, 0)

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """Refuse images that would have another shape.

        Args:
            shape: C, H, W.

        Raises:
            FusionError: The images are not square and would lie on their side.
        """
        if self.degrees in (90, 270) and shape[1] != shape[2]:
            raise FusionError(
                f"Expected square images to rotate by {self.degrees} degrees, got {'x'.join(map(str, shape))}; "
                "rotate by 180"
            )

    def change(self, images: LabelledImages, part: str) -> LabelledImages:
        """Return the images of a part, a share of them changed, in the same order.

        Args:
            images: Left as they are.
            part: Its name, which selects other images in every part.
        """
        _, chosen = stratified_split(images.labels, self.share, derived_seed("domain", part, self.seed))
        return images.changed(chosen, self.turned)

    def turned(self, images: Tensor) -> Tensor:
        """Return the same number of images turned or inverted, uint8 `[B, C, H, W]`."""
        return 255 - images if self.degrees is None else torch.rot90(images, self.degrees // 90, (2, 3))

    def to_dict(self) -> dict[str, Any]:
        """Return the domain as plain containers, from which `as_domain` makes it again."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def as_domain(value: Domain | Mapping[str, Any] | None) -> Domain | None:
    """Return the domain of a dictionary of `Domain.to_dict`; None and a domain stay as they are.

    Raises:
        FusionError: The value is something else, or has a key that is no attribute of a domain.
    """
    return from_mapping(Domain, value, "domain")
