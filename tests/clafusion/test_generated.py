"""Networks in the manner of their users: each fused with itself is itself, and more; see `tests/generated.py`."""

import warnings

import pytest
import torch

from tests import generated

#: Seeds that are tried here, the last of which were wrong once; many more by hand: `python -m tests.generated`.
SEEDS = (*range(24), 30033, 30092, 30104)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_a_generated_network_is_right_or_refused_by_name(seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on layers that are left as they are, and on few samples
        kind, line = generated.outcome(seed)
    assert kind in ("right", "refused"), line


def test_most_generated_networks_are_not_refused():
    """Reading alone: a generator whose networks were all refused would prove nothing."""
    read = 0
    for seed in range(6):
        model, shape = generated.Generator(seed).network()
        try:
            generated.structure_of(model, torch.randn(3, *shape, dtype=torch.float64))
            read += 1
        except generated.FusionError:
            pass
    assert read >= 5


def test_a_wrong_network_is_noticed(monkeypatch):
    """The control: a fusion that returns something else."""

    def wrong(models, batches, options):
        fusion = generated_fuse(models, batches, options)
        with torch.no_grad():
            next(fusion.model.parameters()).add_(0.1)
        return fusion

    generated_fuse = generated.fuse
    monkeypatch.setattr(generated, "fuse", wrong)
    assert generated.outcome(0)[0] == "wrong"
