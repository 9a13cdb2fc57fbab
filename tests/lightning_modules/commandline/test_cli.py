"""The command line, run in this process: what it does, what it leaves behind, what it refuses."""

import json
import re
import shlex
import signal
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pytorch_lightning.utilities.exceptions import SIGTERMException
from rich.console import Console
from rich.progress import Progress

from clafusion import networks
from clafusion.datamodules import DigitsDataModule
from clafusion.fusion.record import in_percent
from clafusion.lightning_modules import (
    Distiller,
    FusionTrainer,
    ImageClassifier,
    load_parent,
    read_checkpoint,
    save_checkpoint,
)
from clafusion.lightning_modules.commandline import cli
from clafusion.lightning_modules.commandline.shorthand import spell_out
from clafusion.lightning_modules.progress import steps
from tests.helpers import ROOT, UNTRAINED

QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
SHORT = [*QUIET, "--trainer.enable_model_summary", "false", "--trainer.max_epochs", "1"]
MODULES = "CIFARDataModule, DigitsDataModule, ImageFolderDataModule, MNISTDataModule, TinyImageNetDataModule"
DIGITS = ["--data", "DigitsDataModule"]
FEW = ["--fusion.num_samples", "70", *UNTRAINED]
MLP = {"name": "MLP", "in_features": 64, "hidden": [4], "num_classes": 10}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*args: str) -> None:
    cli.main([str(arg) for arg in args])


def refused(capsys, *args: str) -> str:
    """The one line that the command line ends with; no file was written or changed."""
    before = files()
    with pytest.raises(SystemExit) as end:
        run(*args)
    assert end.value.code == 2
    assert files() == before
    error = capsys.readouterr().err
    assert re.fullmatch(r"clafusion: error: [^\n]+\n", error), error
    return error


def files() -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in Path.cwd().rglob("*") if path.is_file()}


def fuse_arguments(parents, output="fused.ckpt") -> list[str]:
    return ["fuse", "--parents", f"[{', '.join(map(str, parents))}]", "--output", str(output), *QUIET, *FEW]


def saved(path: Path, **architecture) -> Path:
    """A checkpoint of an MLP for the digits with some of its arguments changed."""
    base = {"name": "MLP", "in_features": 64, "hidden": [16], "num_classes": 10}
    save_checkpoint(ImageClassifier({**base, **architecture}), path)
    return path


# --- what it does ---


def test_a_configuration_trains_a_parent(capsys):
    run("fit", "--config", "configs/train/digits_deep.yaml", *SHORT)
    folder = Path("runs/digits_deep")
    assert {path.name for path in folder.iterdir()} == {"best.ckpt", "last.ckpt", "logs"}
    assert load_parent(folder / "best.ckpt").architecture["hidden"] == [64, 48, 32, 24, 16]
    logged = (folder / "logs/version_0/metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train_loss", "val_loss", "val_acc"} <= set(logged)
    run("fit", "--config", folder / "logs/version_0/config.yaml", *SHORT, "--overwrite")
    assert not re.search("GPU available|💡|Seed set|Warning", capsys.readouterr().err)


def test_fuse_writes_an_ordinary_checkpoint_and_its_record(mlp_checkpoints, capsys):
    run(*fuse_arguments(mlp_checkpoints))
    assert sorted(path.name for path in Path.cwd().iterdir()) == [
        *("fused.ckpt", "fused.html", "fused.json", "fused.yaml", "fused_figures")
    ]
    record = json.loads(Path("fused.json").read_text())
    names = [row["name"] for row in record["networks"]]
    assert names[:3] == ["deep.ckpt", "shallow.ckpt", "ensemble"] and names[-1] == "fused"
    assert "naive average" not in names and "balanced shallow.ckpt" in names
    assert all(0 <= row["test_acc"] <= 1 and row["parameters"] > 0 for row in record["networks"])
    assert len(record["alignments"]) == len(record["transport_costs"]) == 2
    assert record["options"]["num_samples"] == 70 and record["seconds"] > 0 and record["peak_memory_bytes"] > 0
    assert [len(parent["sha256"]) for parent in record["parents"]] == [64, 64]
    assert {row["test_images"] for row in record["networks"]} == {len(DigitsDataModule().read()[1])}
    assert record["data"]["class_path"] == "clafusion.datamodules.DigitsDataModule"
    assert record["data"]["init_args"]["batch_size"] == 128 and record["device"].startswith("cpu (")
    assert datetime.fromisoformat(record["date"]).utcoffset() == timedelta() and record["host"]
    assert read_checkpoint("fused.ckpt")["fusion"] == record
    table = capsys.readouterr().out
    assert all(name in table for name in names)
    assert in_percent(record["networks"][-1]) in table and "± one standard error for 359 test images" in table


