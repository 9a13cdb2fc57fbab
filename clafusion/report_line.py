"""How well the average of the moved parents does, for all weights between one parent and another."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clafusion.combination import combine
from clafusion.fusion import Fusion, owners_by_unit
from clafusion.maps import Balanced
from clafusion.statistics import as_input, chunks, structure_of

#: The shares of the other parent that are measured.
SHARES = tuple(step / 10 for step in range(11))


def made_at_once(fusion: Fusion) -> bool:
    """Whether all parents were averaged in one step, so that the average can be made again."""
    return fusion.options.many != "iterative" or len(fusion.balanced) == 2


def averages(fusion: Fusion, samples: Tensor, weights: Iterable[Sequence[float]]) -> Iterator[nn.Module]:
    """The averages of the moved parents, without their correction.

    Args:
        fusion: made in one step.
        samples: two or more inputs.
        weights: for each average its weight per parent, summing to one.
    """
    options = fusion.options
    structures = tuple(structure_of(parent, samples) for parent in fusion.balanced)
    owners = owners_by_unit(structures[fusion.template], fusion.template, fusion.alignments, None, options)
    balanced = Balanced(structures, owners, options.anchor_index, fusion.template)
    for shares in weights:
        yield combine(fusion.balanced[options.anchor_index], balanced, fusion.maps, shares, options)


@torch.no_grad()
def line_accuracies(fusion: Fusion, images: Tensor, labels: Tensor) -> dict[str, Any] | None:
    r"""The accuracy along the line between the anchor and every other parent, both on the anchor's neurons.

    .. math:: \theta(s) = (1 - s)\, \theta_\mathrm{anchor} + s\, T_k \theta_k, \quad s = 0, 0.1, \ldots, 1

    Args:
        fusion: what `fuse` returned.
        images: labelled inputs, [samples, ...], on the device of the fused network; two or more.
        labels: their classes, [samples].

    Returns:
        `samples`, how many there were; `shares`, all `s`; `fused`, the accuracy of the fused network; `accuracies`,
        by the number of the parent. None where the networks were fused one after another.
    """
    if not made_at_once(fusion):
        return None
    anchor, count = fusion.options.anchor_index, len(fusion.balanced)
    found = {}
    for k in range(count):
        if k != anchor:
            lines = [[(1 - s) * (i == anchor) + s * (i == k) for i in range(count)] for s in SHARES]
            found[str(k)] = [_accuracy(model, images, labels) for model in averages(fusion, images, lines)]
    fused = _accuracy(fusion.model, images, labels)
    return {"samples": len(labels), "shares": list(SHARES), "fused": fused, "accuracies": found}


def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    outputs = torch.cat([model(as_input(chunk, model)).argmax(1) for chunk in chunks(images)])
    return float((outputs == labels).double().mean())
