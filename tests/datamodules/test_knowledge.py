"""Data for parents that know different things: label sets of their own, other domains, images that nobody else has."""

import json
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from clafusion.datamodules import CIFARDataModule, DigitsDataModule, Domain, ImageDataModule
from clafusion.datamodules.domain import as_domain
from clafusion.datamodules.image_set import ImageSet
from clafusion.errors import FusionError
from clafusion.lightning_modules.commandline import cli
from tests.data_fixtures import write_cifar

PARTS = ("train", "val", "test")
HALF = {"kind": "rotate", "degrees": 90, "share": 0.5}


def ready(**arguments: Any) -> DigitsDataModule:
    data = DigitsDataModule(**arguments)
    data.setup()
    return data


def keys(images: Tensor) -> list[bytes]:
    return [image.numpy().tobytes() for image in images]


def same(images: Tensor, others: Tensor) -> Tensor:
    return (images == others).flatten(1).all(1)


# --- label sets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
def test_a_label_set_keeps_its_classes_and_numbers_them_in_its_order(part):
    whole, own = ready()._part(part), ready(label_set=[7, 2])
    chosen = torch.isin(whole.labels, torch.tensor([2, 7]))
    assert torch.equal(own._part(part).images, whole.images[chosen])
    assert own._part(part).labels.tolist() == [[7, 2].index(label) for label in whole.labels[chosen].tolist()]
    assert own.num_classes == 2 and ready().num_classes == 10


def test_limits_and_splits_count_what_is_left_of_a_label_set():
    own = ready(label_set=[7, 2], limit_train=30, split={"kind": "labels", "labels": [1]})
    assert set(own._part("train").labels.tolist()) == {1} and own.train_size < 30
    with pytest.raises(FusionError, match=r"Expected labels of split in 0\.\.1, got 2; choose classes of this data"):
        DigitsDataModule(label_set=[7, 2], split={"kind": "labels", "labels": [2]})


def test_files_are_read_as_before(tmp_path):
    write_cifar(tmp_path, per_batch=20, test=10)
    data = CIFARDataModule(10, data_dir=str(tmp_path), label_set=[0, 1, 2, 3, 4, 5, 6, 7, 8])
    data.setup()
    assert data.num_classes == 9 and max(data._part("train").labels) < 9
    assert CIFARDataModule(**data.hparams).label_set == data.label_set


# --- domains ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("domain", "changed"),
    [
        ({"kind": "invert"}, lambda images: 255 - images),
        ({"kind": "rotate", "degrees": 180}, lambda images: images.flip(2, 3)),
        ({"kind": "rotate", "degrees": 270}, lambda images: images.transpose(2, 3).flip(3)),
    ],
)
def test_all_images_are_of_the_domain(part, domain, changed):
    before, after = ready()._part(part), ready(domain=domain)._part(part)
    assert torch.equal(after.images, changed(before.images)) and torch.equal(after.labels, before.labels)


@pytest.mark.parametrize("part", PARTS)
def test_half_of_every_class_is_of_the_domain(part):
    before, after = ready()._part(part), ready(domain=HALF)._part(part)
    kept, turned = same(after.images, before.images), same(after.images, before.images.rot90(1, (2, 3)))
    assert bool((kept ^ turned).all())
    for label in range(10):
        own = before.labels == label
        assert abs(int(turned[own].sum()) - int(own.sum()) / 2) <= 0.5


def test_the_seed_selects_the_images_of_the_domain():
    chosen = [ready(domain={**HALF, "seed": seed})._part("test").images for seed in (0, 0, 1)]
    assert torch.equal(chosen[0], chosen[1]) and not torch.equal(chosen[0], chosen[2])


def test_samples_to_fuse_on_are_mixed_too():
    before, mixed = (torch.cat(list(ready(domain=one).alignment_batches(400))) for one in (None, HALF))
    kept = same(before, mixed)
    assert 0.4 < float(kept.double().mean()) < 0.6
    assert torch.equal(mixed[~kept], before[~kept].rot90(1, (2, 3)))


