"""The experiments that come with the package: what each file plans, and how one is named on the command line."""

import json
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from clafusion import Ensemble, FusionError, FusionOptions, average, fuse, transfer
from clafusion.datamodules import DigitsDataModule
from clafusion.lightning_modules import FusionTrainer, ImageClassifier, load_parent
from clafusion.lightning_modules.commandline import cli
from clafusion.lightning_modules.commandline.shorthand import at_scale
from clafusion.lightning_modules.experiments import catalogue
from clafusion.lightning_modules.experiments.jobs import Job
from clafusion.lightning_modules.experiments.parsing import from_plain
from clafusion.lightning_modules.experiments.pipeline import run_pipeline
from clafusion.lightning_modules.experiments.plan import KINDS, Plan, plan, stage_from
from clafusion.lightning_modules.experiments.schema import Experiment
from clafusion.lightning_modules.experiments.variants import Transfers, Variants, cells
from clafusion.networks import build
from tests.helpers import ROOT

# The folder of a stage holds its record before its checkpoints.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

# The table of published numbers (A, B), the parents in the order of the file.
PUBLISHED = {
    "mlp_ablation": [96.95, 97.75],
    "skill_transfer": [90.76, 87.58],
    "resnet34_resnet18_cifar10": [93.31, 92.92],
    "resnet34_resnet18_cifar100": [65.93, 65.33],
    "vgg_teacher_student": [92.65, 89.72],
    "resnet_teacher_student": [65.93, 61.53],
    "distill_vgg": [92.65],
    "distill_vgg_small": [92.65, 89.72],
    "distill_resnet": [65.93],
    "distill_resnet_small": [65.93, 61.53],
}
PAPER = {*PUBLISHED, "resnet_x4", "resnet_x6", "transfer_resnet18_resnet34"}
#: The parents know different things.
KNOWLEDGE = {"disjoint_classes", "label_sets", "two_domains", "small_data"}
NAMES = sorted(PAPER | KNOWLEDGE | {"digits_mlp", "fashion_mlp"})


