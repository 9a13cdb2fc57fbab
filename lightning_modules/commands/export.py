"""Networks in the formats of other programs, by PyTorch's own exporters: `clafusion export`."""

import contextlib
import io
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from clafusion.errors import FusionError
from clafusion.lightning_modules.checkpoints.reading import load_parent
from clafusion.lightning_modules.commands.outputs import check_new, check_output
from clafusion.lightning_modules.compatibility import run
from clafusion.lightning_modules.files import write_atomically, writer

# Of the largest logit; other programs add up in another order.
_TOLERANCE = 1e-3
_NEEDED = ("onnx", "onnxscript")
_BATCH = {0: torch.export.Dim.DYNAMIC}


def export_file(input: str, output: str, shape: list[int] | None = None, overwrite: bool = False) -> None:
    """Export a network to torch.export or ONNX, for any batch size, and check that its outputs stay the same.

    Args:
        input: A checkpoint of fit, fuse or transfer, or a file of save_network.
        output: The file to write: NAME.pt2 for torch.export, NAME.onnx for ONNX, which needs the packages onnx and
            onnxscript.
        shape: Of one image as the network gets it, such as [3, 32, 32]; none given: that of the images that the
            checkpoint was trained on.
        overwrite: Whether output may replace an existing file.

    Raises:
        FusionError: The input or the output cannot be used, or the outputs differ; nothing is written then.
    """
    path = check_output(output, (".pt2", ".onnx"))
    check_new([path], overwrite)
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if path.suffix == ".onnx" and missing:
        raise FusionError(
            f"Expected the packages {' and '.join(_NEEDED)}, got no {missing[0]}; pip install {missing[0]}"
        )
    network = load_parent(input)
    if shape is None:
        raise FusionError(f"Expected --shape, got none, and nothing in {input} says which images it had; give one")
    samples, expected = _samples(network, shape, input)
    convert, run_exported = (_as_onnx, _run_onnx) if path.suffix == ".onnx" else (_as_program, _run_program)
    content = _exported(convert, network, samples[:2], path.suffix)
    # Another number of samples than it was exported with: the batch size must be free.
    difference = float((run_exported(content, samples) - expected).abs().max())
    if not difference <= _TOLERANCE * float(expected.abs().max()):
        raise FusionError(f"Expected equal outputs, got a difference of {difference:.2g}; try the other format")
    # Not written by PyTorch, which aborts the process where the disk is full.
    write_atomically(path, writer(content))
    print(f"wrote {output}: takes [samples, {', '.join(map(str, shape))}], and its outputs agree with the network's")


def _samples(network: nn.Module, shape: Sequence[int], path: str) -> tuple[Tensor, Tensor]:
    """Return three random samples that the network accepts, and its outputs for them."""
    if not shape or min(shape) < 1:
        raise FusionError(f"Expected a shape of numbers from 1, got {list(shape)}; give --shape '[3, 32, 32]'")
    like = next(network.parameters())
    samples = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).to(like.dtype)
    try:
        return samples, run(network, samples)
    except FusionError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = str(error).partition("\n")[0]
        raise FusionError(f"Expected a shape that {path} takes, got {list(shape)}: {reason}; change --shape") from error


def _exported(convert: Callable[[nn.Module, Tensor], bytes], network: nn.Module, samples: Tensor, suffix: str) -> bytes:
    """Call an exporter, whose own remarks are about PyTorch and not about the network."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return convert(network, samples)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FusionError(
            f"Expected a network that PyTorch exports to {suffix}, got: {reason}; try the other format"
        ) from error


def _as_program(network: nn.Module, samples: Tensor) -> bytes:
    content = io.BytesIO()
    torch.export.save(torch.export.export(network, (samples,), dynamic_shapes=(_BATCH,)), content)
    return content.getvalue()


def _run_program(content: bytes, samples: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = torch.export.load(io.BytesIO(content)).module()(samples)
    return output


def _as_onnx(network: nn.Module, samples: Tensor) -> bytes:
    program = torch.onnx.export(
        network,
        (samples,),
        dynamo=True,
        dynamic_shapes=(_BATCH,),
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None  # None is for dynamo=False
    content: bytes = program.model_proto.SerializeToString()
    return content


def _run_onnx(content: bytes, samples: Tensor) -> Tensor:
    # The evaluator of the standard itself: slow, and independent of the exporter.
    from onnx.reference import ReferenceEvaluator

    [logits] = ReferenceEvaluator(content).run(None, {"images": samples.numpy()})
    return torch.from_numpy(logits)
