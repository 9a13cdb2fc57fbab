"""Train and fuse on a stream: WebDataset shards, read one after another, that need not fit into memory or be listed.

    pip install webdataset
    python examples/streaming.py                                          # on digits that it writes into shards first
    python examples/streaming.py --train 'train-{000..099}.tar' --test 'test-{00..09}.tar' --size 32 --classes 100

The data module is your own: nothing of it comes from this library. `ImageClassifier` trains on it, `fuse` takes its
batches. Shards hold pairs of files, `00017.png` and `00017.cls` (the number of the class).
"""

import argparse
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import webdataset
from pytorch_lightning import LightningDataModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor

from clafusion import FusionOptions, fuse
from clafusion.lightning_modules import ImageClassifier


class Shards(LightningDataModule):
    """Batches of colour images in `[0, 1]` from shards; each process and each worker reads shards of its own."""

    def __init__(self, train: str, test: str, batch_size: int = 32, num_workers: int = 0) -> None:
        super().__init__()
        self.train, self.test, self.batch_size, self.num_workers = train, test, batch_size, num_workers

    def _loader(self, shards: str, shuffle: int) -> Any:
        stream = webdataset.WebDataset(shards, shardshuffle=shuffle, nodesplitter=webdataset.split_by_node)
        samples = stream.shuffle(shuffle).decode("torchrgb").to_tuple("png", "cls").batched(self.batch_size)
        return webdataset.WebLoader(samples, batch_size=None, num_workers=self.num_workers)

    def train_dataloader(self) -> Any:
        """Training images, shuffled within a window of 1,000."""
        return self._loader(self.train, 1000)

    def test_dataloader(self) -> Any:
        """Test images in the order of their shards."""
        return self._loader(self.test, 0)

    def samples(self, count: int) -> Iterator[Tensor]:
        """The first `count` images of the stream, or a few more, without labels."""
        batches = itertools.islice(self.train_dataloader(), -(-count // self.batch_size))
        return (images for images, _ in batches)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Does what the module says; returns the test accuracy of every network."""
    asked = parse(arguments)
    seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        train, test = (asked.train, asked.test) if asked.train else write_digits(Path(folder))
        data = Shards(train, test)

        # 1. Two parents of different depth.
        inputs = {"name": "MLP", "in_features": 3 * asked.size**2, "num_classes": asked.classes}
        parents = [ImageClassifier({**inputs, "hidden": hidden}, lr=0.05) for hidden in ([48, 32, 24], [48, 32])]
        for parent in parents:
            trainer_for(asked.epochs).fit(parent, data)

        # 2. One network from both, on images of the stream without their labels.
        options = FusionOptions(num_samples=asked.samples)
        result = fuse([parent.eval().network for parent in parents], data.samples(options.num_samples), options)
        fused = ImageClassifier()
        fused.set_network(result.model)

        # 3. What it is worth.
        networks = dict(zip(("deep", "shallow", "fused"), [*parents, fused], strict=True))
        tested = {name: trainer_for(0).test(network, data, verbose=False) for name, network in networks.items()}
    accuracies = {name: value["test_acc"] for name, [value] in tested.items()}
    for name, value in accuracies.items():
        print(f"{name:10} {value:7.2%} of the test images")
    return accuracies


def trainer_for(epochs: int) -> Trainer:
    """A trainer that writes nothing."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(max_epochs=epochs, accelerator="cpu", devices=1, enable_model_summary=False, **quiet)


def write_digits(folder: Path) -> tuple[str, str]:
    """Shards of the 1,797 digits of scikit-learn, four to train on and one to test with; returns their names."""
    digits = load_digits()
    images = torch.from_numpy(digits.images * 255 / 16).round().to(torch.uint8).numpy()
    for number in range(5):
        name = "test-0.tar" if number == 4 else f"train-{number}.tar"
        with webdataset.TarWriter(str(folder / name)) as shard:
            for index in range(number, len(images), 5):
                label = int(digits.target[index])
                shard.write({"__key__": f"{index:04}", "png": images[index][..., None].repeat(3, 2), "cls": label})
    return str(folder / "train-{0..3}.tar"), str(folder / "test-0.tar")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Trains and fuses on WebDataset shards.")
    parser.add_argument("--train", help="shards to train on, with {first..last}; digits without it")
    parser.add_argument("--test", help="shards to test with")
    parser.add_argument("--size", type=int, default=8, help="height and width of the images")
    parser.add_argument("--classes", type=int, default=10, help="number of classes")
    parser.add_argument("--epochs", type=int, default=10, help="of training, for each parent")
    parser.add_argument("--samples", type=int, default=1000, help="unlabelled images to fuse on")
    asked = parser.parse_args(arguments)
    if bool(asked.train) != bool(asked.test):
        parser.error("give both --train and --test")
    return asked


if __name__ == "__main__":
    main()