def test_fuse_has_a_short_form(mlp_checkpoints):
    run(*fuse_arguments(mlp_checkpoints))
    deep, shallow = mlp_checkpoints
    Path("short").mkdir()
    run("fuse", deep, "--overwrite", shallow, *QUIET, "-o", "short/fused.ckpt", *FEW)
    long, short = (load_parent(f"{folder}/fused.ckpt").state_dict() for folder in (".", "short"))
    assert all(torch.equal(value, short[name]) for name, value in long.items())


def test_the_short_form_spares_other_arguments():
    given = ["fuse", "-c", "x.yaml", "a, b.ckpt", "--fusion.seed", "3", "c.ckpt", "-od.ckpt", "--fusion.weights=[1,2]"]
    named = ['--parents=["a, b.ckpt", "c.ckpt"]', "--output=d.ckpt"]
    assert spell_out(given) == ["fuse", "-c", "x.yaml", "--fusion.seed", "3", "--fusion.weights=[1,2]", *named]
    assert spell_out(["convert", "a", "-o", "b"]) == spell_out(["convert", "a", "b"])
    assert spell_out(["export", "a", "--output", "b", "--shape", "[8]"]) == [
        *("export", "--output", "b", "--shape", "[8]", "--input=a")
    ]
    assert spell_out(["report", "a.json", "-o", "b.html"]) == ["report", "a.json", "--output=b.html"]
    assert spell_out(["convert", "a", "b", "c"]) == ["convert", "--input=a", "--output=b", "c"]
    assert spell_out(["fit", "a", "-o", "b"]) == ["fit", "a", "-o", "b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.ckpt", "b.ckpt", "--parents", "[a.ckpt, b.ckpt]", "-o", "c.ckpt"], "Expected parents once, got a.ckpt b"),
        (["a.ckpt", "b.ckpt", "-o", "c.ckpt", "--output", "d.ckpt"], "Expected one output, got several"),
        (["a.ckpt", "b.ckpt", "-o", "c.ckpt", "-o", "d.ckpt"], "Expected one output, got several"),
        (["a.ckpt", "b.ckpt", "-o"], "Expected a file after -o, got --trainer.acc"),
        (["a.ckpt", "b.ckpt"], "Expected -o NAME.ckpt, got none"),
        (["-o", "c.ckpt"], "Expected A.ckpt B.ckpt, got none"),
        (["a.ckpt", "-o", "c.ckpt"], "Expected two or more parents, got 1"),
    ],
)
def test_the_short_form_refuses(capsys, arguments, message):
    assert message in refused(capsys, "fuse", *arguments, *QUIET)


def test_the_accuracy_of_the_record_is_that_of_the_checkpoint(mlp_checkpoints, capsys):
    run(*fuse_arguments(mlp_checkpoints))
    record = json.loads(Path("fused.json").read_text())
    capsys.readouterr()
    run("test", "--ckpt_path", "fused.ckpt", *QUIET)
    [accuracy] = re.findall(r"test_acc\s*│\s*([\d.]+)", capsys.readouterr().out)
    assert float(accuracy) == pytest.approx(record["networks"][-1]["test_acc"])


def test_fuse_prints_json_or_nothing_on_demand(mlp_checkpoints, capsys):
    run(*fuse_arguments(mlp_checkpoints), "--json", "--report", "false")
    said = capsys.readouterr()
    assert json.loads(said.out) == json.loads(Path("fused.json").read_text()) and said.err == ""
    run(*fuse_arguments(mlp_checkpoints), "--overwrite", "--align_only", "--json")
    assert json.loads(capsys.readouterr().out)["alignments"]
    run(*fuse_arguments(mlp_checkpoints), "--overwrite", "--quiet", "--report", "false")
    assert capsys.readouterr() == ("", "")


