"""Splits: two parts that share nothing and lack nothing, saved with the run, and taken up again exactly."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning import Callback, seed_everything

from clafusion.datamodules import DigitsDataModule, MNISTDataModule, Split
from clafusion.datamodules.split import as_split
from clafusion.errors import FusionError
from clafusion.lightning_modules import FusionTrainer, ImageClassifier, read_checkpoint
from clafusion.lightning_modules.commandline import cli
from tests.data_fixtures import write_mnist

# To go on in the same folder is the point.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

KINDS: dict[str, dict[str, Any]] = {
    "personal": {"label": 4, "fraction": 0.1},
    "labels": {"labels": [0, 3, 7]},
    "size": {"fraction": 0.2},
}
CASES = [pytest.param({"kind": kind, **given}, id=kind) for kind, given in KINDS.items()]
NETWORK = {"name": "MLP", "in_features": 64, "hidden": [12], "num_classes": 10}


def ready(split: Any = None, **arguments: Any) -> DigitsDataModule:
    data = DigitsDataModule(split=split, **arguments)
    data.setup()
    return data


def images(data: DigitsDataModule, part: str = "train") -> list[bytes]:
    loader = getattr(data, f"{part}_dataloader")()
    return sorted(image.numpy().tobytes() for image in loader.dataset.images)


def classes(data: DigitsDataModule) -> list[int]:
    return data.train_dataloader().dataset.labels.bincount(minlength=10).tolist()


# --- who gets what ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=40),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 9),
    label=st.integers(0, 5),
)
def test_the_parts_are_disjoint_and_together_everything(labels, fraction, seed, label):
    given_labels = torch.tensor(labels)
    for arguments in (
        {"kind": "personal", "label": label, "fraction": fraction, "seed": seed},
        {"kind": "labels", "labels": [label, (label + 1) % 6]},
        {"kind": "size", "fraction": fraction, "seed": seed},
    ):
        a, b = (Split(part=part, **arguments).indices(given_labels).tolist() for part in "AB")
        assert sorted(a + b) == list(range(len(labels)))
        assert a == sorted(a) and b == sorted(b)


def counts(split: Split, labels: torch.Tensor) -> list[int]:
    return labels[split.indices(labels)].bincount(minlength=3).tolist()


def test_each_part_has_what_its_kind_says():
    labels = torch.tensor([0] * 20 + [1] * 30 + [2] * 5)
    assert counts(Split("personal", label=1, fraction=0.2), labels) == [4, 30, 1]
    assert counts(Split("personal", "B", label=1, fraction=0.2), labels) == [16, 0, 4]
    assert counts(Split("labels", labels=[2, 0]), labels) == [20, 0, 5]
    assert counts(Split("labels", "B", labels=[2, 0]), labels) == [0, 30, 0]
    assert counts(Split("size", fraction=0.2), labels) == [4, 6, 1]


def test_the_seed_selects_the_images():
    labels = torch.arange(100) % 4
    chosen = [Split("size", fraction=0.3, seed=seed).indices(labels).tolist() for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


@pytest.mark.parametrize("split", CASES)
@pytest.mark.parametrize("limit", [None, 300])
def test_only_the_training_images_are_shared_out(split, limit):
    whole, a, b = (ready(given, limit_train=limit) for given in (None, split, {**split, "part": "B"}))
    assert sorted(images(a) + images(b)) == images(whole)
    assert a.train_size + b.train_size == whole.train_size == (limit or whole.train_size) and a.train_size
    for part in ("val", "test"):
        assert images(a, part) == images(b, part) == images(whole, part)
    assert (a.mean, a.std) == (b.mean, b.std) == (whole.mean, whole.std)


def test_both_parts_are_normalised_with_the_same_constants():
    whole, *parts = (ready(given) for given in (None, *({"kind": "size", "fraction": 0.1, "part": p} for p in "AB")))
    raw = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8)
    assert all(torch.equal(part.preprocess(raw), whole.preprocess(raw)) for part in parts)


def test_a_personal_split_of_the_digits():
    a, b = (ready(Split("personal", part, label=4, fraction=0.1)) for part in "AB")
    assert classes(b)[4] == 0 and classes(a)[4] == max(classes(a))
    assert all(0 < ours < theirs for label, (ours, theirs) in enumerate(zip(classes(a), classes(b), strict=True))
               if label != 4)  # fmt: skip


def test_samples_to_fuse_on_are_those_of_the_part():
    part = ready({"kind": "labels", "labels": [4]})
    chosen = torch.cat(list(part.alignment_batches(50)))
    own = part.preprocess(part.train_dataloader().dataset.images)
    assert all((image == own).flatten(1).all(1).any() for image in chosen)


def test_data_modules_of_files_have_it_too(tmp_path):
    write_mnist(tmp_path)
    whole, part = (MNISTDataModule(data_dir=str(tmp_path), split=s) for s in (None, {"kind": "size", "fraction": 0.5}))
    for data in (whole, part):
        data.setup()
    assert 0 < part.train_size < whole.train_size
    assert part.hparams["split"] == {"kind": "size", "part": "A", "fraction": 0.5, "seed": 0}


# --- saved and taken up again ----------------------------------------------------------------------------------------


class Interruption(Exception):
    pass


class InterruptAt(Callback):
    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == 4:
            raise Interruption


def fit(folder: Path, split: Any, resume: bool = False, stop: bool = False, **more: Any) -> dict[str, Any]:
    seed_everything(1, verbose=False)
    trainer = FusionTrainer(
        accelerator="cpu", default_root_dir=str(folder), max_epochs=2, save_every_n_steps=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[InterruptAt()] if stop else [],
    )  # fmt: skip
    data = DigitsDataModule(batch_size=16, limit_train=200, split=split, **more)
    path = str(folder / "last.ckpt") if resume else None
    trainer.fit(ImageClassifier(NETWORK, lr=0.05), data, ckpt_path=path, weights_only=True)
    return read_checkpoint(folder / "last.ckpt")


def test_an_interrupted_training_on_a_part_goes_on_exactly(tmp_path):
    split = {"kind": "personal", "label": 4, "fraction": 0.3, "part": "B"}
    whole = fit(tmp_path / "whole", split)
    folder = tmp_path / "interrupted"
    with pytest.raises(Interruption):
        fit(folder, split, stop=True)
    for other in (None, {**split, "part": "A"}, {**split, "fraction": 0.30001}, {**split, "seed": 1}):
        with pytest.raises(FusionError, match="Expected the interrupted run to go on with split {'kind': 'personal'"):
            fit(folder, other, resume=True)
    resumed = fit(folder, Split("personal", "B", label=4, fraction=0.3), resume=True)
    assert all(torch.equal(tensor, resumed["state_dict"][name]) for name, tensor in whole["state_dict"].items())
    assert resumed["global_step"] == whole["global_step"] > 4
    assert resumed["datamodule_hyper_parameters"]["split"] == {**split, "seed": 0}
    assert resumed["DigitsDataModule"]["recipe"]["split"] == {**split, "seed": 0}

    data = DigitsDataModule.load_from_checkpoint(folder / "last.ckpt", weights_only=True)
    data.setup()
    assert images(data) == images(ready(split, limit_train=200))
    assert data.batch_size == 16 and data.split == Split("personal", "B", label=4, fraction=0.3)


def test_a_checkpoint_of_a_run_without_a_split_goes_on(tmp_path):
    """As those written before there were splits."""
    with pytest.raises(Interruption):
        fit(tmp_path, None, stop=True)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["DigitsDataModule"]["recipe"].pop("split") is None
    del saved["datamodule_hyper_parameters"]["split"]
    torch.save(saved, tmp_path / "last.ckpt")
    assert fit(tmp_path, None, resume=True)["epoch"] == 1


@pytest.mark.parametrize("split", CASES)
def test_plain_values_make_the_split_again(split):
    made = Split(**split, part="B", seed=3)
    assert as_split(json.loads(json.dumps(made.to_dict()))) == made
    assert DigitsDataModule(split=made).hparams["split"] == made.to_dict() == DigitsDataModule(
        split=made.to_dict()).hparams["split"]  # fmt: skip
    assert hash(made) == hash(as_split(made.to_dict()))


# --- on the command line ---------------------------------------------------------------------------------------------


def test_the_command_line_reads_and_saves_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("split.yaml").write_text(
        "data: {class_path: DigitsDataModule, init_args: {split: {kind: size, fraction: 0.2}}}"
    )
    shown = {}
    for name, arguments in {
        "flow": ["--data.split", "{kind: personal, label: 4, fraction: 0.1, seed: 0, part: A}"],
        "dots": ["--data.split.kind", "labels", "--data.split.labels", "[1, 2]", "--data.split.part", "B"],
        "file": ["--config", "split.yaml"],
    }.items():
        with pytest.raises(SystemExit):
            cli.main(["fit", "--data", "DigitsDataModule", *arguments, "--print_config"])
        shown[name] = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["split"]
    assert as_split(shown["flow"]) == Split("personal", label=4, fraction=0.1)
    assert as_split(shown["dots"]) == Split("labels", "B", labels=[1, 2])
    assert as_split(shown["file"]) == Split("size", fraction=0.2)

    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    fit_ = ["fit", "--model.architecture", json.dumps(NETWORK), *quiet, "--trainer.max_epochs"]
    cli.main([*fit_, "1", "--config", "split.yaml"])
    # Training goes on with the data of the checkpoint.
    cli.main([*fit_, "2", "--ckpt_path", "last"])
    after = read_checkpoint("runs/last.ckpt")
    assert after["epoch"] == 1 and after["datamodule_hyper_parameters"]["split"]["fraction"] == 0.2
    assert after["DigitsDataModule"]["recipe"]["train_size"] < 300


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("{kind: magic}", "data.split.*magic"),
        ("{kind: personal, label: 4}", "a value of fraction for a split of kind personal, got none; it is given label"),
        ("{kind: labels, labels: [3, 12]}", "labels of split in 0..9, got 12; choose classes of this data"),
        ("{kind: size, fraction: 0.1, parts: A}", "parts"),
        ("{kind: size, fraction: many}", "data.split.*many"),
        ("{fraction: 0.1}", "kind"),
    ],
)
def test_bad_splits_end_the_command_with_one_line(capsys, tmp_path, monkeypatch, split, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.main(["fit", "--model.architecture", json.dumps(NETWORK), "--data.split", split])
    error = capsys.readouterr().err
    assert end.value.code == 2 and re.fullmatch(rf"clafusion: error: [^\n]*{message}[^\n]*\n", error), error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "magic"}, "kind of split to be one of personal, labels, size, got 'magic'"),
        ({"kind": "size", "fraction": 0.1, "part": "C"}, "part of split to be one of A, B, got 'C'"),
        ({"kind": "size", "fraction": 0.0}, "fraction of split between 0 and 1, got 0.0"),
        ({"kind": "size", "fraction": 1}, "fraction of split between 0 and 1, got 1"),
        ({"kind": "size", "fraction": float("nan")}, "between 0 and 1, got nan"),
        ({"kind": "size", "fraction": 0.1, "label": 1}, "no value of label for a split of kind size, got 1"),
        ({"kind": "labels"}, "a value of labels for a split of kind labels, got none; it is given labels"),
        ({"kind": "labels", "labels": []}, r"a list of different classes, got \[\]"),
        ({"kind": "labels", "labels": [1, 1]}, r"a list of different classes, got \[1, 1\]"),
        ({"kind": "labels", "labels": "12"}, "a list of different classes, got '12'"),
        ({"kind": "labels", "labels": [1, -1]}, "each of labels of split to be an integer of at least 0, got -1"),
        ({"kind": "labels", "labels": [True]}, "each of labels of split to be an integer .* got True"),
        ({"kind": "personal", "label": 2.0, "fraction": 0.1}, "label of split to be an integer .* got 2.0"),
        ({"kind": "personal", "label": 10, "fraction": 0.1}, r"labels of split in 0\.\.9, got 10"),
        ({"kind": "size", "fraction": 0.1, "seed": -1}, "seed of split to be an integer of at least 0, got -1"),
        ({"kind": "size", "fractions": 0.1}, "a split with kind and others of kind, part, .* got"),
        ({"label": 1}, "a split with kind"),
        ("personal", "a split with kind .* got 'personal'"),
    ],
)
def test_refuses_by_name(arguments, message):
    with pytest.raises(FusionError, match=message):
        DigitsDataModule(split=arguments)


def test_a_part_without_images_is_refused():
    for split in (Split("size", fraction=0.001), Split("labels", "B", labels=list(range(10)))):
        with pytest.raises(FusionError, match=f"training images in part {split.part} of the split, got none of 60;"):
            ready(split, limit_train=60)
