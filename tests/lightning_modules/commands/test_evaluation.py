"""Networks side by side, and what is refused before anything is computed with it."""

import pytest
import torch
from torch import Tensor, nn

from clafusion import FusionError, FusionOptions, fuse, load_network, save_network
from clafusion.datamodules import DigitsDataModule
from clafusion.lightning_modules import ImageClassifier
from clafusion.lightning_modules.commands import fuse as command
from clafusion.lightning_modules.commands.evaluation import controls
from tests.lightning_modules.normed import Normed

SAMPLES = torch.randn(30, 1, 8, 8, generator=torch.Generator().manual_seed(0))
OPTIONS = FusionOptions(num_samples=30, correction="none")


def stored(network: nn.Module, path: str) -> nn.Module:
    save_network(network, path, SAMPLES[:2])
    return load_network(path)


def test_a_balanced_network_that_cannot_be_built_is_left_out_with_a_line(tmp_path):
    deep, narrow = (
        stored(Normed(depth, width).eval(), str(tmp_path / f"{depth}")) for depth, width in ((3, 12), (2, 8))
    )
    with pytest.warns(UserWarning, match=r"^balanced b is left out: Expected StoredNetwork to run at other widths"):
        found = controls({"a": deep, "b": narrow}, fuse([deep, narrow], [SAMPLES], OPTIONS))
    assert list(found) == ["ensemble"]
    alike = stored(Normed(2, 12).eval(), str(tmp_path / "alike"))
    found = controls({"a": deep, "b": alike}, fuse([deep, alike], [SAMPLES], OPTIONS))
    assert list(found) == ["ensemble", "balanced b"]


@torch.library.custom_op("clafusion_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return x * 2


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Own(Normed):
    """Uses an operation that nobody else has."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(doubled(x))


class NoSamples:
    image_shape, num_classes = (1, 8, 8), 10

    def alignment_batches(self, num_samples: int, seed: int) -> list[Tensor]:
        raise AssertionError("too late")


def test_what_could_not_be_saved_is_refused_before_any_work(monkeypatch):
    parents = [Normed(2, 8).eval(), Own(2, 8).eval()]
    monkeypatch.setattr(command, "load_parents", lambda *given: (parents, None))
    with pytest.raises(FusionError, match=r"got clafusion_tests.doubled.default .*\(in b.ckpt\)$"):
        command.fuse_and_record(["a.ckpt", "b.ckpt"], NoSamples(), OPTIONS, torch.device("cpu"))


def test_a_network_of_a_class_of_its_own_is_described_for_the_images_of_the_data():
    arguments = {"class_path": f"{Normed.__module__}.Normed", "init_args": {"depth": 1, "width": 6}}
    classifier = ImageClassifier(arguments)
    assert classifier.hparams["architecture"]["input"] == [64]
    classifier.describe_for(DigitsDataModule().image_shape)
    again = classifier.hparams["architecture"]
    assert again["input"] == [1, 8, 8]
    classifier.describe_for((1, 8, 8))
    assert classifier.hparams["architecture"] is again