def test_steps_are_shown_on_a_terminal_only(monkeypatch, capsys):
    for terminal, quiet in ((True, False), (True, True), (False, False)):
        monkeypatch.setattr(Console, "is_terminal", terminal)
        with steps(quiet) as step:
            step("fusing 2 networks")
        assert ("fusing 2 networks" in capsys.readouterr().err) == (terminal and not quiet)


def test_a_bar_shows_how_far_a_fusion_is(mlp_checkpoints, monkeypatch):
    shown = []
    add, update = Progress.add_task, Progress.update
    monkeypatch.setattr(Progress, "add_task", lambda self, words, **new: shown.append(words) or add(self, words, **new))
    monkeypatch.setattr(
        Progress, "update", lambda self, *_, **new: shown.append(new["count"]) or update(self, *_, **new)
    )
    monkeypatch.setattr(Console, "is_terminal", True)
    run(*fuse_arguments(mlp_checkpoints), "--fusion.targets", "matched")
    assert shown[:3] == ["loading 2 networks", "testing deep.ckpt", "testing shallow.ckpt"]
    assert shown[3] == "fusing 2 networks"
    for words, layers in (("matching neurons", 4), ("refitting layers", 5)):
        at = shown.index(words)
        assert shown[at + 1 : at + 1 + layers] == [f"{done}/{layers}" for done in range(1, layers + 1)]
    shown.clear()
    run(*fuse_arguments(mlp_checkpoints), "--overwrite", "--quiet")
    assert not shown


def test_equal_parents_are_also_averaged_naively(mlp_checkpoints):
    deep, _ = mlp_checkpoints
    run(*fuse_arguments([deep, deep]))
    rows = {row["name"]: row["test_acc"] for row in json.loads(Path("fused.json").read_text())["networks"]}
    assert rows["naive average"] == pytest.approx(rows["deep.ckpt"]) == pytest.approx(rows["fused"])


