"""What is a fused network worth where its parents know different things? Trains its own parents and says.

    python benchmarks/union.py --output runs/union
    python benchmarks/union.py --families '[vgg]' --seeds '[0]' --output runs/union

Fashion-MNIST, 2,000 unlabelled training images that are mixed as the test images are, no gradient. Parents of two
depths that saw the same images, few images, unequal shares of the classes, other classes, other classes with heads of
their own, or the images upright and changed. Test accuracy in per cent, mean and standard deviation over the seeds: the
better parent; the ensembles (mean of the probabilities, gated); an oracle that knows which parent has learned an
image's class or domain; and networks of the anchor's size: the settings before there was a gate, the control (the
anchor with an output layer fitted to the gated ensemble), neurons that are matched, those chosen among all, and the
default, which chooses. Last, the control distilled: trained on the same images to say what the gated ensemble says,
with Adam and for as many CPU seconds as the default took.
"""

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from architectures import build, vit
from common import once, table_over_seeds
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

from clafusion import Ensemble, FusionOptions, fuse, load_network, save_network
from clafusion.datamodules import MNISTDataModule

VARIANTS: dict[str, dict[str, Any]] = {
    "mean teacher, matched": {"teacher": "mean", "targets": "matched"},
    "control: anchor's features": {"targets": "matched", "anchor_lead": 1e9},
    "matched": {"targets": "matched"},
    "union": {"targets": "union"},
    "default": {},
}
VGG = {"vgg13": [[64, 64], [128, 128], [256, 256], [512, 512], [512, 512]]}
VGG["vgg11"] = [[64], [128], [256, 256], [512, 512], [512, 512]]


def mlp(hidden: Sequence[int]) -> dict[str, Any]:
    """A perceptron with biases."""
    return {"name": "MLP", "in_features": 784, "hidden": list(hidden), "bias": True}


