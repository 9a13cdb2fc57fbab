"""Whole experiments: what they leave, how they go on after a kill, what they refuse, what a failure leaves intact."""

import copy
import csv
import json
import multiprocessing
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pytorch_lightning import Callback

from clafusion import Ensemble, FusionError, average
from clafusion.datamodules import DigitsDataModule
from clafusion.lightning_modules import FusionTrainer, ImageClassifier, load_parent, read_checkpoint
from clafusion.lightning_modules.checkpoints.last import LastCheckpoint
from clafusion.lightning_modules.commandline import cli
from clafusion.lightning_modules.experiments import runner as pipeline
from clafusion.lightning_modules.experiments.context import RunContext
from clafusion.lightning_modules.experiments.jobs import Job
from clafusion.lightning_modules.experiments.parsing import from_plain
from clafusion.lightning_modules.experiments.pipeline import run_pipeline
from clafusion.lightning_modules.experiments.plan import plan, stage_from
from clafusion.lightning_modules.experiments.runner import ExperimentFailed
from clafusion.lightning_modules.experiments.schema import Experiment
from clafusion.lightning_modules.experiments.stages import fusing
from clafusion.lightning_modules.experiments.stages.training import Cost
from tests.helpers import HAS_FONT, ROOT

pytestmark = [
    # To go on in the same folder is the point.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    # From Python 3.12 on; what is forked here uses one thread.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded"),
]

EXPERIMENT: dict[str, Any] = {
    "name": "tiny",
    "parents": {
        "deep": {
            "architecture": {"name": "MLP", "in_features": 64, "hidden": [12, 10, 8], "num_classes": 10},
            "epochs": 2,
            "lr": 0.05,
        },
        "shallow": {
            "architecture": {"name": "MLP", "in_features": 64, "hidden": [12, 8], "num_classes": 10, "dropout": 0.2},
            "epochs": 2,
            "lr": 0.05,
        },
    },
    "fusions": {"default": {"num_samples": 70}},
    "finetune": {"epochs": 2, "lr": 0.02, "milestones": [1], "gamma": 0.5, "networks": ["deep", "fused default"]},
    "distill": {"epochs": 2, "lr": 0.02, "students": ["scratch"]},
    "published": {"deep": 96.95},
    "small": {"data": {"limit_train": 72}, "parents": {"deep": {"epochs": 1}}},
}
# 5 batches in an epoch, or on 2 processes as many of half the size.
DATA = {"limit_train": 80, "batch_size": 16, "augment": True}
BATCHES = 5
NETWORKS = [
    *["deep", "shallow", "ensemble", "fused default", "balanced shallow", "deep, finetuned"],
    *["fused default, finetuned", "scratch T=4 alpha=0.9, distilled"],
]
STAGES = 2 + 1 + 2 + 1 + len(NETWORKS)


def with_changes(changes: dict[str, Any]) -> dict[str, Any]:
    """The experiment with some values changed, by their path; None leaves a key out."""
    experiment = copy.deepcopy(EXPERIMENT)
    for path, value in changes.items():
        *parts, last = path.split(".")
        target = experiment
        for part in parts:
            target = target[part]
        if value is None:
            del target[last]
        else:
            target[last] = value
    return experiment


def run(output: Path, changes: dict[str, Any] | None = None, **arguments: Any) -> dict[str, Any]:
    """Carries out the experiment in this process."""
    own = {name: arguments.pop(name) for name in ("seeds", "scale", "report") if name in arguments}
    data = {**DATA, **arguments.pop("data", {})}
    model = arguments.pop("model", None) or ImageClassifier()
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = FusionTrainer(**{**quiet, "devices": 1, "save_every_n_steps": 1, **arguments})
    experiment = with_changes(changes or {})
    return run_pipeline(trainer, model, DigitsDataModule(**data), experiment, output=str(output), **own)


def networks(folder: Path) -> dict[str, Any]:
    """All weights below a folder, and the momenta and learning rates of the last checkpoints."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.ckpt")):
        content = read_checkpoint(path)
        name = str(path.relative_to(folder))
        found |= {f"{name} {key}": tensor for key, tensor in content["state_dict"].items()}
        for optimizer in content["optimizer_states"]:
            found[f"{name} rates"] = optimizer["param_groups"]
            found |= {f"{name} momentum {key}": state["momentum_buffer"] for key, state in optimizer["state"].items()}
    return found


def accuracies(folder: Path) -> dict[str, float]:
    rows = json.loads((folder / "results.json").read_text())["networks"]
    return {f"{row['name']} {seed}": run["test_acc"] for row in rows for seed, run in row["seeds"].items()}


def differences(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    assert one.keys() == two.keys()
    same = {key: torch.equal(v, two[key]) if isinstance(v, torch.Tensor) else v == two[key] for key, v in one.items()}
    return [key for key in one if not same[key]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of the experiment, carried out without interruption for two seeds."""
    output = tmp_path_factory.mktemp("whole") / "tiny"
    run(output, seeds=[0, 1])
    return output


@pytest.fixture
def done(whole, tmp_path) -> Path:
    """A copy of it that a test may spoil."""
    subprocess.run(["cp", "-a", str(whole), str(tmp_path / "tiny")], check=True)
    return tmp_path / "tiny"


# --- what an experiment leaves ---


