"""What Lightning costs: an epoch under the trainer against a bare PyTorch loop over the same batches.

    python benchmarks/train.py

Epochs of the two take turns within one fit, each on its own copy of the network: the same uint8 tensors, preprocessing,
loss and optimizer; the bare loop has no trainer, no logging and no metrics. The second table sets the options for speed
against none of them, in the bare loop; on a CPU few of them pay.
"""

import copy
import logging
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from common import cpu_seconds, fastest, print_machine, print_table
from data import RandomImages
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from torch import nn
from torch.nn.functional import cross_entropy

from clafusion import networks
from lightning_modules import FusionTrainer, ImageClassifier

IMAGES, EPOCHS = 1_280, 4


def bare_epoch(network: nn.Module, data: RandomImages, optimizer: torch.optim.Optimizer) -> None:
    """One epoch without a trainer."""
    generator = torch.Generator().manual_seed(0)
    part = data.train_dataloader().dataset
    for chosen in torch.randperm(len(part)).split(data.batch_size):  # type: ignore[arg-type]
        images, labels = part[chosen]
        optimizer.zero_grad()
        cross_entropy(network(data.preprocess(images, generator)), labels).backward()
        optimizer.step()


class TakeTurns(Callback):
    """Measures every epoch of a fit, and after each a bare one."""

    def __init__(self, network: nn.Module, data: RandomImages) -> None:
        self.network, self.data = network, data
        self.optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        self.start = 0.0
        self.seconds: dict[str, list[float]] = {"trainer": [], "bare": []}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The clock starts."""
        self.start = time.process_time()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The clock stops; then comes the bare epoch."""
        self.seconds["trainer"].append(time.process_time() - self.start)
        self.seconds["bare"].append(cpu_seconds(lambda: bare_epoch(self.network, self.data, self.optimizer)))


def trainer_against_bare(name: str) -> dict[str, object]:
    """One row of the first table."""
    seed_everything(0, verbose=False)
    data = RandomImages(augment=True, size=IMAGES)
    data.setup()
    classifier = ImageClassifier({"name": name, "num_classes": 10}, lr=0.01)
    assert classifier.network is not None
    turns = TakeTurns(copy.deepcopy(classifier.network), data)
    trainer = FusionTrainer(
        accelerator="cpu", max_epochs=EPOCHS, limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[turns],
    )  # fmt: skip
    trainer.fit(classifier, data)
    pairs = list(zip(turns.seconds["trainer"], turns.seconds["bare"], strict=True))[1:]  # the first one warms up
    ratio = statistics.median(one / other for one, other in pairs)
    return {"network": name, "trainer, CPU s": pairs[0][0], "bare, CPU s": pairs[0][1], "ratio": ratio}


def step_of(network: nn.Module, autocast: bool = False, **optimizer: Any) -> Callable[[], None]:
    """One training step on a fixed batch."""
    stepper = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, **optimizer)
    images, labels = torch.randn(128, 3, 32, 32), torch.arange(128) % 10

    def step() -> None:
        stepper.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = cross_entropy(network(images), labels)
        loss.backward()
        stepper.step()

    return step


def main() -> None:
    """Both tables."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning|torch")
    print_machine()
    print_table(
        f"An epoch of {IMAGES} images of 3x32x32 in batches of 128",
        [trainer_against_bare(name) for name in ("resnet18_eighth",)],
    )
    networks_ = [networks.build({"name": "resnet18_fourth", "batch_norm": True}) for _ in range(5)]
    last = networks_[3].to(memory_format=torch.channels_last)
    steps = {
        "none": step_of(networks_[0]),
        "fused optimizer": step_of(networks_[1], fused=True),
        "bfloat16": step_of(networks_[2], autocast=True),
        "channels_last": step_of(last),
    }
    if shutil.which("c++"):
        steps["compile"] = step_of(torch.compile(networks_[4]))
    for step in steps.values():
        step()
    seconds = fastest(steps, rounds=3)
    print_table(
        "A training step of 128 images on the CPU, resnet18_fourth with BatchNorm",
        [{"option": name, "CPU s": value, "ratio": value / seconds["none"]} for name, value in seconds.items()],
    )


if __name__ == "__main__":
    main()
