"""Damages small files of every kind that is read, and reads them: `python -m tests.fuzzing --seconds 600`.

Whatever is in a file, reading it must either succeed or raise `FusionError` in one line, soon, in little more memory
than the file has bytes, and without running, writing or opening anything else. Input number n of a seed is always the
same: `--first n --count 1` repeats it. Files that break the rule are kept in the folder of `--keep`.
"""

import argparse
import contextlib
import gzip
import io
import json
import pickle
import random
import re
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn

from clafusion import FusionError, FusionOptions, fuse, networks, save_network
from clafusion.datamodules.idx import read_idx
from clafusion.datamodules.pickles import read_pickle
from clafusion.lightning_modules import ImageClassifier, save_checkpoint
from clafusion.lightning_modules.checkpoints.reading import load_fusion, load_parent
from clafusion.lightning_modules.commands.convert import convert_file
from clafusion.lightning_modules.compatibility import check_images
from clafusion.lightning_modules.experiments.report import report_file
from clafusion.report.pages import report_data
from tests.helpers import REFERENCE

#: Seconds until a read counts as a hang.
PATIENCE = 20
#: Memory that a read may take: so much, and so many times the size of the file.
FIXED, RELATIVE = 64 * 2**20, 16
_SPECIAL = [0, -1, 1, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63), 1e308, float("nan"), float("inf")]
_ODD: list[Any] = [*_SPECIAL, None, True, "", "x", "__class__", "../x", "\n", [], {}, [[]], {"a": 1}, [1, 2], "é" * 9]
_TORCH = re.compile(r"\.(ckpt|pth|pt)$")
#: What may not happen while a file is read (see sys.audit): nothing is run, and files are written in one folder only.
_FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
    "ctypes.dlopen",
)


class _Images:
    """Stands in for a data module."""

    image_shape, num_classes = (1, 8, 8), 4


class _Foreign(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.head = nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d((2, 2)), nn.Linear(4, 4)
        self.norm, self.scale = nn.BatchNorm2d(4), nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.norm(self.conv(x))) + 1).flatten(2).transpose(1, 2)
        first, second = torch.nn.functional.scaled_dot_product_attention(x, x, x).chunk(2, 1)
        x = torch.cat([first, second, self.scale.expand(x.shape[0], 1, -1)], 1)
        return self.head(nn.functional.dropout(x, 0.1, self.training)).view(x.shape[0], -1, 4).mean(1)


def use(path: Path) -> None:
    """Loads a network as `fuse` does, and runs it."""
    load_fusion(path)
    check_images(load_parent(path), _Images(), str(path))


def convert(path: Path) -> None:
    """Converts a file."""
    convert_file(str(path), str(path.parent / "out.ckpt"), overwrite=True)


def report(path: Path) -> None:
    """Draws the report of a record."""
    report_file(str(path), str(path.parent / "out.html"), overwrite=True)


def seeds(folder: Path) -> dict[str, tuple[bytes, list[Callable[[Path], Any]]]]:
    """The intact files by name, each with what reads it."""
    torch.manual_seed(0)
    mlp = {"name": "MLP", "in_features": 64, "hidden": [6, 5], "num_classes": 4, "batch_norm": True}
    classifier = ImageClassifier(mlp)
    classifier.fusion = {"parents": [{"path": "a.ckpt", "sha256": "0" * 64}], "alignments": [[[0, 1]]]}
    save_checkpoint(classifier, folder / "ours.ckpt")
    save_network(networks.ResNet([1, 1], 2, 4, in_channels=1), folder / "ours.safetensors")
    save_network(_Foreign(), folder / "graph.safetensors")
    classifier.set_network(_Foreign())
    save_checkpoint(classifier, folder / "graph.ckpt")
    first = REFERENCE / "first_version" / "saved" / "foreign.safetensors"
    (folder / "first.safetensors").write_bytes(first.read_bytes())
    published = {"model_state_dict": networks.build(mlp).state_dict(), "test_accuracy": 1.5, "epoch": 3}
    torch.save({**published, "args": argparse.Namespace(lr=0.1, device=torch.device("cpu"))}, folder / "published.pth")
    resnet = torchvision.models.resnet18(num_classes=4, width_per_group=64)
    small = {
        name: tensor[:8, :8].clone() if tensor.ndim > 1 else tensor[:8].clone() if tensor.ndim else tensor
        for name, tensor in resnet.state_dict().items()
        if name.startswith(("conv1", "bn1", "layer1", "fc"))
    }
    torch.save(small, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    (folder / "images.gz").write_bytes(
        gzip.compress(bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 3]) + bytes(18))
    )
    entries = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 2], b"batch_label": b"x"}
    (folder / "batch.pickle").write_bytes(pickle.dumps(entries, protocol=2))
    pair = networks.MLP(8, [6, 5, 4], 3), networks.MLP(8, [6, 4], 3)
    samples = torch.randn(20, 8)
    fusion = fuse(pair, [samples], FusionOptions(num_samples=20))
    row = {"name": "fused", "parameters": 1, "test_acc": 0.5}
    record = {
        **fusion.summary(),
        "output": "c.ckpt",
        "networks": [row],
        "parents": [{"path": "a", "sha256": "b"}] * 2,
        "seconds": 1.0,
        "peak_memory_bytes": 1,
        "seeds": {"fusion": 0, "global": 0},
        "versions": {"torch": "2"},
        "report": report_data(fusion, samples),
    }
    (folder / "fusion.json").write_text(json.dumps(record))
    readers: dict[str, list[Callable[[Path], Any]]] = {
        "ours.ckpt": [use, convert], "ours.safetensors": [use, convert], "graph.safetensors": [use, convert],
        "graph.ckpt": [use, convert], "first.safetensors": [use, convert],
        "published.pth": [convert], "legacy.pt": [convert], "images.gz": [lambda path: read_idx(path, 3)],
        "batch.pickle": [read_pickle], "fusion.json": [report],
    }  # fmt: skip
    return {name: ((folder / name).read_bytes(), found) for name, found in readers.items()}


