"""Files that are truncated, forged or made to harm: one line each, little memory, nothing run, nothing else written."""

import gzip
import io
import json
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from clafusion import FusionError, networks, restore, save_network
from clafusion.datamodules import DigitsDataModule
from clafusion.datamodules.idx import read_idx
from clafusion.datamodules.pickles import read_pickle
from clafusion.lightning_modules import FusionTrainer, ImageClassifier, save_checkpoint
from clafusion.lightning_modules.checkpoints.reading import load_parent
from clafusion.lightning_modules.checkpoints.writing import AtomicCheckpointIO
from clafusion.lightning_modules.commandline import cli
from clafusion.lightning_modules.commands.convert import convert_file
from clafusion.lightning_modules.compatibility import check_images
from tests.fuzzing import Watch, read

MLP = {"name": "MLP", "in_features": 64, "hidden": [6], "num_classes": 10}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def checkpoint(path: str = "good.ckpt") -> Path:
    save_checkpoint(ImageClassifier(MLP), path)
    return Path(path)


def changed(change: Callable[[dict[str, Any]], Any], zipped: bool = True) -> None:
    content = torch.load(checkpoint(), weights_only=True)
    change(content)
    torch.save(content, "bad.ckpt", _use_new_zipfile_serialization=zipped)


def weight(new: Callable[[torch.Tensor], Any]) -> None:
    def change(content: dict[str, Any]) -> None:
        content["state_dict"]["network.fc1.weight"] = new(content["state_dict"]["network.fc1.weight"])

    changed(change)


def archive(pickled: bytes, kind: int = zipfile.ZIP_STORED, **more: bytes) -> None:
    with zipfile.ZipFile("bad.ckpt", "w", kind) as file:
        for name, content in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little", **more}.items():
            file.writestr(f"archive/{name}", content)


def repacked(kind: int = zipfile.ZIP_STORED, **more: bytes) -> None:
    """A good checkpoint in another archive."""
    with zipfile.ZipFile(checkpoint()) as good, zipfile.ZipFile("bad.ckpt", "w", kind) as file:
        for name in good.namelist():
            file.writestr(name, good.read(name))
        for name, content in more.items():
            file.writestr(f"{good.namelist()[0].partition('/')[0]}/{name}", content)


def claimed_size() -> None:
    """A good checkpoint whose list of contents says that a record has 2 GiB."""
    content = bytearray(checkpoint().read_bytes())
    place = content.rindex(b"PK\x01\x02")
    content[place + 24 : place + 28] = struct.pack("<I", 2**31)
    Path("bad.ckpt").write_bytes(content)


def endless(depth: int = 60) -> list[Any]:
    """Lists of which each holds the next one twice: to walk through all of them takes longer than there is time."""
    lists: list[Any] = [[] for _ in range(depth)]
    for one, other in zip(lists, lists[1:], strict=False):
        one += [other, other]
    return lists[0]


def tuples() -> bytes:
    """A pickle of a dict with a key of tuples in tuples: to look it up takes as long."""
    steps = b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(100))
    return b"\x80\x02})q\x000" + steps + b"K\x01s."


def itself() -> None:
    loop: dict[str, Any] = {}
    loop["again"] = loop
    changed(lambda content: content["hyper_parameters"].update(loop=loop))


def shared() -> None:
    many = {f"x{number}": "network.fc1.weight" for number in range(500)}
    changed(lambda content: content.update(more={name: content["state_dict"][old] for name, old in many.items()}))


def large() -> None:
    with open("bad.ckpt", "wb") as file:
        file.truncate(2**42)  # takes no room on the disk