def vgg(name: str, batch_norm: bool) -> dict[str, Any]:
    """A VGG at an eighth of its width."""
    channels = [[width // 8 for width in stage] for stage in VGG[name]]
    return {"name": "VGG", "channels": channels, "bias": True, "batch_norm": batch_norm}


def resnet(blocks: Sequence[int], batch_norm: bool) -> dict[str, Any]:
    """A ResNet at an eighth of its width."""
    return {"name": "ResNet", "blocks": list(blocks), "width": 8, "batch_norm": batch_norm}


@dataclass(frozen=True)
class Family:
    """Two architectures, and how they are trained.

    Attributes:
        architectures: of the parents.
        learning_rate: the highest.
        epochs: over all images of the parent.
        small_epochs: over few images.
        adam: AdamW instead of SGD.
        num_train: images of each parent, at most.
    """

    architectures: tuple[dict[str, Any], dict[str, Any]]
    learning_rate: float = 0.05
    epochs: int = 2
    small_epochs: int = 20
    adam: bool = False
    num_train: int = 20_000


FAMILIES = {
    "mlp": Family((mlp([400, 200, 100, 50]), mlp([400, 200, 100])), epochs=4, small_epochs=30, num_train=60_000),
    "vgg": Family((vgg("vgg13", True), vgg("vgg11", True)), 0.1),
    "vgg_plain": Family((vgg("vgg13", False), vgg("vgg11", False))),
    "resnet": Family((resnet([2, 2, 2, 2], True), resnet([1, 1, 1, 1], True)), 0.1),
    "resnet_plain": Family((resnet([2, 2, 2, 2], False), resnet([1, 1, 1, 1], False))),
    "vit": Family((vit(6, 64), vit(4, 64)), 1e-3, epochs=4, adam=True),
}


def upright(images: Tensor) -> Tensor:
    """The images as they are."""
    return images


def rotated(images: Tensor) -> Tensor:
    """Turned by 90 degrees."""
    return torch.rot90(images, 1, (2, 3))


def inverted(images: Tensor) -> Tensor:
    """White on black instead of black on white."""
    return 1 - images


def blurred(images: Tensor) -> Tensor:
    """The mean of 5 x 5 pixels."""
    return avg_pool2d(images, 5, stride=1, padding=2)


@dataclass(frozen=True)
class Regime:
    """What each of two parents learned.

    Attributes:
        classes: of each parent.
        heads: whether each parent has outputs for its own classes alone.
        change: what was done to the images of the second parent.
        train: training images of each parent; None: all of its classes.
        skill: the first parent saw a tenth of all classes but class 4, the second the rest without class 4.
    """

    classes: tuple[range, range] = (range(10), range(10))
    heads: bool = False
    change: Callable[[Tensor], Tensor] = upright
    train: int | None = None
    skill: bool = False


REGIMES = {
    "same": Regime(),
    "small_data": Regime(train=2_000),
    "skill": Regime(skill=True),
    "disjoint_classes": Regime((range(5), range(5, 10))),
    "overlapping_classes": Regime((range(7), range(3, 10))),
    "label_sets": Regime((range(5), range(5, 10)), heads=True),
    "overlapping_label_sets": Regime((range(7), range(3, 10)), heads=True),
    "rotated": Regime(change=rotated),
    "inverted": Regime(change=inverted),
    "blurred": Regime(change=blurred),
}


@dataclass(frozen=True)
class Images:
    """Images as they are, values from 0 to 1 [images, 1, 28, 28], labels, and what makes them inputs."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    prepare: Callable[[Tensor], Tensor]


def load_images(family: str) -> Images:
    """Fashion-MNIST; for convolutions padded to 3x32x32."""
    shape: dict[str, Any] = {} if family == "mlp" else {"pad_to": 32, "channels": 3}
    data = MNISTDataModule(variant="fashion", val_fraction=0.0, **shape)
    data.setup()
    train, test = (loader.dataset for loader in (data.train_dataloader(), data.test_dataloader()))

    def prepare(images: Tensor) -> Tensor:
        return data.preprocess((255 * images).round().to(torch.uint8))

    return Images(train.images.float() / 255, train.labels, test.images.float() / 255, test.labels, prepare)


def train(network: nn.Module, images: Tensor, labels: Tensor, family: Family, epochs: int, seed: int) -> nn.Module:
    """SGD or AdamW with a one-cycle learning rate and clipped gradients."""
    generator, batch, rate = torch.Generator().manual_seed(seed), 128, family.learning_rate
    optimizer: torch.optim.Optimizer = torch.optim.SGD(network.parameters(), rate, 0.9, weight_decay=5e-4)
    if family.adam:
        optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=0.05)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, cycle_momentum=not family.adam)
    network.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for chosen in order.split(batch)[: len(images) // batch]:
            optimizer.zero_grad()
            cross_entropy(network(images[chosen]), labels[chosen]).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimizer.step()
            schedule.step()
    return network.eval()


def distilled(network: nn.Module, samples: Tensor, wanted: Tensor, seconds: float) -> nn.Module:
    """A copy trained to give the wanted probabilities for so many CPU seconds; statistics of norms stay as they are."""
    generator, batch, rate = torch.Generator().manual_seed(0), 64, 1e-3
    network = copy.deepcopy(network).eval()
    optimizer = torch.optim.Adam(network.parameters(), rate)

    def step(chosen: Tensor) -> None:
        optimizer.zero_grad()
        cross_entropy(network(samples[chosen]), wanted[chosen]).backward()
        optimizer.step()

    start, state = time.process_time(), copy.deepcopy(network.state_dict())
    for chosen in torch.arange(5 * batch).split(batch):
        step(chosen)
    steps = max(1, int(5 * seconds / (time.process_time() - start)))
    network.load_state_dict(state)
    optimizer = torch.optim.Adam(network.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    while steps > 0:
        for chosen in torch.randperm(len(samples), generator=generator).split(batch)[:steps]:
            step(chosen)
            schedule.step()
            steps -= 1
    return network


def parent_of(name: str, family: str, side: int, seed: int, images: Images, folder: Path) -> nn.Module:
    """A trained parent, from the folder if it is there."""
    regime, how = REGIMES[name], FAMILIES[family]
    if side == 0 and regime.change is not upright:
        name = "same"  # the upright parent is the one of that regime
    path = folder / f"{family}_{name}_{side}_{seed}.safetensors"
    if not path.exists():
        generator = torch.Generator().manual_seed(100 * seed + 7)
        order = torch.randperm(len(images.train), generator=generator)
        labels, own = images.train_labels[order], torch.tensor(list(regime.classes[side]))
        chosen = order[torch.isin(labels, own)]
        if regime.skill:
            tenth = torch.rand(len(order), generator=generator) < 0.1
            mine = (labels == 4) | tenth
            chosen = order[mine if side == 0 else ~mine]
        if regime.train is not None:
            chosen = order[side * regime.train : (side + 1) * regime.train]
        else:
            chosen = chosen[: how.num_train]
        count = len(own) if regime.heads else 10
        given = images.train_labels[chosen] - (int(own[0]) if regime.heads else 0)
        epochs = how.epochs if regime.train is None else how.small_epochs
        inputs = images.prepare(regime.change(images.train[chosen]) if side else images.train[chosen])
        torch.manual_seed(1000 * seed + side)
        network = train(build(how.architectures[side], count), inputs, given, how, epochs, seed)
        save_network(network, path, example=inputs[:2])
    return load_network(path)


@torch.no_grad()
def answers(network: nn.Module, images: Tensor) -> Tensor:
    """The logits of a network."""
    return torch.cat([network.eval()(batch) for batch in images.split(500)])


def accuracy(answer: Tensor, labels: Tensor) -> float:
    """In per cent."""
    return 100 * float((answer.argmax(1) == labels).double().mean())


def measure(name: str, family: str, seed: int, images: Images, folder: Path, num_samples: int) -> dict[str, Any]:
    """One regime with one seed."""
    regime = REGIMES[name]
    # In skill transfer the second parent, who knows nearly everything, is the anchor.
    sides = (1, 0) if regime.skill else (0, 1)
    parents = [parent_of(name, family, side, seed, images, folder) for side in sides]
    order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(seed + 5))[:num_samples]
    samples, test, labels = images.train[order], images.test, images.test_labels
    knows = labels >= 5 if regime.classes[0] == range(5) else None
    if regime.change is not upright:
        half = num_samples // 2
        samples = torch.cat([samples[:half], regime.change(samples[half:])])
        samples = samples[torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed))]
        knows = torch.arange(2 * len(test)) >= len(test)
        test, labels = torch.cat([test, regime.change(test)]), torch.cat([labels, labels])
    samples, test = images.prepare(samples), images.prepare(test)
    classes = [list(one) for one in regime.classes] if regime.heads else None
    alone = [Ensemble([parent], classes=[classes[k]] if classes else None) for k, parent in enumerate(parents)]
    own = [answers(one, test) for one in alone]
    if classes:
        wide = [torch.full((len(labels), 10), -torch.inf) for _ in own]
        own = [one.index_copy(1, torch.tensor(classes[k]), own[k]) for k, one in enumerate(wide)]
    found = {"better parent": max(accuracy(one, labels) for one in own)}
    found["ensemble, mean"] = accuracy(answers(Ensemble(parents, classes=classes), test), labels)
    gated = Ensemble(parents, space="gated", samples=samples, classes=classes)
    found["ensemble, gated"] = accuracy(answers(gated, test), labels)
    if knows is not None:
        found["oracle"] = accuracy(torch.stack(own, 1)[torch.arange(len(labels)), knows.long()], labels)
    seconds, control = {}, parents[0]
    for variant, options in VARIANTS.items():
        start = time.process_time()
        fusion = fuse(parents, [samples], FusionOptions(num_samples=num_samples, **options), classes=classes)
        seconds[variant] = time.process_time() - start
        found[variant] = accuracy(answers(fusion.model, test), labels)
        control = fusion.model if variant.startswith("control") else control
    wanted = answers(gated, samples).exp()
    longer = distilled(control, samples, wanted, seconds[variant])
    found["control, distilled"] = accuracy(answers(longer, test), labels)
    return {"regime": name, "family": family, "seed": seed, "accuracy": found, "seconds": seconds,
            "chosen": fusion.chosen, "candidates": dict(fusion.candidates), "trust": list(fusion.trust)}  # fmt: skip


def table(results: Sequence[Mapping[str, Any]], key: str) -> str:
    """A Markdown table: mean and standard deviation over the seeds."""
    rows: dict[str, dict[str, list[float]]] = {}
    for result in results:
        for name, value in result[key].items():
            rows.setdefault(f"{result['family']}: {result['regime']}", {}).setdefault(name, []).append(value)
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    return table_over_seeds(rows, columns, digits=1)


def main(
    families: list[str] | None = None,
    regimes: list[str] | None = None,
    seeds: list[int] | None = None,
    output: str = "runs/union",
    num_samples: int = 2_000,
    threads: int = 1,
) -> None:
    """Measure and print.

    Args:
        families: Names (`FAMILIES`); none given: mlp.
        regimes: Names; none given: all.
        seeds: Seeds; none given: 0, 1 and 2.
        output: Folder of parents and results.
        num_samples: Unlabelled images to fuse on.
        threads: CPU threads.
    """
    torch.set_num_threads(threads)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for family in families or ["mlp"]:
        images = load_images(family)
        for seed in [0, 1, 2] if seeds is None else seeds:
            for name in regimes or REGIMES:
                path, case = folder / f"{family}_{name}_{seed}.json", (name, family, seed, images, folder, num_samples)
                results.append(once(path, lambda case=case: measure(*case)))
                print(json.dumps(results[-1]), flush=True)
    print(f"\nTest accuracy\n\n{table(results, 'accuracy')}\n\nCPU seconds\n\n{table(results, 'seconds')}")


if __name__ == "__main__":
    auto_cli(main)
