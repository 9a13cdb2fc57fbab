"""`clafusion report`: a fusion or an experiment as one HTML file, from the files that they left behind."""

import csv
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from clafusion import Fusion
from clafusion.errors import FusionError
from clafusion.report import experiment_report, fusion_report, report_data
from clafusion.statistics import collect
from lightning_modules.checkpoints import write_text
from lightning_modules.checks import ImageData
from lightning_modules.outputs import check_new, check_output

#: A record of a fusion of large networks takes a few MiB; what takes more is something else.
_LARGEST = 64 * 2**20
_QUANTITIES = ("val_acc", "train_loss")
Course = dict[str, dict[int, float]]


def report_file(input: str, output: str = "report.html", overwrite: bool = False) -> None:
    """Shows a fusion or an experiment as one HTML file, which needs no network.

    Args:
        input: A fusion.json as fuse writes it; or the folder of a pipeline, or its results.json.
        output: The file to write, NAME.html.
        overwrite: Whether output may replace an existing file.

    Raises:
        FusionError: The input or the output cannot be used; nothing is written then.
    """
    path = check_output(output, (".html",))
    check_new([path], overwrite)
    source = Path(input)
    if source.is_dir():
        source = source / ("results.json" if (source / "results.json").exists() else "fusion.json")
    record = _read(source)
    if "networks" in record and "experiment" in record:
        text = experiment_report(record, _courses(source.parent))
    else:
        text = fusion_report(record)
    write_text(path, text)
    print(f"wrote {output}")


def drawn(fusion: Fusion, networks: Sequence[nn.Module], data: ImageData) -> dict[str, Any]:
    """What the report shows beyond the other figures of `fusion.json`, measured on the samples of the fusion.

    Args:
        fusion: What `fuse` returned.
        networks: The parents, on the device of the fused network.
        data: The images that the fusion measured on.
    """
    options = fusion.options
    samples = collect(data.alignment_batches(options.num_samples, options.seed), options.num_samples)
    return report_data(fusion, networks, samples)


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
    for log in sorted(stage.glob("logs/version_*/metrics.csv"), key=_version):
        for row in _rows(log):
            for name in _QUANTITIES:
                value, epoch = _number(row.get(name), float), _number(row.get("epoch"), int)
                if value is not None and epoch is not None and 0 <= epoch < 100_000 and math.isfinite(value):
                    course[name][epoch] = value
    return course


def _version(log: Path) -> tuple[int, str]:
    number = log.parent.name.rpartition("_")[2]
    return (int(number) if number.isdecimal() else -1), number


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