def configuration(name: str, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    """What the command line understands."""
    with pytest.raises(SystemExit) as end:
        cli.main(["pipeline", name, *more, "--print_config"])
    assert end.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def planned(config: dict[str, Any]) -> tuple[Experiment, Plan]:
    """The experiment at the configuration's scale, with its stages; without images."""
    experiment, changes = from_plain(Experiment, config["experiment"], "experiment").at(config["scale"])
    module = cli.datamodules.__dict__[config["data"]["class_path"].rpartition(".")[2]]
    return experiment, plan(experiment, module(**{**config["data"].get("init_args", {}), **changes}))


# --- the files ---


def test_every_experiment_of_the_paper_is_there():
    assert catalogue.names() == NAMES


@cache
def at(name: str, scale: str) -> tuple[Experiment, Plan]:
    config = yaml.safe_load(catalogue.find(name).read_text())
    other = config["experiment"]["small"]["data"] if scale == "small" and name in PAPER else {}
    if other:
        config["data"] = {"class_path": other["class"], "init_args": other["init_args"]}
    return planned({"scale": scale, **config})


@pytest.mark.parametrize("name", NAMES)
def test_the_small_scale_is_planned_and_smaller(name):
    experiment, stages = at(name, "small")
    assert experiment.name == name and experiment.description and experiment.cost
    if name in PAPER:
        assert experiment.seeds == [0]
        data = yaml.safe_load(catalogue.find(name).read_text())["experiment"]["small"]["data"]
        assert data["class"] == "clafusion.datamodules.MNISTDataModule" and data["init_args"]["limit_train"] <= 10000
    recipes = [stage.settings["recipe"] for stage in stages.stages if "recipe" in stage.settings]
    assert len(recipes) <= 12 and sum(recipe["epochs"] for recipe in recipes) <= 60


@pytest.mark.parametrize("name", sorted(PAPER))
def test_the_full_scale_is_the_published_one(name):
    experiment, stages = at(name, "full")
    assert experiment.seeds == [0, 1, 2, 3, 4]
    assert list(experiment.published.values()) == PUBLISHED.get(name, [])
    assert list(experiment.published) == list(experiment.parents)[: len(experiment.published)]
    for parent in experiment.parents.values():
        network = build(parent.architecture)
        assert not any("bias" in key or "running" in key for key in network.state_dict())
    paper = [how.options for variant, how in cells(experiment.fusions).items() if variant == "paper"]
    anchored = {"anchor": 1} if "teacher" in experiment.parents else {}
    assert all(options == FusionOptions.paper(**anchored) for options in paper)
    kinds = Counter(stage.kind for stage in stages.stages)
    assert kinds["train"] == len(experiment.parents) and kinds["fuse"] == len(cells(experiment.fusions))


def test_every_stage_is_the_same_after_it_was_written():
    kinds = set()
    for name in NAMES:
        for stage in at(name, "small")[1].stages:
            record = json.loads(json.dumps(Job(stage, 0, Path("seed_0"), {"data": {}, "trainer": {}}).record))
            assert stage_from(record) == stage
            kinds.add(type(stage))
    assert kinds == set(KINDS)


def recipe_of(name: str, kind: str) -> dict[str, Any]:
    return next(stage.settings["recipe"] for stage in at(name, "full")[1].stages if stage.kind == kind)


@pytest.mark.parametrize(
    ("name", "kind", "epochs", "lr", "momentum", "decay", "batch", "rate"),
    [
        # rate: the learning rate in the last epoch, by the published schedule.
        ("mlp_ablation", "train", 10, 0.01, 0.5, 0.0, 64, 0.01),
        ("skill_transfer", "train", 10, 0.01, 0.5, 0.0, 64, 0.01),
        ("resnet34_resnet18_cifar10", "train", 300, 0.1, 0.9, 1e-4, 256, 0.1 / 100),
        ("resnet34_resnet18_cifar10", "finetune", 120, 0.02, 0.9, 1e-4, 256, 0.02 / 2**5),
        ("vgg_teacher_student", "train", 300, 0.05, 0.9, 5e-4, 128, 0.05 / 2**9),
        ("vgg_teacher_student", "finetune", 120, 0.01, 0.9, 5e-4, 128, 0.01 / 2**3),
    ],
)
def test_recipes_are_the_published_ones(name, kind, epochs, lr, momentum, decay, batch, rate):
    recipe = recipe_of(name, kind)
    assert [recipe[key] for key in ("epochs", "lr", "momentum", "weight_decay", "batch_size")] == [
        epochs, lr, momentum, decay, batch,
    ]  # fmt: skip
    passed = [milestone for milestone in recipe["milestones"] if milestone < epochs]
    assert lr * recipe["gamma"] ** len(passed) == pytest.approx(rate)


def test_grids_of_the_paper_are_whole():
    subjects = {name: [s.subject for s in at(name, "full")[1].stages] for name in ("mlp_ablation", "skill_transfer")}
    aligned = [subject for subject in subjects["mlp_ablation"] if subject.startswith("fused align ")]
    assert len(aligned) == 3 * 2 * 2 and "fused align wasserstein pin_first=0 pin_last=1" in aligned
    assert {f"fused merge {rule}" for rule in ("sum", "majority", "average")} <= set(subjects["mlp_ablation"])
    evaluated = subjects["skill_transfer"]
    assert sum(subject.startswith("ensemble") for subject in evaluated) == 11
    assert "fused paper merge weights=0.3:0.7" in evaluated and "ensemble weights=0.3:0.7" in evaluated
    distilled = [stage for stage in at("distill_vgg", "full")[1].stages if stage.kind == "distil"]
    assert len(distilled) == 4 * 5 * 6 and {stage.settings["reduction"] for stage in distilled} == {"mean"}
    assert {tuple(stage.settings["teachers"]) for stage in distilled} == {("teacher",)}


@pytest.mark.parametrize("scale", ["full", "small"])
@pytest.mark.parametrize("name", sorted(KNOWLEDGE))
def test_a_fusion_of_knowledge_stands_beside_its_controls(name, scale):
    experiment, stages = at(name, scale)
    one, other = experiment.parents
    student = "fused anchor" if name == "label_sets" else one
    assert [row.name for row in stages.contestants] == [
        *[one, other, "ensemble", "gated ensemble", "oracle gate", "joint"],
        *[f"fused {variant}" for variant in ("default", "mean", "anchor", "union")],
        *[f"{student} T=1 alpha=1{length}, distilled" for length in ("", " x4")],
    ]  # fmt: skip
    assert {row.name: row.role for row in stages.contestants}["joint"] == "control"
    options = {variant: how.options for variant, how in cells(experiment.fusions).items()}
    assert options["default"] == FusionOptions() and options["anchor"].targets == "matched"
    assert options["anchor"].anchor_lead == 1e9
    assert (options["mean"].teacher, options["mean"].targets) == ("mean", "matched")
    short, long = (stage for stage in stages.stages if stage.kind == "distil")
    assert 4 * short.recipe.epochs == long.recipe.epochs and 4 * short.recipe.milestones[0] == long.recipe.milestones[0]
    # What is distilled is what is fused, on the same images: the recipe has no data of its own.
    assert short.teacher == "auto" and short.alpha == 1 and short.recipe.data == {} and short.teachers == [one, other]


def test_who_knows_what():
    data = {name: {p: parent.data for p, parent in at(name, "full")[0].parents.items()} for name in KNOWLEDGE}
    assert [one["split"]["part"] for one in data["disjoint_classes"].values()] == ["A", "B"]
    assert [one["label_set"] for one in data["label_sets"].values()] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert [one["domain"] for one in data["two_domains"].values()] == [None, {"kind": "rotate", "degrees": 90}]
    assert [one["skip_train"] for one in data["small_data"].values()] == [2000, 4000]


def test_skills_are_shared_out():
    parts = [parent.data["split"] for parent in at("skill_transfer", "full")[0].parents.values()]
    common = {"kind": "personal", "label": 4, "fraction": 0.1}
    assert parts == [{**common, "part": "A"}, {**common, "part": "B"}]


# --- grids ---


def test_a_grid_is_a_variant_for_each_combination():
    grid = {"layer_measure": ["cka", "index"], "pin_first": [0, 1], "weights": [[0.25, 0.75]], "debiased": [False]}
    found = cells({"a": Variants(grid=grid, num_samples=7), "b": Variants(ridge=2.0)})
    assert list(found) == [
        "a cka pin_first=0 weights=0.25:0.75 debiased=false", "a cka pin_first=1 weights=0.25:0.75 debiased=false",
        "a index pin_first=0 weights=0.25:0.75 debiased=false", "a index pin_first=1 weights=0.25:0.75 debiased=false",
        "b",
    ]  # fmt: skip
    one = FusionOptions(layer_measure="index", pin_first=1, weights=[0.25, 0.75], debiased=False, num_samples=7)
    assert found["a index pin_first=1 weights=0.25:0.75 debiased=false"].options == one
    assert found["b"].options == FusionOptions(ridge=2.0)


def test_a_grid_of_transfers():
    found = cells({"t": Transfers(grid={"join": ["none", "insert"], "mapping": ["chain"]}, classifier=False)})
    assert list(found) == ["t none chain", "t insert chain"] and found["t insert chain"].how().combine == "insert"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"grid": {"pin_frist": [1]}}, "got grid.pin_frist; did you mean pin_first"),
        ({"grid": {"pin_first": []}}, "Expected grid.pin_first to be one or more different values, got"),
        ({"grid": {"pin_first": [1, 1]}}, "one or more different values, got .1, 1."),
        ({"grid": {"ridge": [1.0, -1.0]}}, "Expected a positive ridge, got -1.0"),
        ({"grid": {"grid": [{}]}}, "got one of grids"),
        ({"grid": {"mapping": "chain"}}, "e.grid.mapping to be a list, got 'chain'"),
        ({"join": "insert", "classifier": True}, "no classifier with combine insert"),
        ({"join": "melt"}, "e.join to be 'none' or .*, got 'melt'"),
    ],
)
def test_grids_that_cannot_be_are_refused(entry, message):
    with pytest.raises(FusionError, match=message):
        from_plain(Transfers, entry, "e")


