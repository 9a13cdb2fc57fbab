"""Equal networks and samples give equal results: whatever the batches, the threads and the precision; and the seed."""

import json

import pytest
import torch

from clafusion import FusionOptions, fuse
from clafusion.statistics import moments as statistics
from tests.helpers import CORRECTIONS, NORMED_PAIRS, largest_difference, relative_error


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("case", NORMED_PAIRS)
def test_the_size_of_the_batches_makes_no_difference_at_all(case, correction):
    make, samples = NORMED_PAIRS[case]
    options, models = FusionOptions(correction=correction, targets="matched"), make()
    expected = fuse(models, [samples], options).model
    for size in (1, 7, 32):
        assert largest_difference(fuse(models, samples.split(size), options).model, expected) == 0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("case", NORMED_PAIRS)
def test_nor_does_how_many_samples_are_run_at_once(case, correction, dtype, tolerance, monkeypatch):
    make, samples = NORMED_PAIRS[case]
    models, options = [model.to(dtype) for model in make()], FusionOptions(correction=correction, targets="matched")
    expected = fuse(models, [samples], options).model
    monkeypatch.setattr(statistics, "CPU_CHUNK", 13)
    found = fuse(models, [samples], options).model
    assert relative_error(found, expected, samples.to(next(found.parameters()))) < tolerance


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("case", NORMED_PAIRS)
def test_nor_does_the_number_of_threads(case, correction):
    make, samples = NORMED_PAIRS[case]
    models, options = [model.float() for model in make()], FusionOptions(correction=correction, targets="matched")
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            found.append(fuse(models, [samples.float()], options).model)
        finally:
            torch.set_num_threads(1)
    assert relative_error(*found, samples.float()) < 1e-4


PRECISIONS = [(torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=str)
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("case", NORMED_PAIRS)
def test_every_precision_comes_near_double(case, correction, dtype, tolerance):
    """Half precision rounds what the parents compute, and the result; the sums are float64 all the same."""
    make, samples = NORMED_PAIRS[case]
    parents, options = [model.to(dtype) for model in make()], FusionOptions(correction=correction, targets="matched")
    found = fuse(parents, [samples], options).model
    expected = fuse([model.double() for model in parents], [samples], options).model
    assert next(found.parameters()).dtype == dtype
    assert relative_error(found.double(), expected, samples) < tolerance


def test_samples_may_be_of_another_precision_than_the_networks():
    make, samples = NORMED_PAIRS["mlp"]
    parents = [model.float() for model in make()]
    expected = fuse(parents, [samples.bfloat16().float()]).model
    assert largest_difference(fuse(parents, [samples.bfloat16()]).model, expected) == 0


@pytest.mark.parametrize("options", [FusionOptions(seed=5), FusionOptions(mapping="random", seed=7)])
def test_the_summary_has_all_that_a_repetition_needs(options):
    make, samples = NORMED_PAIRS["mlp"]
    fusion = fuse(make(), [samples], options)
    summary = json.loads(json.dumps(fusion.summary(), allow_nan=False))
    assert summary["options"]["seed"] == options.seed
    again = fuse(make(), [samples], FusionOptions(**summary["options"])).model
    assert largest_difference(again, fusion.model) == 0