def test_plain_values_make_the_domain_again():
    made = Domain(**HALF, seed=3)
    assert as_domain(json.loads(json.dumps(made.to_dict()))) == made
    assert DigitsDataModule(domain=made).hparams["domain"] == {**HALF, "seed": 3}
    assert DigitsDataModule(**DigitsDataModule(domain=made).hparams).domain == made


# --- images that nobody else has -------------------------------------------------------------------------------------


def test_networks_that_skip_and_are_limited_share_no_image():
    sets = [keys(ready(skip_train=skip, limit_train=100)._part("train").images) for skip in (None, 100, 200)]
    assert [len(one) for one in sets] == [100, 100, 100]
    # The digits have no image twice.
    assert len({key for one in sets for key in one}) == 300
    assert sets[0] == keys(ready(limit_train=100)._part("train").images)
    rest = ready(skip_train=200)
    assert rest.train_size == ready().train_size - 200 and set(sets[2]) <= set(keys(rest._part("train").images))


# --- refused ---------------------------------------------------------------------------------------------------------


class Oblong(ImageDataModule):
    num_classes = 2
    raw_shape = (1, 4, 5)
    mean, std = (0.0,), (1.0,)

    def read(self) -> tuple[ImageSet, ImageSet]:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_set": []}, r"Expected label_set to be a list of different classes, got \[\]"),
        ({"label_set": [1, 1]}, r"a list of different classes, got \[1, 1\]"),
        ({"label_set": [1, "2"]}, "each of label_set to be an integer of at least 0, got '2'"),
        ({"label_set": [3, 12]}, r"Expected label_set in 0\.\.9, got 12; choose classes of this data"),
        ({"skip_train": -1}, "Expected skip_train to be an integer of at least 0, got -1"),
        ({"domain": "rotate"}, "Expected a domain with kind and others of kind, degrees, share, seed, got 'rotate'"),
        ({"domain": {"kind": "blur"}}, "Expected kind of domain to be one of rotate, invert, got 'blur'"),
        ({"domain": {"kind": "rotate"}}, "Expected 90, 180 or 270 for degrees of a domain of kind rotate, got None"),
        ({"domain": {"kind": "rotate", "degrees": 45}}, "Expected 90, 180 or 270 .* got 45; change it"),
        ({"domain": {"kind": "rotate", "degrees": 90.0}}, "Expected 90, 180 or 270 .* got 90.0"),
        ({"domain": {"kind": "invert", "degrees": 90}}, "Expected no value for degrees of a domain of kind invert"),
        ({"domain": {**HALF, "share": 0}}, r"Expected share of domain in \(0, 1\], got 0"),
        ({"domain": {**HALF, "seed": -1}}, "Expected seed of domain to be an integer of at least 0, got -1"),
    ],
)
def test_refuses_by_name(arguments, message):
    with pytest.raises(FusionError, match=message):
        DigitsDataModule(**arguments)


def test_images_that_are_not_square_do_not_lie_on_their_side():
    with pytest.raises(FusionError, match="Expected square images to rotate by 90 degrees, got 1x4x5; rotate by 180"):
        Oblong(domain=HALF)
    assert Oblong(domain={**HALF, "degrees": 180}).domain == Domain("rotate", 180, 0.5)


@pytest.mark.parametrize("limit", [None, 100])
def test_more_images_than_there_are_cannot_be_skipped(limit):
    with pytest.raises(FusionError, match="of at most the 1295 training images, got .* after skip_train 1295; lower"):
        ready(skip_train=1295, limit_train=limit)


def test_the_command_line_reads_them(capsys):
    with pytest.raises(SystemExit):
        cli.main(
            ["fit", "--data", "DigitsDataModule", "--data.domain", json.dumps(HALF), "--data.label_set", "[7, 2]"]
            + ["--data.skip_train", "5", "--print_config"]
        )
    shown = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]
    assert as_domain(shown["domain"]) == Domain(**HALF) and shown["label_set"] == [7, 2] and shown["skip_train"] == 5
