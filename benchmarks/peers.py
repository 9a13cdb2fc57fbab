"""Networks of another project, fused: MNIST perceptrons that know unequal shares of the classes, on 400 images.

    python benchmarks/peers.py NETWORKS MNIST

The networks are those of AndrewSpano/neuron-interpolation-model-fusion (MIT licence), perceptrons 784-256-10 as state
dicts of `nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))`, in files `mnist_splitK_I.pt` for parent I
of K. Its method gives 94.23 and 94.34 on 400 class-balanced images with importances that are computed from labels, and
92.86 without. Here labels only balance the draw. Test accuracy in per cent, mean and standard deviation over draws of
the images: the parents; their ensembles (mean of the probabilities, gated); the control (the anchor with an output
layer fitted to the gated ensemble); and what the options give.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import table_over_seeds
from jsonargparse import auto_cli
from torch import Tensor, nn

from clafusion import Ensemble, FusionOptions, fuse
from clafusion.datamodules import MNISTDataModule

VARIANTS: dict[str, dict[str, Any]] = {
    "control": {"teacher": "auto", "anchor_lead": 1e9, "targets": "matched"},
    "matched": {"teacher": "auto", "targets": "matched"},
    "union": {"teacher": "auto", "targets": "union"},
    "centroids": {"teacher": "auto", "targets": "centroids"},
    "auto": {"teacher": "auto", "targets": "auto"},
}


def load_sets(folder: Path) -> dict[int, list[nn.Module]]:
    """The parents of every set, by their number."""
    found: dict[int, dict[int, nn.Module]] = {}
    for path in sorted(folder.glob("mnist_split*_*.pt")):
        numbers = re.fullmatch(r"mnist_split(\d+)_(\d+)", path.stem)
        if numbers is None:
            continue
        layers = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
        layers.load_state_dict(torch.load(path, weights_only=True))
        network = nn.Sequential(nn.Flatten(), layers).eval()
        found.setdefault(int(numbers[1]), {})[int(numbers[2])] = network
    return {count: [parents[k] for k in sorted(parents)] for count, parents in sorted(found.items())}


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """In per cent."""
    answers = torch.cat([network(batch).argmax(1) for batch in images.split(1000)])
    return 100 * float((answers == labels).double().mean())


def drawn(labels: Tensor, count: int, seed: int) -> Tensor:
    """The places of as many images of every class, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    each = [order[labels[order] == label][: count // 10] for label in range(10)]
    return torch.cat(each)[torch.randperm(count // 10 * 10, generator=generator)]


def measure(parents: Sequence[nn.Module], samples: Tensor, images: Tensor, labels: Tensor) -> dict[str, float]:
    """The accuracies for one draw."""
    found = {"better parent": max(accuracy(parent, images, labels) for parent in parents)}
    found["worse parent"] = min(accuracy(parent, images, labels) for parent in parents)
    found["ensemble, mean"] = accuracy(Ensemble(parents), images, labels)
    found["ensemble, gated"] = accuracy(Ensemble(parents, space="gated", samples=samples), images, labels)
    for name, options in VARIANTS.items():
        fusion = fuse(parents, [samples], FusionOptions(num_samples=len(samples), **options))
        found[name] = accuracy(fusion.model, images, labels)
    print({name: round(value, 2) for name, value in found.items()}, fusion.chosen, flush=True)
    return found


def main(networks: str, data: str, num_samples: int = 400, draws: int = 5, threads: int = 1) -> None:
    """Measure and print.

    Args:
        networks: Folder of the networks.
        data: Folder of MNIST's IDX files.
        num_samples: Unlabelled images to fuse on.
        draws: How many draws of the images.
        threads: CPU threads.
    """
    torch.set_num_threads(threads)
    module = MNISTDataModule(data_dir=data, val_fraction=0.0)
    module.setup()
    train, test = (loader.dataset for loader in (module.train_dataloader(), module.test_dataloader()))
    images, rows = module.preprocess(test.images), {}
    for count, parents in load_sets(Path(networks)).items():
        found: dict[str, list[float]] = {}
        for seed in range(draws):
            samples = module.preprocess(train.images[drawn(train.labels, num_samples, seed)])
            for name, value in measure(parents, samples, images, test.labels).items():
                found.setdefault(name, []).append(value)
        rows[f"{count} parents"] = found
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    print(f"\nTest accuracy, {num_samples} images\n\n{table_over_seeds(rows, columns, digits=2)}")


if __name__ == "__main__":
    auto_cli(main)
