"""Which package may import which."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from configparser import ConfigParser
from pathlib import Path

import pytest

import clafusion
from clafusion import lightning
from tests.helpers import ROOT

#: The folders at the top and the names that they are imported by.
PACKAGES = {
    "clafusion": "clafusion",
    "lightning_modules": "clafusion.lightning_modules",
    "datamodules": "clafusion.datamodules",
    "callbacks": "clafusion.callbacks",
    "configs": "clafusion.configs",
}
#: Floors from the ground up: a module or package may import those on floors below its own, and its own package.
LIBRARY = [
    ["errors", "old_names", "naming", "tracking", "lightning", "loading"],
    ["options"],
    ["networks", "tracing"],
    ["statistics", "formats"],
    ["teachers"],
    ["transport"],
    ["alignment"],
    ["balancing"],
    ["correction"],
    ["fusion", "filter_transfer", "distillation", "ensemble"],
    ["report"],
]
LIGHTNING = [
    ["files", "distributed", "progress", "placing", "samples"],
    ["checkpoints"],
    ["compatibility", "optimizers"],
    ["classifier"],
    ["distiller"],
    ["trainer"],
    ["commands"],
    ["experiments"],
    ["commandline"],
]
#: What the packages at the top may import of each other.
MAY_IMPORT = {
    "clafusion": set(),
    "configs": set(),
    "datamodules": {"clafusion"},
    "lightning_modules": {"clafusion", "configs"},
    "callbacks": {"clafusion", "lightning_modules"},
}
#: The command line knows all of them by their names.
FRONT = "clafusion.lightning_modules.commandline"


def module_of(path: Path) -> str:
    """The name by which a source file is imported."""
    top, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([PACKAGES[top], *rest]).removesuffix(".__init__")


MODULES = {module_of(path): path for top in PACKAGES for path in sorted((ROOT / top).rglob("*.py"))}


def imports(path: Path) -> Iterator[str]:
    """The full names of what a source file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports here are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def arrows(sources: Mapping[str, Path]) -> dict[str, set[str]]:
    """For every module the modules of ours that it imports."""
    found: dict[str, set[str]] = {}
    for module, path in sources.items():
        # `from package import module` is an arrow to the module, not to the package around it.
        deepest = (
            max((one for one in MODULES if f"{name}.".startswith(f"{one}.")), default="") for name in imports(path)
        )
        found[module] = {one for one in deepest if one} - {module}
    return found


ARROWS = arrows(MODULES)


def top_of(module: str) -> str:
    """The folder at the top that a module lies in."""
    return next(top for top in reversed(PACKAGES) if f"{module}.".startswith(f"{PACKAGES[top]}."))


def room_of(module: str) -> str:
    """The package or module below the one at the top; "" for that itself."""
    return module.removeprefix(PACKAGES[top_of(module)]).lstrip(".").partition(".")[0]


def is_forbidden(module: str, other: str) -> bool:
    """Whether one module may not import another."""
    one, two = top_of(module), top_of(other)
    if module.startswith(FRONT) or module == "clafusion.__main__":
        return False
    if one != two:
        return two not in MAY_IMPORT[one]
    floors = {"clafusion": LIBRARY, "lightning_modules": LIGHTNING}.get(one)
    mine, theirs = room_of(module), room_of(other)
    # The package itself is its table of contents.
    if floors is None or mine == theirs or not mine:
        return False
    floor = {room: number for number, rooms in enumerate(floors) for room in rooms}
    return not theirs or floor[theirs] >= floor[mine]


@pytest.mark.parametrize("module", MODULES)
def test_a_package_imports_only_what_is_below_it(module):
    assert not [other for other in sorted(ARROWS[module]) if is_forbidden(module, other)]


@pytest.mark.parametrize(
    "source",
    [
        "from clafusion.fusion.fuse import fuse",
        "from clafusion import fuse",
        "import clafusion.report.pages",
        "from clafusion.lightning_modules import ImageClassifier",
        "def late():\n    from clafusion.correction import refit",
    ],
)
def test_a_planted_arrow_is_found(source, tmp_path):
    planted = tmp_path / "planted.py"
    planted.write_text(source)
    module = "clafusion.alignment.dynamic_programming"
    assert [other for other in arrows({module: planted})[module] if is_forbidden(module, other)]


def test_every_room_is_on_a_floor():
    for top, floors in (("clafusion", LIBRARY), ("lightning_modules", LIGHTNING)):
        rooms = {
            path.stem for path in (ROOT / top).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
        }
        assert sorted(room for rooms in floors for room in rooms) == sorted(rooms - {"__init__", "__main__"})


def test_data_modules_know_only_errors_of_the_library_and_lightning():
    found = {name for module in MODULES if top_of(module) == "datamodules" for name in imports(MODULES[module])}
    found = {name for name in found if name.startswith("clafusion") and not name.startswith("clafusion.datamodules")}
    known = {"clafusion.errors.FusionError", "clafusion.old_names.refuse_old_name"}
    assert {name for name in found if not name.startswith("clafusion.lightning.")} == known