def mutated(name: str, content: bytes, chance: random.Random) -> bytes:
    """A damaged file: bytes, the pickle or the header in it, or the values that it holds."""
    ways = [_scramble]
    if _TORCH.search(name):
        ways += [_change_values, _change_values] + ([_change_pickle, _change_pickle] if content[:2] == b"PK" else [])
    elif name.endswith(".safetensors"):
        ways += [_change_header, _change_header]
    elif name.endswith(".gz"):
        ways += [lambda content, chance: gzip.compress(_scramble(gzip.decompress(content), chance))]
    elif name.endswith(".json"):
        ways += [lambda content, chance: json.dumps(_change(json.loads(content), chance)).encode()]
    return chance.choice(ways)(content, chance)


def _scramble(content: bytes, chance: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 4, 16])):
        # Often near the beginning or the end, where the formats say what there is.
        beginning, end = min(64, len(data)), max(0, len(data) - 256)
        at = chance.randint(*chance.choice([(0, len(data)), (0, beginning), (end, len(data))]))
        span = chance.choice([1, 1, 2, 4, 8, 64, 4096])
        kind = chance.randrange(6)
        if kind == 0:
            data[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            data[at : at + span] = chance.randbytes(span)
        elif kind == 2:
            del data[at : at + span]
        elif kind == 3:
            data[at:at] = data[at : at + span]
        elif kind == 4:
            width = chance.choice([1, 2, 4, 8])
            value = chance.choice([0, 1, 127, 128, 255, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1])
            data[at : at + width] = (value % 256**width).to_bytes(width, chance.choice(["little", "big"]))
        elif chance.random() < 0.2:
            del data[at:]
    return bytes(data)


def _change_pickle(content: bytes, chance: random.Random) -> bytes:
    """Damages one record of an archive, which stays a correct archive."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(made, "w") as changed:
        names = archive.namelist()
        chosen = chance.choice([name for name in names if name.endswith(".pkl")] * 3 + names)
        for name in names:
            record = archive.read(name)
            kind = zipfile.ZIP_DEFLATED if chance.random() < 0.01 else zipfile.ZIP_STORED
            changed.writestr(name, _scramble(record, chance) if name == chosen else record, kind)
    return made.getvalue()


def _change_values(content: bytes, chance: random.Random) -> bytes:
    with torch.serialization.safe_globals([argparse.Namespace]):
        values = torch.load(io.BytesIO(content), weights_only=True)
    made = io.BytesIO()
    torch.save(_change(values, chance), made, _use_new_zipfile_serialization=chance.random() < 0.8)
    return made.getvalue()


def _change_header(content: bytes, chance: random.Random) -> bytes:
    """Changes the header of safetensors, or the architecture in it; its length is right most of the time."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    architecture = json.loads(header["__metadata__"]["architecture"])
    if chance.random() < 0.7:
        header["__metadata__"]["architecture"] = json.dumps(_change(architecture, chance))
    else:
        header = _change(header, chance)
    text = json.dumps(header).encode()
    claimed = len(text) if chance.random() < 0.95 else chance.choice([0, 2**31, 2**63, len(text) + 1])
    return claimed.to_bytes(8, "little") + text + content[8 + length :]


def _change(value: Any, chance: random.Random) -> Any:
    """A copy in which one value, somewhere, is another, is missing, or is there once more."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key, kind = chance.choice(list(value)), chance.random()
        if kind < 0.1:
            return {name: item for name, item in value.items() if name != key}
        changed = {name: item for name, item in value.items()}
        if kind < 0.2:
            changed[chance.choice([f"{key}x", "extra", "class_path", 3, "../x", "__class__"])] = value[key]
        else:
            changed[key] = _change(value[key], chance)
        return changed
    if isinstance(value, list | tuple) and len(value) and chance.random() < 0.9:
        place, items = chance.randrange(len(value)), list(value)
        if chance.random() < 0.2:
            items[place:place] = [value[place]] * chance.choice([1, 1, 100, 3000])
        else:
            items[place] = _change(items[place], chance)
        return type(value)(items) if type(value) in (list, tuple) else items
    if isinstance(value, torch.Tensor):
        return _change_tensor(value, chance)
    return chance.choice(_ODD)


def _change_tensor(tensor: torch.Tensor, chance: random.Random) -> Any:
    dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64,
              torch.float8_e4m3fn, torch.uint16]  # fmt: skip
    ways: list[Callable[[], Any]] = [
        lambda: tensor.to(chance.choice(dtypes)),
        lambda: tensor.flatten(),
        lambda: tensor[..., :0] if tensor.ndim else tensor[None],
        lambda: torch.cat([tensor.flatten(), tensor.flatten()]),
        lambda: torch.full_like(tensor, chance.choice([0, 1])).double() * float(chance.choice([1e39, "nan", "inf"])),
        lambda: torch.zeros(1).expand(chance.choice([3, 10**6, 10**12])),
        lambda: tensor.to("meta"),
        lambda: tensor.to_sparse() if tensor.ndim else tensor,
        lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.quint8),
        lambda: nn.Parameter(tensor.float()),
        lambda: tensor.tolist(),
        lambda: chance.choice(_ODD),
    ]
    return chance.choice(ways)()


class Watch:
    """Notes what a read does that it must not do, and ends one that takes too long.

    Args:
        folder: The only folder in which files may be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.active, self.seen = str(folder), False, list[str]()
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event in _FORBIDDEN:
            self.seen.append(f"{event} {arguments}")
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if writes and not str(arguments[0]).startswith((self.folder, "/proc/self/")):
            self.seen.append(f"wrote {arguments[0]}")

    @contextlib.contextmanager
    def over(self, size: int) -> Iterator[None]:
        """Watches over a read of a file of that size.

        Raises:
            AssertionError: It took too much memory, or did what it must not do.
        """
        before, previous = _memory("VmRSS"), signal.signal(signal.SIGALRM, _expired)
        Path("/proc/self/clear_refs").write_text("5")
        self.seen.clear()
        self.active = True
        signal.alarm(PATIENCE)
        try:
            yield
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, previous)
            self.active = False
        assert not self.seen, self.seen
        taken = _memory("VmHWM") - before
        assert taken <= FIXED + RELATIVE * size, f"took {taken:,} bytes of memory"