BYTES = b"\x80\x02}X\x01\x00\x00\x00acbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85Rs."  # {"a": bytearray(2**31 - 1)}
CHECKPOINTS: dict[str, tuple[Callable[[], Any], str]] = {
    "2 GiB in 40 bytes": (lambda: archive(BYTES), r"not run \(builtins.bytearray\)"),
    "the same in the old format": (lambda: Path("bad.ckpt").write_bytes(BYTES), r"not run \(builtins.bytearray\)"),
    "endless lists": (
        lambda: changed(lambda c: c["hyper_parameters"].update(x=endless())),
        "got containers in containers without end",
    ),
    "endless lists in the old format": (
        lambda: changed(lambda c: c.update(callbacks=endless()), zipped=False),
        "got containers in containers without end",
    ),
    "a list in itself": (itself, "got containers in containers without end"),
    "a key of endless tuples": (lambda: archive(tuples()), "got containers in containers without end"),
    "compressed": (lambda: repacked(zipfile.ZIP_DEFLATED, bomb=bytes(10**8)), "truncated or damaged"),
    "a name twice": (lambda: repacked(**{"DATA.PKL": BYTES}), "truncated or damaged"),
    "a path upwards": (lambda: archive(b"\x80\x02}.", **{"../../evil": b"x"}), "with weights alone"),
    "a forged size": (claimed_size, "truncated or damaged"),
    "larger than the memory": (large, "that fits into memory, got bad.ckpt of 4,398,046,511,104"),
    "whole numbers": (lambda: weight(lambda w: w.long()), "fc1.weight in .* of type torch.float32, got torch.int64"),
    "flags": (lambda: weight(lambda w: w > 0), "of type torch.float32, got torch.bool"),
    "complex numbers": (lambda: weight(lambda w: w.to(torch.complex64)), "got torch.complex64"),
    "eight bits": (lambda: weight(lambda w: w.to(torch.float8_e4m3fn)), "not run .*_rebuild_tensor_v3"),
    "a number repeated": (
        lambda: weight(lambda w: torch.zeros(1).expand(6, 64)),
        "got a tensor with more numbers than there are",
    ),
    "a number repeated 10**12 times": (
        lambda: weight(lambda w: torch.zeros(1).expand(10**12)),
        "got a tensor with more numbers than there are",
    ),
    "numbers shared by hundreds": (shared, "got tensors that share their numbers many times over"),
    "no numbers": (lambda: weight(lambda w: w.to("meta")), "not run .*_rebuild_meta_tensor_no_storage"),
    "a sparse tensor": (lambda: weight(lambda w: w.to_sparse()), "not run .*_rebuild_sparse_tensor"),
    "a huge network": (
        lambda: changed(lambda c: c["hyper_parameters"]["architecture"].update(hidden=[2**24] * 9)),
        r"to have shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_that_harm_are_refused(name, tmp_path):
    make, message = CHECKPOINTS[name]
    make()
    with pytest.raises(FusionError, match=message) as refusal, Watch(tmp_path).over(0):
        load_parent("bad.ckpt")
    assert "\n" not in str(refusal.value) and ";" in str(refusal.value)
    with Watch(tmp_path).over(0):
        assert read(lambda path: convert_file(str(path), "out.ckpt"), Path("bad.ckpt")) == "refused"
    assert not Path("out.ckpt").exists()


def test_the_bytes_of_the_test_above_take_the_memory():
    """What is refused above: PyTorch itself fills 2 GiB for this file (here 256 MiB)."""
    archive(BYTES.replace(b"\xff\xff\xff\x7f", struct.pack("<i", 2**28)))
    command = (
        "import re, torch\n"
        "def most(): return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "before = most()\n"
        "torch.load('bad.ckpt', weights_only=True)\n"
        "print((most() - before) // 1024)"
    )
    # In a process of its own: what another test has freed would be taken instead.
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 128


def test_weights_that_are_shared_by_two_layers_are_read():
    save_checkpoint(
        ImageClassifier({"name": "MLP", "in_features": 64, "hidden": [10, 10], "num_classes": 10}), "a.ckpt"
    )
    content = torch.load("a.ckpt", weights_only=True)
    content["state_dict"]["network.fc3.weight"] = content["state_dict"]["network.fc2.weight"]
    torch.save(content, "a.ckpt")
    network = load_parent("a.ckpt")
    assert torch.equal(network.fc2.weight, network.fc3.weight)


# --- safetensors ---


def forged(change: Callable[[dict[str, Any]], Any] = lambda header: None, length: int | None = None) -> None:
    """A file of save_network with another header."""
    save_network(networks.build(MLP), "bad.safetensors")
    content = Path("bad.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    start = (len(text) if length is None else length).to_bytes(8, "little")
    Path("bad.safetensors").write_bytes(start + text + content[8 + size :])


HEADERS: dict[str, Callable[[], None]] = {
    "longer than the file": lambda: forged(length=2**40),
    "longer than anything": lambda: forged(length=2**64 - 1),
    "of 90 MB that are not there": lambda: forged(length=90 * 10**6),
    "empty": lambda: forged(length=0),
    "offsets beyond the end": lambda: forged(lambda h: h["fc1.weight"].update(data_offsets=[0, 2**40])),
    "offsets backwards": lambda: forged(lambda h: h["fc1.weight"].update(data_offsets=[8, 0])),
    "offsets below zero": lambda: forged(lambda h: h["fc1.weight"].update(data_offsets=[-8, 0])),
    "the same bytes twice": lambda: forged(lambda h: h["fc1.weight"].update(h["fc2.weight"])),
    "a shape that overflows": lambda: forged(lambda h: h["fc1.weight"].update(shape=[2**33, 2**33])),
    "a huge shape": lambda: forged(lambda h: h["fc1.weight"].update(shape=[2**20, 2**20])),
    "another type": lambda: forged(lambda h: h["fc1.weight"].update(dtype="I32")),
    "no type": lambda: forged(lambda h: h["fc1.weight"].update(dtype="OBJECT")),
    "a name upwards": lambda: forged(lambda h: h.update({"../evil": h.pop("fc1.weight")})),
}


@pytest.mark.parametrize("name", HEADERS)
def test_forged_headers_are_refused(name, tmp_path):
    HEADERS[name]()
    for reader in (load_parent, lambda path: convert_file(str(path), "out.ckpt")):
        with Watch(tmp_path).over(0):
            assert read(reader, Path("bad.safetensors")) == "refused"


def pooling(size: int, dim: int) -> dict[str, Any]:
    """The graph of a network that pools to a size, pools to one point, and flattens from a dimension on."""
    calls = [
        ["aten.adaptive_avg_pool2d.default", [{"input": 0}, [size, size]], {}],
        ["aten.adaptive_avg_pool2d.default", [{"node": 0}, [1, 1]], {}],
        ["aten.flatten.using_ints", [{"node": 1}, dim], {}],
        ["aten.linear.default", [{"node": 2}, {"tensor": "head.weight"}, {"tensor": "head.bias"}], {}],
    ]
    tensors = [["head.weight", "parameter", [10, 1], "float"], ["head.bias", "parameter", [10], "float"]]
    return {
        "name": "aten", "version": 1, "input": [1, 8, 8], "nodes": calls, "logits": {"node": 3}, "tensors": tensors,
    }  # fmt: skip


def pooling_of_the_first_version(size: int, dim: int) -> dict[str, Any]:
    """The same as it was written before."""
    nodes = [
        ("placeholder", "x", "x", []),
        ("call_module", "pool", "pool", [{"node": "x"}]),
        ("call_module", "small", "small", [{"node": "pool"}]),
        ("call_function", "flat", "torch.flatten", [{"node": "small"}, dim]),
        ("call_module", "head", "head", [{"node": "flat"}]),
        ("output", "output", "output", [{"node": "head"}]),
    ]
    modules = {
        "pool": {"type": "AdaptiveAvgPool2d", "output_size": size},
        "small": {"type": "AdaptiveAvgPool2d", "output_size": 1},
        "head": {"type": "Linear", "in_features": 1, "out_features": 10, "bias": True},
    }
    names = ("op", "name", "target", "args")
    return {
        "name": "graph",
        "nodes": [{**dict(zip(names, node, strict=True)), "kwargs": {}} for node in nodes],
        "modules": modules,
    }


GRAPHS = {pooling: "aten.adaptive_avg_pool2d.default, operation 0", pooling_of_the_first_version: "pool"}


def written(architecture: dict[str, Any]) -> Path:
    metadata = {"format": "clafusion", "version": "1", "architecture": json.dumps(architecture)}
    save_file(restore(architecture).state_dict(), "bad.safetensors", metadata)
    return Path("bad.safetensors")


class Images:
    image_shape, num_classes = (1, 8, 8), 10


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_network_that_blows_images_up_is_refused_before_it_does(graph, tmp_path):
    assert check_images(load_parent(written(graph(1, 1))), Images(), "good.safetensors") == 10
    path = written(graph(30_000, 1))
    refused = f"got 1,800,000,000 from '{GRAPHS[graph]}'; choose another"
    with Watch(tmp_path).over(0), pytest.raises(FusionError, match=refused):
        check_images(load_parent(path), Images(), "bad.safetensors")


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_graph_that_fails_prints_nothing(graph, capfd):
    with pytest.raises(FusionError, match="got 1x8x8 from Images"):
        check_images(load_parent(written(graph(1, 9))), Images(), "bad.safetensors")
    assert capfd.readouterr() == ("", "")


# --- data ---


def test_a_small_file_that_unpacks_to_gigabytes_is_refused(tmp_path):
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=9) as file:
        file.write(bytes([0, 0, 8, 1]) + struct.pack(">I", 100))
        for _ in range(200):
            file.write(bytes(2**20))
    Path("labels.gz").write_bytes(packed.getvalue())
    with Watch(tmp_path).over(0), pytest.raises(FusionError, match=r"Expected 100 values .*, got more; fetch it again"):
        read_idx(Path("labels.gz"), 1)


def towers(depth: int) -> bytes:
    """A pickle of a dict whose two keys are equal sets of sets of sets: each level doubles the time to compare them."""
    pair = b"(h%ch%c\x91q%c0(h%ch%cK\x02\x91q%c0"
    first = b"(K\x00\x91q%c0(K\x01\x91q%c0"
    steps = [
        first % (start, start + 1)
        + b"".join(pair % (n, n + 1, n + 2, n, n + 1, n + 3) for n in range(start, start + 2 * depth, 2))
        for start in (0, 100)
    ]
    return b"\x80\x04" + b"".join(steps) + b"}(h%cK\x01h%cK\x01u." % (2 * depth, 100 + 2 * depth)


def equal_hashes(count: int) -> bytes:
    """A pickle of a dict whose keys are numbers of the same hash: each is compared with all before it."""
    numbers = ((n * (2**61 - 1)).to_bytes(16, "little") for n in range(1, count + 1))
    return b"\x80\x02}(" + b"".join(b"\x8a\x10" + number + b"K\x01" for number in numbers) + b"u."


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02}r\x00\x00\x00\x10.",  # remember this as number 2**28
        b"\x80\x05\x96" + struct.pack("<Q", 2**31) + b"x.",  # mutable bytes, 2 GiB
        b"\x80\x02})q\x000" + b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(100)) + b"K\x01s.",
        towers(20),
        equal_hashes(10_000),
        # The name of a codec is tuples of tuples: a message with it would be as long.
        b"\x80\x02c_codecs\nencode\nU\x01a)q\x000%sh\x19\x86R."
        % b"".join(b"h%ch%c\x86q%c0" % (n, n, n + 1) for n in range(25)),
    ],
    ids=["memo", "bytes", "tuples", "sets", "numbers", "codec"],
)
def test_pickled_images_take_the_memory_that_they_have(content, tmp_path):
    Path("batch").write_bytes(content)
    with Watch(tmp_path).over(0):
        assert read(read_pickle, Path("batch")) == ("read" if content[3:4] == b"r" else "refused")


