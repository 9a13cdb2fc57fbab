"""Who may import whom."""

import ast
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"clafusion", "lightning_modules", "datamodules", "callbacks", "cli"}
MAY_IMPORT = {
    "clafusion": set(),
    "datamodules": {"clafusion"},
    "lightning_modules": {"clafusion"},
    "callbacks": {"clafusion", "lightning_modules"},
    "cli": {"clafusion", "lightning_modules", "datamodules", "callbacks"},
}
SOURCES = [path for top in sorted(OURS) for path in sorted({*(ROOT / top).rglob("*.py"), *ROOT.glob(f"{top}.py")})]


def imports(path: Path) -> set[str]:
    """The full names of what a source file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports here are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def top_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_import_only_those_below_them(path):
    top = top_of(path)
    found = {name.partition(".")[0] for name in imports(path)} & OURS
    assert found <= MAY_IMPORT[top] | {top}


@pytest.mark.parametrize("path", sorted((ROOT / "datamodules").rglob("*.py")), ids=lambda path: path.name)
def test_data_modules_know_only_the_error_of_the_library(path):
    found = {name for name in imports(path) if name.startswith("clafusion")}
    assert found <= {"clafusion.errors.FusionError"}


def test_no_package_imports_itself_in_a_circle():
    graph = {}
    for path in SOURCES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[module] = imports(path)
    edges = {
        module: {
            other for other in graph if other != module and any(f"{name}.".startswith(f"{other}.") for name in names)
        }
        for module, names in graph.items()
    }
    # `from package import module` counts as an import of the module, not of the package around it.
    for module, others in edges.items():
        edges[module] = {other for other in others if not any(deeper.startswith(f"{other}.") for deeper in others)}
    while edges:
        free = {module for module, others in edges.items() if not others & edges.keys()}
        assert free, f"these import each other in a circle: {sorted(edges)}"
        edges = {module: others for module, others in edges.items() if module not in free}


def test_the_library_loads_without_lightning_and_friends():
    code = "import sys, clafusion; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["pytorch_lightning", "lightning_fabric", "torchmetrics", "torchvision", "jsonargparse"]
    out = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stdout == "[]\n"


def test_setup_cfg_names_all_that_is_installed():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    patterns = setup["options.packages.find"]["include"].split()
    assert {pattern.rstrip("*") for pattern in patterns} == (OURS | {"configs"}) - {"cli"}
    assert setup["options"]["py_modules"] == "cli"
    assert setup["options.entry_points"]["console_scripts"].strip() == "clafusion = cli:main"
