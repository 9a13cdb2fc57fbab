"""How good is a fused network, before and after a short finetune? Trains its own parents on Fashion-MNIST and says.

    python benchmarks/quality.py --seeds '[0, 1, 2]' --output runs/quality
    python benchmarks/quality.py --output benchmarks/results/quality      # goes on from the results that are checked in

Two tables, mean and standard deviation over the seeds of the test accuracy in per cent. Before: the parents, their
prediction ensemble, the published settings, every correction, and the default settings, all at equal weights, on
unlabelled training images and without a gradient. After an equal short finetune: the fused networks, each parent, and
the shallow parent balanced to the fused depth. Parents and results are kept in the output folder; a repeated command
goes on where the last one stopped.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from architectures import build, vit
from common import once, table_over_seeds
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from clafusion import Ensemble, FusionError, FusionOptions, fuse, load_network, save_network
from clafusion.datamodules import MNISTDataModule

#: Hidden layers that average the parents, as the tables below do unless they say otherwise.
MATCHED = {"teacher": "mean", "targets": "matched"}
#: What the second table has no row for is measured and dropped. `equal features`: hidden layers, too, are refit to the
#: plain mean of the parents; `anchor's features`: the control, the anchor as it is with an output layer that is fitted
#: to the ensemble, which is what the default comes to where parents agree; `refit`: between the two; `anchor by
#: agreement`: likewise, the anchor chosen without labels.
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"correction": "none"},
    "rescale": {"correction": "rescale"},
    "repair": {"correction": "repair"},
    "refit, equal features": {**MATCHED, "anchor_lead": 1.0},
    "refit, anchor's features": {**MATCHED, "anchor_lead": 1e9},
    "refit": MATCHED,
    "refit, anchor by agreement": {**MATCHED, "anchor": "agreement"},
    "default": {},
}
FINETUNED = ("none", "refit, equal features", "refit", "refit, anchor by agreement")
VGG = {
    "vgg11": [[64], [128], [256, 256], [512, 512], [512, 512]],
    "vgg13": [[64, 64], [128, 128], [256, 256], [512, 512], [512, 512]],
    "vgg11_half": [[64], [64], [128, 128], [256, 256], [256, 512]],
    "vgg13_doub": [[64, 128], [256, 256], [512, 512], [1024, 1024], [1024, 512]],
}


def vgg(name: str, **kwargs: Any) -> dict[str, Any]:
    """A published VGG at an eighth of its width."""
    return {"name": "VGG", "channels": [[width // 8 for width in stage] for stage in VGG[name]], **kwargs}


def resnet(blocks: Sequence[int], **kwargs: Any) -> dict[str, Any]:
    """A published ResNet at an eighth of its width."""
    return {"name": "ResNet", "blocks": list(blocks), "width": 8, **kwargs}


def mlp(hidden: Sequence[int]) -> dict[str, Any]:
    """A published multilayer perceptron, at full width."""
    return {"name": "MLP", "in_features": 784, "hidden": list(hidden), "num_classes": 10}


def convnext(*stages: tuple[int, int | None, int]) -> dict[str, Any]:
    """A ConvNeXt of torchvision's from its stages: width, width of the next stage, blocks."""
    return {"name": "torchvision.ConvNeXt", "block_setting": [list(stage) for stage in stages]}


@dataclass(frozen=True)
class Recipe:
    """How networks are trained: SGD, momentum 0.9, a one-cycle or constant learning rate; or by AdamW."""

    epochs: int
    learning_rate: float
    momentum: float = 0.9
    batch_size: int = 128
    weight_decay: float = 5e-4
    one_cycle: bool = True
    adam: bool = False


@dataclass(frozen=True)
class Experiment:
    """Networks to train and fuse.

    Attributes:
        parents: architectures.
        recipe: how they are trained.
        fusion: what differs from the default options.
        flat: 1x28x28 images instead of 3x32x32.
        skills: parent 0 sees all of class 4 and a tenth of the rest, parent 1 the remainder.
        finetune: whether the table after finetuning has a row for it.
        num_train: training images of the parents.
    """

    parents: tuple[dict[str, Any], ...]
    recipe: Recipe
    fusion: Mapping[str, Any] = field(default_factory=dict)
    flat: bool = False
    skills: bool = False
    finetune: bool = True
    num_train: int = 60_000


