"""The samples that everything is measured on: collected, checked, cut into chunks."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from clafusion.errors import FusionError
from clafusion.statistics.batches import Batches, Inputs, batches_of, inputs_of
from clafusion.statistics.memory import samples_at_once
from clafusion.tracing.execution import GraphRunner, as_input
from clafusion.tracing.spaces import Axis
from clafusion.tracing.structure import Structure

#: Samples run at once, at most: more gain nothing.
CPU_CHUNK, ACCELERATOR_CHUNK = 64, 1024
#: Bytes of the largest activation: the C library keeps blocks of up to this size for the next one. It returns larger
#: ones to the system, and to get a new one may take as long as what is computed in it.
REUSED_BYTES = 32 * 2**20


def collect(batches: Batches, num_samples: int, inputs: Inputs = None) -> Tensor:
    """The first `num_samples` inputs as one tensor.

    Args:
        batches: in any form that `batches_of` takes (labels are ignored); read once, and no further than needed.
        num_samples: how many at most.
        inputs: which part of a batch the networks take; see `inputs_of`.

    Raises:
        FusionError: if there is not at least one batch, or a batch has no inputs, or a value is not finite.
    """
    parts: list[Tensor] = []
    missing = num_samples
    for batch in batches_of(batches, num_samples):
        part = inputs_of(batch, inputs)
        if parts and part.shape[1:] != parts[0].shape[1:]:
            raise FusionError(
                f"Expected samples of one shape, got {list(parts[0].shape[1:])} and {list(part.shape[1:])}"
            )
        parts.append(part[:missing].detach())
        missing -= len(parts[-1])
        if missing <= 0:
            break
    if not parts:
        raise FusionError("Expected at least one batch of samples, got none; pass unlabelled inputs")
    samples = torch.cat(parts) if len(parts) > 1 else parts[0]
    if not all_finite(samples):
        raise FusionError("Expected finite samples, got NaN or infinity; check the data")
    return samples


def all_finite(tensor: Tensor) -> bool:
    """Whether there is neither NaN nor infinity; a finite sum says so at once, but a sum may also overflow."""
    return bool(tensor.sum().isfinite() or tensor.isfinite().all())


def check_finite(
    state: Mapping[str, Tensor], called: str, axes: Mapping[str, Sequence[Axis | None]] | None = None
) -> None:
    """Refuse a network with a parameter or buffer that is not finite.

    Args:
        state: the parameters and buffers by name.
        called: what the message calls the network.
        axes: tell the neuron spaces.
    """
    for name, tensor in state.items():
        if not all_finite(tensor):
            own = (axes or {}).get(name, ())
            space = next((f" (neuron space {axis.spaces[0]!r})" for axis in own if axis is not None), "")
            raise FusionError(f"Expected finite weights, got NaN or infinity in {name!r}{space} of {called}")


def check_features(*sums: Tensor) -> None:
    """Refuse what was summed over features that are not finite, or too large for their dtype."""
    if not all(all_finite(one) for one in sums):
        raise FusionError(
            "Expected finite activations, got NaN or infinity for some of the samples; check the samples, or use a "
            "wider dtype"
        )


def batch_size(runners: Sequence[GraphRunner], memory_budget: int) -> int:
    """The number of samples to run through networks side by side.

    Args:
        runners: of the networks.
        memory_budget: MiB for the activations that are alive at once, as `GraphRunner.live_numbers` counts them.
    """
    parameters = [runner.capture.reference for runner in runners]
    each = [runner.live_numbers() * p.element_size() for runner, p in zip(runners, parameters, strict=True)]
    most = CPU_CHUNK if parameters[0].device.type == "cpu" else ACCELERATOR_CHUNK
    return samples_at_once(min(most, memory_budget * 2**20 // max(1, sum(each))))


def quick_size(runners: Sequence[GraphRunner], most: int) -> int:
    """The number of samples, at most `most`, to run at once where the size of a batch decides about speed alone."""
    parameters = [runner.capture.reference for runner in runners]
    if parameters[0].device.type != "cpu":
        return most
    largest = max(one.largest_output() * p.element_size() for one, p in zip(runners, parameters, strict=True))
    return max(1, min(most, REUSED_BYTES // max(1, largest)))


def chunks(samples: Tensor, size: int | None = None) -> tuple[Tensor, ...]:
    """Near-equal parts of at most `size` samples; without a size none is too small for an unbiased estimate."""
    size = samples_at_once() if size is None else size
    return samples.tensor_split(max(1, -(-len(samples) // size)))


def rows(features: Tensor, dim: int = 1) -> Tensor:
    """One row per sample and position: neurons along a dimension become [observations, neurons]."""
    return features if features.ndim == 2 and dim == 1 else features.movedim(dim, -1).flatten(0, -2)


@torch.no_grad()
def logits_of(structure: Structure, samples: Tensor) -> Tensor:
    """The logits of a traced network, [samples, classes].

    Raises:
        FusionError: if they are not finite.
    """
    runner, end = GraphRunner(structure.capture), structure.capture.logits
    batches = chunks(samples, quick_size([runner], samples_at_once()))
    logits = torch.cat([dict(runner.observe(as_input(batch, runner.capture), [end]))[end] for batch in batches])
    check_features(logits)
    return logits