def test_the_table_has_every_network_over_all_seeds(whole):
    results = json.loads((whole / "results.json").read_text())
    assert [row["name"] for row in results["networks"]] == NETWORKS
    assert (results["experiment"], results["scale"], results["seeds"]) == ("tiny", "full", [0, 1])
    assert results["failures"] == []
    assert [row["role"] for row in results["networks"]] == [
        *["parent", "parent", "control", "fused", "control", "control", "finetuned", "control"],
    ]
    for row in results["networks"]:
        found = [row["seeds"][seed]["test_acc"] for seed in ("0", "1")]
        assert row["test_acc"] == pytest.approx(sum(found) / 2) and 0 <= row["test_acc"] <= 1
        assert row["test_acc_std"] == pytest.approx(statistics.stdev(found))
        made = row["name"] != "ensemble"
        assert (row["seconds"] is not None) == (row["peak_memory_bytes"] is not None) == made
        assert row["published_test_acc"] == (0.9695 if row["name"] == "deep" else None)


def test_the_other_tables_say_the_same(whole):
    rows = json.loads((whole / "results.json").read_text())["networks"]
    lines = list(csv.DictReader((whole / "results.csv").read_text().splitlines()))
    assert [(line["network"], line["seed"]) for line in lines] == [(n, s) for n in NETWORKS for s in "01"]
    assert {f"{line['network']} {line['seed']}": float(line["test_acc"]) for line in lines} == accuracies(whole)
    text = (whole / "results.md").read_text()
    for row in rows:
        shown = f"| {row['name']} | {100 * row['test_acc']:.2f} ± {100 * row['test_acc_std']:.2f} | "
        shown += "96.95 | " if row["name"] == "deep" else "– | "
        assert f"{shown}{row['parameters']:,} |" in text


def test_a_report_shows_it_unless_nobody_wants_it(whole, tmp_path):
    text = (whole / "report.html").read_text()
    assert all(name in text for name in NETWORKS) and "<script" not in text
    figures = {path.name for path in (whole / "report_figures").iterdir()}
    for name in ("test-accuracy-of-every-network", "default-map-of-fc1-shallow"):
        assert {f"{name}.svg", *([f"{name}.png"] if HAS_FONT else [])} < figures
    record = json.loads((whole / "seed_0/fuse_default/fusion.json").read_text())
    assert record["report"]["diagnosis"]["samples"] == 70 and len(record["report"]["line"]["accuracies"]["1"]) == 11
    run(tmp_path / "x", {"finetune": None, "distill": None}, report=False)
    assert not list(tmp_path.rglob("report*"))
    assert "report" not in json.loads((tmp_path / "x/seed_0/fuse_default/fusion.json").read_text())


def test_the_accuracies_are_those_of_the_networks_on_the_test_images(whole):
    data = DigitsDataModule()
    data.setup()
    images, labels = data.preprocess(data._part("test").images), data._part("test").labels
    folder, found = whole / "seed_1", accuracies(whole)
    parents = [load_parent(folder / f"train_{name}/best.ckpt") for name in ("deep", "shallow")]
    expected = {
        "deep": parents[0],
        "ensemble": Ensemble(parents),
        "fused default": load_parent(folder / "fuse_default/fused.ckpt"),
        "fused default, finetuned": load_parent(folder / "finetune_fused_default/best.ckpt"),
        "scratch T=4 alpha=0.9, distilled": load_parent(folder / "distil_scratch_T4_alpha0.9/best.ckpt"),
    }
    for name, network in expected.items():
        right = (network(images).argmax(1) == labels).double().mean().item()
        assert found[f"{name} 1"] == pytest.approx(right)


def test_what_is_fused_is_an_ordinary_checkpoint_with_its_record(whole):
    folder = whole / "seed_0/fuse_default"
    record = json.loads((folder / "fusion.json").read_text())
    assert read_checkpoint(folder / "fused.ckpt")["fusion"] == record
    assert record["options"]["num_samples"] == 70 and len(record["alignments"]) == 2
    assert len(load_parent(folder / "fused.ckpt").architecture["hidden"]) == 3
    # Balancing changes no function.
    balanced, parent = (
        load_parent(p) for p in (folder / "balanced_shallow.ckpt", folder.parent / "train_shallow/best.ckpt")
    )
    images = torch.randn(5, 1, 8, 8)
    assert len(balanced.architecture["hidden"]) == 3 and not (folder / "balanced_deep.ckpt").exists()
    torch.testing.assert_close(balanced(images), parent(images), atol=1e-5, rtol=0)
    tuned = read_checkpoint(folder.parent / "finetune_fused_default/best.ckpt")
    assert tuned["fusion"] == record and tuned["hyper_parameters"]["milestones"] == [1]


def test_seeds_differ_and_parents_do(whole):
    weights = networks(whole)
    for name in ("train_deep/best.ckpt", "fuse_default/fused.ckpt", "finetune_deep/best.ckpt"):
        key = next(key for key in weights if key.startswith(f"seed_0/{name}"))
        assert not torch.equal(weights[key], weights[key.replace("seed_0", "seed_1")])
    seeds = {name: json.loads((whole / f"seed_0/{name}/stage.json").read_text())["description"]["seed"]
             for name in ("train_deep", "train_shallow", "finetune_deep", "finetune_fused_default")}  # fmt: skip
    assert seeds["train_deep"] != seeds["train_shallow"] and seeds["finetune_deep"] == seeds["finetune_fused_default"]


def test_only_evaluations_see_test_images(tmp_path, monkeypatch):
    seen = []
    original = DigitsDataModule._fixed_loader

    def noting(self, part):
        seen.append((part, self.trainer.state.fn))
        return original(self, part)

    monkeypatch.setattr(DigitsDataModule, "_fixed_loader", noting)
    run(tmp_path / "x", {"finetune": None, "distill": None})
    assert {state for part, state in seen if part == "test"} == {"test"}
    assert {state for part, state in seen if part == "val"} == {"fit"}