PLAIN, NORMED, SHALLOW = Recipe(2, 0.05), Recipe(2, 0.1), Recipe(10, 0.01, 0.5, 64, weight_decay=0.0, one_cycle=False)
MODERN = Recipe(4, 1e-3, weight_decay=0.05, adam=True)
R34, R18 = (3, 4, 6, 3), (2, 2, 2, 2)
EXPERIMENTS = {
    "mlp": Experiment((mlp([400, 200, 100, 50, 25]), mlp([400, 200, 100])), SHALLOW, flat=True),
    "skill_transfer": Experiment(
        (mlp([400, 200, 100]), mlp([400, 200, 100, 50])), SHALLOW, {"anchor": 1}, flat=True, skills=True, finetune=False
    ),
    "vgg13_vgg11": Experiment((vgg("vgg13"), vgg("vgg11")), PLAIN),
    "vgg13_vgg11_bn": Experiment(
        (vgg("vgg13", bias=True, batch_norm=True), vgg("vgg11", bias=True, batch_norm=True)), NORMED
    ),
    "vgg13_doub_vgg11_half": Experiment((vgg("vgg13_doub"), vgg("vgg11_half")), PLAIN, {"anchor": 1}, finetune=False),
    "resnet34_resnet18": Experiment((resnet(R34), resnet(R18)), PLAIN),
    "resnet34_resnet18_bn": Experiment((resnet(R34, batch_norm=True), resnet(R18, batch_norm=True)), NORMED),
    "resnet_x4": Experiment((resnet(R34), resnet(R18), resnet(R34), resnet(R18)), PLAIN, finetune=False),
    "torchvision_resnets": Experiment(
        ({"name": "torchvision.resnet34"}, {"name": "torchvision.resnet18"}), NORMED, num_train=20_000
    ),
    "vit": Experiment((vit(6, 64), vit(4, 64)), MODERN, num_train=20_000),
    # Of a class that cannot be built at other widths the deepest parent is the anchor.
    "vit_narrow": Experiment((vit(6, 64), vit(4, 48)), MODERN, num_train=20_000),
    "convnext": Experiment(
        (convnext((32, 64, 2), (64, None, 4)), convnext((32, 64, 1), (64, None, 2))), MODERN, num_train=20_000
    ),
    "torchvision_vggs": Experiment(
        ({"name": "torchvision.vgg13_bn"}, {"name": "torchvision.vgg11_bn"}),
        Recipe(2, 0.02),
        finetune=False,
        num_train=10_000,
    ),
}


