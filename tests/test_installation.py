"""A wheel in an environment of its own, used in a folder whose packages have the names of our folders."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers import ROOT

pytestmark = pytest.mark.slow
#: The folders of this repository's top level that many Lightning projects have, too.
COMMON = ("callbacks", "configs", "datamodules", "lightning_modules")
ONE_EPOCH = [
    *("--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    *("--trainer.enable_model_summary", "false", "--data.limit_train", "200"),
]


class Installed(NamedTuple):
    """Where the wheel is, and where it is installed."""

    wheel: Path
    binaries: Path


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    folder = tmp_path_factory.mktemp("installed")
    # A copy, so that building leaves nothing in the checkout.
    kept = shutil.ignore_patterns("__pycache__", ".*", "build", "runs", "tests", "docs", "benchmarks", "*.egg-info")
    source = shutil.copytree(ROOT, folder / "source", ignore=kept)
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    succeed(folder, [sys.executable, "-m", "pip", "--disable-pip-version-check", *build])
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "environment")
    binaries = folder / "environment" / "bin"
    python = str(binaries / "python")
    packages = Path(succeed(folder, [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    # What we depend on is taken from here; an editable install of ours is not, whose files are not read there.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    install = ["install", "--quiet", "--no-deps", "--no-index", "--force-reinstall", str(wheel)]
    succeed(folder, [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, *install])
    return Installed(wheel, binaries)


@pytest.fixture
def project(tmp_path) -> Path:
    """The folder of a user who has packages of these names."""
    for name in COMMON:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("mine = True\n")
    (tmp_path / "cli.py").write_text("raise SystemExit('the cli of the user')\n")
    return tmp_path


def succeed(folder: Path, command: list[str]) -> str:
    """The standard output of a command that must end well."""
    unset = ("PYTHONPATH", "SLURM_", "PL_", "CLAFUSION_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unset)}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_one_package_with_all_its_files(installed):
    names = set(zipfile.ZipFile(installed.wheel).namelist())
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"clafusion"}
    for top in ("clafusion", *COMMON):
        ours = [path for path in (ROOT / top).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        prefix = "" if top == "clafusion" else "clafusion/"
        assert ours and not [path for path in ours if f"{prefix}{path.relative_to(ROOT).as_posix()}" not in names]


def test_it_is_used_beside_packages_of_the_same_names(installed, project):
    python, command = str(installed.binaries / "python"), str(installed.binaries / "clafusion")
    code = (
        "from clafusion.callbacks import FusionCallback; from clafusion.datamodules import DigitsDataModule; "
        "import clafusion, callbacks, configs, datamodules, lightning_modules; "
        "assert callbacks.mine and configs.mine and datamodules.mine and lightning_modules.mine; "
        "print(clafusion.__file__)"
    )
    assert str(installed.binaries.parent) in succeed(project, [python, "-c", code])
    for name in ("deep", "shallow"):
        config = ["--config", f"configs/train/digits_{name}.yaml"]
        succeed(project, [python, "-m", "clafusion", "fit", *config, *ONE_EPOCH])
    parents = [f"runs/digits_{name}/best.ckpt" for name in ("shallow", "deep")]
    succeed(
        project,
        [command, "fuse", *parents, "-o", "fused.ckpt", "--fusion.num_samples", "50", "--check_parents", "false"],
    )
    assert (project / "fused.ckpt").exists() and (project / "fused.html").exists()
    torchrun = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "clafusion"]
    ddp = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--trainer.default_root_dir", "runs/two"]
    succeed(project, [*torchrun, "fit", "--config", "configs/train/digits_deep.yaml", *ONE_EPOCH, *ddp])
    assert (project / "runs/two/last.ckpt").exists()
