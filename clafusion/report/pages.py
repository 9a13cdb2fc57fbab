"""A report a person wants to look at: one HTML file that loads nothing, of a fusion or of a whole experiment.

`report_data` and `line_accuracies` measure what `Fusion.summary` does not hold; `report_fusion` and `report_experiment`
write the pages from plain values alone, out of `report_charts` and `report_pixels` (pictures), `report_page` (style),
`report_markup` (escaping); `figures` are the pictures one by one, `rasterised` turns them into PNG files.
"""

import zlib
from collections.abc import Callable
from typing import Any

from clafusion.errors import FusionError
from clafusion.report.experiment_page import Courses, Fusions, experiment_page
from clafusion.report.figure_files import figures, rasterised
from clafusion.report.fusion_page import fusion_page
from clafusion.report.measurements import line_accuracies, report_data

__all__ = ["experiment_report", "figures", "fusion_report", "line_accuracies", "rasterised", "report_data"]


def fusion_report(record: dict[str, Any]) -> str:
    """The report on one fusion.

    Args:
        record: `{**fusion.summary(), "report": report_data(fusion, samples)}`, or the content of `fusion.json`.

    Returns:
        An HTML document.

    Raises:
        FusionError: if the record is not of this form.

    Example:
        >>> import torch
        >>> from clafusion import fuse
        >>> from clafusion.networks import MLP
        >>> models, samples = [MLP(8, [6, 5, 4], 3), MLP(8, [6, 4], 3)], torch.randn(64, 8)
        >>> fusion = fuse(models, [samples])
        >>> text = fusion_report({**fusion.summary(), "report": report_data(fusion, samples)})
        >>> text.count("<svg") > 4, "http" in text
        (True, False)
    """
    return _written(lambda: fusion_page(record), "the record of a fusion as `clafusion fuse` writes it")


def experiment_report(results: dict[str, Any], courses: Courses, fusions: Fusions | None = None) -> str:
    """The report on an experiment.

    Args:
        results: the content of `results.json`.
        courses: by the name of a training, for each seed: by the name of a quantity its value after every epoch.
        fusions: by the name of a fusion, what its `fusion.json` holds.

    Returns:
        An HTML document.

    Raises:
        FusionError: if the results are not of this form.
    """
    return _written(
        lambda: experiment_page(results, courses, fusions or {}), "results as `clafusion pipeline` writes them"
    )


def _written(write: Callable[[], str], expected: str) -> str:
    try:
        return write()
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError, zlib.error) as error:
        raise FusionError(f"Expected {expected}, got {type(error).__name__}: {error}; write the file anew") from error
