"""From checkpoints to one fused network, with the record of how it was fused: `clafusion fuse`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from clafusion import Fusion, FusionOptions
from clafusion.errors import FusionError
from clafusion.formats.files import check_saved
from clafusion.fusion.record import AlignmentRecord, FusionRecord, NetworkRow
from clafusion.lightning import LightningDataModule, Trainer
from clafusion.lightning_modules.classifier import ImageClassifier
from clafusion.lightning_modules.commands.align import align_checkpoints, print_alignment
from clafusion.lightning_modules.commands.chance import check_above_chance
from clafusion.lightning_modules.commands.evaluation import (
    evaluate_fusion,
    evaluate_networks,
    log_networks,
    widened,
)
from clafusion.lightning_modules.commands.figures import Pictures, check_folder, folder_beside
from clafusion.lightning_modules.commands.fuse_modules import ModuleFusion
from clafusion.lightning_modules.commands.naming import file_names
from clafusion.lightning_modules.commands.outputs import check_empty, check_new, check_output, prepared
from clafusion.lightning_modules.commands.printing import print_fusion, say
from clafusion.lightning_modules.commands.recording import Evaluate, record_fusion
from clafusion.lightning_modules.commands.records import as_json, parent_files, write_results
from clafusion.lightning_modules.compatibility import ImageData, label_places, load_parents
from clafusion.lightning_modules.files import write_together, writer
from clafusion.lightning_modules.progress import Step, steps
from clafusion.naming import named_parents
from clafusion.report.measurements import SAMPLES
from clafusion.report.pages import fusion_report, line_accuracies, report_data
from clafusion.statistics.samples import collect
from clafusion.teachers.label_sets import Label, union_of

#: Called with the parents by name, with outputs for all classes, before they are fused, and with these classes.
Examine = Callable[[Mapping[str, nn.Module], Sequence[Label]], list[NetworkRow]]


def fuse_and_record(
    paths: list[str],
    data: ImageData,
    options: FusionOptions,
    device: torch.device,
    *,
    classes: Sequence[Sequence[Label]] | None = None,
    names: Sequence[str] | None = None,
    output: str | None = None,
    report: bool = False,
    examine: Examine | None = None,
    evaluate: Evaluate | None = None,
    step: Step = lambda words: None,
) -> tuple[Fusion, FusionRecord]:
    """Fuse the networks of checkpoints, and record how.

    Args:
        paths: Two or more checkpoints of fit or fuse, or files of save_network.
        data: Unlabelled training images; for the report also its validation images, if there are any.
        options: How to fuse.
        device: Where to compute.
        classes: Per parent the labels that its outputs stand for; None: as the files say, or the same for all.
        names: What to call each parent in messages and in the record; None: as `file_names` does.
        output: The file that the caller is going to write; recorded.
        report: Whether to measure what the report shows beyond the other figures of the record.
        examine: Evaluates the parents before they are fused, or refuses them; None: `evaluate` does.
        evaluate: Evaluates the result; None: nothing is evaluated.
        step: Called with what is done next.

    Returns:
        The fusion, whose networks are on the device, and its record.

    Raises:
        FusionError: The parents, the data and the options do not fit together.
    """
    step(f"loading {len(paths)} networks")
    names = names or file_names(paths)
    options = options.for_parents(names, paths)
    with named_parents(names):
        parents, classes = load_parents(paths, data, classes)
        for path, parent in zip(paths, parents, strict=True):
            check_saved(parent, torch.zeros(2, *data.image_shape), path)
        together = dict(zip(names, parents, strict=True))
        rows = examine(widened(together, classes), union_of(classes or ())) if examine else []
        step(f"fusing {len(paths)} networks")
        batches = list(data.alignment_batches(options.num_samples, options.seed))

    def measure(fusion: Fusion, batches: list[Tensor]) -> dict[str, Any]:
        step("measuring for the report")
        return _report_measurements(fusion, parents, batches, data)

    return record_fusion(
        together, parent_files(paths, names), batches, options, device, data,
        classes=classes, output=output, rows=rows, evaluate=evaluate, measure=measure if report else None,
    )  # fmt: skip


def _report_measurements(
    fusion: Fusion, parents: list[nn.Module], batches: list[Tensor], data: ImageData
) -> dict[str, Any]:
    """Measure what the report shows beyond the other figures of the record.

    Where the data has validation images and the parents have the same classes, that is also their accuracy along the
    line between the parents.
    """
    found = report_data(fusion, collect(batches, SAMPLES))
    if fusion.teacher is not None and fusion.teacher.columns is not None:
        return found
    labelled = list(_validation_images(data, batches[0].device))
    if sum(len(labels) for _, labels in labelled) > 1:
        images, labels = (torch.cat(parts) for parts in zip(*labelled, strict=True))
        places = label_places(data, fusion.classes, "the network") if fusion.classes else None
        labels = labels if places is None else places.to(labels.device)[labels]
        found["line"] = line_accuracies(fusion, images, labels)
    return found


def _validation_images(data: ImageData, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the first validation images, as many as are measured on, with their labels."""
    missing = SAMPLES
    for images, labels in getattr(data, "validation_batches", lambda: ())():
        if missing <= 0:
            return
        yield images[:missing].to(device), labels[:missing].to(device)
        missing -= len(labels)


