"""Two networks with different skills become one that has both, without training and without labels.

    python examples/skill_transfer.py

One sees all images of a 4 and a tenth of the others, the other the rest and never a 4: the real 8x8 digits that come
with scikit-learn. It takes seconds.
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from clafusion import Ensemble, FusionOptions, fuse
from clafusion.datamodules import DigitsDataModule, Split
from clafusion.networks import MLP

LABEL = 4


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Does what the module says; returns the test accuracy of every network."""
    parser = argparse.ArgumentParser(description="Fuses two networks that were trained on disjoint images.")
    parser.add_argument("--epochs", type=int, default=40, help="of training, for each parent")
    epochs = parser.parse_args(arguments).epochs

    # 1. Two parents of different depth and width, on disjoint images.
    torch.manual_seed(0)
    general = trained(MLP(64, [64, 48, 32, 24], num_classes=10), part("B"), epochs)
    personal = trained(MLP(64, [64, 48, 32], num_classes=10), part("A"), epochs)

    # 2. One network from both, on images of all kinds without their labels. At the ends it is (nearly) one parent.
    everything = DigitsDataModule()
    everything.setup()
    results = {}
    for weight in (1.0, 0.75, 0.5, 0.25, 0.0):
        options = FusionOptions(weights=[weight, 1 - weight])
        batches = everything.alignment_batches(options.num_samples, seed=0)
        results[f"fused {weight:.2f} general"] = fuse([general, personal], batches, options).model

    # 3. On all test images, and on those of the class that only one parent has seen.
    networks = {"general": general, "personal": personal, "ensemble": Ensemble([general, personal]), **results}
    images, labels = held_out(everything)
    accuracies = {}
    for name, network in networks.items():
        hits = predictions(network, images) == labels
        accuracies[name] = hits.float().mean().item()
        print(f"{name:20} {accuracies[name]:7.2%} of all, {hits[labels == LABEL].float().mean():7.2%} of the {LABEL}")
    return accuracies


def part(name: str) -> DigitsDataModule:
    """The images of one of the parents."""
    data = DigitsDataModule(batch_size=32, split=Split("personal", part=name, label=LABEL, fraction=0.1))
    data.setup()
    return data


def trained(network: nn.Module, data: DigitsDataModule, epochs: int) -> nn.Module:
    """The network after training."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for images, labels in data.train_dataloader():
            optimizer.zero_grad()
            cross_entropy(network(data.preprocess(images)), labels).backward()
            optimizer.step()
    return network.eval()


def held_out(data: DigitsDataModule) -> tuple[Tensor, Tensor]:
    """All test images, as the networks get them, and their labels."""
    batches = [(data.preprocess(images), labels) for images, labels in data.test_dataloader()]
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


@torch.no_grad()
def predictions(network: nn.Module, images: Tensor) -> Tensor:
    """The class that the network gives each image."""
    return network(images).argmax(1)


if __name__ == "__main__":
    main()
