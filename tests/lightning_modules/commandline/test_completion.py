"""Shell completion: the script that the command line prints, in a real bash."""

import shutil
import subprocess
from pathlib import Path

import pytest

from clafusion.lightning_modules.commandline import cli

BASH = shutil.which("bash")
ASK = """source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_TYPE=9
_shtab_clafusion clafusion "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def printed(capsys, shell: str) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(["--print_completion", shell])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "clafusion.bash"
    capture = pytest.MonkeyPatch()
    with open(path, "w") as file, capture.context() as patch, pytest.raises(SystemExit):
        patch.setattr("sys.stdout", file)
        cli.main(["--print_completion", "bash"])
    return path


@pytest.mark.skipif(BASH is None, reason="there is no bash here")
@pytest.mark.parametrize(
    "typed, expected",
    [
        (["f"], {"fit", "fuse"}),
        (["fuse", "--fusion.corr"], {"--fusion.correction"}),
        (["fuse", "--fusion.correction", "re"], {"rescale", "repair", "refit"}),
        (["fuse", "--data.data_"], {"--data.data_dir"}),
        (["fuse", "--report", ""], {"true", "false"}),
        (["fuse", "one.ckpt", "tw"], {"two.ckpt"}),
        (["fuse", "one.ckpt", "two.ckpt", "-o", "tw"], {"two.ckpt"}),
        (["pipeline", "mlp"], {"mlp_ablation"}),
        (["pipeline", "mlp_ablation", "--scale", ""], {"full", "small"}),
        (["fit", "--model.moment"], {"--model.momentum"}),
        (["test", "--ckpt_path", "on"], {"one.ckpt"}),
        (["report", "on"], {"one.ckpt"}),
    ],
)
def test_bash_completes(script, tmp_path, typed, expected):
    for name in ("one.ckpt", "two.ckpt"):
        (tmp_path / name).touch()
    command = [str(BASH), "-c", ASK, "bash", str(script), "clafusion", *typed]
    end = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert set(end.stdout.split()) == expected


def test_the_scripts_are_of_a_size_that_a_shell_can_read(capsys, script):
    assert script.stat().st_size < 500_000
    assert printed(capsys, "zsh").startswith("#compdef clafusion")
    assert "complete clafusion" in printed(capsys, "tcsh")