def test_fuse_is_deterministic(mlp_checkpoints):
    for name in ("a", "b"):
        Path(name).mkdir()
        run(*fuse_arguments(mlp_checkpoints, f"{name}/fused.ckpt"))
    one, two = (load_parent(f"{name}/fused.ckpt").state_dict() for name in ("a", "b"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_a_checkpoint_is_evaluated_on_data(mlp_checkpoints, command):
    output = ["-o", "predicted.csv"] if command == "predict" else []
    run(command, "--ckpt_path", mlp_checkpoints[0], *DIGITS, *output, *QUIET)
    assert [path.name for path in Path.cwd().iterdir()] == output[1:]


def test_training_goes_on_from_a_fused_checkpoint(mlp_checkpoints):
    run(*fuse_arguments(mlp_checkpoints))
    run("fit", "--ckpt_path", "fused.ckpt", *SHORT)
    trained = read_checkpoint("runs/last.ckpt")
    assert trained["epoch"] == 0 and trained["global_step"] > 0
    assert trained["fusion"] == read_checkpoint("fused.ckpt")["fusion"]


def test_the_command_line_wins_over_the_checkpoint(mlp_checkpoints):
    run("fit", "--ckpt_path", mlp_checkpoints[0], "--model.momentum", "0.3", *SHORT)
    trained = read_checkpoint("runs/last.ckpt")
    assert (trained["hyper_parameters"]["momentum"], trained["hyper_parameters"]["lr"]) == (0.3, 0.05)
    [group] = trained["optimizer_states"][0]["param_groups"]
    assert (group["momentum"], group["lr"]) == (0.3, 0.05)


def test_a_configuration_file_wins_over_the_checkpoint_too(mlp_checkpoints):
    Path("recipe.yaml").write_text("model: {lr: 0.5}\n")
    run("fit", "--config", "recipe.yaml", "--ckpt_path", mlp_checkpoints[0], *SHORT)
    assert read_checkpoint("runs/last.ckpt")["hyper_parameters"]["lr"] == 0.5


def test_the_command_line_wins_when_training_is_resumed():
    run("fit", "--config", "configs/train/digits_shallow.yaml", *SHORT)
    path = "runs/digits_shallow/last.ckpt"
    # Without momentum, which would diverge at that rate.
    run("fit", "--ckpt_path", path, "--model.lr", "0.5", "--model.momentum", "0", *SHORT, "--trainer.max_epochs", "2")
    trained = read_checkpoint("runs/last.ckpt")
    assert trained["epoch"] == 1
    assert trained["optimizer_states"][0]["param_groups"][0]["lr"] == 0.5


def test_options_come_from_files_and_the_environment(monkeypatch, capsys):
    monkeypatch.setenv("CLAFUSION_FUSE__FUSION__SEED", "7")
    with pytest.raises(SystemExit) as end:
        run(
            *["fuse", "--config", "configs/fusion/paper.yaml", "--config", "configs/trainer/cpu.yaml"],
            *["--fusion.num_samples", "50", "--parents", "[a, b]", "--output", "c.ckpt", "--print_config"],
        )
    assert end.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    options = config["fusion"]
    assert (options["seed"], options["num_samples"], options["head"]) == (7, 50, "transport")
    assert config["trainer"]["deterministic"] is True


def test_the_configuration_of_the_published_settings_is_that_of_the_library(capsys):
    from clafusion import FusionOptions

    options = yaml.safe_load((ROOT / "configs/fusion/paper.yaml").read_text())["fusion"]
    assert FusionOptions(**options) == FusionOptions.paper()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_is_understood(path, capsys):
    commands = {"fusion": ["fuse", "--parents", "[a, b]", "--output", "c.ckpt"], "experiments": ["pipeline"]}
    command = commands.get(path.parent.name, ["fit"])
    with pytest.raises(SystemExit) as end:
        run(*command, "--config", path, "--print_config")
    assert end.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    if path.parent.name == "train":
        assert config["trainer"]["default_root_dir"] == f"runs/{path.stem}"
        if path.stem in ("finetune_cnn", "finetune_transformer"):
            # Their network is that of --ckpt_path.
            assert config["lr_scheduler"]["init_args"]["T_max"] == config["trainer"]["max_epochs"]
            return
        architecture, fused = config["model"]["init_args"]["architecture"], config["trainer"]["callbacks"]
        assert [callback["class_path"] for callback in fused or []] == ["clafusion.callbacks.FusionCallback"] * (
            not architecture
        )
        assert not architecture or networks.build(architecture).architecture["num_classes"] == 10


def test_the_environment_names_arguments_of_the_module_and_of_the_data(monkeypatch, capsys):
    monkeypatch.setenv("CLAFUSION_FIT__MODEL__LR", "0.3")
    monkeypatch.setenv("CLAFUSION_FIT__MODEL__MOMENTUM", "0.4")
    monkeypatch.setenv("CLAFUSION_FIT__DATA__BATCH_SIZE", "7")
    monkeypatch.setenv("CLAFUSION_TEST__MODEL__GAMMA", "0.5")
    with pytest.raises(SystemExit):
        run("fit", "--model.momentum", "0.8", "--print_config")
    config = yaml.safe_load(capsys.readouterr().out)
    arguments = config["model"]["init_args"]
    assert (arguments["lr"], arguments["momentum"], arguments["gamma"]) == (0.3, 0.8, 0.1)
    assert config["data"]["init_args"]["batch_size"] == 7


def distilled(path: Path) -> Path:
    save_checkpoint(
        Distiller(
            ["teacher.ckpt"],
            architecture={"name": "MLP", "in_features": 64, "hidden": [4], "num_classes": 10},
            temperature=7.0,
            lr=0.06,
        ),
        path,
    )
    return path


@pytest.mark.parametrize(
    ("given", "class_name", "expected"),
    [
        ([], "Distiller", {"teachers": ["teacher.ckpt"], "temperature": 7.0, "lr": 0.06}),
        (["--model.lr", "0.9"], "Distiller", {"temperature": 7.0, "lr": 0.9}),
        (["--model", "Distiller", "--model.teachers", "[b]"], "Distiller", {"teachers": ["b"], "temperature": 7.0}),
        (["--model", "ImageClassifier"], "ImageClassifier", {"lr": 0.06, "momentum": 0.9}),
        (["--config", "other.yaml"], "ImageClassifier", {"lr": 0.06, "momentum": 0.3}),
    ],
)
def test_a_checkpoint_says_what_kind_of_module_it_is(monkeypatch, given, class_name, expected):
    Path("other.yaml").write_text("model: {class_path: ImageClassifier, init_args: {momentum: 0.3}}\n")
    made = {}
    monkeypatch.setattr(FusionTrainer, "fit", lambda self, model, **kwargs: made.update(model=model))
    run("fit", "--ckpt_path", distilled(Path("distilled.ckpt")), *given, *SHORT)
    assert type(made["model"]).__name__ == class_name
    assert {name: made["model"].hparams[name] for name in expected} == expected
    assert made["model"].network is not None


class Own(ImageClassifier):
    """A class of the user's own, with an argument of its own."""

    def __init__(self, share: float = 0.0, **recipe: Any) -> None:
        super().__init__(**recipe)
        self.share = share


def test_a_class_of_ones_own_takes_its_arguments_from_the_checkpoint(monkeypatch):
    save_checkpoint(Own(share=0.25, lr=0.06, architecture=MLP), "own.ckpt")
    made = {}
    monkeypatch.setattr(FusionTrainer, "fit", lambda self, model, **kwargs: made.update(model=model))
    run("fit", "--ckpt_path", "own.ckpt", "--model", f"{__name__}.Own", "--model.momentum", "0.5", *SHORT)
    model = made["model"]
    assert (type(model), model.share, model.lr, model.momentum) == (Own, 0.25, 0.06, 0.5)


def test_a_distilled_checkpoint_is_tested_without_its_teachers():
    run("test", "--ckpt_path", distilled(Path("distilled.ckpt")), *DIGITS, *QUIET)


@pytest.mark.parametrize("name", ["MNISTDataModule", "clafusion.datamodules.MNISTDataModule"])
def test_data_modules_are_known_by_their_short_names(name, capsys):
    with pytest.raises(SystemExit):
        run("fit", "--data", name, "--data.variant", "fashion", "--print_config")
    data = yaml.safe_load(capsys.readouterr().out)["data"]
    assert data["class_path"] == "clafusion.datamodules.MNISTDataModule" and data["init_args"]["variant"] == "fashion"


def test_help_and_version(capsys):
    for args in (["--help"], ["--version"], ["fuse", "--help"]):
        with pytest.raises(SystemExit) as end:
            run(*args)
        assert end.value.code == 0
    out = capsys.readouterr().out
    assert "clafusion 0.1.0" in out and "--fusion.num_samples" in out and "{fit,validate,test,predict,fuse," in out
    assert "weights_only" not in out and "exit codes: 0 success" in out


def test_the_installed_command_ends_with_one_line_and_code_2():
    command = "from clafusion.lightning_modules.commandline import main; main(['test', '--ckpt_path', 'none.ckpt'])"
    end = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert end.returncode == 2
    assert end.stderr == "clafusion: error: Expected a checkpoint, got none.ckpt, which is no file; check the path\n"


@pytest.mark.parametrize(
    "end, name, code",
    [(KeyboardInterrupt(), "SIGINT", 130), (SIGTERMException(), "SIGTERM", 143)],
    ids=["Ctrl-C", "SIGTERM"],
)
@pytest.mark.parametrize("command", ["fit", "fuse"])
def test_the_exit_code_of_an_interruption(mlp_checkpoints, monkeypatch, capsys, command, end, name, code):
    def interrupted(*_, **__):
        raise end

    monkeypatch.setattr(ImageClassifier, "training_step", interrupted)
    monkeypatch.setattr("clafusion.lightning_modules.commands.fuse.fuse_and_record", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as caught:
            if command == "fit":
                run("fit", "--config", "configs/train/digits_deep.yaml", *SHORT)
            run(*fuse_arguments(mlp_checkpoints))
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores a second one
    assert caught.value.code == code
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"clafusion: ended by {name}; what was saved is kept")
    assert not list(Path.cwd().rglob("*.ckpt"))


@pytest.mark.slow
def test_the_commands_of_the_readme_work_as_typed():
    commands = re.findall(r"^clafusion (.*?)(?:\s+#.*)?$", (ROOT / "README.md").read_text(), re.MULTILINE)
    names = [command.split()[0] for command in commands]
    assert names == ["fit", "fit", "fuse", "test", "fit", "fit", "fit", "fit", "fit", "pipeline"]
    for command in commands[:-1]:
        run(*shlex.split(command), *QUIET)
    run(*shlex.split(commands[-1]), "--scale", "small", "--seeds", "[0]")
    for name in (
        "runs/digits_low/last.ckpt",
        "runs/digits_high/last.ckpt",
        "runs/fused.ckpt",
        "runs/finetuned/best.ckpt",
        "runs/digits_finetune/best.ckpt",
        "runs/digits_distill/best.ckpt",
        "runs/digits_mlp/seed_0/fuse_default/fused.ckpt",
    ):
        assert load_parent(name).architecture["num_classes"] == 10


# So short an example has too few samples; with enough of them it would take minutes.
@pytest.mark.filterwarnings("ignore:Expected at least as many observations:UserWarning")
@pytest.mark.slow
def test_the_example_of_the_readme_works_as_typed(capsys):
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == "torch.Size([64, 10])\n"


# --- what it refuses ---


def test_unusable_parents_are_refused(mlp_checkpoints, capsys):
    deep, shallow = mlp_checkpoints
    inputs = Path.cwd()
    truncated, poisoned = inputs / "truncated.ckpt", saved(inputs / "nan.ckpt")
    truncated.write_bytes(deep.read_bytes()[:3000])
    content = torch.load(poisoned, weights_only=True)
    content["state_dict"]["network.fc1.weight"][0, 0] = float("nan")
    torch.save(content, poisoned)
    for parents, message in (
        (["none.ckpt", shallow], "Expected a checkpoint, got none.ckpt, which is no file"),
        ([truncated, shallow], "truncated.ckpt, which is truncated or damaged"),
        ([deep, poisoned], "NaN or infinity in fc1.weight"),
        ([deep], "Expected two or more parents, got 1"),
        ([deep, saved(inputs / "wide.ckpt", in_features=49)], "49 values, as .*wide.ckpt takes, got 1x8x8 from Digits"),
        ([deep, saved(inputs / "many.ckpt", num_classes=12)], "same number of classes, got .*deep.ckpt: 10, .*: 12"),
        ([deep, "https://example.org/b.ckpt"], "Expected a local file"),
    ):
        assert re.search(message, refused(capsys, *fuse_arguments(parents)))


def test_pickled_code_in_a_parent_is_not_run(mlp_checkpoints, capsys):
    class Bomb:
        def __reduce__(self):
            return Path("exploded").touch, ()

    torch.save({"state_dict": Bomb()}, "bomb.ckpt")
    for arguments in (fuse_arguments([mlp_checkpoints[0], "bomb.ckpt"]), ["test", "--ckpt_path", "bomb.ckpt", *QUIET]):
        assert "pickled objects, which were not run" in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--fusion.num_samples", "0"], "num_samples"),
        (["--fusion.num_samples", "1"], "num_samples"),
        (["--fusion.num_samples", "many"], "num_samples"),
        (["--fusion.num_sample", "100"], "num_sample"),
        (["--fusion.no_such_option", "1"], "no_such_option"),
        (["--fusion.layer_measure", "magic"], "magic"),
        (["--fusion.regularization", "-1"], "regularization"),
        (["--over", "true"], "over"),
        (["--trainer.max_epoch", "1"], "max_epoch"),
        (["--trainer.devices", "0"], "devices"),
        (["--config", "none.yaml"], "none.yaml"),
        (["--data", "NoSuchDataModule"], "NoSuchDataModule"),
        (["--data.batch_size", "0"], "batch_size"),
        (
            ["--model.architecture", "{name: MLP, in_features: 64, hidden: [4], num_classes: 10}"],
            "--model.architecture",
        ),
    ],
)
def test_bad_options_are_refused(mlp_checkpoints, capsys, extra, message):
    assert message in refused(capsys, *fuse_arguments(mlp_checkpoints), *extra)


