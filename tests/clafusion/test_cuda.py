"""What the CPU gives, a GPU gives: fusing, its precisions, its memory, and training what was fused."""

import copy

import pytest
import torch
from pytorch_lightning import Callback, seed_everything

from clafusion import Ensemble, FusionOptions, fuse
from clafusion.datamodules import DigitsDataModule
from clafusion.datamodules.transforms import augment, normalize, pad_to_size
from clafusion.lightning_modules import FusionTrainer, ImageClassifier, load_parent
from clafusion.lightning_modules.checkpoints.reading import load_fusion
from clafusion.lightning_modules.commandline import cli
from clafusion.transport.solvers import transport_plan
from tests.helpers import CORRECTIONS, NORMED_PAIRS, UNTRAINED, largest_difference, mlp, relative_error, vectors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")

DEVICE = "cuda"


def largest_entry(difference: torch.Tensor) -> float:
    return float(difference.abs().max())


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("case", NORMED_PAIRS)
def test_fusing_gives_what_the_cpu_gives(case, correction):
    make, samples = NORMED_PAIRS[case]
    options, models = FusionOptions(correction=correction, targets="matched"), make()
    expected = fuse(models, [samples], options).model
    fusion = fuse([copy.deepcopy(model).to(DEVICE) for model in models], [samples], options)
    for network in (fusion.model, *fusion.balanced):
        assert {tensor.device.type for tensor in network.state_dict().values()} == {DEVICE}
    assert relative_error(fusion.model.cpu(), expected, samples) < 1e-6


@pytest.mark.parametrize(
    "options", [FusionOptions(), FusionOptions(teacher="gated", targets="union")], ids=["default", "union"]
)
@pytest.mark.parametrize("case", NORMED_PAIRS)
def test_choosing_neurons_and_networks_gives_what_the_cpu_gives(case, options):
    make, samples = NORMED_PAIRS[case]
    models = make()
    expected = fuse(models, [samples], options)
    found = fuse([copy.deepcopy(model).to(DEVICE) for model in models], [samples], options)
    assert found.chosen == expected.chosen
    assert found.trust == pytest.approx(expected.trust)
    assert relative_error(found.model.cpu(), expected.model, samples) < 1e-6


def test_parents_of_other_classes_are_fused_there():
    models, samples = [mlp([9, 8], 0, classes=3).to(DEVICE), mlp([9, 8], 1, classes=2).to(DEVICE)], vectors(60)
    fusion = fuse(models, [samples], classes=[["a", "b", "c"], ["d", "e"]])
    assert fusion.model(samples.to(DEVICE)).shape == (60, 5)
    ensemble = Ensemble(models, space="gated", samples=samples.to(DEVICE), classes=[[0, 1, 2], [3, 4]])
    assert ensemble(samples.to(DEVICE)).shape == (60, 5)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)], ids=str
)
@pytest.mark.parametrize("case", NORMED_PAIRS)
def test_every_precision_comes_near_double(case, dtype, tolerance):
    make, samples = NORMED_PAIRS[case]
    parents = [model.to(DEVICE, dtype) for model in make()]
    found = fuse(parents, [samples]).model
    expected = fuse([model.double() for model in parents], [samples]).model
    assert relative_error(found.double(), expected, samples.to(next(expected.parameters()))) < tolerance


def test_a_small_budget_of_memory_changes_nothing_but_rounding():
    make, samples = NORMED_PAIRS["resnet"]
    parents = [model.to(DEVICE) for model in make()]
    found, expected = (fuse(parents, [samples], FusionOptions(memory_budget=budget)).model for budget in (1, 1024))
    assert relative_error(found, expected, samples.to(next(expected.parameters()))) < 1e-9


@pytest.mark.parametrize("solver", ["sinkhorn", "unbalanced"])
@pytest.mark.parametrize("shape", [(8, 12), (300, 256)])
def test_transport_plans_are_those_of_the_cpu(solver, shape):
    cost = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = transport_plan(cost.to(DEVICE), solver)
    assert found.device.type == DEVICE
    assert (found.cpu() - transport_plan(cost, solver)).abs().max() * shape[0] < 1e-9


def test_images_are_preprocessed_as_on_the_cpu():
    def prepared(device):
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (9, 1, 28, 28), generator=generator, dtype=torch.uint8).to(device)
        return normalize(augment(pad_to_size(images, 32, 32), generator), (0.3,), (0.4,), 3).cpu()

    assert largest_entry(prepared("cpu") - prepared(DEVICE)) < 1e-6


class Batches(Callback):
    """Remembers where the images of a training are, its batches, and what dropout would have drawn."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        kept = trainer.train_dataloader.dataset.images.device.type
        self.seen.append((kept, *(tensor.cpu() for tensor in batch), torch.rand(3, device=batch[0].device).cpu()))


@pytest.mark.parametrize("workers", [0, 1])
def test_images_are_held_there_and_nothing_else_changes(tmp_path, workers):
    def batches(accelerator):
        seed_everything(3, verbose=False)
        found = Batches()
        FusionTrainer(
            accelerator=accelerator, devices=1, max_steps=3, default_root_dir=str(tmp_path), logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[found],
        ).fit(
            ImageClassifier({"name": "MLP", "in_features": 64, "hidden": [8], "num_classes": 10}),
            DigitsDataModule(augment=True, num_workers=workers),
        )  # fmt: skip
        return found.seen

    for here, there, again in zip(batches("cpu"), batches("gpu"), batches("gpu"), strict=True):
        assert (here[0], there[0]) == ("cpu", "cpu" if workers else DEVICE)
        assert largest_entry(here[1] - there[1]) < 1e-6
        assert torch.equal(here[2], there[2])
        assert torch.equal(there[3], again[3])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_command_line_fuses_and_finetunes_on_it(mlp_checkpoints, tmp_path, monkeypatch, precision):
    monkeypatch.chdir(tmp_path)
    there = ["--trainer.accelerator", "gpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"]
    parents, plain = f"[{', '.join(map(str, mlp_checkpoints))}]", ["--figures", "false", "--fusion.num_samples", "70"]
    cli.main(["fuse", "--parents", parents, "--output", "fused.ckpt", *plain, *there, *UNTRAINED])
    assert load_fusion("fused.ckpt") is not None
    quiet = ["--trainer.enable_model_summary", "false"]
    start = ["--data", "DigitsDataModule", "--ckpt_path", "fused.ckpt"]
    cli.main(["fit", *start, "--trainer.max_epochs", "1", "--trainer.precision", precision, *quiet, *there])
    finetuned = load_parent("runs/last.ckpt")
    assert largest_difference(finetuned, load_parent("fused.ckpt")) > 0