def test_two_variants_of_one_name_are_refused():
    with pytest.raises(FusionError, match="Expected variants of different names, got two 'a cka'; rename a cka"):
        cells({"a": Variants(grid={"layer_measure": ["cka"]}), "a cka": Variants()})


def test_variants_are_checked_without_assertions():
    """`python -O` leaves assertions out."""
    code = (
        "from clafusion.lightning_modules.experiments.variants import Transfers, Variants\n"
        "for kind, values in ((Variants, {'ridge': -1.0}), (Transfers, {'join': 'insert', 'classifier': True})):\n"
        "    try:\n"
        "        kind(**values)\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__, error)\n"
    )
    out = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    ridge, insert = out.stdout.splitlines()
    assert ridge == "FusionError Expected a positive ridge, got -1.0"
    assert insert.startswith("FusionError Expected no classifier with combine insert")


# --- the command line ---


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(["pipeline", *arguments])
    error = capsys.readouterr().err
    assert end.value.code == 2 and re.fullmatch(r"clafusion: error: [^\n]+\n", error), error
    return error


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "got 'mlp_ablatoin'; did you mean mlp_ablation? there are digits_mlp, " in refused(capsys, "mlp_ablatoin")
    assert f"got 'zzz'; there are {', '.join(NAMES)}\n" in refused(capsys, "zzz", "--scale", "small")
    assert "got '../experiments/digits_mlp'" in refused(capsys, "../experiments/digits_mlp")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the parser's own, about values with a class