def test_a_picture_of_too_many_points_is_refused(tmp_path):
    from PIL import Image

    from clafusion.datamodules.folders import image_files

    Image.new("1", (9_000, 9_000)).save("a.png")
    with Watch(tmp_path).over(0), pytest.raises(FusionError, match="a.png, got 9000x9000 points"):
        image_files([(Path("a.png"), 0)], Path(), 8).decoded()


@pytest.mark.parametrize("variant", ["cifar", "mnist"])
def test_a_downloaded_archive_of_another_sum_is_refused(variant, monkeypatch):
    import torchvision.datasets.utils as utils

    from clafusion.datamodules import CIFARDataModule, MNISTDataModule

    monkeypatch.setattr(utils, "_urlretrieve", lambda url, filename, *_: Path(filename).write_bytes(b"something else"))
    monkeypatch.setattr(utils, "_get_redirect_url", lambda url, **_: url)
    module = CIFARDataModule if variant == "cifar" else MNISTDataModule
    with pytest.raises(FusionError, match="Expected to download the images to data, got RuntimeError: .*; check the"):
        module(download=True).prepare_data()


# --- outputs ---


def test_a_link_in_the_place_of_an_output_is_replaced_and_not_followed():
    precious = Path("precious")
    precious.write_text("precious")
    checkpoint()
    for link in ("out.ckpt", "out.safetensors", ".last.ckpt.part"):
        Path(link).symlink_to(precious)
    convert_file("good.ckpt", "out.ckpt", overwrite=True)
    convert_file("good.ckpt", "out.safetensors", overwrite=True)
    AtomicCheckpointIO().save_checkpoint({"a": 1}, "last.ckpt")
    assert precious.read_text() == "precious"
    assert not any(Path(name).is_symlink() for name in ("out.ckpt", "out.safetensors", "last.ckpt", ".last.ckpt.part"))