@dataclass(frozen=True)
class Images:
    """Images of one experiment, normalised, with labels."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def load_images(flat: bool, num_train: int) -> Images:
    """Fashion-MNIST; a seeded choice of `num_train` training images."""
    shape: dict[str, Any] = {} if flat else {"pad_to": 32, "channels": 3}
    data = MNISTDataModule(variant="fashion", val_fraction=0.0, limit_train=num_train, **shape)
    data.setup()
    train, test = (loader.dataset for loader in (data.train_dataloader(), data.test_dataloader()))
    return Images(data.preprocess(train.images), train.labels, data.preprocess(test.images), test.labels)


def train(network: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe, seed: int) -> nn.Module:
    """Plain training; gradients are clipped, without which networks that have no BatchNorm may diverge."""
    generator = torch.Generator().manual_seed(seed)
    network = network.train()
    rates = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(network.parameters(), **rates)
        if recipe.adam
        else torch.optim.SGD(network.parameters(), momentum=recipe.momentum, **rates)
    )
    steps = recipe.epochs * (len(images) // recipe.batch_size)
    schedule: torch.optim.lr_scheduler.LRScheduler = (
        torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=steps)
        if recipe.one_cycle
        else torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    )
    for _ in range(recipe.epochs):
        order = torch.randperm(len(images), generator=generator)
        for chosen in order.split(recipe.batch_size)[: len(images) // recipe.batch_size]:
            optimizer.zero_grad()
            cross_entropy(network(images[chosen]), labels[chosen]).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimizer.step()
            schedule.step()
    return network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, images: Images) -> float:
    """Test accuracy in per cent."""
    network.eval()
    hits = [
        (network(x).argmax(1) == y).sum()
        for x, y in zip(images.test.split(500), images.test_labels.split(500), strict=True)
    ]
    return 100 * float(torch.stack(hits).sum()) / len(images.test_labels)


def parents_of(experiment: Experiment, images: Images, seed: int, folder: Path) -> list[nn.Module]:
    """The trained parents, from the folder where they are there already."""
    found = []
    for number, architecture in enumerate(experiment.parents):
        # The same network serves every experiment that has it in the same place.
        key = [architecture, number if experiment.skills else number // 2, experiment.skills, len(images.train), seed]
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        path = folder / f"{architecture['name'].lower()}_{digest[:16]}.safetensors"
        if not path.exists():
            torch.manual_seed(1000 * seed + number)
            chosen = _skill(images.train_labels, number, seed) if experiment.skills else slice(None)
            network = build(architecture)
            network = train(network, images.train[chosen], images.train_labels[chosen], experiment.recipe, seed)
            save_network(network, path, example=images.train[:2])
        found.append(load_network(path))
    return found


def _skill(labels: Tensor, number: int, seed: int) -> Tensor:
    """The images of the specialist (0) or the generalist (1)."""
    own, rest = (labels == 4).nonzero()[:, 0], (labels != 4).nonzero()[:, 0]
    rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]
    tenth = len(rest) // 10
    return torch.cat([own, rest[:tenth]]) if number == 0 else rest[tenth:]


def before_finetuning(
    experiment: Experiment, parents: list[nn.Module], images: Images, seed: int, num_samples: int
) -> tuple[dict[str, float], dict[str, nn.Module]]:
    """Accuracies by name, and the networks that the second table finetunes."""
    order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(seed))
    samples = images.train[order[:num_samples]]
    found = {f"parent {k}": accuracy(parent, images) for k, parent in enumerate(parents, 1)}
    found["ensemble"] = accuracy(Ensemble(parents), images)
    anchor = experiment.fusion.get("anchor", 0)
    if experiment.recipe is not MODERN:  # the published method knows plain and residual networks alone
        found["published"] = accuracy(fuse(parents, [samples], FusionOptions.paper(anchor=anchor)).model, images)
    kept = {f"parent {k}": parent for k, parent in enumerate(parents, 1)}
    for name, changes in VARIANTS.items():
        if changes.keys() & experiment.fusion.keys():
            continue
        result = fuse(parents, [samples], FusionOptions(num_samples=num_samples, **experiment.fusion, **changes))
        found[name] = accuracy(result.model, images)
        if name in FINETUNED:
            kept[f"fused, {name}"] = result.model
        try:
            kept["balanced"] = result.balanced[1]
        except FusionError:  # a class that cannot be built at the widths of the shallow parent
            continue
    return found, kept


def after_finetuning(
    kept: Mapping[str, nn.Module], images: Images, seed: int, epochs: int, modern: bool
) -> dict[str, float]:
    """Test accuracy of every network after the same short training."""
    recipe = replace(MODERN, epochs=epochs, learning_rate=3e-4) if modern else Recipe(epochs, 0.01)
    return {
        name: accuracy(train(network, images.train, images.train_labels, recipe, 100 + seed), images)
        for name, network in kept.items()
    }


def table(results: Iterable[Mapping[str, Any]], part: str) -> str:
    """A Markdown table, one row per experiment: mean and standard deviation over the seeds."""
    rows: dict[str, dict[str, list[float]]] = {}
    for result in results:
        for name, value in result.get(part, {}).items():
            rows.setdefault(result["experiment"], {}).setdefault(name, []).append(value)
    names = dict.fromkeys(name for row in rows.values() for name in row)
    columns = sorted(names, key=lambda name: not name.startswith("parent"))
    return table_over_seeds(rows, columns, digits=2)


def measure(name: str, seed: int, folder: Path, num_samples: int, finetune_epochs: int) -> dict[str, Any]:
    """One experiment with one seed."""
    experiment = EXPERIMENTS[name]
    images = load_images(experiment.flat, experiment.num_train)
    parents = parents_of(experiment, images, seed, folder)
    start = time.perf_counter()
    before, kept = before_finetuning(experiment, parents, images, seed, num_samples)
    seconds = time.perf_counter() - start
    result = {"experiment": name, "seed": seed, "before": before, "seconds": seconds}
    if experiment.finetune and finetune_epochs:
        short = Images(images.train[:10_000], images.train_labels[:10_000], images.test, images.test_labels)
        result["after"] = after_finetuning(kept, short, seed, finetune_epochs, experiment.recipe is MODERN)
    return result


def main(
    experiments: list[str] | None = None,
    seeds: list[int] | None = None,
    output: str = "runs/quality",
    num_samples: int = 2_000,
    finetune_epochs: int = 1,
    threads: int = 1,
) -> None:
    """Run the experiments and print both tables.

    Args:
        experiments: Names; none given: all.
        seeds: Seeds; none given: 0, 1 and 2.
        output: Folder of parents and results.
        num_samples: Unlabelled images to fuse on.
        finetune_epochs: Epochs over 10,000 images of the short finetune; 0 leaves the second table out.
        threads: CPU threads.
    """
    torch.set_num_threads(threads)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in [0, 1, 2] if seeds is None else seeds:
        for name in experiments or EXPERIMENTS:
            result = once(
                folder / f"{name}_{seed}.json",
                lambda name=name, seed=seed: measure(name, seed, folder, num_samples, finetune_epochs),
            )
            print(json.dumps(result), flush=True)
            results.append(result)
    for part in ("before", "after"):
        print(f"\n{part} finetuning\n\n{table(results, part)}")


if __name__ == "__main__":
    auto_cli(main)
