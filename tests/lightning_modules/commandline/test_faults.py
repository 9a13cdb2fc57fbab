"""What goes wrong around a command: signals, disks, memory, lost processes, weights that are no numbers."""

import json
import os
import re
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback

from clafusion import FusionError, FusionOptions, align_layers, fuse
from clafusion.lightning_modules import ImageClassifier, load_parent, read_checkpoint, save_checkpoint
from clafusion.lightning_modules.commandline import cli
from clafusion.lightning_modules.commandline.exit_codes import ended_by, user_message
from clafusion.lightning_modules.commands.export import export_file
from clafusion.statistics import moments as statistics
from clafusion.statistics.memory import CHUNK, DIVISORS, is_out_of_memory, within_memory
from clafusion.statistics.samples import CPU_CHUNK
from clafusion.tracing.execution import GraphRunner
from tests.helpers import UNTRAINED, largest_difference, mlp, plain, vectors
from tests.lightning_modules.checkpoints.test_resume import COMMAND, EPOCHS, differences, fit, result
from tests.processes import clafusion, succeed

QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fuse_command(parents: Any, *more: str) -> list[str]:
    return ["fuse", *map(str, parents), "-o", "fused.ckpt", *QUIET, "--fusion.num_samples", "70", *UNTRAINED, *more]


def ended(capsys: Any, code: int, *arguments: str) -> str:
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as end:
        cli.main(list(arguments))
    out, error = capsys.readouterr()
    assert end.value.code == code and not out
    assert re.fullmatch(r"clafusion: [^\n]+\n", error), error
    return error


# --- signals ---


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole")
    fit(folder)
    return result(folder)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_training_that_is_ended_says_so_and_goes_on_exactly(uninterrupted, capsys, number, code):
    # Where the tests run in the background of a shell, Ctrl-C is ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    stop = ["--trainer.callbacks+=tests.processes.SignalRank", "--trainer.callbacks.batch=4"]
    line = ended(capsys, code, *COMMAND, *stop, f"--trainer.callbacks.number={int(number)}")
    signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored
    assert line == (
        f"clafusion: ended by {number.name}; what was saved is kept: give the same command again, "
        "fit with --ckpt_path last\n"
    )
    assert read_checkpoint("runs/last.ckpt")["global_step"] >= 4
    cli.main(COMMAND)
    assert differences(result(Path("runs")), uninterrupted) == []