def test_a_finished_experiment_is_not_computed_again_and_its_tables_are_written_again(done, monkeypatch, capsys):
    before = accuracies(done)
    for name in ("results.json", "results.csv", "results.md"):
        (done / name).unlink()
    monkeypatch.setattr(Job, "run", None)
    run(done, seeds=[1])
    assert accuracies(done) == {key: value for key, value in before.items() if key.endswith("1")}
    run(done, seeds=[0, 1])
    assert accuracies(done) == before
    said = capsys.readouterr()
    assert f"[{2 * STAGES}/{2 * STAGES}] evaluate" in said.err and "(done)" in said.err and "96.95" in said.out


def test_the_small_scale_changes_what_it_says(tmp_path):
    run(tmp_path / "x", scale="small", changes={"finetune": None, "distill": None})
    described = [
        json.loads((tmp_path / f"x/seed_0/train_{name}/stage.json").read_text())["description"]
        for name in ("deep", "shallow")
    ]
    assert [stage["settings"]["recipe"]["epochs"] for stage in described] == [1, 2]
    assert {stage["data"]["limit_train"] for stage in described} == {72}
    with pytest.raises(FusionError, match="x to be of this experiment, got one with scale small instead of full"):
        run(tmp_path / "x", {"finetune": None, "distill": None})


def test_a_parent_can_have_data_of_its_own(tmp_path):
    run(tmp_path / "x", {"finetune": None, "distill": None, "parents.deep.data": {"limit_train": 32}})
    steps = [read_checkpoint(tmp_path / f"x/seed_0/train_{n}/last.ckpt")["global_step"] for n in ("deep", "shallow")]
    assert steps == [2 * 2, 2 * BATCHES]


# --- stages as plain values ---


def test_a_stage_runs_from_its_description_alone(whole, tmp_path):
    trainer = FusionTrainer(
        accelerator="cpu", devices=1, enable_progress_bar=False, enable_model_summary=False, logger=False,
        save_every_n_steps=1, default_root_dir=str(tmp_path),
    )  # fmt: skip
    context, home = RunContext(trainer, DigitsDataModule(**DATA)), whole / "seed_1"
    for path in sorted(home.glob("*/stage.json")):
        record = json.loads(path.read_text())
        stage, folder = stage_from(record), tmp_path / path.parent.name
        assert stage.name == folder.name and stage.subject == record["name"]
        folder.mkdir()
        inputs = {name: home / file for name, file in record["description"]["inputs"].items()}
        result = stage.run(context, folder, inputs, record["description"]["seed"])
        expected = json.loads((path.parent / "done.json").read_text())
        assert set(stage.files) == expected["outputs"].keys() <= {file.name for file in folder.iterdir()}
        costs = {"seconds", "peak_memory_bytes"}
        assert result.keys() == expected["result"].keys()
        assert {key: result[key] for key in result.keys() - costs} == {
            key: expected["result"][key] for key in expected["result"].keys() - costs
        }
    assert len(list(tmp_path.iterdir())) == STAGES
    assert differences(networks(tmp_path), networks(home)) == []


