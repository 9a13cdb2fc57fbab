"""What the CPU gives, a GPU gives: fusing, its precisions, its memory, and training what was fused."""

import copy

import pytest
import torch

import cli
from clafusion import FusionOptions, fuse
from clafusion.statistics import as_input
from lightning_modules import load_parent
from lightning_modules.checkpoints import load_fusion
from tests.helpers import CORRECTIONS, NORMED_PAIRS, largest_difference, relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")

DEVICE = "cuda"


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("case", NORMED_PAIRS)
def test_fusing_gives_what_the_cpu_gives(case, correction):
    make, samples = NORMED_PAIRS[case]
    options, models = FusionOptions(correction=correction), make()
    expected = fuse(models, [samples], options).model
    fusion = fuse([copy.deepcopy(model).to(DEVICE) for model in models], [samples], options)
    for network in (fusion.model, *fusion.balanced):
        assert {tensor.device.type for tensor in network.state_dict().values()} == {DEVICE}
    assert relative_error(fusion.model.cpu(), expected, samples) < 1e-6


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)], ids=str
)
@pytest.mark.parametrize("case", NORMED_PAIRS)
def test_every_precision_comes_near_double(case, dtype, tolerance):
    make, samples = NORMED_PAIRS[case]
    parents = [model.to(DEVICE, dtype) for model in make()]
    found = fuse(parents, [samples]).model
    expected = fuse([model.double() for model in parents], [samples]).model
    assert relative_error(found.double(), expected, as_input(samples, expected)) < tolerance


def test_a_small_budget_of_memory_changes_nothing_but_rounding():
    make, samples = NORMED_PAIRS["resnet"]
    parents = [model.to(DEVICE) for model in make()]
    found, expected = (fuse(parents, [samples], FusionOptions(memory_budget=budget)).model for budget in (1, 1024))
    assert relative_error(found, expected, as_input(samples, expected)) < 1e-9


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_command_line_fuses_and_finetunes_on_it(mlp_checkpoints, tmp_path, monkeypatch, precision):
    monkeypatch.chdir(tmp_path)
    there = ["--trainer.accelerator", "gpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"]
    parents = f"[{', '.join(map(str, mlp_checkpoints))}]"
    cli.main(["fuse", "--parents", parents, "--output", "fused.ckpt", "--fusion.num_samples", "70", *there])
    assert load_fusion("fused.ckpt") is not None
    quiet = ["--trainer.enable_model_summary", "false"]
    start = ["--data", "DigitsDataModule", "--ckpt_path", "fused.ckpt"]
    cli.main(["fit", *start, "--trainer.max_epochs", "1", "--trainer.precision", precision, *quiet, *there])
    finetuned = load_parent("runs/last.ckpt")
    assert largest_difference(finetuned, load_parent("fused.ckpt")) > 0
