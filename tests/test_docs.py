"""The documentation: what it shows runs, its table of options is that of the code, and the site builds."""

import inspect
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import yaml

from clafusion import FusionOptions
from clafusion.lightning_modules.commandline import cli
from tests.helpers import ROOT

DOCS = ROOT / "docs"
QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
# Pages that only other people's shells can run stand without a language: they are shown, not run.
PAGES = ["index.md", *sorted(f"tutorials/{path.name}" for path in (DOCS / "tutorials").glob("*.md"))]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# What stands in the pages as an example of something that takes hours.
LONG = ("mlp_ablation", "resnet34_resnet18_cifar10")


def blocks(page: str) -> list[tuple[str, str]]:
    return BLOCK.findall((DOCS / page).read_text())


def carry_out(command: str) -> None:
    """A command of a page, at the smallest scale: one epoch."""
    # What is printed need not go to a file here.
    name, *arguments = shlex.split(command.removeprefix("clafusion ").partition(" > ")[0])
    if name in ("fit", "fuse", "test", "transfer"):
        arguments += QUIET
    if name == "fuse":
        # After one epoch a parent may still guess.
        arguments += ["--check_parents", "false"]
    if name == "fit":
        arguments += ["--trainer.max_epochs", "1", "--trainer.enable_model_summary", "false"]
    if name == "pipeline" and arguments[0] in LONG:
        arguments += ["--print_config"]
    try:
        cli.main([name, *arguments])
    except SystemExit as end:
        assert not end.code, command


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_shows_runs_as_typed(page, tmp_path, monkeypatch, capsys):
    for package in ("timm", "transformers"):
        if f"import {package}" in (DOCS / page).read_text():
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, page, "exec"), scope)
            continue
        for line in text.splitlines():
            if line.startswith("clafusion "):
                carry_out(line)
            else:
                assert line in ("", "pip install .", "pip install timm", "pip install transformers"), line


def test_the_test_of_the_pages_can_fail():
    with pytest.raises(AssertionError, match="no_such_command"):
        carry_out("clafusion no_such_command")


# --- the table of options ---


def option_rows() -> dict[str, dict[str, str]]:
    """What the table must say about each option, from the code: every column but `effect`."""
    documented = re.split(r"\n {4}(?=\w+: )", (inspect.getdoc(FusionOptions) or "").partition("Attributes:")[2])[1:]
    meanings = {}
    for entry in documented:
        name, _, text = entry.partition("\n\n")[0].partition(": ")
        meanings[name] = " ".join(text.split())
    hints, defaults, paper = get_type_hints(FusionOptions), FusionOptions(), FusionOptions.paper()
    rows = {}
    for field in fields(FusionOptions):
        value, theirs = getattr(defaults, field.name), getattr(paper, field.name)
        rows[field.name] = {
            "option": f"`{field.name}`",
            "values": _values(hints[field.name]),
            "default": f"`{_word(value)}`",
            "meaning": meanings[field.name].replace("|", "\\|"),
            "published": "" if theirs == value else f"`{_word(theirs)}`",
        }
    return rows


def _values(hint: Any) -> str:
    if get_origin(hint) is not None and all(isinstance(value, str) for value in get_args(hint)):
        return ", ".join(f"`{value}`" for value in get_args(hint))
    if hint == int | str:
        return "whole number, name, or `agreement`"
    return {bool: "`true`, `false`", int: "whole number", float: "number"}.get(hint, "list of numbers, or `null`")


def _word(value: Any) -> str:
    return {"True": "true", "False": "false", "None": "null"}.get(str(value), str(value))


def test_every_option_is_in_the_table_as_the_code_has_it():
    found = {}
    for line in (DOCS / "options.md").read_text().splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            found[cells[0].strip("`")] = dict(
                zip(("option", "values", "default", "meaning", "effect", "published"), cells, strict=True)
            )
    assert list(found) == [field.name for field in fields(FusionOptions)]
    assert all(row.pop("effect") for row in found.values())
    assert found == option_rows()


def published_settings() -> list[dict[str, Any]]:
    """For every option of `fuse` that stands beside a published setting: it and its value."""
    section = (DOCS / "options.md").read_text().partition("## From the published settings")[2]
    cells = [line.split(" | ")[1] for line in section.splitlines() if line.startswith("| ") and " | " in line]
    found = []
    for cell in cells:
        for names, more in re.findall(r"`((?:--fusion\.[^`]*))`((?:, `[^`-]*`)*)", cell):
            pairs = re.findall(r"--fusion\.(\w+) ('[^']*'|\S+)", names)
            values = [value.strip("'") for _, value in pairs] + re.findall("`([^`]*)`", more)
            found += [{(pairs[0][0] if more else pairs[at][0]): yaml.safe_load(v)} for at, v in enumerate(values)]
    return found


def test_what_stands_beside_a_published_setting_is_an_option_and_its_value():
    found = published_settings()
    assert len(found) > 35
    for option in found:
        FusionOptions(**{"correction": "none", **option})
    named = {name for option in found for name in option}
    assert named == {field.name for field in fields(FusionOptions)} - {
        "anchor",
        "ridge",
        "anchor_lead",
        "memory_budget",
        "teacher",
        "budget",
        "gate_temperature",
        "targets",
        "width",
    }


# --- troubleshooting ---


def messages() -> str:
    """All source text, with the strings that Python joins joined."""
    packages = ("clafusion", "lightning_modules", "datamodules", "callbacks")
    sources = [path.read_text() for package in packages for path in sorted((ROOT / package).rglob("*.py"))]
    # The parser's own, which test_cli.py looks at, and Lightning's own, see test_lightning_packages.py.
    sources += ["unrecognized arguments: ", "`model` must be a `LightningModule` or ..., got `ImageClassifier`"]
    return re.sub(r'"\s*f?"', "", "\n".join(sources))


def test_every_message_of_the_troubleshooting_page_is_one_of_ours():
    headings = re.findall(r"^### (.*)$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(headings) >= 20
    known = messages()
    for heading in headings:
        pattern = "[^\n]*".join(re.escape(part) for part in heading.split("…"))
        assert re.search(pattern, known), heading


# --- the site ---


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    subprocess.run([sys.executable, "scripts/installed_layout.py"], cwd=ROOT, check=True)
    build = ["-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run([sys.executable, *build], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        html = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?([^\s\">]+)", html)
        loaded += re.findall(r"<link[^>]*rel=\"?(?:stylesheet|preconnect|icon)[^>]*href=\"?([^\s\">]+)", html)
        assert not [address for address in loaded if "//" in address], page
    # The pages of the API say what the docstrings say.
    assert "Fuse trained networks of different depth and width into one" in (tmp_path / "api.html").read_text()
