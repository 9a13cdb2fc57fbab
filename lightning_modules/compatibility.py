"""Preconditions: the data fits the networks, and the networks fit each other."""

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from clafusion.errors import FusionError
from clafusion.formats.stored import StoredNetwork
from clafusion.lightning_modules.checkpoints.reading import load_classes, load_parent
from clafusion.teachers.label_sets import Label, check_classes, union_of

#: Numbers that a layer of a network from a file may give: at most, and at most for every number of the image.
_LARGEST, _MOST_OF_ONE = 2**28, 2**15


class ImageData(Protocol):
    """The part of a data module that fusing needs: the shape (C, H, W) of its images, and some without labels.

    Where its classes have names, it has `class_names`, in the order of its labels, too.
    """

    image_shape: tuple[int, int, int]
    num_classes: int

    def alignment_batches(self, num_samples: int, seed: int) -> Iterable[Tensor]:
        """Return that many training images, chosen by the seed, in batches as the network gets them."""
        ...


def check_images(network: nn.Module, data: ImageData, owner: str, least: int | None = None) -> int:
    """Run two blank images through a copy of the network.

    Args:
        network: Left as it is.
        data: Says what shape the images have and how many classes there are.
        owner: What to call the network in the message.
        least: How many classes it must have at least; None: as many as the data.

    Returns:
        The network's number of classes.

    Raises:
        FusionError: The network does not take images of that shape, or has fewer classes.
    """
    least = data.num_classes if least is None else least
    shape = "x".join(map(str, data.image_shape))
    name = type(data).__name__
    probe = copy.deepcopy(network).eval()
    like = next(iter(probe.parameters()), torch.zeros(()))
    try:
        output = run(probe, torch.zeros(2, *data.image_shape, dtype=like.dtype, device=like.device))
    except FusionError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise FusionError(
            f"Expected images with {_input_of(network)}, as {owner} takes, got {shape} from {name}; "
            "choose the data it was trained on (--data)"
        ) from error
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[1] < least:
        raise FusionError(
            f"Expected at least {least} classes for {name}, got output of shape {_shape(output)} "
            f"from {owner}; choose the data it was trained on (--data)"
        )
    return output.shape[1]


def run(network: nn.Module, samples: Tensor) -> Any:
    """Return the output of a network that may come from anyone's file.

    A graph in a file can ask for layers without weights that blow an image up to any size; that is seen first.

    Raises:
        FusionError: An activation would be out of all proportion to the image.
        Exception: What PyTorch raises for samples that do not fit.
    """
    with torch.no_grad():
        if not isinstance(network, fx.GraphModule | StoredNetwork):
            return network(samples)
        most = min(_LARGEST, _MOST_OF_ONE * samples.numel())

        def check(name: str, value: Any) -> None:
            parts = value if isinstance(value, list | tuple) else [value]
            numbers = sum(part.numel() for part in parts if isinstance(part, Tensor))
            if numbers > most:
                raise FusionError(
                    f"Expected at most {most:,} numbers from each layer for {len(samples)} images, got "
                    f"{numbers:,} from {name!r}; choose another network"
                )

        blank = copy.deepcopy(network).to("meta")
        if isinstance(blank, StoredNetwork):
            blank.observe(samples.to("meta"), check)
            return network(samples)
        _Watched(blank, check).run(samples.to("meta"))
        # Not called: called, a graph module prints a traceback when it fails.
        return network.forward(samples)


class _Watched(fx.Interpreter):
    """Runs a graph and shows each value as it comes, with the name of its node."""

    def __init__(self, module: fx.GraphModule, see: Callable[[str, Any], None]) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.see = see

    def run_node(self, n: fx.Node) -> Any:
        """Run a node as it is, and show its value."""
        value = super().run_node(n)
        self.see(n.name, value)
        return value


def _shape(output: object) -> Any:
    return list(output.shape[1:]) if isinstance(output, Tensor) else type(output).__name__