def test_lightning_is_imported_in_one_file_and_not_by_the_library():
    packages = {"lightning", "lightning_fabric", "pytorch_lightning"}
    using = {
        module for module, path in MODULES.items() if {name.partition(".")[0] for name in imports(path)} & packages
    }
    assert using == {"clafusion.lightning"}
    ours = {module for module in MODULES if top_of(module) == "clafusion"}
    assert not [module for module in ours if "clafusion.lightning" in ARROWS[module]]


def test_no_package_imports_itself_in_a_circle():
    edges = dict(ARROWS)
    while edges:
        free = {module for module, others in edges.items() if not others & edges.keys()}
        assert free, f"these import each other in a circle: {sorted(edges)}"
        edges = {module: others for module, others in edges.items() if module not in free}


def test_no_public_name_hides_a_module():
    hidden = [name for name in clafusion.__all__ if f"clafusion.{name}" in MODULES]
    assert hidden == ["networks"]  # which is the module itself


def test_the_library_loads_without_lightning_and_friends():
    code = "import sys, clafusion; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["pytorch_lightning", "lightning", "lightning_fabric", "torchmetrics", "torchvision", "jsonargparse"]
    out = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stdout == "[]\n"


def test_setup_cfg_names_all_that_is_installed():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    folders = {path.parent for path in MODULES.values()}
    named = setup["options"]["packages"].split()
    assert sorted(named) == sorted(module_of(folder / "__init__.py") for folder in folders)
    mapped = dict(line.split(" = ") for line in setup["options"]["package_dir"].strip().splitlines())
    assert mapped == {name: top for top, name in PACKAGES.items()}
    script = setup["options.entry_points"]["console_scripts"].strip()
    assert script == "clafusion = clafusion.lightning_modules.commandline:main"


def test_setup_cfg_names_all_data_files():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    folders = {module_of(path / "__init__.py"): path for path in {path.parent for path in MODULES.values()}}
    named = {
        path
        for package, patterns in setup["options.package_data"].items()
        for pattern in patterns.split()
        for path in folders[package].glob(pattern)
    }
    found = {path for top in PACKAGES for path in (ROOT / top).rglob("*.*") if path.is_file()}
    assert named == {path for path in found if path.suffix not in (".py", ".pyc")}


#: Classes of Lightning whose private names nobody but clafusion.lightning may use.
LIGHTNINGS_OWN = [lightning.Trainer, lightning.LightningModule, lightning.LightningDataModule, lightning.Callback,
                  lightning.ModelCheckpoint, lightning.LightningCLI, lightning.LightningArgumentParser,
                  lightning.SaveConfigCallback, lightning.CSVLogger, lightning.Strategy, lightning.SLURMEnvironment,
                  lightning.TorchCheckpointIO, lightning.CheckpointConnector.__base__]  # fmt: skip


def private_names(kind: type) -> set[str]:
    """The private names of Lightning that a class has, those that it gives its instances included."""
    found: set[str] = set()
    for one in kind.__mro__:
        if one.__module__.startswith((lightning.PACKAGE, lightning.FABRIC)):
            found |= {name for name in vars(one) if re.match("_(?!abc_)[a-z]", name)}
            found |= set(re.findall(r"self\.(_[a-z]\w*)\b[^=\n]* = ", inspect.getsource(one)))
    return found


PRIVATE = {name: kind.__name__ for kind in LIGHTNINGS_OWN for name in private_names(kind)}


def private_uses(source: str) -> set[str]:
    """The private names of Lightning that a source takes from something else than `self`."""
    return {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and node.attr in PRIVATE
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    }


def overridden(kind: type) -> set[str]:
    """The private names of Lightning that a class of ours, or one of its instances, has in their place."""
    bases = set().union(*(private_names(base) for base in kind.__mro__))
    own = set(vars(kind)) | {
        node.attr
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(kind))))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }
    return own & bases


@pytest.mark.parametrize("module", [module for module in MODULES if top_of(module) not in ("clafusion", "configs")])
def test_private_names_of_lightning_are_used_in_one_file(module):
    assert private_uses(MODULES[module].read_text()) == set()
    loaded = importlib.import_module(module)
    kinds = [kind for kind in vars(loaded).values() if inspect.isclass(kind) and kind.__module__ == module]
    assert {kind.__name__: names for kind in kinds if (names := overridden(kind))} == {}


def test_a_planted_use_of_a_private_name_is_found():
    class Planted(lightning.Trainer):
        def _run(self, *arguments, **more):
            return super()._run(*arguments, **more)

        def stop(self):
            self._signal_connector = None

    assert overridden(Planted) == {"_run", "_signal_connector"}
    assert private_uses("trainer._accelerator_connector.strategy") == {"_accelerator_connector"}
    assert private_uses("self._run()") == set()
