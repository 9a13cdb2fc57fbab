"""Files of networks from elsewhere as checkpoints of ours, and back: `clafusion convert`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from clafusion.errors import FusionError
from clafusion.formats.conversion import convert, published_state, torchvision_state
from clafusion.formats.files import describe, restore, save_network
from clafusion.lightning_modules.checkpoints.reading import (
    load_fusion,
    load_parent,
    load_plain,
    local_file,
    read_checkpoint,
)
from clafusion.lightning_modules.classifier import ImageClassifier
from clafusion.lightning_modules.commands.outputs import check_new, check_output, save_as
from clafusion.lightning_modules.commands.weights import find_weights
from clafusion.lightning_modules.files import write_atomically

# The published code itself writes NAME.checkpoint.
_PICKLED = (".ckpt", ".pt", ".pth", ".checkpoint")
_SAFE = ".safetensors"
# Where our checkpoint keeps what the published one says besides its weights, so that it can be written back.
_KEY = "published"
_REMARKS = ("test_accuracy", "epoch", "args")


@dataclass(frozen=True)
class _Loaded:
    """A network and what its file says about it.

    Attributes:
        network: In eval mode, on the CPU.
        origin: Whose file it was, in words.
        remarks: Those of `_REMARKS` that are known.
        epoch: Of our own checkpoint; 0 if it was not trained.
        fusion: How the network was fused, as `load_fusion` gives it.
        notes: What the user should know about the conversion.
    """

    network: nn.Module
    origin: str
    remarks: dict[str, Any] = field(default_factory=dict)
    epoch: int | None = None
    fusion: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


class _Arguments:
    """Stands in for `argparse.Namespace` while a file is read: keeps the values it is given and can do nothing else.

    Naming the real class in `safe_globals` would run no code either; but a file could then set any of its attributes.
    """

    __slots__ = ("values",)
    values: Any

    def __setstate__(self, state: Any) -> None:
        self.values = state


class _WithRemarks(ImageClassifier):
    """A classifier that is saved with what the published checkpoint said besides its weights."""

    remarks: dict[str, Any]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the remarks, if there are any."""
        super().on_save_checkpoint(checkpoint)
        if self.remarks:
            checkpoint[_KEY] = self.remarks


