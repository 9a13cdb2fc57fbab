"""Reports to look at: one HTML file that loads nothing, on a fusion or on a whole experiment, and its figures.

`report_data` and `line_accuracies` measure what `Fusion.summary` does not hold; `fusion_report` and `experiment_report`
write the pages from plain values alone; `svg_files` and `rasterised` turn their figures into files.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2 import UndefinedError

from clafusion.errors import FusionError
from clafusion.report.experiment_page import Curves, NamedFusion, experiment_page
from clafusion.report.figure_files import rasterised, svg_files
from clafusion.report.fusion_page import fusion_page
from clafusion.report.html import Figure, Report
from clafusion.report.measurements import line_accuracies, report_data

__all__ = [
    "Figure",
    "NamedFusion",
    "Report",
    "experiment_report",
    "fusion_report",
    "line_accuracies",
    "rasterised",
    "report_data",
    "svg_files",
]


def fusion_report(record: Mapping[str, Any]) -> Report:
    """Return the report on one fusion.

    Args:
        record: `{**fusion.summary(), "report": report_data(fusion, samples)}`, or the record that `fuse` writes.

    Returns:
        An HTML document and its figures.

    Raises:
        FusionError: if the record is not of this form.

    Example:
        >>> import torch
        >>> from clafusion import fuse
        >>> from clafusion.networks import MLP
        >>> models, samples = [MLP(8, [6, 5, 4], 3), MLP(8, [6, 4], 3)], torch.randn(64, 8)
        >>> fusion = fuse(models, [samples])
        >>> report = fusion_report({**fusion.summary(), "report": report_data(fusion, samples)})
        >>> report.html.count("<svg") > 4, "http" in report.html
        (True, False)
        >>> list(svg_files(report.figures))[0]
        'layers-of-parent-1-and-parent-2-that-correspond'
    """
    return _checked(lambda: fusion_page(record), "the record of a fusion as `clafusion fuse` writes it")


def experiment_report(results: dict[str, Any], curves: Curves, fusions: Sequence[NamedFusion] = ()) -> Report:
    """Return the report on an experiment.

    Args:
        results: the content of `results.json`.
        curves: by the name of a training, for each seed: by the name of a quantity its value after every epoch.
        fusions: those of the experiment.

    Returns:
        An HTML document and its figures.

    Raises:
        FusionError: if the results are not of this form.
    """
    return _checked(lambda: experiment_page(results, curves, fusions), "results as `clafusion pipeline` writes them")


def _checked(write: Callable[[], Report], expected: str) -> Report:
    """Report a value of another form in one line."""
    wrong = (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError, UndefinedError, zlib.error)
    try:
        return write()
    except wrong as error:
        raise FusionError(f"Expected {expected}, got {type(error).__name__}: {error}; write the file anew") from error