def test_what_is_no_file_is_not_opened():
    os.mkfifo("pipe.ckpt")  # to open it would wait for ever
    Path("folder.ckpt").mkdir()
    Path("loop.ckpt").symlink_to("loop.ckpt")
    for path in ("pipe.ckpt", "folder.ckpt", "loop.ckpt", "/dev/zero", "file:///etc/passwd", "s3://bucket/a.ckpt"):
        with pytest.raises(FusionError, match="which is no file|Expected a local file"):
            load_parent(path)


# --- from the command line ---


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(list(arguments))
    out, error = capsys.readouterr()
    assert end.value.code == 2 and not out and error.startswith("clafusion: error: ") and error.count("\n") == 1
    return error


def test_the_command_line_refuses_them_with_one_line(capsys):
    archive(BYTES)
    for arguments in (["test", "--ckpt_path", "bad.ckpt"], ["fuse", "bad.ckpt", "bad.ckpt", "-o", "out.ckpt"],
                      ["convert", "--input", "bad.ckpt", "--output", "out.ckpt"],
                      ["export", "--input", "bad.ckpt", "--output", "out.pt2", "--shape", "[1,8,8]"]):  # fmt: skip
        assert "pickled objects, which were not run (builtins.bytearray)" in refused(capsys, *arguments)