def test_a_fusion_that_is_ended_leaves_nothing(mlp_checkpoints, capsys, monkeypatch):
    monkeypatch.setattr(
        "clafusion.lightning_modules.commands.recording.fuse", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert "ended by SIGINT" in ended(capsys, 130, *fuse_command(mlp_checkpoints))
    assert list(Path.cwd().iterdir()) == []


def test_the_help_is_no_interruption():
    assert ended_by(SystemExit(0)) is None and ended_by(RuntimeError()) is None
    assert user_message(RuntimeError("a bug")) is None and user_message(OSError(2, "No such file", "x")) is None


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_where_one_process_is_lost_the_other_one_ends(tmp_path, rank):
    command = [*COMMAND, "--config", "configs/trainer/ddp.yaml"]
    stop = ["--trainer.callbacks+=processes.SignalRank", "--trainer.callbacks.batch=3"]
    stop += [f"--trainer.callbacks.number={int(signal.SIGKILL)}", f"--trainer.callbacks.rank={rank}"]
    done = clafusion(tmp_path, *command, *stop)  # it would not come back if the other process waited
    assert done.returncode == (1 if rank else -signal.SIGKILL)
    lines = [line for line in done.stderr.splitlines() if line.startswith("clafusion: ")]
    assert len(lines) == 1 and "Expected all processes to go on, got one that is gone" in lines[0]
    assert "Traceback" not in done.stderr
    succeed(tmp_path, *command)
    assert read_checkpoint(tmp_path / "runs/last.ckpt")["epoch"] == EPOCHS - 1


# --- disks ---


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """A disk on which a file cannot grow beyond a size: writing fails as on one that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("output", "more"),
    [("a.ckpt", []), ("a.safetensors", []), ("a.pth", ["--to", "published"])],
)
def test_a_full_disk_while_converting_leaves_the_file_as_it_was(mlp_checkpoints, capsys, output, more):
    Path(output).write_text("precious")
    arguments = ["convert", "--input", str(mlp_checkpoints[0]), "--output", output, "--overwrite", *more]
    with small_files(500):
        line = ended(capsys, 2, *arguments)
    assert "File too large" in line and output in line
    assert Path(output).read_text() == "precious" and list(Path.cwd().iterdir()) == [Path(output).absolute()]


def test_a_full_disk_while_fusing_leaves_what_was_there(mlp_checkpoints, capsys):
    for name in ("fused.ckpt", "fused.json", "fused.html"):
        Path(name).write_text("precious")
    with small_files(500):
        assert "File too large; make room" in ended(capsys, 2, *fuse_command(mlp_checkpoints, "--overwrite"))
    with small_files(20_000):
        # There is room for the checkpoint and the record, but not for the report.
        assert "fused.html: File too large; make room" in ended(
            capsys, 2, *fuse_command(mlp_checkpoints, "--overwrite")
        )
    found = {path.name: path.read_text() for path in Path.cwd().iterdir()}
    assert found == dict.fromkeys(("fused.ckpt", "fused.json", "fused.html"), "precious")


def test_a_full_disk_while_exporting_leaves_nothing(mlp_checkpoints):
    with small_files(500), pytest.raises(FusionError, match="a.pt2.*; make room or choose another|exports to .pt2"):
        export_file(str(mlp_checkpoints[0]), "a.pt2", [1, 8, 8])
    assert list(Path.cwd().iterdir()) == []


def test_a_full_disk_at_the_beginning_of_a_training_is_one_line(capsys):
    with small_files(100):
        assert "File too large" in ended(capsys, 2, *COMMAND)


def test_folders_in_which_nobody_can_write_are_one_line(mlp_checkpoints, capsys):
    """/proc and /sys: not even root can."""
    command = fuse_command(mlp_checkpoints)
    command[command.index("fused.ckpt")] = "/proc/fused.ckpt"
    assert "/proc" in ended(capsys, 2, *command)
    assert "/sys/runs" in ended(capsys, 2, *COMMAND, "--trainer.default_root_dir", "/sys/runs")


# --- memory ---


def out_of_memory_above(size: int, monkeypatch: Any) -> list[int]:
    """A device that has no room for more than so many samples; what was tried."""
    tried: list[int] = []
    ahead = statistics.Ahead

    def limited(runner: Any, batch: torch.Tensor, names: Any) -> Any:
        tried.append(len(batch))
        if len(batch) > size:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has ...")
        return ahead(runner, batch, names)

    monkeypatch.setattr(statistics, "Ahead", limited)
    return tried


@pytest.mark.parametrize("correction", ["none", "refit"])
def test_out_of_memory_fewer_samples_are_run_at_once(monkeypatch, correction):
    parents, samples = [mlp([9, 8, 7], 0), mlp([9, 8], 1)], [vectors(64)]
    options = plain(correction=correction, targets="matched", layer_measure="index")
    expected = fuse(parents, samples, options)
    before = [{name: tensor.clone() for name, tensor in parent.state_dict().items()} for parent in parents]
    tried = out_of_memory_above(20, monkeypatch)
    with pytest.warns(UserWarning) as said:
        found = fuse(parents, samples, options)
    assert [str(one.message) for one in said] == [
        f"Out of memory; trying again with 1/{divisor} of the samples at once" for divisor in (2, 4)
    ]
    assert max(tried) == CPU_CHUNK and largest_difference(found.model, expected.model) < 1e-9
    for parent, state in zip(parents, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in parent.state_dict().items())


def test_layers_are_aligned_with_fewer_samples_at_once(monkeypatch):
    parents, samples = [mlp([9, 8, 7], 0), mlp([9, 8], 1)], [vectors(64)]
    expected = align_layers(parents, samples, FusionOptions(layer_measure="cka"))

    class Limited(GraphRunner):
        def observe(self, batch: torch.Tensor, names: Any) -> Any:
            if len(batch) > CHUNK // 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            return super().observe(batch, names)

    monkeypatch.setattr("clafusion.alignment.layer_costs.GraphRunner", Limited)
    with pytest.warns(UserWarning, match="Out of memory; trying again with 1/2 of the samples at once"):
        assert align_layers(parents, samples).alignments == expected.alignments


@pytest.mark.filterwarnings("ignore:Out of memory; trying again")
def test_without_memory_for_the_fewest_samples_a_fusion_ends_in_one_line(mlp_checkpoints, capsys, monkeypatch):
    out_of_memory_above(CHUNK // DIVISORS[-1] - 1, monkeypatch)
    with pytest.raises(FusionError, match="to run 1/4 of the samples at once, got CUDA out of memory. .*; use another"):
        fuse([mlp([9, 8], 0), mlp([9, 8], 1)], [vectors(64)], plain())
    monkeypatch.setattr("warnings.warn", lambda *_, **__: None)
    assert "memory to run 1/4 of the samples at once" in ended(capsys, 2, *fuse_command(mlp_checkpoints))
    assert list(Path.cwd().iterdir()) == []


def test_other_errors_are_not_tried_again():
    calls = []

    def fail() -> None:
        calls.append(1)
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        within_memory(fail)
    assert len(calls) == 1
    assert is_out_of_memory(MemoryError()) and not is_out_of_memory(RuntimeError("x"))
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**50)
    assert is_out_of_memory(error.value)


class OutOfMemory(Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def test_a_training_without_memory_ends_in_one_line(capsys):
    line = ended(capsys, 2, *COMMAND, f"--trainer.callbacks+={__name__}.OutOfMemory")
    assert "fit into memory, got CUDA out of memory; lower --data.batch_size" in line


# --- numbers that are none ---


class Diverge(Callback):
    """Spoils a weight in an epoch."""

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.current_epoch == 1:
            with torch.no_grad():
                module.network.fc2.weight[0, 0] = float("nan")


@pytest.mark.filterwarnings("ignore:Encountered `nan` values in tensor")
@pytest.mark.parametrize("every", [[], ["--trainer.save_every_n_steps", "1"]])
def test_a_training_that_diverges_ends_and_keeps_what_was_before(capsys, every):
    command = [part for part in COMMAND if part not in ("--trainer.save_every_n_steps", "1")]
    line = ended(capsys, 2, *command, *every, f"--trainer.callbacks+={__name__}.Diverge")
    assert re.search(
        r"Expected finite weights to save, got NaN or infinity in fc[12].weight after \d steps: the tr", line
    )
    for name in ("last.ckpt", "best.ckpt"):
        load_parent(f"runs/{name}")
        assert read_checkpoint(f"runs/{name}")["epoch"] == 0


def test_what_is_not_finite_is_not_saved():
    classifier = ImageClassifier({"name": "MLP", "in_features": 4, "hidden": [3], "num_classes": 2})
    with torch.no_grad():
        classifier.network.fc1.weight.fill_(float("inf"))
    with pytest.raises(FusionError, match="got NaN or infinity in fc1.weight after 0 steps"):
        save_checkpoint(classifier, "a.ckpt")
    assert not os.path.exists("a.ckpt") and json.dumps(sorted(os.listdir())) == "[]"
