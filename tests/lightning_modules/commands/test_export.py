"""Export: other programs' files give the network's outputs, for any number of samples; and what is refused."""

import re
from pathlib import Path

import pytest
import torch

from clafusion import FusionError, save_network
from clafusion.lightning_modules import load_parent
from clafusion.lightning_modules.commandline import cli
from clafusion.lightning_modules.commands import export as exporting
from clafusion.lightning_modules.commands.export import export_file
from tests.helpers import build, foreign, images

NETWORKS = {
    "mlp": ({"name": "MLP", "in_features": 64, "hidden": [12, 8], "num_classes": 10, "batch_norm": True}, [1, 8, 8]),
    "vgg": ({"name": "VGG", "channels": [[4], [6, 6]], "num_classes": 5}, [3, 16, 16]),
    "resnet": ({"name": "ResNet", "blocks": [1, 2], "width": 4, "batch_norm": True}, [3, 16, 16]),
}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def saved(name: str) -> tuple[str, list[int]]:
    architecture, shape = NETWORKS[name]
    save_network(build(architecture, dtype=torch.float32), "network.safetensors")
    return "network.safetensors", shape


def agrees(path: str, network: torch.nn.Module, samples: torch.Tensor) -> bool:
    run = exporting._run_onnx if path.endswith(".onnx") else exporting._run_program
    with torch.no_grad():
        return torch.allclose(run(Path(path).read_bytes(), samples), network(samples), rtol=1e-3, atol=1e-4)


def need_onnx(suffix: str) -> None:
    if suffix == ".onnx":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")
        if torch.__version__.startswith("2.6."):
            pytest.skip("ONNX takes PyTorch 2.7, see setup.cfg")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.parametrize("name", NETWORKS)
def test_an_exported_network_gives_the_same_outputs(name, suffix, capsys):
    need_onnx(suffix)
    path, shape = saved(name)
    export_file(path, f"out{suffix}", shape)
    samples = torch.randn(5, *shape, generator=torch.Generator().manual_seed(3))
    assert agrees(f"out{suffix}", load_parent(path), samples)
    assert sorted(file.name for file in Path.cwd().iterdir()) == ["network.safetensors", f"out{suffix}"]
    assert capsys.readouterr().out.startswith(f"wrote out{suffix}: takes [samples, ")


@pytest.mark.slow
def test_a_foreign_network_is_exported():
    network = foreign("resnet18").float()
    save_network(network, "foreign.safetensors")
    export_file("foreign.safetensors", "out.pt2", [3, 32, 32])
    assert agrees("out.pt2", network, images(2, 32).float())


def test_the_command_exports_a_checkpoint(mlp_checkpoints):
    cli.main(["export", "--input", str(mlp_checkpoints[0]), "--output", "deep.pt2", "--shape", "[1, 8, 8]"])
    samples = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert agrees("deep.pt2", load_parent(mlp_checkpoints[0]), samples)


@pytest.mark.parametrize(
    ("output", "shape", "message"),
    [
        ("out.bin", [1, 8, 8], r"named NAME\.pt2 or NAME\.onnx, got out\.bin"),
        ("none/out.pt2", [1, 8, 8], "a folder that can be written, got none"),
        ("there.pt2", [1, 8, 8], "got there.pt2, which exists; give --overwrite"),
        ("out.pt2", [1, 7, 7], r"a shape that .*network.safetensors takes, got \[1, 7, 7\]"),
        ("out.pt2", [0], r"numbers from 1, got \[0\]"),
    ],
)
def test_bad_use_is_refused_and_nothing_is_written(output, shape, message, capsys):
    path, _ = saved("mlp")
    Path("there.pt2").write_text("precious")
    with pytest.raises(SystemExit) as end:
        cli.main(["export", "--input", path, "--output", output, "--shape", str(shape)])
    assert end.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert sorted(file.name for file in Path.cwd().iterdir()) == ["network.safetensors", "there.pt2"]
    assert Path("there.pt2").read_text() == "precious"


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_without_the_packages_onnx_is_refused_in_one_line(missing, monkeypatch):
    found = exporting.find_spec
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name == missing else found("json"))
    with pytest.raises(FusionError, match=f"got no {missing}; pip install {missing}"):
        export_file("network.safetensors", "out.onnx", [1, 8, 8])


def test_outputs_that_differ_are_refused_and_nothing_is_left(monkeypatch):
    path, shape = saved("mlp")
    run = exporting._run_program
    monkeypatch.setattr(exporting, "_run_program", lambda *args: run(*args) + 1)
    with pytest.raises(FusionError, match="Expected equal outputs, got a difference of 1"):
        export_file(path, "out.pt2", shape)
    assert [file.name for file in Path.cwd().iterdir()] == ["network.safetensors"]


def test_what_pytorch_cannot_export_is_refused(monkeypatch):
    def fail(*args):
        raise RuntimeError("no such operator\nand much more")

    path, shape = saved("mlp")
    monkeypatch.setattr(exporting, "_as_program", fail)
    with pytest.raises(FusionError, match=r"exports to \.pt2, got: no such operator; try the other format"):
        export_file(path, "out.pt2", shape)