def fuse_checkpoints(
    trainer: Trainer,
    model: ImageClassifier,
    datamodule: ImageData,
    parents: list[str],
    output: str,
    classes: list[list[int | str]] | None = None,
    overwrite: bool = False,
    check_parents: bool = True,
    align_only: bool = False,
    report: bool = True,
    figures: bool = True,
    quiet: bool = False,
    json: bool = False,
    module: str | None = None,
    network: str | None = None,
    inputs: str | None = None,
    fusion: FusionOptions = FusionOptions(),  # noqa: B008 (it is frozen)
) -> FusionRecord | AlignmentRecord:
    """Fuse trained networks into one and show how well each of them does on the test images.

    Writes the fused network as an ordinary checkpoint NAME.ckpt, and next to it NAME.json: options, alignment, costs,
    accuracies, parameters, seconds, memory, date, host, device, data, seeds, versions and the parents' checksums; and
    NAME.html, whose figures go to the folder NAME_figures, too, and into TensorBoard where that is the logger. Nothing
    is written before all of it is there.

    Args:
        trainer: Evaluates the networks.
        model: Its training recipe is saved with the fused network.
        datamodule: Unlabelled training images for the fusion, test images for the evaluation.
        parents: Two or more checkpoints of fit or fuse, or files of save_network.
        output: The checkpoint to write, NAME.ckpt.
        classes: What the outputs of each parent stand for, if they have not all the same classes, such as [[0, 1], [2]]
            or [[cat, dog], [car]]; none given: as the checkpoints say, if trainings on folders of images wrote them.
        overwrite: Whether the files written here may replace existing ones.
        check_parents: Whether to end before anything is fused if a parent does no better than chance on the test images
            of its classes, most often because it was trained on images of another size or normalisation.
        align_only: Only show and write to NAME.json which layers correspond, with the costs of every stage.
        report: Whether to draw NAME.html as well: all of this as one file to look at.
        figures: Whether every figure of the report becomes a file of its own as well, as SVG and as PNG.
        quiet: Whether to print nothing but errors.
        json: Whether to print what NAME.json holds, as JSON and nothing else, instead of tables.
        module: The LightningModule of which the parents are checkpoints, and the output will be, as package.Class, if
            it is one of your own; the data may then be any LightningDataModule, and nothing is evaluated.
        network: With module, the attribute path of what is fused inside it, such as net; none given: found.
        inputs: With module, which part of a batch of the data the network takes, by key or place; none given: found.
        fusion: The options of the method.

    Returns:
        The content of NAME.json.

    Raises:
        FusionError: A parent, the data, an option or the output cannot be used; nothing is written then.
    """
    path = check_output(output)
    file, page = path.with_suffix(".json"), path.with_suffix(".html")
    figures = figures and report and not align_only
    check_new([file] if align_only else [path, file, *([page] if report else [])], overwrite)
    if figures:
        check_folder(page, overwrite)
    check_empty(model)
    own = None if module is None else ModuleFusion(module, network, inputs)
    _check_data(datamodule, own, align_only)
    device, silent = trainer.strategy.root_device, quiet or json or not trainer.is_global_zero
    if align_only:
        with steps(silent) as step:
            step(f"aligning the layers of {len(parents)} networks")
            alignment = align_checkpoints(parents, datamodule, fusion, device, classes)
        if trainer.is_global_zero:
            write_results(alignment, file)
            say(alignment, print_alignment, quiet, json)
        return alignment
    with steps(silent) as step:

        def examine(networks: Mapping[str, nn.Module], known: Sequence[Label]) -> list[NetworkRow]:
            rows = evaluate_networks(trainer, networks, datamodule, step, "parent", known)
            if check_parents:
                check_above_chance(rows, len(known) or datamodule.num_classes)
            return rows

        def evaluate(networks: Mapping[str, nn.Module], result: Fusion) -> list[NetworkRow]:
            return evaluate_fusion(trainer, networks, result, datamodule, step)

        report_here = report and trainer.is_global_zero
        if own is not None:
            content, record = own.run(trainer, cast(LightningDataModule, datamodule), parents, fusion, output, step)
        else:
            fused, record = fuse_and_record(
                parents, datamodule, fusion, device, classes=classes, output=output, report=report_here,
                examine=examine, evaluate=evaluate, step=step,
            )  # fmt: skip
            content = prepared(model, fused.model, record)
    if trainer.is_global_zero:
        shown = fusion_report(record) if report else None
        pictures = Pictures.of(shown.figures if shown and figures else ())
        pages = {page: writer(shown.html)} if shown else {}
        write_together({path: content, file: writer(as_json(record)), **pages})
        log_networks(trainer.loggers, record.get("networks", []))
        if figures:
            pictures.write(folder_beside(page))
            pictures.log(trainer.loggers)
        say(record, print_fusion, quiet, json)
    return record


def _check_data(data: Any, own: ModuleFusion | None, align_only: bool) -> None:
    """Refuse data without images for parents of ours, and what is not done with a module of the user's own."""
    if own is None and not hasattr(data, "alignment_batches"):
        raise FusionError(
            f"Expected an image data module to fuse on, got {type(data).__name__}; name the class of the parents by "
            "--module if it is your own"
        )
    if own is not None and align_only:
        raise FusionError("Expected --align_only for checkpoints of fit or fuse, got --module; leave one of them out")