def optimizer_shape(content: dict[str, Any]) -> None:
    content["optimizer_states"][0]["state"][0]["momentum_buffer"] = torch.zeros(3)


def fit(epochs: int, path: str | None = None) -> None:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = FusionTrainer(accelerator="cpu", devices=1, default_root_dir=".", max_epochs=epochs, **quiet)
    data = DigitsDataModule(limit_train=40, batch_size=20)
    trainer.fit(ImageClassifier(MLP), data, ckpt_path=path, weights_only=True)


STATES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "KeyError: 'param_groups'": lambda c: c.update(optimizer_states=[{}]),
    "contains only the model": lambda c: c.pop("optimizer_states"),
    r"momentum_buffer of shape \[3\] for a weight of shape \[6, 64\]": optimizer_shape,
    "TypeError: 'int' object": lambda c: c.update(loops=3),
    "AttributeError: 'list' object": lambda c: c.update(callbacks=[1]),
    "InvalidVersion": lambda c: c.update({"pytorch-lightning_version": "x"}),
    "TypeError: ": lambda c: c.update(DigitsDataModule=7),
}


@pytest.mark.filterwarnings("ignore:.*The dirpath has changed", "ignore:Checkpoint directory")
def test_a_training_state_that_does_not_fit_is_refused(capsys):
    fit(1)
    for message, change in STATES.items():
        content = torch.load("last.ckpt", weights_only=True)
        change(content)
        torch.save(content, "bad.ckpt")
        with pytest.raises(
            FusionError, match="Expected the state of a training in bad.ckpt, got one that fails .*" + message
        ):
            fit(2, "bad.ckpt")
    fit(2, "last.ckpt")
    arguments = ["--model.architecture", json.dumps(MLP), "--data", "DigitsDataModule", "--trainer.accelerator", "cpu"]
    arguments += ["--trainer.max_epochs", "2", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    assert "got one that fails" in refused(capsys, "fit", *arguments, "--ckpt_path", "bad.ckpt")
