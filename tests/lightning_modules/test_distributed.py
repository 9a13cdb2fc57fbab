"""Several processes: every image is evaluated once, and training shares one order."""

import re
import signal

import pytest
import torch

from clafusion import FusionError
from clafusion.datamodules import DigitsDataModule
from clafusion.datamodules.samplers import EpochSampler, ShardSampler
from clafusion.lightning_modules import ImageClassifier, read_checkpoint, save_checkpoint
from tests.processes import clafusion, succeed

TWO = ["--config", "configs/trainer/ddp.yaml"]
QUIET = [
    *["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"],
    *["--trainer.enable_model_summary", "false"],
]


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 7, 16, 100])
@pytest.mark.parametrize("size", [5, 6, 32, 33, 34])
def test_each_sample_is_evaluated_once_in_as_many_batches_on_each_rank(size, batch_size, processes):
    shards = [list(ShardSampler(size, batch_size, rank, processes)) for rank in range(processes)]
    assert sorted(index for shard in shards for batch in shard for index in batch) == list(range(size))
    assert len({len(shard) for shard in shards}) == 1 == len({len(ShardSampler(size, batch_size, 0, processes))})
    sizes = {len(batch) for shard in shards for batch in shard}
    assert min(sizes) > 0 and max(sizes) <= max(batch_size, 2) and max(sizes) - min(sizes) <= 2


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_training_shares_one_order_and_no_image_is_seen_twice(processes):
    whole = list(EpochSampler(33, seed=1))
    shards = [list(EpochSampler(33, 1, rank, processes)) for rank in range(processes)]
    assert {len(shard) for shard in shards} == {33 // processes} == {len(EpochSampler(33, 1, 0, processes))}
    # What the ranks see together in a step is what one process sees with as many times the batch size.
    together = [index for indices in zip(*shards, strict=True) for index in indices]
    assert together == whole[: 33 // processes * processes]


def test_another_image_is_left_out_in_each_epoch():
    left_out = set()
    for epoch in range(8):
        seen = {index for rank in (0, 1) for index in EpochSampler(5, 1, rank, 2, epoch)}
        left_out |= set(range(5)) - seen
    assert len(left_out) > 2


def test_a_sampler_goes_on_in_its_epoch_and_the_next_one_is_whole():
    sampler, whole = EpochSampler(33, 1, 1, 2, epoch=3, skip=6), EpochSampler(33, 1, 1, 2, epoch=3)
    sampler.set_epoch(3)
    assert list(sampler) == list(whole)[6:] and len(sampler) == len(whole) == 16
    for each in (sampler, whole):
        each.set_epoch(4)
    assert list(sampler) == list(whole) and len(list(whole)) == 16


def test_more_processes_than_images_are_refused():
    with pytest.raises(FusionError, match="a training image for each of the 3 processes, got 2; use fewer processes"):
        EpochSampler(2, 0, 0, 3)
    with pytest.raises(FusionError, match="a val image for each of the 3 processes, got 2; use fewer processes"):
        ShardSampler(2, 8, 0, 3, "val")


def test_lightning_leaves_these_samplers_in_their_place(tmp_path):
    from pytorch_lightning import Trainer

    data = DigitsDataModule()
    data.setup()
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, default_root_dir=tmp_path)
    connector = trainer._data_connector
    loader = data._loader("test", None, ShardSampler(data.test_size, 100, 0, 2))
    assert not connector._requires_distributed_sampler(loader)
    assert not connector._requires_distributed_sampler(data.train_dataloader())
    assert connector._requires_distributed_sampler(data.test_dataloader())


@pytest.mark.slow
def test_the_accuracy_on_33_images_is_the_same_on_2_processes(tmp_path):
    (tmp_path / "few.py").write_text(
        "from clafusion.datamodules import DigitsDataModule\n"
        "class Few(DigitsDataModule):\n"
        "    def read(self):\n"
        "        train, test = super().read()\n"
        "        return train, test.subset(__import__('torch').arange(33))\n"
    )
    torch.manual_seed(0)
    network = {"name": "MLP", "in_features": 64, "hidden": [16], "num_classes": 10, "batch_norm": True}
    save_checkpoint(ImageClassifier(network), tmp_path / "x.ckpt")
    command = ["test", "--ckpt_path", "x.ckpt", "--data", "few.Few", "--data.eval_batch_size", "8", *QUIET]
    one, two = (
        re.findall(r"test_(acc|loss)\s*│\s*([\d.e-]+)", succeed(tmp_path, *command, *more)) for more in ([], TWO)
    )
    assert dict(one)["acc"] == dict(two)["acc"]
    assert float(dict(one)["loss"]) == pytest.approx(float(dict(two)["loss"]), rel=1e-6)


FIT = ["fit", "--data", "DigitsDataModule", "--data.limit_train", "100", "--trainer.max_epochs", "2", *QUIET]


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch_size(tmp_path):
    network = ["--model.architecture", "{name: MLP, in_features: 64, hidden: [16], num_classes: 10}"]
    for batch_size, more in ((20, []), (10, TWO)):
        root = ["--trainer.default_root_dir", str(batch_size), "--data.batch_size", str(batch_size)]
        succeed(tmp_path, *FIT, *network, *root, *more)
    one, two = (read_checkpoint(tmp_path / name / "last.ckpt") for name in ("20", "10"))
    assert one["global_step"] == two["global_step"] == 10
    for name, tensor in one["state_dict"].items():
        assert torch.allclose(tensor, two["state_dict"][name], atol=1e-6), name


@pytest.mark.slow
def test_validation_ends_although_the_ranks_have_different_shares(tmp_path):
    """33 images, 17 of them on one rank: in batches of 16 it would need one more, and DDP would wait for the other."""
    data = DigitsDataModule(val_fraction=0.024)
    data.setup()
    assert data.val_size == 33
    network = "{name: MLP, in_features: 64, hidden: [16], num_classes: 10, batch_norm: true}"
    more = ["--model.architecture", network, "--data.val_fraction", "0.024", "--data.eval_batch_size", "16", *TWO]
    succeed(tmp_path, *FIT, *more)
    assert read_checkpoint(tmp_path / "runs" / "best.ckpt")["global_step"] > 0


@pytest.mark.slow
def test_the_options_for_speed_go_together_with_fusing_two_processes_and_a_kill(tmp_path):
    """All but `compile`, which would take a C++ compiler and minutes here."""
    resnet = {"name": "ResNet", "width": 8, "num_classes": 10, "in_channels": 1}
    for name, blocks in {"a": [2, 1], "b": [1, 1]}.items():
        save_checkpoint(ImageClassifier({**resnet, "blocks": blocks}), tmp_path / f"{name}.ckpt")
    command = [*FIT, *TWO, "--data.batch_size", "10", "--trainer.precision", "bf16-mixed"]
    command += ["--model.fused", "true", "--model.channels_last", "true"]
    command += ["--trainer.callbacks+=FusionCallback", "--trainer.callbacks.parents=[a.ckpt, b.ckpt]"]
    killed = ["--trainer.callbacks+=processes.KillAt", "--trainer.callbacks.batches=[7]"]
    killed += [f"--trainer.callbacks.folder={tmp_path}", "--trainer.default_root_dir", "killed", "--ckpt_path", "last"]
    assert clafusion(tmp_path, *command, *killed).returncode == -signal.SIGKILL
    succeed(tmp_path, *command, *killed)
    succeed(tmp_path, *command, "--trainer.default_root_dir", "whole")
    whole, resumed = (read_checkpoint(tmp_path / name / "last.ckpt") for name in ("whole", "killed"))
    assert whole["global_step"] == resumed["global_step"] == 10
    assert whole["optimizer_states"][0]["param_groups"][0]["fused"]
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name]), name