def convert_file(
    input: str,
    output: str,
    to: Literal["ours", "published", "torchvision"] = "ours",
    weights: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Convert checkpoints of the published code and of torchvision into ours, and ours into such ones.

    The outputs of the network stay what they were. The architecture is inferred from the names and shapes of the
    weights; nothing in the file is run. Prints what was recognised and what was assumed.

    Args:
        input: A file of the published code, weights of a torchvision ResNet or VGG (a state dict, alone or under model,
            net or state_dict; an AveragedModel's; a checkpoint of a LightningModule that holds the network, also beside
            a loss), or one of our own checkpoints; NAME.ckpt, .pt, .pth, .checkpoint or .safetensors.
        output: The file to write. For ours NAME.ckpt, an ordinary checkpoint as fit writes it, or NAME.safetensors as
            save_network writes it; for published and torchvision NAME.ckpt, .pt, .pth or .checkpoint.
        to: Whose format to write; for torchvision the state dict of a ResNet or VGG as load_state_dict takes it.
        weights: Which weights to take where the file holds several, such as model_ema beside model.
        overwrite: Whether output may replace an existing file.

    Returns:
        The architecture of the network.

    Raises:
        FusionError: The input or the output cannot be used; nothing is written then.
    """
    check_new([check_output(output, (".ckpt", _SAFE) if to == "ours" else _PICKLED)], overwrite)
    loaded = _load(input, weights)
    if to != "ours":
        content = _published(loaded) if to == "published" else _plain_state(torchvision_state(loaded.network))
        write_atomically(output, lambda file: torch.save(content, file))
    elif Path(output).suffix == _SAFE:
        save_network(loaded.network, output)
    else:
        _save_ours(loaded, output)
    architecture = describe(loaded.network)
    size = sum(parameter.numel() for parameter in loaded.network.parameters())
    print(f"{input}: {loaded.origin}, {_in_words(architecture)}, {size:,} parameters")
    for note in loaded.notes:
        print(f"assumed: {note}")
    print(f"wrote {output}")
    return architecture


def _load(path: str, weights: str | None) -> _Loaded:
    """Return the network in a file of any of the known kinds."""
    if "://" not in path and Path(path).suffix not in (*_PICKLED, _SAFE):
        raise FusionError(f"Expected a file named {_names((*_PICKLED, _SAFE))}, got {path}; rename it if it is one")
    file = local_file(path)
    return _load_safetensors(file, weights) if file.suffix == _SAFE else _load_pickled(file, weights)


def _load_safetensors(file: Path, weights: str | None) -> _Loaded:
    try:
        with safe_open(file, framework="pt", device="cpu") as content:
            ours = (content.metadata() or {}).get("format") == "clafusion"
            state = {} if ours else {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise FusionError(f"Expected safetensors, got {file}, which is truncated or damaged; copy it again") from error
    return _Loaded(load_parent(file), "a network of ours") if ours else _foreign(state, file, weights, {})


def _load_pickled(file: Path, weights: str | None) -> _Loaded:
    with torch.serialization.safe_globals([(_Arguments, "argparse.Namespace")]):
        content = load_plain(file)
    if "architecture" in (content.get("hyper_parameters") or ()):
        checkpoint = read_checkpoint(file)
        epoch, remarks = checkpoint.get("epoch"), _remarks(checkpoint.get(_KEY))
        return _Loaded(load_parent(file), "a checkpoint of ours", remarks, epoch, load_fusion(file))
    published = content.get("model_state_dict", {})
    if not isinstance(published, Mapping):
        raise FusionError(
            f"Expected model_state_dict in {file} to be a dict, got {type(published).__name__}; save it again"
        )
    return _foreign(content, file, weights, _remarks(content) if published else {})


def _foreign(content: Mapping[Any, Any], file: Path, weights: str | None, remarks: dict[str, Any]) -> _Loaded:
    """Return the network of a file that is not ours."""
    try:
        found = find_weights(content, weights)
        conversion = convert(cast(Mapping[str, torch.Tensor], found.state))
    except FusionError as error:
        raise FusionError(f"{error} (in {file})") from error
    with torch.device("meta"):
        network = restore(conversion.architecture)
    # Clones: what shares memory in the file, such as tied layers, is independent in the network.
    network.load_state_dict({name: tensor.clone() for name, tensor in conversion.state.items()}, assign=True)
    biases = sum(name.endswith(".bias") for name in conversion.added)
    added = f"{biases} layers got a bias of zero, since some have one and ours have it in all layers or none"
    notes = (*found.assumed, *([added] if biases else []), *_unsaid(conversion.architecture))
    origin = "a network of torchvision" if conversion.convention == "torchvision" else "by the published names"
    return _Loaded(network.eval(), origin, remarks, notes=notes)


def _unsaid(architecture: Mapping[str, Any]) -> list[str]:
    """Return what no state dict says about a network of that family."""
    unsaid = {
        "ResNet": ["stages after the first halve the image, norms have an eps of 1e-05"],
        "VGG": ["every stage ends in a max-pool, norms have an eps of 1e-05"],
        "MLP": ["ReLU after every layer but the last, no dropout"],
    }
    return unsaid.get(architecture["name"], [])


def _plain_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors that share no memory."""
    return {name: tensor.contiguous().clone() for name, tensor in state.items()}


def _save_ours(loaded: _Loaded, output: str) -> None:
    classifier = _WithRemarks()
    classifier.remarks = loaded.remarks
    save_as(classifier, loaded.network, loaded.fusion, output)


def _published(loaded: _Loaded) -> dict[str, Any]:
    """Return the content of a checkpoint of the published code; what is not known is None."""
    known = loaded.remarks
    return {
        "model_state_dict": _plain_state(published_state(loaded.network)),
        "test_accuracy": known.get("test_accuracy"),
        "epoch": known.get("epoch", loaded.epoch),
        "args": known.get("args", {"architecture": describe(loaded.network)}),
    }


def _remarks(content: object) -> dict[str, Any]:
    """Return what a published checkpoint says besides its weights."""
    if not isinstance(content, Mapping):
        return {}
    return {name: _plain(content[name]) for name in _REMARKS if name in content}


def _plain(value: Any) -> Any:
    """Return a value of a file as plain containers, numbers and words, which our checkpoints may hold."""
    if isinstance(value, _Arguments):
        return _plain(getattr(value, "values", {}))
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value) if type(value) in (list, tuple) else list(value)
    return value if value is None or type(value) in (bool, int, float, str) else str(value)


def _names(suffixes: tuple[str, ...]) -> str:
    return " or ".join(f"NAME{suffix}" for suffix in suffixes)


def _in_words(architecture: Mapping[str, Any]) -> str:
    """Return the architecture in one line, without the defaults."""
    if "nodes" in architecture:
        return f"a network of {len(architecture['nodes'])} operations"
    shown = {name: value for name, value in architecture.items() if name != "name" and value not in (None, False)}
    return f"{architecture['name']}({', '.join(f'{name}={value}' for name, value in shown.items())})"
