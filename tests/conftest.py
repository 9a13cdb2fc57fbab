"""What all tests share: few threads, and a pair of checkpoints that the command line can fuse."""

from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def few_threads():
    """The networks of the tests are too small for more."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """No test depends on which tests have run before it."""
    torch.default_generator.manual_seed(0)


@pytest.fixture(scope="session")
def mlp_checkpoints(tmp_path_factory) -> tuple[Path, Path]:
    """Checkpoints of a deeper and a shallower MLP for the digits, as `fit` would write them, untrained."""
    from clafusion.lightning_modules import ImageClassifier, save_checkpoint

    folder = tmp_path_factory.mktemp("parents")
    paths = folder / "deep.ckpt", folder / "shallow.ckpt"
    for seed, (path, hidden) in enumerate(zip(paths, ([24, 20, 16, 12], [24, 16]), strict=True)):
        torch.manual_seed(seed)
        classifier = ImageClassifier({"name": "MLP", "in_features": 64, "hidden": hidden, "num_classes": 10}, lr=0.05)
        save_checkpoint(classifier, path)
    return paths
