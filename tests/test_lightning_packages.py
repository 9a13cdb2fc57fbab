"""`pytorch_lightning` and `lightning.pytorch`: ours work with the one that a program has imported first."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

#: A program that fuses and trains by a trainer of L.
FUSE_AND_TRAIN = """
from clafusion.callbacks import FusionCallback
from clafusion.datamodules import DigitsDataModule
from clafusion.lightning_modules import ImageClassifier, load_parent, save_checkpoint
{after}
for name, hidden in (("deep.ckpt", [12, 10, 8]), ("shallow.ckpt", [12, 8])):
    save_checkpoint(ImageClassifier({{"name": "MLP", "in_features": 64, "hidden": hidden, "num_classes": 10}}), name)
trainer = L.Trainer(
    accelerator="cpu", max_epochs=1, callbacks=[FusionCallback(["deep.ckpt", "shallow.ckpt"])],
    logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=".",
)
trainer.fit(ImageClassifier(lr=0.05), DigitsDataModule(limit_train=300, batch_size=100))
trainer.test(ckpt_path="best", datamodule=DigitsDataModule(), verbose=False, weights_only=True)
print(len(load_parent(trainer.checkpoint_callback.best_model_path).architecture["hidden"]))
import sys
from clafusion import lightning
print(lightning.PACKAGE, isinstance(trainer, lightning.Trainer), "pytorch_lightning" in sys.modules)
"""


def run(folder: Path, before: str, after: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", before + FUSE_AND_TRAIN.format(after=after)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("imported", "package"),
    [("import lightning as L", "lightning.pytorch"), ("import pytorch_lightning as L", "pytorch_lightning"),
     ("import lightning.pytorch as L", "lightning.pytorch")],
)  # fmt: skip
def test_the_package_that_is_imported_first_is_used(tmp_path, imported, package):
    if package.startswith("lightning"):
        pytest.importorskip("lightning.pytorch")
    done = run(tmp_path, imported)
    assert done.stdout.splitlines()[-2:] == ["3", f"{package} True {package == 'pytorch_lightning'}"], done.stderr


def test_a_trainer_of_the_other_package_refuses_our_modules(tmp_path):
    pytest.importorskip("lightning.pytorch")
    done = run(tmp_path, "", "import lightning as L")
    assert done.returncode == 1
    # Lightning's own words, which docs/troubleshooting.md explains.
    assert re.fullmatch(
        "TypeError: `model` must be a `LightningModule` .*, got `ImageClassifier`", done.stderr.splitlines()[-1]
    )