def test_folders_of_the_first_version_are_recognised(done, monkeypatch):
    """That version wrote neither the name and the outputs of a stage nor the roles of networks."""
    before = accuracies(done)
    for path in done.glob("seed_*/*/stage.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps({name: record[name] for name in ("description", "inputs")}))
    results = json.loads((done / "results.json").read_text())
    rows = [{key: value for key, value in row.items() if key != "role"} for row in results["networks"]]
    (done / "results.json").write_text(json.dumps({**results, "networks": rows}))
    (done / "seed_0/evaluate_fused_default/done.json").unlink()
    monkeypatch.setattr(Job, "run", only(Job.run, "evaluate_fused_default"))
    run(done, seeds=[0, 1])
    assert accuracies(done) == before


def test_an_experiment_that_the_first_version_finished_is_finished(tmp_path, monkeypatch, capsys):
    folder = ROOT / "tests/reference/first_version"
    config = yaml.safe_load((folder / "tiny.yaml").read_text())
    for how in (*config["experiment"]["fusions"].values(), *config["experiment"]["transfers"].values()):
        how.update(teacher="mean", targets="matched")  # the defaults then
    shutil.copytree(folder / "experiment", tmp_path / "experiment")
    before = accuracies(tmp_path / "experiment")
    monkeypatch.setitem(globals(), "EXPERIMENT", config["experiment"])
    monkeypatch.setattr(Job, "run", None)
    rows = run(tmp_path / "experiment", data={**config["data"]["init_args"], "augment": False})["networks"]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 18 and all(line.endswith("(done)") for line in said)
    assert accuracies(tmp_path / "experiment") == before
    assert {row["name"]: row["role"] for row in rows if row["role"] != "control"} == {
        "deep": "parent", "shallow": "parent", "fused default": "fused", "fused plain": "fused",
        "transferred alone": "transferred", "fused default, finetuned": "finetuned",
        "fused default T=4 alpha=0.9, distilled": "finetuned",
    }  # fmt: skip


def only(original: Any, name: str) -> Any:
    def run_it(job: Job, context: RunContext) -> Any:
        assert job.stage.name == name
        return original(job, context)

    return run_it


def test_another_name_is_no_other_stage(done, monkeypatch):
    path = done / "seed_0/fuse_default/stage.json"
    path.write_text(path.read_text().replace('"name": "default"', '"name": "usual"', 1))
    assert json.loads(path.read_text())["name"] == "usual"
    monkeypatch.setattr(Job, "run", None)
    run(done, seeds=[0, 1])


def test_checkpoints_keep_the_cost_under_the_name_that_they_had():
    assert Cost().state_key == "Cost"


# --- the plan ---


def test_roles_do_not_follow_from_names():
    parents = {"fusednet": EXPERIMENT["parents"]["deep"], "transferrednet": EXPERIMENT["parents"]["shallow"]}
    changes = {
        "parents": parents, "fusions": {"default_merge": {"balance": "merge"}}, "transfers": {"alone": {}},
        "finetune.networks": None, "published": None,
        "distill.students": ["scratch", "fusednet", "fused default_merge", "transferred alone, finetuned"],
    }  # fmt: skip
    found = plan(from_plain(Experiment, with_changes(changes), "experiment"), DigitsDataModule())
    assert {row.name: row.role for row in found.contestants} == {
        "fusednet": "parent", "transferrednet": "parent", "ensemble": "control",
        "fused default_merge": "fused", "balanced fusednet": "control", "transferred alone": "transferred",
        "fusednet, finetuned": "control", "transferrednet, finetuned": "control",
        "fused default_merge, finetuned": "finetuned", "balanced fusednet, finetuned": "control",
        "transferred alone, finetuned": "finetuned",
        "scratch T=4 alpha=0.9, distilled": "control", "fusednet T=4 alpha=0.9, distilled": "control",
        "fused default_merge T=4 alpha=0.9, distilled": "finetuned",
        "transferred alone, finetuned T=4 alpha=0.9, distilled": "finetuned",
    }  # fmt: skip


def planned(**changes: Any) -> list[str]:
    experiment = from_plain(Experiment, with_changes({"published": None, **changes}), "experiment")
    return [f"{stage.kind} {stage.subject}" for stage in plan(experiment, DigitsDataModule()).stages]


def test_all_networks_are_finetuned_unless_some_are_named():
    found = planned(**{"finetune.networks": None, "distill": None})
    tuned = [name for name in found if name.startswith("finetune")]
    assert tuned == [f"finetune {name}" for name in ("deep", "shallow", "fused default", "balanced shallow")]


def test_a_balanced_network_that_cannot_be_built_is_left_out_with_a_line():
    made = {"class_path": "tests.lightning_modules.normed.Normed"}
    parents = {
        name: {**EXPERIMENT["parents"]["deep"], "architecture": {**made, "init_args": {"depth": depth, "width": width}}}
        for name, depth, width in (("deep", 3, 12), ("alike", 2, 12), ("narrow", 2, 8))
    }
    with pytest.warns(UserWarning, match="^balanced narrow is left out: Expected StoredNetwork to run at other widths"):
        found = planned(parents=parents, fusions={"default": {}}, finetune=None, distill=None)
    assert [name for name in found if "balanced" in name] == ["evaluate balanced alike"]


def test_variants_share_what_they_balance_alike():
    merge = {"balance": "merge"}
    fusions = {"default": {}, "none": {"correction": "none"}, "merge": merge, "half": {"weights": [0.2, 0.8]}}
    found = planned(fusions=fusions, finetune=None, distill=None)
    balanced = [name for name in found if "balanced" in name]
    assert balanced == [f"evaluate balanced {name}" for name in ("shallow", "deep merge")]
    ensembles = [name for name in found if "ensemble" in name]
    assert ensembles == ["evaluate ensemble", "evaluate ensemble weights=0.2:0.8"]


def test_a_grid_of_distillations():
    distill = {"epochs": 1, "lr": 0.1, "students": ["scratch", "fused default", "deep, finetuned"],
               "temperatures": [20, 1.5], "alphas": [0.05, 0.5], "teachers": ["deep"], "milestones": [3]}  # fmt: skip
    found = [name for name in planned(distill=distill) if name.startswith("distil")]
    assert len(found) == 12 and "distil deep, finetuned T=1.5 alpha=0.05" in found


def test_alike_parents_are_averaged_naively(tmp_path):
    alike = {"parents.shallow.architecture": EXPERIMENT["parents"]["deep"]["architecture"], "distill": None}
    run(tmp_path / "x", {**alike, "finetune": None, "fusions.default.weights": [0.3, 0.7]})
    data = DigitsDataModule()
    data.setup()
    images, labels = data.preprocess(data._part("test").images), data._part("test").labels
    parents = [load_parent(tmp_path / f"x/seed_0/train_{name}/best.ckpt") for name in ("deep", "shallow")]
    found = accuracies(tmp_path / "x")
    for name, network in (("naive average", average(parents, [0.3, 0.7])), ("ensemble", Ensemble(parents, [0.3, 0.7]))):
        assert found[f"{name} 0"] == pytest.approx((network(images).argmax(1) == labels).double().mean().item())


# --- interruptions ---


class KillIn(Callback):
    """Kills this process, or its group, in a stage before a batch, once; notes every batch.

    Args:
        stage: Name of the stage's folder.
        batch: Number of the batch, counted over all epochs.
        log: A file.
        group: Whether to kill all processes of the command.
    """

    def __init__(self, stage: str, batch: int, log: str, group: bool = False) -> None:
        self.stage, self.batch, self.notes, self.group = stage, batch, Path(log), group

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        line = f"{Path(trainer.default_root_dir).name} {trainer.fit_loop.total_batch_idx}"
        before = self.notes.read_text().splitlines() if self.notes.exists() else []
        if line == f"{self.stage} {self.batch}" and f"killed {line}" not in before and trainer.is_global_zero:
            self._note(f"killed {line}")
            os.kill(0 if self.group else os.getpid(), signal.SIGKILL)
        if trainer.is_global_zero:
            self._note(line)

    def _note(self, line: str) -> None:
        with self.notes.open("a") as file:
            file.write(line + "\n")


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying_after(module: Any, name: str, when: Any) -> Any:
    """Changes a function, for this process, so that a call about which `when` is true is its last act."""
    original = getattr(module, name)

    def changed(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if when(*args):
            die()
        return result

    return lambda: setattr(module, name, changed)


def dying_before(module: Any, name: str, when: Any) -> Any:
    original = getattr(module, name)
    return lambda: setattr(module, name, lambda *args: die() if when(*args) else original(*args))


def carried_out(output: Path, callback: KillIn, where: str) -> None:
    """What a process of its own does: the experiment, with what kills it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    how = KILLS[where]
    if not isinstance(how, tuple):
        how()
    run(output, callbacks=[callback])


def forked(output: Path, callback: KillIn, where: str) -> int | None:
    """How a process of its own ends that carries out the experiment.

    It comes from a server that imports everything once and trains nothing: where a network has been exported before the
    first backward pass, autograd starts threads for devices, and what is forked then cannot train.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    child = context.Process(target=carried_out, args=(output, callback, where))
    child.start()
    child.join()
    return child.exitcode


def named(name: str) -> Any:
    return lambda folder, *_: folder.name == name


#: In the order of the stages: where the process is killed.
KILLS: dict[str, Any] = {
    "before anything is written": dying_before(pipeline, "claim", lambda *_: True),
    "train, in an epoch": ("train_deep", 2),
    "train, between epochs": ("train_deep", BATCHES),
    "train, before it is done": dying_before(pipeline, "finish", named("train_deep")),
    "fuse, half written": dying_after(fusing, "save_as", lambda *given: given[-1].name == "fused.ckpt"),
    "fuse, before it is done": dying_before(pipeline, "finish", named("fuse_default")),
    "finetune, in an epoch": ("finetune_deep", 1),
    "finetune, between epochs": ("finetune_fused_default", BATCHES),
    "distil, between best and last": dying_before(
        LastCheckpoint, "on_train_epoch_end", lambda _, trainer, *__: "distil" in trainer.default_root_dir
    ),
    "distil, in an epoch": ("distil_scratch_T4_alpha0.9", BATCHES + 2),
    "evaluate, before it is done": dying_before(pipeline, "finish", named("evaluate_ensemble")),
    "before the tables": dying_before(pipeline, "write_tables", lambda *_: True),
}


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_goes_on(whole, tmp_path):
    output, log = tmp_path / "tiny", tmp_path / "log"
    for where, how in KILLS.items():
        stage, batch = how if isinstance(how, tuple) else ("", 0)
        assert forked(output, KillIn(stage, batch, str(log)), where) == -signal.SIGKILL, where
    run(output, callbacks=[KillIn("", 0, str(log))])
    expected = {key: value for key, value in networks(whole).items() if key.startswith("seed_0")}
    assert differences(networks(output), expected) == []
    assert accuracies(output) == {key: value for key, value in accuracies(whole).items() if key.endswith(" 0")}
    # It went on: nothing was trained on twice but the batch after which nothing had been saved.
    batches = Counter(line for line in log.read_text().splitlines() if not line.startswith("killed"))
    assert len(batches) == 5 * 2 * BATCHES
    assert [line for line, count in batches.items() if count > 1] == [f"distil_scratch_T4_alpha0.9 {BATCHES - 1}"]


def test_the_seconds_before_an_interruption_count(tmp_path):
    cost = Cost()
    cost.load_state_dict({"seconds": 100.0, "peak_memory_bytes": 2**60})
    assert 100 < cost.state_dict()["seconds"] < 110 and cost.state_dict()["peak_memory_bytes"] == 2**60


def test_ctrl_c_ends_it_and_the_same_command_goes_on(whole, tmp_path, monkeypatch):
    class CtrlC(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if "finetune" in trainer.default_root_dir:
                raise KeyboardInterrupt

    for interrupt in ({"callbacks": [CtrlC()]}, {}):
        before = signal.getsignal(signal.SIGINT)
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            if not interrupt:
                patch.setattr(Job, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            run(tmp_path / "x", **interrupt)
        signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored
        assert end.value.code == 1
    run(tmp_path / "x")
    assert accuracies(tmp_path / "x") == {key: v for key, v in accuracies(whole).items() if key.endswith(" 0")}


def test_a_cluster_that_takes_the_job_away_between_trainings_is_asked_to_requeue_it(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in {"NTASKS": 1, "NTASKS_PER_NODE": 1, "NNODES": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    asked: list[list[str]] = []

    def requeue(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    def signalled(*args: Any, **more: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return original(*args, **more)

    original = fusing.fuse_and_record
    monkeypatch.setattr("clafusion.lightning_modules.checkpoints.last.subprocess.run", requeue)
    monkeypatch.setattr(fusing, "fuse_and_record", signalled)
    try:
        run(tmp_path / "x", {"finetune": None, "distill": None}, enable_checkpointing=False)
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert asked == [["scontrol", "requeue", "42"]]


# --- failures ---


def test_a_failing_stage_leaves_the_others(whole, tmp_path, capsys, monkeypatch):
    original = fusing.fuse_and_record
    monkeypatch.setattr(fusing, "fuse_and_record", lambda *_, **__: 1 / 0)
    with pytest.raises(ExperimentFailed, match=f"5 of {STAGES} stages have no result"):
        run(tmp_path / "x")
    results = json.loads((tmp_path / "x/results.json").read_text())
    reasons = {failure["stage"]: failure["reason"] for failure in results["failures"]}
    assert list(reasons) == [
        *["fuse default", "finetune fused default", "evaluate fused default", "evaluate balanced shallow"],
        "evaluate fused default, finetuned",
    ]
    error = tmp_path / "x/seed_0/fuse_default/error.txt"
    assert reasons["fuse default"] == f"ZeroDivisionError: division by zero (see {error})"
    assert "1 / 0" in error.read_text()
    assert reasons["finetune fused default"] == "skipped: it needs fuse_default, which failed"
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "failed" in line] == [
        f"clafusion: failed: fuse default, seed 0: {reasons['fuse default']}",
        *[
            f"[{number}/{STAGES}] {stage}, seed 0 ({reasons[stage]})"
            for number, stage in zip([5, 10, 11, 13], list(reasons)[1:], strict=True)
        ],
    ]
    missing = {"fused default", "balanced shallow", "fused default, finetuned"}
    expected = {key: v for key, v in accuracies(whole).items() if key.endswith(" 0")}
    assert accuracies(tmp_path / "x") == {key: None if key[:-2] in missing else v for key, v in expected.items()}
    assert "- fuse default, seed 0: ZeroDivisionError" in (tmp_path / "x/results.md").read_text()
    # Mended, the same command completes it.
    monkeypatch.setattr(fusing, "fuse_and_record", original)
    assert run(tmp_path / "x")["failures"] == [] and accuracies(tmp_path / "x") == expected
    assert not error.exists()


@pytest.mark.filterwarnings("ignore:Encountered `nan` values in tensor")
def test_a_training_that_diverges_is_a_failure_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write("x.yaml", with_changes({"finetune.lr": 1e30, "finetune.networks": ["deep"], "distill": None}))
    with pytest.raises(SystemExit) as end:
        cli.main(command("x.yaml"))
    error = capsys.readouterr().err
    assert end.value.code == 1
    assert re.search(
        "^clafusion: failed: finetune deep, seed 0: Expected finite weights to save, got NaN or infinity in",
        error,
        re.M,
    )
    assert error.splitlines()[-1] == "clafusion: failed: 2 of 10 stages have no result, the others are there"
    assert accuracies(Path("runs/tiny"))["deep, finetuned 0"] is None


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nam": "x"}, "got experiment.nam; did you mean name?"),
        ({"name": None}, "Expected experiment.name, got none; add it"),
        ({"name": "a/b"}, "Expected names of letters, digits, '-', '_' and '.', none of balanced, .*, got 'a/b'"),
        ({"parents.deep.epoch": 3}, "got experiment.parents.deep.epoch; did you mean epochs?"),
        ({"parents.deep.epochs": "x"}, "Expected experiment.parents.deep.epochs to be a whole number, got 'x'"),
        ({"parents.deep.epochs": 0}, "Expected epochs of at least 1, got 0; .*parents.deep"),
        ({"parents.deep": None}, "Expected two or more parents, got 1"),
        ({"parents.deep.architecture.name": "MPL"}, "in experiment.parents.deep.architecture"),
        ({"parents.deep.architecture.in_features": 63}, "63 values, as experiment.parents.deep takes, got 1x8x8"),
        ({"parents.deep.architecture.num_classes": 9}, "10 classes for DigitsDataModule, got .*9.*parents.deep"),
        ({"parents.deep.architecture.num_classes": 11}, "number of classes, got deep: 11, shallow: 10; choose"),
        ({"parents.deep.data": {"colour": 1}}, "got .*'colour': 1.*unexpected keyword argument 'colour'"),
        ({"parents.deep.data": {"limit_train": 10**6}}, "Expected limit_train of at most"),
        ({"parents.deep.data": {"batch_size": 8}}, "Expected no batch_size in data, got one.*parents.deep"),
        ({"fusions.default.num_sample": 3}, "got experiment.fusions.default.num_sample; did you mean num_samples?"),
        ({"fusions.default.head": "z"}, "head to be 'average' or 'transport' or 'anchor', got 'z'"),
        ({"fusions.default.anchor": 2}, "Expected fusions.default to fit 2 parents, got anchor 2 and weights None"),
        ({"fusions.default.weights": [1]}, "to fit 2 parents, got anchor 0 and weights .1.0.; change them"),
        ({"fusions.default.ridge": -1.0}, "Expected a positive ridge, got -1.0 .in experiment.fusions.default"),
        ({"finetune.lr": "fast"}, "Expected experiment.finetune.lr to be a number, got 'fast'"),
        ({"finetune.networks": ["wide"]}, "experiment.finetune.networks to name one of deep; shallow; .*, got 'wide'"),
        ({"finetune.networks": ["deep", "deep"]}, "one or more different values, got .'deep', 'deep'."),
        ({"distill.students": ["fused x"]}, "experiment.distill.students to name one of deep; .*, got 'fused x'"),
        ({"distill.teachers": ["x"]}, "experiment.distill.teachers to name one of .*, got 'x'"),
        ({"distill.scratch": "x"}, "experiment.distill.scratch to name one of deep; shallow, got 'x'"),
        ({"distill.alphas": [2.0]}, r"Expected alpha in \[0, 1\], got 2.0"),
        ({"published.x": 3.0}, "experiment.published to name one of deep; shallow; ensemble; .*, got 'x'"),
        ({"small.finetune": {"epoch": 1}}, "got experiment.small.finetune.epoch; did you mean epochs?"),
        ({"small.data": 3}, "Expected experiment.small to hold changes, those of data by name"),
    ],
)  # fmt: skip
def test_experiments_that_cannot_be_are_refused(tmp_path, changes, message):
    with pytest.raises(FusionError, match=message) as refusal:
        run(tmp_path / "x", changes)
    assert "\n" not in str(refusal.value) and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": []}, "Expected seeds to be one or more different values, got"),
        ({"seeds": [1, 1]}, "Expected seeds to be one or more different values, got .1, 1."),
        ({"seeds": [-1]}, "Expected seeds of at least 0, got -1"),
        ({"max_epochs": 3}, "Expected the experiment to decide on max_epochs, got 3; leave out trainer.max_epochs"),
        ({"fast_dev_run": True}, "Expected the experiment to decide on fast_dev_run, got True"),
        ({"data": {"val_fraction": 0.0}}, "Expected validation images to choose the best epoch by, got none"),
        ({"model": ImageClassifier(lr=0.3)}, "the experiment to say what is trained and how, got --model"),
    ],
)
def test_commands_that_cannot_be_are_refused(tmp_path, arguments, message):
    with pytest.raises(FusionError, match=message):
        run(tmp_path / "x", **arguments)
    assert not (tmp_path / "x").exists()


def test_networks_that_cannot_be_fused_are_refused_before_they_are_trained(tmp_path):
    vgg = {"name": "VGG", "channels": [[4], [4]], "num_classes": 10, "in_channels": 1}
    with pytest.raises(FusionError, match=r"(deep|shallow).*\(in experiment.fusions.default\)"):
        run(tmp_path / "x", {"parents.shallow.architecture": vgg})
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"parents.deep.lr": 0.5}, {}, "train_deep to .*settings.recipe.lr 0.05 instead of 0.5; .*--output, or move"),
        ({"fusions.default.ridge": 1.0}, {}, "fuse_default .* settings.options.ridge 0.0001 instead of 1.0"),
        ({}, {"data": {"batch_size": 8}}, "settings.recipe.batch_size 16 instead of 8"),
        ({}, {"data": {"limit_train": 60}}, "data.limit_train 80 instead of 60"),
        ({}, {"precision": "bf16-mixed"}, "trainer.precision 32-true instead of bf16-mixed"),
        ({"name": "other"}, {}, "tiny to be of this experiment, got one with experiment tiny instead of other"),
    ],
)  # fmt: skip
def test_what_has_changed_is_refused_and_named(whole, changes, arguments, message):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    with pytest.raises(FusionError, match=message) as refusal:
        run(whole, changes, **arguments)
    assert "\n" not in str(refusal.value)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_more_may_be_added_to_an_experiment(done):
    before = networks(done / "seed_0")
    run(done, {"fusions.none": {"num_samples": 70, "correction": "none"}, "distill.alphas": [0.9, 0.5]})
    after = networks(done / "seed_0")
    assert differences(before, {key: after[key] for key in before}) == []
    assert {"fused none 0", "scratch T=4 alpha=0.5, distilled 0"} <= accuracies(done).keys()