def test_outputs_that_cannot_be_written_are_refused(mlp_checkpoints, capsys):
    Path("file").touch()
    Path("folder.ckpt").mkdir()
    for output, message in (
        ("none/fused.ckpt", "Expected a folder that can be written, got none"),
        ("file/fused.ckpt", "Expected a folder that can be written, got file"),
        ("folder.ckpt", "Expected to write a new file, got folder.ckpt"),
        ("fused.pt", "NAME.ckpt"),
        ("s3://bucket/fused.ckpt", "Expected a local output file"),
    ):
        assert message in refused(capsys, *fuse_arguments(mlp_checkpoints, output))


@pytest.mark.parametrize(
    ("name", "demand"),
    [("fused.ckpt", ["--overwrite"]), ("fused.json", ["--overwrite", "--seed_everything", "1"]),
     ("fused.ckpt", ["--overwrite", "true"])],
)  # fmt: skip
def test_existing_results_are_replaced_only_on_demand(mlp_checkpoints, capsys, name, demand):
    Path(name).write_text("precious")
    assert f"got {name}, which exists; give --overwrite" in refused(capsys, *fuse_arguments(mlp_checkpoints))
    assert f"got {name}" in refused(capsys, *fuse_arguments(mlp_checkpoints), "--overwrite", "false")
    assert Path(name).read_text() == "precious"
    run(*fuse_arguments(mlp_checkpoints), *demand)
    assert len(load_parent("fused.ckpt").architecture["hidden"]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["test"], "Expected a network, got none"),
        (["fit", *SHORT], "Expected a network, got none"),
        (["test", "--ckpt_path", "none.ckpt"], "none.ckpt"),
        (["fit", "--model.lr", "fast"], "model.lr"),
        (["fit", "--model.lr", "-1"], "lr"),
        (["fit", "--model.milestones", "[1.5]"], "milestones"),
        (["fit", "--model.architecture", "{name: Nothing}"], "Nothing"),
        (["fit", "--model.arch", "{a: 1}"], "model.arch"),
        (["fit", "--config", "configs/train/fashion_mlp_deep.yaml", "--data.data_dir", "none", *SHORT], "idx3-ubyte"),
        (["no_such_command"], "no_such_command"),
        ([], "Expected a command"),
    ],
)
def test_bad_use_of_the_other_commands_is_refused(capsys, arguments, message):
    assert message in refused(capsys, *arguments)