def _input_of(network: nn.Module) -> str:
    """Return the input of the first layer with weights, in words."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            return f"{module.in_features} values"
        if isinstance(module, nn.Conv2d):
            return f"{module.in_channels} channels of sufficient size"
    return "another shape"


def label_places(data: ImageData, classes: Sequence[Label], owner: str) -> Tensor | None:
    """Find which output stands for each class of the data.

    Classes are found by name. Where the data has no names, its classes are those of the first outputs; where the
    outputs stand for whole numbers, these are the labels of the data.

    Args:
        data: Says how many classes there are, and their names if they have some.
        classes: What the outputs stand for.
        owner: What to call the network in the message.

    Returns:
        The numbers of the outputs, [classes of the data]; None: they are those of the labels.

    Raises:
        FusionError: No output stands for a class of the data.
    """
    names = getattr(data, "class_names", None) or classes[: data.num_classes]
    wanted = range(data.num_classes) if type(classes[0]) is int else names
    unknown = [label for label in wanted if label not in classes]
    if unknown or len(wanted) < data.num_classes:
        some = ", ".join(map(str, classes[:10])) + (", ..." if len(classes) > 10 else "")
        other = repr(unknown[0]) if unknown else f"{data.num_classes} classes"
        raise FusionError(
            f"Expected classes that {owner} can tell apart ({some}), got {other} from {type(data).__name__}; choose "
            "other data (--data)"
        )
    places = [classes.index(label) for label in wanted]
    return None if places == list(range(len(places))) else torch.tensor(places)


def load_parents(
    paths: list[str], data: ImageData, classes: Sequence[Sequence[Label]] | None = None
) -> tuple[list[nn.Module], Sequence[Sequence[Label]] | None]:
    """Load two or more networks to be fused.

    Args:
        paths: Checkpoints of fit or fuse, or files of save_network.
        data: What the networks will be run on.
        classes: Per parent the labels that its outputs stand for; None: as the files say.

    Returns:
        The networks, and their classes; None for these if a file does not say: then all have the same.

    Raises:
        FusionError: There are fewer, or they cannot be used, or the data has a class that none of them knows.

    Warns:
        UserWarning: The data lacks a class.
    """
    if len(paths) < 2:
        raise FusionError(f"Expected two or more parents, got {len(paths)}; name them, such as a.ckpt b.ckpt")
    classes = classes or load_classes(paths)
    if classes is None:
        return load_alike(paths, data, "parents"), None
    networks = [load_parent(path) for path in paths]
    outputs = [check_images(network, data, path, 1) for path, network in zip(paths, networks, strict=True)]
    check_classes(classes, outputs)
    together = union_of(classes)
    label_places(data, together, "the parents together")
    if len(together) > data.num_classes:
        warnings.warn(
            f"Expected images of the {len(together)} classes of all parents, got {data.num_classes} classes from "
            f"{type(data).__name__}; the result may forget the others", UserWarning, stacklevel=2,
        )  # fmt: skip
    return networks, classes


def load_alike(paths: list[str], data: ImageData, role: str) -> list[nn.Module]:
    """Load networks, all of which take the data's images and tell the same number of classes apart.

    Args:
        paths: Checkpoints of fit or fuse, or files of save_network.
        data: What the networks will be run on.
        role: What to call them in the message, in the plural.

    Raises:
        FusionError: A file cannot be used, or a network does not fit the data or the others.

    Warns:
        UserWarning: The networks tell more classes apart than the data has.
    """
    networks = [load_parent(path) for path in paths]
    classes = [check_images(network, data, path) for path, network in zip(paths, networks, strict=True)]
    if len(set(classes)) > 1:
        found = ", ".join(f"{path}: {count}" for path, count in zip(paths, classes, strict=True))
        raise FusionError(f"Expected {role} with the same number of classes, got {found}; choose others")
    if classes[0] > data.num_classes:
        warnings.warn(
            f"Expected {role} with the {data.num_classes} classes of {type(data).__name__}, got {classes[0]}; their "
            "accuracies mean nothing if they were trained on other data", UserWarning, stacklevel=2,
        )  # fmt: skip
    return networks