def test_folders_and_files_of_others_are_refused(done, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("precious")
    with pytest.raises(FusionError, match="Expected an empty folder, or one of this experiment, got .*full with other"):
        run(tmp_path / "full")
    (tmp_path / "file").write_text("")
    with pytest.raises(FusionError, match="got .*file with other files"):
        run(tmp_path / "file")
    fused = done / "seed_0/fuse_default/fused.ckpt"
    fused.write_bytes((done / "seed_1/fuse_default/fused.ckpt").read_bytes())
    with pytest.raises(FusionError, match="Expected .*fused.ckpt as this stage wrote it, got another one; .* move"):
        run(done)
    fused.unlink()
    with pytest.raises(FusionError, match="Expected .*fused.ckpt as this stage wrote it, got none"):
        run(done)
    (fused.parent / "stage.json").write_text("{")
    with pytest.raises(FusionError, match="Expected a readable record, got .*stage.json"):
        run(done)
    (fused.parent / "stage.json").unlink()
    with pytest.raises(FusionError, match="fuse_default to be a stage's, got one without stage.json"):
        run(done)


def test_a_stage_that_is_moved_away_is_run_again_and_what_came_of_it_is_refused(done, tmp_path):
    (done / "seed_0/evaluate_deep").rename(tmp_path / "away")
    before = accuracies(done)
    run(done, seeds=[0, 1])
    assert accuracies(done) == before
    other = done / "seed_1/train_deep/best.ckpt"
    (done / "seed_0/train_deep/done.json").unlink()
    (done / "seed_0/train_deep/best.ckpt").write_bytes(other.read_bytes())
    with pytest.raises(FusionError, match="fuse_default to come from .*best.ckpt as it is, got another deep"):
        run(done)


class Bomb:
    def __init__(self, target: Path):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("unsafe", [False, True])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("last.ckpt", "pickled objects, which were not run"),
        ("best.ckpt", "best.ckpt as this stage wrote it, got another one"),
        ("hpc_ckpt_1.ckpt", "no checkpoint besides those of this stage, got .*hpc_ckpt_1.ckpt; move it away"),
    ],
)
def test_planted_checkpoints_are_not_run(done, tmp_path, monkeypatch, unsafe, name, message):
    if unsafe:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    folder = done / "seed_0/finetune_deep"
    torch.save({"state_dict": Bomb(tmp_path / "exploded")}, folder / name)
    if name != "best.ckpt":
        (folder / "done.json").unlink()
    with pytest.raises(FusionError, match=message):
        run(done)
    # Where nobody has looked before it is used, it is refused then.
    monkeypatch.setattr("clafusion.lightning_modules.experiments.jobs._check_folders", lambda *_: None)
    with pytest.raises(ExperimentFailed):
        run(done)
    assert not (tmp_path / "exploded").exists()