def test_data_that_does_not_fit_is_refused_before_training(capsys):
    wide = "{name: MLP, in_features: 784, hidden: [4], num_classes: 10}"
    line = refused(capsys, "fit", "--model.architecture", wide, *SHORT)
    assert "784 values" in line and "1x8x8 from DigitsDataModule" in line


def test_a_checkpoint_of_another_architecture_is_refused(mlp_checkpoints, capsys):
    other = ["--model.architecture", "{name: MLP, in_features: 64, hidden: [5], num_classes: 10}"]
    line = refused(capsys, "test", "--ckpt_path", str(mlp_checkpoints[0]), *other, *DIGITS, *QUIET)
    assert "leave out --model.architecture" in line


def test_other_errors_keep_their_traceback(mlp_checkpoints, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr("clafusion.lightning_modules.commands.recording.fuse", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run(*fuse_arguments(mlp_checkpoints))
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "Expected a command, such as fuse (clafusion --help lists them), got none\n"),
        (["fus"], "Expected a command, such as fuse (clafusion --help lists them), got 'fus'\n"),
        (["fuse"], "Expected A.ckpt B.ckpt and -o NAME.ckpt, got none; give it, see clafusion fuse --help\n"),
        (["report"], "Expected INPUT, got none; give it, see clafusion report --help\n"),
        (["pipeline"], "Expected --experiment, got none; give it, see clafusion pipeline --help\n"),
        (
            ["fuse", "a", "b", "-o", "c.ckpt", "--data", "DigitsDataModule", "--data.data_dir", "d"],
            "Expected an option that the data module has, got --data.data_dir; name the module by --data, such as "
            f"{MODULES}\n",
        ),
        (
            ["fuse", "a", "b", "-o", "c.ckpt", "--data", "ImageFolder"],
            f"Expected --data to name a data module, got ImageFolder; there are {MODULES}, or give package.Class of "
            "your own\n",
        ),
        (["fuse", "a", "b", "-o", "c.ckpt", "--num_sample", "3"], "unrecognized arguments: --num_sample 3\n"),
    ],
)
def test_what_is_not_a_whole_command_is_refused(capsys, arguments, message):
    assert refused(capsys, *arguments) == f"clafusion: error: {message}"
