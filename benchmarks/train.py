"""What Lightning costs: an epoch under the trainer against a bare PyTorch loop over the same batches.

    python benchmarks/train.py

Epochs of the two take turns within one fit, each on its own copy of the network: the same uint8 tensors, preprocessing,
loss and optimizer; the bare loop has no trainer, no logging and no metrics. The second table sets the options for speed
against none of them, in the bare loop.
"""

import copy
import shutil
import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import fastest, now, print_machine, print_table, quietly, seconds
from data import RandomImages
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from clafusion import networks
from clafusion.lightning_modules import FusionTrainer, ImageClassifier

EPOCHS = 4

Batch = tuple[Tensor, Tensor]


def bare_epoch(network: nn.Module, data: RandomImages, optimizer: torch.optim.Optimizer, device: str) -> None:
    """One epoch without a trainer."""
    generator = torch.Generator().manual_seed(0)
    part = data.train_dataloader().dataset
    for chosen in torch.randperm(len(part)).split(data.batch_size):  # type: ignore[arg-type]
        images, labels = (tensor.to(device) for tensor in part[chosen])
        optimizer.zero_grad()
        cross_entropy(network(data.preprocess(images, generator)), labels).backward()
        optimizer.step()


class TakeTurns(Callback):
    """Measures every epoch of a fit, and after each a bare one."""

    def __init__(self, network: nn.Module, data: RandomImages, device: str) -> None:
        self.network, self.data, self.device = network.to(device), data, device
        self.optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        self.start = 0.0
        self.seconds: dict[str, list[float]] = {"trainer": [], "bare": []}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The clock starts."""
        self.start = now(self.device)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The clock stops; then comes the bare epoch."""
        self.seconds["trainer"].append(now(self.device) - self.start)
        bare = seconds(lambda: bare_epoch(self.network, self.data, self.optimizer, self.device), self.device)
        self.seconds["bare"].append(bare)


def trainer_against_bare(name: str, images: int, device: str = "cpu") -> dict[str, object]:
    """One row of the first table."""
    seed_everything(0, verbose=False)
    data = RandomImages(augment=True, size=images)
    data.setup()
    classifier = ImageClassifier({"name": name, "num_classes": 10}, lr=0.01)
    assert classifier.network is not None
    turns = TakeTurns(copy.deepcopy(classifier.network), data, device)
    trainer = FusionTrainer(
        accelerator=device, devices=1, max_epochs=EPOCHS, limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[turns],
    )  # fmt: skip
    trainer.fit(classifier, data)
    pairs = list(zip(turns.seconds["trainer"], turns.seconds["bare"], strict=True))[1:]  # the first one warms up
    ratio = statistics.median(one / other for one, other in pairs)
    return {"network": name, "images": images, "trainer, s": pairs[0][0], "bare, s": pairs[0][1], "ratio": ratio}


def step_of(network: nn.Module, batch: Batch, autocast: bool = False, **optimizer: Any) -> Callable[[], None]:
    """One training step on a fixed batch."""
    stepper = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, **optimizer)
    images, labels = batch

    def step() -> None:
        stepper.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            loss = cross_entropy(network(images), labels)
        loss.backward()
        stepper.step()

    return step


def options_compared(name: str, size: int, device: str = "cpu", repeats: int = 1) -> list[dict[str, object]]:
    """The second table: a training step of so many images with every option for speed, and with all of them."""
    batch = torch.randn(size, 3, 32, 32).to(device), (torch.arange(size) % 10).to(device)

    def network(last: bool = False) -> nn.Module:
        layout = torch.channels_last if last else torch.contiguous_format
        return networks.build({"name": name, "batch_norm": True}).to(device, memory_format=layout)

    steps = {
        "none": step_of(network(), batch),
        "fused optimizer": step_of(network(), batch, fused=True),
        "bfloat16": step_of(network(), batch, autocast=True),
        "channels_last": step_of(network(last=True), batch),
    }
    if shutil.which("c++"):
        steps["compile"] = step_of(torch.compile(network()), batch)
        steps["all of them"] = step_of(torch.compile(network(last=True)), batch, autocast=True, fused=True)
    for step in steps.values():
        step()
        step()

    def repeated(step: Callable[[], None]) -> Callable[[], object]:
        return lambda: [step() for _ in range(repeats)]

    found = fastest({option: repeated(step) for option, step in steps.items()}, rounds=3, device=device)
    return [{"option": option, "s": value / repeats, "ratio": value / found["none"]} for option, value in found.items()]


def main() -> None:
    """Both tables."""
    quietly()
    print_machine()
    print_table("An epoch of 3x32x32 in batches of 128, CPU seconds", [trainer_against_bare("resnet18_eighth", 1280)])
    print_table(
        "A training step of 128 images on the CPU, resnet18_fourth with BatchNorm, CPU seconds",
        options_compared("resnet18_fourth", 128),
    )


if __name__ == "__main__":
    main()