def test_a_class_in_an_experiment_is_not_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    handler = {"class_path": "logging.FileHandler", "init_args": {"filename": str(tmp_path / "made")}}
    Path("x.yaml").write_text(yaml.safe_dump({"experiment": {**TINY, "published": {"deep": handler}}}))
    assert "plain values in experiment.published.deep" in refused(capsys, "--config", "x.yaml")
    assert not (tmp_path / "made").exists()


def test_the_list_says_what_each_does_and_costs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "600")
    with pytest.raises(SystemExit) as end:
        cli.main(["pipeline", "--list"])
    assert not end.value.code
    out = capsys.readouterr().out
    for name in NAMES:
        experiment = yaml.safe_load(catalogue.find(name).read_text())["experiment"]
        [line] = [line for line in out.splitlines() if f" {name} " in line]
        assert experiment["description"] in line and experiment["cost"] in line


def test_a_name_is_found_from_any_folder_and_the_user_wins(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--scale=small", "--trainer.log_every_n_steps", "3"]
    found = configuration("skill_transfer", capsys, *small, "--data.limit_train", "77", "--seeds", "[3]")
    assert found["data"]["init_args"]["limit_train"] == 77 and found["data"]["init_args"]["variant"] == "fashion"
    assert found["seeds"] == [3] and found["trainer"]["log_every_n_steps"] == 3
    found = configuration("vgg_teacher_student", capsys, *small, "--data", "CIFARDataModule")
    assert found["data"]["class_path"] == "clafusion.datamodules.CIFARDataModule"
    assert configuration("skill_transfer", capsys)["data"]["init_args"]["variant"] == "mnist"


def test_only_the_small_scale_changes_the_class_of_the_data():
    path = str(catalogue.find("mlp_ablation"))
    for scale in (["--scale", "full"], []):
        assert at_scale(["--config", path, *scale]) == ["--config", path, *scale]
    more = ["--config", path, "--scale", "small", "--config", "other.yaml"]
    *same, data = at_scale(more)
    assert (
        same == more
        and json.loads(data.removeprefix("--data="))["class_path"] == "clafusion.datamodules.MNISTDataModule"
    )
    assert at_scale(["--config=missing.yaml", "--scale", "small"]) == [
        "--config=missing.yaml", "--scale", "small",
    ]  # fmt: skip


# --- carried out ---

MLP = {"name": "MLP", "in_features": 64, "num_classes": 10}
TINY: dict[str, Any] = {
    "name": "tiny",
    "seeds": [5],
    "parents": {
        "deep": {"architecture": {**MLP, "hidden": [12, 10, 8]}, "epochs": 1, "lr": 0.05},
        "shallow": {"architecture": {**MLP, "hidden": [12, 8]}, "epochs": 1, "lr": 0.05},
    },
    "fusions": {
        "g": {
            "correction": "none", "num_samples": 60, "balanced": False,
            "grid": {"balance": ["insert", "merge"], "weights": [[1, 0], [0.3, 0.7]]},
        }
    },
    "transfers": {
        "alone": {"grid": {"mapping": ["chain", "random"]}, "num_samples": 60},
        "joined": {"grid": {"join": ["average", "transport", "insert"]}, "correction": "none", "num_samples": 60},
        "back": {"source": "deep", "target": "shallow", "num_samples": 60},
    },
    "finetune": {"epochs": 1, "lr": 0.02, "networks": ["transferred alone chain"]},
}  # fmt: skip


def carry_out(experiment: dict[str, Any], output: Path, limit_train: int) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Run an experiment; return the folder of its only seed and the rows of its table."""
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    data = DigitsDataModule(limit_train=limit_train, batch_size=16)
    results = run_pipeline(FusionTrainer(devices=1, **quiet), ImageClassifier(), data, experiment, output=str(output))
    assert results["failures"] == []
    [seed] = results["seeds"]
    return output / f"seed_{seed}", {row["name"]: row for row in results["networks"]}


@pytest.fixture(scope="module")
def carried_out(tmp_path_factory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """A tiny experiment."""
    folder, rows = carry_out(TINY, tmp_path_factory.mktemp("experiments") / "tiny", 80)
    assert folder.name == "seed_5"
    return folder, rows


def test_the_table_names_every_cell(carried_out):
    weights = ["weights=1:0", "weights=0.3:0.7"]
    assert list(carried_out[1]) == [
        "deep", "shallow", "ensemble", "ensemble weights=0.3:0.7",
        *[f"fused g {balance} {word}" for balance in ("insert", "merge") for word in weights],
        "transferred alone chain", "transferred alone random",
        *[f"transferred joined {join}" for join in ("average", "transport", "insert")],
        "transferred back", "transferred alone chain, finetuned",
    ]  # fmt: skip


def test_cells_are_what_they_are_called(carried_out):
    folder, rows = carried_out
    deep, shallow = (load_parent(folder / f"train_{name}/best.ckpt") for name in ("deep", "shallow"))
    found = load_parent(folder / "transfer_alone_chain/transferred.ckpt").state_dict()
    expected = transfer(shallow, deep, "chain").state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    # Two layers onto three with both ends pinned: only one map is possible, and it is the one of all samples.
    data = DigitsDataModule(limit_train=80)
    moved = transfer(shallow, deep, "optimal", data.alignment_batches(60, 0))
    averaged = load_parent(folder / "transfer_joined_average/transferred.ckpt").state_dict()
    for key, tensor in average([deep, moved]).state_dict().items():
        torch.testing.assert_close(averaged[key], tensor)
    back = load_parent(folder / "transfer_back/transferred.ckpt")
    assert back.architecture == shallow.architecture
    # All the weight on the deep parent: that parent.
    assert rows["fused g insert weights=1:0"]["test_acc"] == rows["deep"]["test_acc"] == rows["ensemble"]["test_acc"]
    assert len(load_parent(folder / "fuse_g_merge_weights1-0/fused.ckpt").architecture["hidden"]) == 2
    record = json.loads((folder / "transfer_joined_insert/transfer.json").read_text())
    assert record["combine"] == "insert" and record["fusion"]["options"]["num_samples"] == 60


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "wide"}, "Expected two of deep, shallow as target and source of transfers.x, got deep and wide"),
        ({"source": "deep"}, "got deep and deep; change them"),
        ({"weights": [1, 2, 3]}, "Expected transfers.x to fit 2 parents"),
    ],
)
def test_transfers_that_cannot_be_are_refused(changes, message):
    with pytest.raises(FusionError, match=message):
        from_plain(Experiment, {**TINY, "transfers": {"x": changes}}, "experiment")


LABEL_SETS = [[0, 2, 4, 6], [1, 3, 5, 7, 8, 9]]
KNOWING: dict[str, Any] = {
    "name": "knowing",
    "parents": {
        name: {**TINY["parents"][name], "epochs": 3, "data": {"label_set": own},
               "architecture": {**TINY["parents"][name]["architecture"], "num_classes": len(own)}}
        for name, own in zip(("deep", "shallow"), LABEL_SETS, strict=True)
    },
    "controls": {"joint": {**TINY["parents"]["deep"], "data": {"limit_train": 300}}},
    "fusions": {"plain": {}, "gate": {"teacher": "gated", "num_samples": 90, "gate_temperature": 0.5}},
    "distill": {"epochs": 1, "lr": 0.02, "students": ["fused gate", "joint"], "teacher": "gated", "alphas": [1],
                "lengths": [1, 2], "milestones": [1]},
}  # fmt: skip


@pytest.fixture(scope="module")
def knowing(tmp_path_factory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """A tiny experiment whose parents know other classes."""
    folder, rows = carry_out(KNOWING, tmp_path_factory.mktemp("experiments") / "knowing", 200)
    assert folder.name == "seed_0"
    return folder, rows


def test_parents_of_other_label_sets_are_compared_on_all_classes(knowing):
    folder, rows = knowing
    assert list(rows) == [
        "deep", "shallow", "ensemble", "gated ensemble", "oracle gate", "joint", "fused plain", "fused gate",
        *[f"{student} T=4 alpha=1{x}, distilled" for student in ("fused gate", "joint") for x in ("", " x2")],
    ]  # fmt: skip
    data = DigitsDataModule(limit_train=200)
    data.setup()
    images, labels = data.preprocess(data._part("test").images), data._part("test").labels
    parents = [load_parent(folder / f"train_{name}/best.ckpt") for name in ("deep", "shallow")]
    any_right = torch.zeros(len(labels), dtype=torch.bool)
    for name, parent, own in zip(("deep", "shallow"), parents, LABEL_SETS, strict=True):
        right = torch.tensor(own)[parent(images).argmax(1)] == labels
        assert rows[name]["test_acc"] == pytest.approx(right.double().mean().item()) and right.double().mean() > 0.15
        any_right |= right
    assert rows["oracle gate"]["test_acc"] == pytest.approx(any_right.double().mean().item())
    assert rows["oracle gate"]["test_acc"] >= rows["gated ensemble"]["test_acc"]
    samples = torch.cat(list(data.alignment_batches(90, 0)))
    gated = Ensemble(parents, space="gated", samples=samples, gate_temperature=0.5, classes=LABEL_SETS)
    fused = load_parent(folder / "fuse_gate/fused.ckpt")
    for name, network in (
        ("ensemble", Ensemble(parents, classes=LABEL_SETS)), ("gated ensemble", gated), ("fused gate", fused),
    ):  # fmt: skip
        assert rows[name]["test_acc"] == pytest.approx((network(images).argmax(1) == labels).double().mean().item())
    expected = fuse(parents, [samples], cells({"gate": from_plain(Variants, KNOWING["fusions"]["gate"], "x")})["gate"]
                    .options, LABEL_SETS).model  # fmt: skip
    torch.testing.assert_close(fused(images), expected(images))


def test_controls_are_trained_and_not_fused(knowing):
    folder, rows = knowing
    described = json.loads((folder / "train_joint/stage.json").read_text())["description"]
    assert described["settings"]["recipe"]["data"] == {"limit_train": 300} and rows["joint"]["role"] == "control"
    fused = json.loads((folder / "fuse_gate/stage.json").read_text())["description"]
    assert list(fused["inputs"]) == ["deep", "shallow"] and fused["settings"]["classes"] == LABEL_SETS
    epochs = [json.loads((folder / f"distil_joint_T4_alpha1{x}/stage.json").read_text())["description"]["settings"]
              ["recipe"] for x in ("", "_x2")]  # fmt: skip
    assert [(recipe["epochs"], recipe["milestones"]) for recipe in epochs] == [(1, [1]), (2, [2])]


def test_the_gate_of_a_fusion_is_shown_once_for_each_kind():
    gated = {"teacher": "gated"}
    fusions = {"a": {}, "b": {"teacher": "auto"}, "c": {**gated, "targets": "union"},
               "d": {**gated, "gate_temperature": 0.5}, "e": {**gated, "weights": [1, 3]}}  # fmt: skip
    experiment = from_plain(Experiment, {**TINY, "fusions": fusions, "transfers": {}, "finetune": None}, "experiment")
    names = [row.name for row in plan(experiment, DigitsDataModule()).contestants]
    assert [name for name in names if "ensemble" in name] == [
        "ensemble", "ensemble weights=1:3", "gated ensemble", "gated ensemble d", "gated ensemble e",
    ]  # fmt: skip


DISTILL, JOINT = KNOWING["distill"], KNOWING["controls"]["joint"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill": {**DISTILL, "students": ["deep"]}}, "in experiment.distill.students, got 'deep' with a label_set"),
        ({"distill": {**DISTILL, "students": ["scratch"]}}, "experiment.distill.students, got 'shallow' with"),
        ({"finetune": {"epochs": 1, "lr": 0.1}}, "all classes of the data in experiment.finetune.networks, got 'deep'"),
        ({"transfers": {"x": {}}}, "all classes of the data in experiment.transfers.x, got 'shallow' with a label_set"),
        ({"distill": {**DISTILL, "lengths": [0]}}, "Expected lengths of at least 1, got 0"),
        ({"distill": {**DISTILL, "lengths": [2, 2]}}, "lengths to be one or more different values"),
        ({"distill": {**DISTILL, "gate_temperature": 0.0}}, "Expected a positive gate_temperature, got 0.0"),
        ({"distill": {**DISTILL, "teacher": "best"}}, "teacher to be 'mean' or 'gated' or 'auto', got 'best'"),
        ({"controls": {"deep": JOINT}}, "names of parents and controls to be one or more different values"),
        ({"controls": {"gated": JOINT}}, "Expected names of letters, .* got 'gated'"),
        ({"controls": {"joint": {**JOINT, "architecture": {"name": "MLP"}}}}, "in experiment.controls.joint.arch"),
        ({"parents": {name: {**parent, "data": {"label_set": [0, 1, 2, 3]}, "architecture":
                             {**parent["architecture"], "num_classes": 4}}
                      for name, parent in KNOWING["parents"].items()}}, "for every class of the data, got none for 4"),
    ],
)  # fmt: skip
def test_what_nobody_knows_is_refused_before_training(changes, message):
    with pytest.raises(FusionError, match=message):
        plan(from_plain(Experiment, {**KNOWING, **changes}, "experiment"), DigitsDataModule())


def test_networks_that_do_not_correspond_are_refused_before_training():
    vgg = {"name": "VGG", "channels": [[4], [4]], "num_classes": 10, "in_channels": 1}
    parents = {**TINY["parents"], "shallow": {**TINY["parents"]["shallow"], "architecture": vgg}}
    experiment = from_plain(Experiment, {**TINY, "parents": parents, "fusions": {}}, "experiment")
    with pytest.raises(FusionError, match="stage.*in experiment.transfers.alone chain"):
        plan(experiment, DigitsDataModule())
