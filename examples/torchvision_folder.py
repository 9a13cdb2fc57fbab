"""Two networks of torchvision, with BatchNorm, on a folder of your own images: train or load them, fuse, compare.

    python examples/torchvision_folder.py DATA                        # trains both first
    python examples/torchvision_folder.py DATA --deep a.pt --shallow b.pt    # state dicts of networks that are trained

DATA holds a folder of images per class, or `train` and `test` with one each. No Lightning trainer is involved.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.models import resnet18, resnet34

from clafusion import Ensemble, FusionOptions, fuse, save_network
from clafusion.datamodules import ImageFolderDataModule


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Does what the module says; returns the test accuracy of every network."""
    asked = parse(arguments)
    torch.manual_seed(0)
    data = ImageFolderDataModule(asked.data, size=asked.size, batch_size=32)
    data.setup()

    # 1. The parents: yours, or trained here.
    deep = parent(resnet34(num_classes=data.num_classes), asked.deep, data, asked.epochs)
    shallow = parent(resnet18(num_classes=data.num_classes), asked.shallow, data, asked.epochs)

    # 2. One network from both, on training images without their labels.
    options = FusionOptions(num_samples=asked.samples, correction=asked.correction)
    result = fuse([deep, shallow], data.alignment_batches(options.num_samples, seed=0), options)

    # 3. What it is worth, beside what it came from and beside the ensemble, which costs as much as both.
    networks = {"deep": deep, "shallow": shallow, "ensemble": Ensemble([deep, shallow]), "fused": result.model}
    accuracies = {name: accuracy(network, data) for name, network in networks.items()}
    for name, value in accuracies.items():
        print(f"{name:10} {value:7.2%} of the test images")

    save_network(result.model, asked.output)
    print(f"wrote {asked.output}; `load_network` and `clafusion fuse` read it")
    return accuracies


def parent(network: nn.Module, weights: Path | None, data: ImageFolderDataModule, epochs: int) -> nn.Module:
    """The network with the weights of a file; without one, trained."""
    if weights is not None:
        network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        return network.eval()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    for epoch in range(epochs):
        for images, labels in data.train_dataloader():
            optimizer.zero_grad()
            loss = cross_entropy(network(data.preprocess(images)), labels)
            loss.backward()
            optimizer.step()
        print(f"{type(network).__name__}: epoch {epoch + 1} of {epochs}, loss {loss.item():.3f}")
    return network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, data: ImageFolderDataModule) -> float:
    """Share of the test images that the network gets right."""
    hits = [network(data.preprocess(images)).argmax(1) == labels for images, labels in data.test_dataloader()]
    return torch.cat(hits).float().mean().item()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Fuses a resnet34 and a resnet18 on a folder of images.")
    parser.add_argument("data", help="folder of the images")
    parser.add_argument("--deep", type=Path, help="state dict of a trained resnet34; trained here without it")
    parser.add_argument("--shallow", type=Path, help="state dict of a trained resnet18; trained here without it")
    parser.add_argument("--size", type=int, default=64, help="height and width of the images")
    parser.add_argument("--epochs", type=int, default=10, help="of training, where networks are trained")
    parser.add_argument("--samples", type=int, default=2000, help="unlabelled images to fuse on")
    parser.add_argument("--correction", default="refit", help="refit (minutes), repair (seconds), rescale or none")
    parser.add_argument("--output", type=Path, default=Path("fused.safetensors"), help="file to write")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
