"""FusionCallback on LightningModules and data of other people, and `fuse` of their checkpoints."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import clafusion
from clafusion import FusionError, FusionOptions, fuse
from clafusion.callbacks import FusionCallback
from clafusion.lightning_modules import ImageClassifier, load_parent
from clafusion.lightning_modules.commandline import cli
from clafusion.lightning_modules.placing import find_network
from tests.helpers import ROOT

OPTIONS = FusionOptions(num_samples=60)
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def layers(sizes) -> nn.Sequential:
    pairs = zip(sizes, sizes[1:], strict=False)
    return nn.Sequential(*(layer for one, two in pairs for layer in (nn.Linear(one, two), nn.ReLU())))


class Net(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.body, self.head = layers([6, *hidden]), nn.Linear(hidden[-1], 3)

    def forward(self, x):
        return self.head(self.body(x))


class Trained(LightningModule):
    """What all modules here have in common: a loss with a buffer, a metric, an optimizer of their own."""

    def __init__(self):
        super().__init__()
        self.loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
        self.accuracy = MulticlassAccuracy(3)

    def training_step(self, batch, batch_idx):
        logits = self.logits(batch["x"])
        self.accuracy(logits, batch["label"])
        return self.loss(logits, batch["label"])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.hparams.lr)


class Inside(Trained):
    """Its network is one of its children."""

    def __init__(self, hidden=(5, 4), lr=0.01):
        super().__init__()
        self.save_hyperparameters()
        self.net = Net(hidden)

    def logits(self, x):
        return self.net(x)


class Itself(Trained):
    """It is a network itself."""

    def __init__(self, hidden=(5, 4), lr=0.01):
        super().__init__()
        self.save_hyperparameters()
        self.body, self.head = layers([6, *hidden]), nn.Linear(hidden[-1], 3)

    def forward(self, x):
        return self.head(self.body(x))

    def logits(self, x):
        return self(x)


class Two(Trained):
    """Two networks, and no forward that would say which is meant."""

    def __init__(self, hidden=(5, 4), lr=0.01):
        super().__init__()
        self.save_hyperparameters()
        self.student, self.teacher = Net(hidden), Net(hidden)

    def logits(self, x):
        return self.student(x)


class Pairs(torch.utils.data.Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(5)
        self.x, self.label = torch.randn(60, 6, generator=generator), torch.arange(60) % 3

    def __len__(self):
        return 60

    def __getitem__(self, number):
        return {"x": self.x[number], "label": self.label[number]}


class Data(LightningDataModule):
    """Batches are dicts; the network gets them doubled and shifted."""

    def setup(self, stage):
        self.pairs = Pairs()

    def train_dataloader(self):
        return DataLoader(self.pairs, batch_size=20)

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return {**batch, "x": batch["x"] * 2}

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {**batch, "x": batch["x"] + 1}


def samples() -> list[torch.Tensor]:
    """What the network gets of `Data`."""
    return [batch["x"] * 2 + 1 for batch in DataLoader(Pairs(), batch_size=20)]


def modules(kind=Inside) -> list[LightningModule]:
    """A deeper and a shallower parent."""
    torch.manual_seed(1)
    return [kind([6, 5, 4]), kind([5, 4])]


def network_of(module):
    return module.net if isinstance(module, Inside) else module


class AtStart(Callback):
    def on_train_start(self, trainer, pl_module):
        self.logits = logits_of(pl_module)


def logits_of(module):
    """The logits in evaluation; the module is as before."""
    was = module.training
    with torch.no_grad():
        found = module.eval().logits(samples()[0])
    module.train(was)
    return found


def fit(module, parents, *, epochs=1, data=None, more=(), callback=None, **arguments) -> Trainer:
    torch.manual_seed(0)
    callback = callback or FusionCallback(parents, OPTIONS)
    trainer = Trainer(max_epochs=epochs, callbacks=[callback, *more], enable_checkpointing=False, **QUIET)
    trainer.fit(module, data or Data(), **arguments)
    return trainer


def saved(kind, folder: Path) -> list[str]:
    """Checkpoints of the parents, as Lightning writes them."""
    paths = [str(folder / "deep.ckpt"), str(folder / "shallow.ckpt")]
    for module, path in zip(modules(kind), paths, strict=True):
        trainer = Trainer(max_epochs=0, enable_checkpointing=False, **QUIET)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(path)
    return paths


# --- what is fused ---


@pytest.mark.parametrize("kind", [Inside, Itself])
@pytest.mark.parametrize("given", ["files", "modules"])
def test_the_result_is_that_of_fuse_by_hand(tmp_path, kind, given):
    parents = modules(kind)
    before = [{name: tensor.clone() for name, tensor in parent.state_dict().items()} for parent in parents]
    start, module = AtStart(), kind()
    fit(module, saved(kind, tmp_path) if given == "files" else parents, more=[start])
    with torch.no_grad():
        expected = fuse([network_of(parent) for parent in parents], samples(), OPTIONS).model(samples()[0])
    assert torch.allclose(start.logits, expected, atol=1e-6)
    assert not torch.allclose(logits_of(module), expected, atol=1e-4)  # it has learned since
    for parent, state in zip(parents, before, strict=True):
        assert all(torch.equal(state[name], tensor) for name, tensor in parent.state_dict().items())


def test_networks_of_other_files_and_classes_are_parents_too(tmp_path):
    deep, shallow = (module.net for module in modules())
    clafusion.save_network(deep, tmp_path / "deep.safetensors", torch.zeros(2, 6))
    start = AtStart()
    fit(Inside(), [tmp_path / "deep.safetensors", shallow], more=[start])
    with torch.no_grad():
        expected = fuse([deep, shallow], samples(), OPTIONS).model(samples()[0])
    assert torch.allclose(start.logits, expected, atol=1e-6)


class WithData(Inside):
    """It brings its own data, and takes several loaders at once."""

    loader = None

    def train_dataloader(self):
        return self.loader

    def training_step(self, batch, batch_idx):
        return super().training_step(batch.get("one", batch), batch_idx)


def shuffled() -> DataLoader:
    return DataLoader(Pairs(), batch_size=20, shuffle=True, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("given", ["a loader", "loaders", "the module"])
def test_data_comes_from_whatever_fit_was_given(given):
    module, start, loader, once = WithData(), AtStart(), shuffled(), shuffled()
    module.loader = loader if given == "the module" else None
    inputs = (lambda batch: batch["one"]["x"]) if given == "loaders" else None
    callback = FusionCallback(modules(), OPTIONS, inputs=inputs)
    trainer = Trainer(max_epochs=1, callbacks=[callback, start], enable_checkpointing=False, **QUIET)
    trainer.fit(module, {"a loader": loader, "loaders": {"one": loader}, "the module": None}[given])
    drawn = [batch["x"] for batch in once]
    with torch.no_grad():
        expected = fuse([one.net for one in modules()], drawn, OPTIONS).model(samples()[0])
    assert torch.allclose(start.logits, expected, atol=1e-5)
    # Fusing has left no trace: the loader has drawn as in a training that fuses nothing.
    untouched = shuffled()
    Trainer(max_epochs=1, enable_checkpointing=False, **QUIET).fit(WithData(), untouched)
    assert torch.equal(loader.generator.get_state(), untouched.generator.get_state())


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_an_image_classifier_takes_any_data_too(mlp_checkpoints):
    images = TensorDataset(torch.randn(80, 1, 8, 8), torch.arange(80) % 10)
    module = ImageClassifier(lr=0.0)
    trainer = Trainer(
        max_epochs=1,
        callbacks=[FusionCallback([str(path) for path in mlp_checkpoints], FusionOptions(num_samples=80))],
        enable_checkpointing=False, **QUIET,
    )  # fmt: skip
    trainer.fit(module, DataLoader(images, batch_size=40))
    parents = [load_parent(path) for path in mlp_checkpoints]
    expected = fuse(parents, DataLoader(images, batch_size=40), FusionOptions(num_samples=80)).model
    for name, tensor in expected.state_dict().items():
        assert torch.allclose(module.network.state_dict()[name], tensor, atol=1e-6)
    assert "networks" not in module.fusion


# --- resuming and loading ---


@pytest.mark.parametrize("kind", [Inside, Itself])
def test_a_resumed_training_equals_one_without_a_stop(tmp_path, monkeypatch, kind):
    whole = kind()
    fit(whole, modules(kind), epochs=2)
    fit(kind(), modules(kind)).save_checkpoint(tmp_path / "one.ckpt")
    monkeypatch.setattr(FusionCallback, "_fuse", None)
    # Whatever the module was made with.
    resumed, callback = kind(hidden=[2]), FusionCallback(modules(kind), OPTIONS)
    trainer = fit(resumed, None, epochs=2, callback=callback, ckpt_path=str(tmp_path / "one.ckpt"))
    assert trainer.current_epoch == 2 and [one["path"] for one in callback.record["parents"]] == [kind.__name__] * 2
    assert [one["name"] for one in callback.record["parents"]] == [kind.__name__, f"{kind.__name__} (2)"]
    ours, theirs = resumed.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(ours["loss.weight"], torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("kind", [Inside, Itself])
def test_the_checkpoint_alone_makes_the_module_again(tmp_path, kind):
    module = kind()
    # Without the states of callbacks, as ModelCheckpoint(save_weights_only=True) writes it.
    fit(module, modules(kind)).save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    again = clafusion.load_from(tmp_path / "a.ckpt", kind, lr=0.5)
    assert type(again) is kind and again.training and again.hparams.lr == 0.5
    assert torch.equal(logits_of(again), logits_of(module))
    # A later training, without the callback, writes checkpoints of the same form.
    trainer = Trainer(max_epochs=1, enable_checkpointing=False, **QUIET)
    trainer.fit(again, Data())
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    assert torch.equal(logits_of(clafusion.load_from(tmp_path / "b.ckpt", kind)), logits_of(again))


def test_a_second_fit_goes_on_with_the_fused_network():
    module, callback = Inside(), FusionCallback(modules(), OPTIONS)
    fit(module, None, callback=callback)
    after, start = logits_of(module), AtStart()
    fit(module, None, callback=callback, more=[start])
    assert torch.equal(start.logits, after)


def test_a_resumed_training_can_be_trained_on(tmp_path):
    fit(Inside(), modules()).save_checkpoint(tmp_path / "one.ckpt")
    module, callback, start = Inside(), FusionCallback(modules(), OPTIONS), AtStart()
    fit(module, None, epochs=2, callback=callback, ckpt_path=str(tmp_path / "one.ckpt"))
    after = logits_of(module)
    fit(module, None, callback=callback, more=[start])
    assert torch.equal(start.logits, after)


def test_a_checkpoint_without_a_fused_network_is_loaded_as_it_is(tmp_path):
    deep, _ = saved(Inside, tmp_path)
    assert torch.equal(logits_of(clafusion.load_from(deep, Inside)), logits_of(modules()[0]))


def test_loading_imports_lightning_only_when_it_is_called():
    code = "import sys, clafusion; clafusion.load_from; print('pytorch_lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "False\n"


# --- what is refused ---


def test_which_network_is_meant():
    assert [find_network(one) for one in (Inside(), Itself(), ImageClassifier())] == ["net", "", "network"]
    assert find_network(Two(), "student.body") == "student.body"
    with pytest.raises(FusionError, match="Expected one network in Two, got 'student' or 'teacher'; name it with"):
        find_network(Two())
    with pytest.raises(FusionError, match="Expected a network at 'nett' of Inside, got none; its children are: loss"):
        find_network(Inside(), "nett")


def test_unusable_input_is_refused_in_one_line(tmp_path):
    class Other(Trained):
        def __init__(self, depth):
            super().__init__()
            self.save_hyperparameters()
            self.net = Net([5] * depth)

    class Words(Data):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return {"words": ["a"]}

    deep, shallow = saved(Inside, tmp_path)
    bomb = tmp_path / "bomb.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {"hidden": Path}}, bomb)
    for module, parents, data, message in (
        (Two(), modules(Two), None, "Expected one network in Two"),
        (Inside(), [deep, Itself()], None, "Expected parents of Inside, got Itself"),
        (Itself(), [deep, shallow], None, "Expected a checkpoint of Itself, got .*deep.ckpt, whose weights are others"),
        (Other(1), [deep, shallow], None, "Expected a checkpoint with the arguments of Other, got .*deep.ckpt"),
        (Inside(), [deep, str(bomb)], None, "Expected only tensors and plain values in .*bomb.ckpt"),
        (Inside(), [deep, "none.ckpt"], None, "Expected a checkpoint, got none.ckpt, which is no file"),
        (Inside(), [deep, shallow], Words(), "Expected batches .*, got dict with 'words'; say with `inputs`"),
    ):
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        with pytest.raises(FusionError, match=message) as refused:
            fit(module, parents, data=data)
        assert "\n" not in str(refused.value)
        assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_a_module_that_makes_its_network_in_setup_is_refused():
    class Late(Inside):
        def setup(self, stage):
            self.net = Net([3])

    with pytest.raises(FusionError, match="what replaces the fused network in setup or configure_model"):
        fit(Late(), modules())


# --- the command line ---

COMMAND = ["--trainer.accelerator", "cpu", "--fusion.num_samples", "60", "--quiet"]


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A folder with the user's own package in it."""
    source = Path(__file__).read_text().partition("\ndef samples()")[0]
    (tmp_path / "my_package.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    yield tmp_path
    sys.modules.pop("my_package", None)


def test_fuse_takes_checkpoints_of_ones_own_class(own_module):
    deep, shallow = saved(Inside, own_module)
    classes = ["--module", "my_package.Inside", "--data", "my_package.Data"]
    cli.main(["fuse", deep, shallow, *classes, *COMMAND, "-o", "fused.ckpt"])
    module = clafusion.load_from("fused.ckpt", Inside)
    with torch.no_grad():
        expected = fuse([one.net for one in modules()], samples(), OPTIONS).model(samples()[0])
    assert torch.allclose(logits_of(module), expected, atol=1e-6)
    assert {path.name for path in own_module.iterdir()} >= {"fused.ckpt", "fused.json", "fused.html"}


#: A user's script, which trains with a learning rate of zero.
SCRIPT = """
import torch
from pytorch_lightning import Trainer
from my_package import OPTIONS, QUIET, Data, Inside
from clafusion.callbacks import FusionCallback

if __name__ == "__main__":
    callback = FusionCallback(["deep.ckpt", "shallow.ckpt"], OPTIONS)
    more = {"strategy": "ddp", "devices": 2, "enable_checkpointing": False, **QUIET}
    trainer = Trainer(max_epochs=1, callbacks=[callback], **more)
    trainer.fit(Inside(lr=0.0), Data())
    trainer.save_checkpoint("trained.ckpt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]])
def test_two_processes_fuse_as_one(own_module, launcher):
    saved(Inside, own_module)
    Path("script.py").write_text(SCRIPT)
    paths = os.pathsep.join([str(own_module), str(ROOT)])
    end = subprocess.run(
        [sys.executable, "-W", "ignore", *launcher, "script.py"], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert end.returncode == 0, end.stderr
    alone = Inside(lr=0.0)
    fit(alone, ["deep.ckpt", "shallow.ckpt"])
    ours, theirs = clafusion.load_from("trained.ckpt", Inside).net.state_dict(), alone.net.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_fuse_refuses_what_it_cannot_use(own_module, capsys):
    deep, shallow = saved(Inside, own_module)
    own, data = ["--module", "my_package.Inside"], ["--data", "my_package.Data"]
    for given, message in (
        (["--module", "my_package.Nothing", *data], "Expected package.Class for --module, got my_package.Nothing"),
        (["--module", "torch.nn.Linear", *data], "Expected a LightningModule for --module, got torch.nn.Linear"),
        (data, "Expected an image data module to fuse on, got Data; name the class of the parents by --module"),
        ([*own, *data, "--align_only"], "leave one of them out"),
        ([*own, *data, "--network", "nett"], "Expected a network at 'nett' of Inside"),
        ([*own, *data, "--inputs", "label"], "Expected batches of samples"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(["fuse", deep, shallow, *given, *COMMAND, "-o", "fused.ckpt"])
        error = capsys.readouterr().err
        assert end.value.code == 2 and re.fullmatch(r"clafusion: error: [^\n]+\n", error) and message in error, error
    assert not (own_module / "fused.ckpt").exists()