class Hang(BaseException):
    """A read did not end; no `except Exception` hides it."""


def _expired(*_: Any) -> None:
    raise Hang(f"took more than {PATIENCE} s")


def _memory(what: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def read(reader: Callable[[Path], Any], path: Path) -> str:
    """Reads a file; `read`, or `refused` if it was with one line."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            reader(path)
    except FusionError as error:
        assert "\n" not in str(error) and str(error).startswith("Expected "), f"says {error}"
        return "refused"
    return "read"


def fuzz(
    folder: Path, seed: int, first: int, going_on: Callable[[int], bool], keep: Path | None = None
) -> Counter[str]:
    """Reads damaged files, as long as `going_on` of their number.

    Args:
        folder: For the files.
        seed: Of the sequence of files.
        first: Number of the first file.
        going_on: Whether to go on with that number.
        keep: Folder for the files that break the rule; None: the first one ends it.

    Returns:
        How often each reader has read and refused, and what has broken the rule.

    Raises:
        AssertionError: A file breaks the rule, and `keep` is None.
    """
    intact, watch, counts = seeds(folder), Watch(folder), Counter[str]()
    names, number = list(intact), first
    while going_on(number):
        chance = random.Random(f"{seed} {number}")
        name = chance.choice(names)
        content, readers = intact[name]
        damaged = mutated(name, content, chance)
        path = folder / f"damaged{Path(name).suffix}"
        path.write_bytes(damaged)
        reader = chance.choice(readers)
        try:
            with watch.over(len(damaged)):
                outcome = read(reader, path)
            counts[f"{name}: {outcome}"] += 1
        except BaseException as error:
            broken = f"input {number} of seed {seed} ({name}): {type(error).__name__}: {error}"
            if keep is None or isinstance(error, KeyboardInterrupt):
                raise AssertionError(broken) from error
            keep.mkdir(exist_ok=True)
            (keep / f"{seed}-{number}-{name}").write_bytes(damaged)
            counts["broken"] += 1
            print(broken.replace("\n", " ")[:500], flush=True)
        number += 1
    return counts


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=sys.maxsize)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    end = time.monotonic() + given.seconds
    with tempfile.TemporaryDirectory() as folder:
        counts = fuzz(
            Path(folder), given.seed, given.first,
            lambda number: number < given.first + given.count and time.monotonic() < end, given.keep,
        )  # fmt: skip
    for name, count in sorted(counts.items()):
        print(f"{count:8,} {name}")
    print(f"{sum(counts.values()):,} inputs, {counts['broken']} broke the rule")
    sys.exit(bool(counts["broken"]))


if __name__ == "__main__":
    main()
