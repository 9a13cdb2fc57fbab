"""`clafusion transfer`: from two checkpoints to one network that has the architecture of the second."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from clafusion import FusionOptions, average, fuse, map_units, transfer
from clafusion.errors import FusionError
from clafusion.filter_transfer.transfer import MappingName
from clafusion.lightning import Trainer
from clafusion.lightning_modules.checkpoints.reading import load_parent
from clafusion.lightning_modules.classifier import ImageClassifier
from clafusion.lightning_modules.commands.evaluation import evaluate_networks, print_networks
from clafusion.lightning_modules.commands.outputs import check_empty, check_new, check_output, prepared
from clafusion.lightning_modules.commands.records import as_json, circumstances, peak_memory, seeds, versions
from clafusion.lightning_modules.compatibility import ImageData, check_images
from clafusion.lightning_modules.files import sha256, write_together, writer
from clafusion.lightning_modules.progress import steps

Combine = Literal["none", "average", "transport", "insert"]


@dataclass(frozen=True)
class TransferSettings:
    """How a network is transferred, and how the result is combined with its target.

    Attributes:
        combine: what becomes of the transferred network.
        classifier: as for `clafusion.filter_transfer.transfer`.
        shortcuts: as for `clafusion.filter_transfer.transfer`.
        reinitialize: as for `clafusion.filter_transfer.transfer`.
        options: how to align layers, and how to fuse.

    Raises:
        FusionError: on construction, if the parts do not go together.
    """

    combine: Combine
    classifier: bool
    shortcuts: bool
    reinitialize: bool
    options: FusionOptions

    def __post_init__(self) -> None:
        given = [name for name in ("classifier", "shortcuts", "reinitialize") if getattr(self, name)]
        if self.combine == "insert" and given:
            raise FusionError(
                f"Expected no {', '.join(given)} with combine insert, which transfers nothing; leave out --{given[0]}"
            )

    def run(
        self, source: nn.Module, target: nn.Module, batches: Sequence[Tensor]
    ) -> tuple[dict[str, nn.Module], dict[str, Any]]:
        """Return the networks that are made, by name, the result last; and how, as plain containers."""
        if self.combine == "insert":
            inserted = fuse([target, source], batches, self.options)
            return {"result": inserted.model}, {"fusion": inserted.summary()}
        mapping = map_units(source, target, self.options.mapping, batches, self.options)
        moved = transfer(
            source, target, mapping, batches, classifier=self.classifier, shortcuts=self.shortcuts,
            reinitialize=self.reinitialize, options=self.options,
        )  # fmt: skip
        if self.combine == "none":
            return {"result": moved}, {"map": mapping.summary()}
        if self.combine == "average":
            return {"transferred": moved, "result": average([target, moved], self.options.weights)}, {
                "map": mapping.summary()
            }
        fused = fuse([target, moved], batches, self.options)
        return {"transferred": moved, "result": fused.model}, {"map": mapping.summary(), "fusion": fused.summary()}


def transfer_checkpoint(
    trainer: Trainer,
    model: ImageClassifier,
    datamodule: ImageData,
    source: str,
    output: str,
    target: str | None = None,
    target_architecture: dict[str, Any] | None = None,
    mapping: MappingName | None = None,
    combine: Combine = "none",
    classifier: bool = False,
    shortcuts: bool = False,
    reinitialize: bool = False,
    overwrite: bool = False,
    fusion: FusionOptions = FusionOptions(),  # noqa: B008 (it is frozen)
) -> dict[str, Any]:
    """Write the filters of a trained network into one of another architecture, and show how well it does.

    Writes the result as an ordinary checkpoint NAME.ckpt, and next to it NAME.json: options, the map of the layers,
    accuracies, parameters, seconds, memory, date, host, device, data, seeds, versions and checksums. Nothing is written
    before all of it is there.

    Args:
        trainer: Evaluates the networks.
        model: Its training recipe is saved with the result.
        datamodule: Unlabelled training images to align layers on, test images for the evaluation.
        source: The network to take from: a checkpoint of fit or fuse, or a file of save_network.
        output: The checkpoint to write, NAME.ckpt.
        target: The network to write into: such a file, whose other weights are kept.
        target_architecture: Instead of target, as for --model.architecture: a network with fresh weights, drawn from
            --seed_everything.
        mapping: The map of the layers: optimal, chain or random; none given: that of --fusion.mapping.
        combine: What becomes of the transferred network: none, it is the result; average, it is averaged with the
            target; transport, it is fused with the target. Or insert: nothing is transferred, the source itself is
            fused with the target, and identities are inserted into the shallower one.
        classifier: Whether the output layer is transferred, too.
        shortcuts: Whether projection shortcuts are transferred, too.
        reinitialize: Draw the weights of the target that are not replaced anew, from --fusion.seed.
        overwrite: Whether output and NAME.json may replace existing files.
        fusion: How to align layers; and how to fuse, the target being the first parent, also in the weights.

    Returns:
        The content of NAME.json.

    Raises:
        FusionError: A network, the data, an option or the output cannot be used; nothing is written then.
    """
    path = check_output(output)
    record = path.with_suffix(".json")
    check_new([path, record], overwrite)
    check_empty(model)
    fusion = fusion.for_parents(["target", "source"])
    options = fusion if mapping is None else replace(fusion, mapping=mapping)
    settings = TransferSettings(combine, classifier, shortcuts, reinitialize, options)
    device = trainer.strategy.root_device
    files = {"source": source, "target": target}
    pair: dict[str, nn.Module] = {"source": load_parent(source), "target": _target(target, target_architecture)}
    for role, network in pair.items():
        check_images(network.to(device), datamodule, files[role] or "the target")
    batches = [batch.to(device) for batch in datamodule.alignment_batches(options.num_samples, options.seed)]

    started = time.perf_counter()
    with steps(not trainer.is_global_zero) as step:
        step("transferring")
        made, how = settings.run(pair["source"], pair["target"], batches)
        figures = {"seconds": time.perf_counter() - started, "peak_memory_bytes": peak_memory(device)}
        networks = evaluate_networks(trainer, {**pair, **made}, datamodule, step)
    results = {
        "output": output,
        "networks": networks,
        **{role: None if path is None else {"path": path, "sha256": sha256(path)} for role, path in files.items()},
        "target_architecture": target_architecture,
        **{name: getattr(settings, name) for name in ("combine", "classifier", "shortcuts", "reinitialize")},
        "options": options.to_dict(),
        **how,
        **figures,
        **circumstances(device, datamodule),
        "seeds": seeds(options),
        "versions": versions(),
    }
    if trainer.is_global_zero:
        write_together({Path(output): prepared(model, made["result"], results), record: writer(as_json(results))})
        print_networks(results["networks"])
    return results


def _target(path: str | None, architecture: dict[str, Any] | None) -> nn.Module:
    """Return the target, in eval mode, from a file or from its architecture."""
    if (path is None) == (architecture is None):
        found = "neither" if path is None else "both"
        raise FusionError(f"Expected a target or a target_architecture, got {found}; give one of --target and "
                          "--target_architecture")  # fmt: skip
    if path is not None:
        return load_parent(path)
    network = ImageClassifier(architecture).network
    assert network is not None
    return network.eval()
