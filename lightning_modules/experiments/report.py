"""`clafusion report`: a fusion or an experiment as one HTML file, from the files that they left behind."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clafusion.errors import FusionError
from clafusion.lightning_modules.commands.figures import Pictures, check_folder, folder_beside
from clafusion.lightning_modules.commands.records import check_new, check_output
from clafusion.lightning_modules.experiments.stage_folder import slug
from clafusion.lightning_modules.files import write_text
from clafusion.report.experiment_page import DRAWN
from clafusion.report.pages import experiment_report, fusion_report
from clafusion.report.pages import figures as all_figures

#: A record of a fusion of large networks takes a few MiB; what takes more is something else.
_LARGEST = 64 * 2**20
_QUANTITIES = ("val_acc", "train_loss")
Course = dict[str, dict[int, float]]


def report_file(input: str, output: str = "report.html", figures: bool = True, overwrite: bool = False) -> None:
    """Shows a fusion or an experiment as one HTML file, which needs no network.

    Args:
        input: A fusion.json as fuse writes it; or the folder of a pipeline, or its results.json.
        output: The file to write, NAME.html.
        figures: Whether to write every figure as a file of its own, too: SVG and PNG, in the folder NAME_figures.
        overwrite: Whether existing files may be replaced.

    Raises:
        FusionError: The input or the output cannot be used; nothing is written then.
    """
    path = check_output(output, (".html",))
    check_new([path], overwrite)
    if figures:
        check_folder(path, overwrite)
    source = Path(input)
    if source.is_dir():
        source = source / ("results.json" if (source / "results.json").exists() else "fusion.json")
    whole = "experiment" in _read(source)
    text = experiment_text(source) if whole else fusion_report(_read(source))
    pictures = Pictures.of((experiment_figures(source) if whole else all_figures(text)) if figures else {})
    write_text(path, text)
    if figures:
        pictures.write(folder_beside(path))
    print(f"wrote {output}" + (f" and {len(pictures.drawings)} figures in {folder_beside(path)}" if figures else ""))


def experiment_figures(path: Path) -> dict[str, str]:
    """The figures of the report on an experiment; those of a fusion have its name first.

    Args:
        path: Of its results.json, beside the folders of its stages.

    Raises:
        FusionError: One of the files cannot be used.
    """
    found = all_figures(experiment_report(_read(path), _courses(path.parent)))
    for name, record in list(_fusions(path.parent).items())[:DRAWN]:
        drawings = all_figures(fusion_report(record))
        found |= {f"{slug(name)}-{figure}": drawing for figure, drawing in drawings.items()}
    return found


def experiment_text(path: Path) -> str:
    """The report on an experiment.

    Args:
        path: Of its results.json, beside the folders of its stages.

    Raises:
        FusionError: One of the files cannot be used.
    """
    return experiment_report(_read(path), _courses(path.parent), _fusions(path.parent))


def _read(path: Path) -> dict[str, Any]:
    expected = "Expected the JSON that fuse or pipeline writes"
    if not path.is_file():
        raise FusionError(f"{expected}, or the folder of one, got {path}, which is none; check the path")
    try:
        if path.stat().st_size > _LARGEST:
            raise FusionError(f"{expected}, got {path}, which is larger than {_LARGEST} bytes; choose another")
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise FusionError(f"{expected}, got {path}: {error}; choose another") from error
    if not isinstance(record, dict):
        raise FusionError(f"{expected}, got a {type(record).__name__} in {path}; choose another")
    return record


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON")


def _fusions(folder: Path) -> dict[str, Any]:
    """Every fusion by name, of the first seed that has it."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("seed_*/fuse_*/fusion.json"), key=lambda path: _number_of(path.parents[1])):
        name = path.parent.name.partition("_")[2].replace("_", " ")
        if name not in found:
            found[name] = _read(path)
    return found


def _number_of(folder: Path) -> tuple[int, str]:
    """The number that the name of a folder ends with, for its place among others."""
    number = folder.name.rpartition("_")[2]
    return (int(number) if number.isdecimal() else -1), folder.name


def _courses(folder: Path) -> dict[str, list[Course]]:
    """The trainings after the fusion and their controls, by name, one course for each seed that there is."""
    found: dict[str, list[Course]] = {}
    stages = [stage for kind in ("finetune", "distil") for stage in sorted(folder.glob(f"seed_*/{kind}_*"))]
    for stage in stages:
        course = _course(stage)
        if any(course.values()):
            kind, _, subject = stage.name.partition("_")
            name = f"{subject.replace('_', ' ')}, {'finetuned' if kind == 'finetune' else 'distilled'}"
            found.setdefault(name, []).append(course)
    # Fused networks first: their colours are the same in every report.
    return dict(sorted(found.items(), key=lambda item: (not item[0].startswith("fused"), item[0])))


def _course(stage: Path) -> Course:
    """What was logged after every epoch; where a training went on in another version, that one counts."""
    course: Course = {name: {} for name in _QUANTITIES}
    for log in sorted(stage.glob("logs/version_*/metrics.csv"), key=lambda log: _number_of(log.parent)):
        for row in _rows(log):
            for name in _QUANTITIES:
                value, epoch = _number(row.get(name), float), _number(row.get("epoch"), int)
                if value is not None and epoch is not None and 0 <= epoch < 100_000 and math.isfinite(value):
                    course[name][epoch] = value
    return course


def _rows(log: Path) -> list[dict[str, str]]:
    try:
        with open(log, encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise FusionError(f"Expected a log of training, got {log}: {error}; remove it") from error


def _number(text: str | None, kind: Callable[[str], Any]) -> Any:
    try:
        return None if not text else kind(text)
    except ValueError:
        return None
