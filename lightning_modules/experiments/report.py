"""`clafusion report`: a fusion or an experiment as one HTML file, from the files that they left behind."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clafusion.errors import FusionError
from clafusion.lightning_modules.commands.figures import Pictures, check_folder, folder_beside
from clafusion.lightning_modules.commands.outputs import check_new, check_output
from clafusion.lightning_modules.files import write_text
from clafusion.report.pages import NamedFusion, Report, experiment_report, fusion_report

#: A record of a fusion of large networks takes a few MiB; what takes more is something else.
_LARGEST = 64 * 2**20
_QUANTITIES = ("val_acc", "train_loss")
Curve = dict[str, dict[int, float]]


def report_file(input: str, output: str = "report.html", figures: bool = True, overwrite: bool = False) -> None:
    """Show a fusion or an experiment as one HTML file, which needs no network.

    Args:
        input: A NAME.json as fuse writes it; or the folder of a pipeline, or its results.json.
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
    report = report_on(source)
    pictures = Pictures.of(report.figures if figures else ())
    write_text(path, report.html)
    if figures:
        pictures.write(folder_beside(path))
    print(f"wrote {output}" + (f" and {len(pictures.drawings)} figures in {folder_beside(path)}" if figures else ""))


def report_on(path: Path) -> Report:
    """Return the report on a fusion, or on an experiment with what lies in the folders of its stages.

    Args:
        path: Of the record of a fusion, or of a results.json.

    Raises:
        FusionError: One of the files cannot be used.
    """
    record = _read(path)
    if "experiment" in record:
        return experiment_report(record, _curves(path.parent), _fusions(path.parent))
    return fusion_report(record)


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


def _fusions(folder: Path) -> list[NamedFusion]:
    """Return every fusion, of the first seed that has it."""
    fusions: dict[str, NamedFusion] = {}
    paths = folder.glob("seed_*/fuse_*/fusion.json")
    for path in sorted(paths, key=lambda path: (_number_of(path.parents[1]), path.parent.name)):
        file_name = path.parent.name.partition("_")[2]
        if file_name not in fusions:
            fusions[file_name] = NamedFusion(_subject(path.parent), file_name, _read(path))
    return list(fusions.values())


def _subject(stage: Path) -> str:
    """The name that a stage recorded; the first version did not, but the name of the folder is nearly that one."""
    record = _read(stage / "stage.json") if (stage / "stage.json").exists() else {}
    return str(record.get("name") or stage.name.partition("_")[2].replace("_", " "))


def _number_of(folder: Path) -> tuple[int, str]:
    """The number that the name of a folder ends with, for its place among others."""
    number = folder.name.rpartition("_")[2]
    return (int(number) if number.isdecimal() else -1), folder.name


def _curves(folder: Path) -> dict[str, list[Curve]]:
    """Return the trainings after the fusion and their controls, by name, one curve for each seed that there is."""
    curves: dict[str, list[Curve]] = {}
    for kind, word in (("finetune", "finetuned"), ("distil", "distilled")):
        for stage in sorted(folder.glob(f"seed_*/{kind}_*")):
            curve = _curve(stage)
            if any(curve.values()):
                curves.setdefault(f"{_subject(stage)}, {word}", []).append(curve)
    return curves


def _curve(stage: Path) -> Curve:
    """The values after every epoch; those of a later version of the log count, which a resumed training writes."""
    curve: Curve = {name: {} for name in _QUANTITIES}
    for log in sorted(stage.glob("logs/version_*/metrics.csv"), key=lambda log: _number_of(log.parent)):
        for row in _rows(log):
            for name in _QUANTITIES:
                value, epoch = _number(row.get(name), float), _number(row.get("epoch"), int)
                if value is not None and epoch is not None and 0 <= epoch < 100_000 and math.isfinite(value):
                    curve[name][epoch] = value
    return curve


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
