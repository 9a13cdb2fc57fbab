"""Images in folders: held in memory, decoded on demand, and by torchvision's ImageFolder in a DataLoader.

    python benchmarks/folders.py DIR

One epoch of shuffled batches of 128, brought to 224 pixels and normalised, without augmentation and without a network;
each row is a fresh process. Images per CPU second of the process and its workers together: with as many cores as
workers, these work side by side. Memory is the peak of the process and that of its largest worker.
"""

import json
import resource
import sys
import time
from collections.abc import Iterable
from typing import Any

from common import case_of_this_process, in_fresh_process, peak_mib, print_machine, print_table, quietly
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from clafusion.datamodules import ImageFolderDataModule

SIZE, BATCH = 224, 128
#: What is measured, with so many workers.
CASES = {"in memory": (0,), "on demand": (0, 2), "torchvision": (0, 2)}


def ours(folder: str, in_memory: bool, workers: int) -> Iterable[Any]:
    """The data module here, as a trainer uses it."""
    given = {"size": SIZE, "batch_size": BATCH, "augment": False, "val_fraction": 0.0, "test_fraction": 0.01}
    data = ImageFolderDataModule(folder, in_memory=in_memory, num_workers=workers, **given)
    data.setup()
    return ((data.preprocess(images), labels) for images, labels in data.train_dataloader())


def theirs(folder: str, workers: int) -> Iterable[Any]:
    """The way of most programs."""
    steps = [transforms.Resize(SIZE), transforms.CenterCrop(SIZE), transforms.ToTensor()]
    steps += [transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    return DataLoader(ImageFolder(folder, transforms.Compose(steps)), BATCH, shuffle=True, num_workers=workers)


def measured(folder: str, kind: str, workers: int) -> dict[str, float]:
    """One epoch: images per CPU second and per second, and peak MiB."""
    before, start = cpu_seconds(), time.perf_counter()
    batches = theirs(folder, workers) if kind == "torchvision" else ours(folder, kind == "in memory", workers)
    count = sum(len(labels) for _, labels in batches)
    wall = time.perf_counter() - start
    del batches  # and with it the workers, which are counted when they have ended
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {"speed": count / (cpu_seconds() - before), "wall": count / wall, "own": peak_mib(), "worker": largest}


def cpu_seconds() -> float:
    """CPU seconds of this process and of those that it has started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def main() -> None:
    """The table."""
    quietly()
    case = case_of_this_process()
    if case is not None:
        print(json.dumps(measured(**case)))
        return
    print_machine()
    rows = []
    for kind, choices in CASES.items():
        for workers in choices:
            found = in_fresh_process(__file__, {"folder": sys.argv[1], "kind": kind, "workers": workers})
            row = {"images": kind, "workers": workers, "images per CPU second": found["speed"]}
            rows.append({**row, "peak MiB": found["own"], "of a worker": found["worker"] if workers else ""})
    print_table(f"One epoch at {SIZE} pixels", rows)


if __name__ == "__main__":
    main()