# --- the command line ---


def write(path: str, experiment: dict[str, Any]) -> None:
    data = {"class_path": "clafusion.datamodules.DigitsDataModule", "init_args": DATA}
    Path(path).write_text(yaml.safe_dump({"experiment": experiment, "data": data}))


def command(path: str, *more: str) -> list[str]:
    return ["pipeline", "--config", path, "--trainer.accelerator", "cpu", "--trainer.save_every_n_steps", "1", *more]


def test_the_command_line_refuses_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write("x.yaml", EXPERIMENT)
    write("typo.yaml", with_changes({"parents.deep.epoch": 3}))
    for given, message in (
        (command("typo.yaml"), "experiment.parents.deep.epoch; did you mean epochs?"),
        (command("x.yaml", "--scale", "tiny"), "scale"),
        (command("x.yaml", "--trainer.max_epochs", "1"), "leave out trainer.max_epochs"),
        (command("x.yaml", "--data", "MNISTDataModule", "--data.data_dir", "none"), "64 values, as experiment.parents"),
        (command("x.yaml", "--model.lr", "1"), "got --model; leave it out"),
        (command("x.yaml", "--trainer.strategy", "ddp_spawn", "--trainer.devices", "2"), "use ddp"),
        (["pipeline"], "experiment"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(given)
        error = capsys.readouterr().err
        assert end.value.code == 2
        assert re.fullmatch(r"clafusion: error: [^\n]+\n", error) and message in error, error
    assert {path.name for path in tmp_path.iterdir()} == {"x.yaml", "typo.yaml"}


def test_missing_data_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = ["pipeline", "--config", "configs/experiments/fashion_mlp.yaml", "--data.data_dir", "none"]
    with pytest.raises(SystemExit) as end:
        cli.main(config)
    assert end.value.code == 2 and not list(tmp_path.iterdir())
    assert re.fullmatch(r"clafusion: error: Expected .*train-images.*none.*\n", capsys.readouterr().err)


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of this Python, in a process group of its own."""
    clean = {name: v for name, v in os.environ.items() if not name.startswith(("SLURM_", "PL_", "CLAFUSION_"))}
    environment = {**clean, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=180, start_new_session=True,
    )  # fmt: skip


TWO = ["--trainer.strategy", "ddp", "--trainer.devices", "2"]
# Each process draws random numbers of its own, and to refit from few samples multiplies the rounding of the parents.
STILL = {"parents.shallow.architecture.dropout": 0.0, "fusions.default.correction": "none"}


def assert_as_on_one_process(folder: Path, whole: Path) -> None:
    found = {key: value for key, value in networks(folder).items() if "best.ckpt" in key or "fuse_" in key}
    expected = networks(whole / "seed_0")
    for key, value in found.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, expected[key], atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_two_processes_killed_and_gone_on_give_what_one_gives(tmp_path):
    write(str(tmp_path / "x.yaml"), with_changes(STILL))
    run(tmp_path / "one", STILL, data={"augment": False})
    kill = [f"--trainer.callbacks+={KillIn.__module__}.KillIn", f"--trainer.callbacks.log={tmp_path / 'log'}"]
    kill += ["--trainer.callbacks.stage=finetune_fused_default", "--trainer.callbacks.batch=6"]
    kill += ["--trainer.callbacks.group=true", "--data.augment", "false"]
    killed = launch(tmp_path, "clafusion", *command("x.yaml", *TWO, *kill))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    end = launch(tmp_path, "clafusion", *command("x.yaml", *TWO, *kill))
    assert end.returncode == 0, end.stderr
    assert f"[{STAGES}/{STAGES}] " in end.stderr and end.stderr.count("[1/") == 1
    assert_as_on_one_process(tmp_path / "runs/tiny/seed_0", tmp_path / "one")
    assert accuracies(tmp_path / "runs/tiny") == pytest.approx(accuracies(tmp_path / "one"))
    batches = Counter(line for line in (tmp_path / "log").read_text().splitlines() if "killed" not in line)
    assert set(batches.values()) == {1}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Encountered `nan` values in tensor")
def test_torchrun_gives_what_one_process_gives_and_a_failure_is_one_of_all(tmp_path):
    short = {**STILL, "distill": None, "finetune.networks": ["deep"], "finetune.lr": 1e30, "finetune.epochs": 1}
    write(str(tmp_path / "x.yaml"), with_changes(short))
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "clafusion"]
    end = launch(tmp_path, *torchrun, *command("x.yaml", *TWO, "--data.augment", "false"))
    assert end.returncode == 1, end.stderr
    failed = [line for line in end.stderr.splitlines() if line.startswith("clafusion: failed:")]
    assert len(failed) == 2 and "finetune deep, seed 0: Expected finite weights" in failed[0]
    with pytest.raises(ExperimentFailed):
        run(tmp_path / "one", short, data={"augment": False})
    for name in ("train_deep/best.ckpt", "fuse_default/fused.ckpt"):
        ours, theirs = (
            load_parent(p / "seed_0" / name).state_dict() for p in (tmp_path / "runs/tiny", tmp_path / "one")
        )
        for key, value in ours.items():
            torch.testing.assert_close(value, theirs[key], atol=1e-6, rtol=1e-5)
    found, expected = accuracies(tmp_path / "runs/tiny"), accuracies(tmp_path / "one")
    assert found.pop("deep, finetuned 0") is expected.pop("deep, finetuned 0") is None
    assert found == pytest.approx(expected)
