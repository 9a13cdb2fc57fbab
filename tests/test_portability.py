"""The package needs no more than it says: declared packages, and nothing that only POSIX has."""

import re
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions

from tests.helpers import ROOT
from tests.test_layout import MODULES, imports

#: What `export` imports where it is asked for, an extra.
OPTIONAL = {"onnx"}

#: A Python in which our modules find what Windows has: others are imported before, or may go on as they are.
WITHOUT_POSIX = """
import builtins, importlib, os, signal, sys
import jsonargparse, ot, pytorch_lightning, sklearn, torch, torchmetrics, torchvision

modules = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios"}
names = {
    signal: ["SIGUSR1", "SIGUSR2", "SIGKILL", "SIGALRM", "SIGHUP", "SIGQUIT", "alarm", "pthread_sigmask"],
    os: ["sysconf", "getuid", "geteuid", "uname", "fork", "mkfifo", "setsid", "killpg", "getloadavg"],
}
real = builtins.__import__

def without(name, globals=None, *rest):
    ours = str((globals or {}).get("__name__")).partition(".")[0] in ("clafusion", "__main__")
    if ours and name in modules:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return real(name, globals, *rest)

builtins.__import__ = without
for owner, lost in names.items():
    for name in lost:
        delattr(owner, name)
try:
    import resource
except ImportError:
    pass
else:
    raise AssertionError("resource should not be found")
"""


def run_without_posix(code: str) -> str:
    command = [sys.executable, "-c", WITHOUT_POSIX + code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def normal(name: str) -> str:
    """The name of a distribution as all of its spellings have it."""
    return name.lower().replace("_", "-")


def test_what_is_imported_is_declared():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"].split()
    declared = {normal(re.match(r"[\w.-]+", line)[0]) for line in lines} | OPTIONAL
    imported = {name.partition(".")[0] for path in MODULES.values() for name in imports(path)}
    others = imported - sys.stdlib_module_names - {"clafusion"}
    owners = packages_distributions()
    assert {"PIL", "yaml", "torch"} <= others
    assert not [name for name in others if not {normal(owner) for owner in owners[name]} & declared]


def test_every_module_can_be_imported():
    code = f"""
for module in {sorted(MODULES)}:
    importlib.import_module(module)
print(sum(module in sys.modules for module in {sorted(MODULES)}))
"""
    assert int(run_without_posix(code)) == len(MODULES)


def test_a_callback_is_made_and_a_checkpoint_is_written_and_read(tmp_path):
    code = f"""
from clafusion.callbacks import FusionCallback
from clafusion.lightning_modules import ImageClassifier, load_parent, save_checkpoint
from clafusion.lightning_modules.commands.records import peak_memory

with FusionCallback(["a.ckpt", "b.ckpt"])._signal as held:
    pass
held.deliver()
path = {str(tmp_path / "a.ckpt")!r}
save_checkpoint(ImageClassifier({{"name": "MLP", "in_features": 4, "hidden": [3], "num_classes": 2}}), path)
print(type(load_parent(path)).__name__, peak_memory(torch.device("cpu")))
"""
    assert run_without_posix(code) == "MLP 0\n"
