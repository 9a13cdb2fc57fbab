"""The report in a real browser: nothing is missing, nothing is complained about, nothing sticks out."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from clafusion import FusionOptions, fuse
from clafusion.report.pages import NamedFusion, experiment_report, fusion_report, line_accuracies, report_data
from tests.helpers import mlp, vectors

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="there is no chromium here")]
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--enable-logging=stderr", "--dump-dom",
]  # fmt: skip
# Measured in the page and left in its title, where --dump-dom shows it.
PROBE = """<script>
document.documentElement.style.width = 'WIDTHpx';  // a window itself cannot be as narrow as a phone
const shown = [...document.querySelectorAll('figure svg, figure img')].map(one => {
  const box = one.getBoundingClientRect();
  return box.width > 40 && box.height > 40 && (one.naturalWidth ?? 1) > 0;
});
document.querySelectorAll('details').forEach(one => one.open = true);
document.title = JSON.stringify({
  shown, width: document.body.scrollWidth,
  ground: getComputedStyle(document.body).backgroundColor
});
</script>"""


@pytest.fixture(scope="module")
def record():
    models, samples = [mlp([9, 8, 7, 6, 5], 0), mlp([9, 7, 5], 1)], vectors(40)
    fusion = fuse(models, [samples], FusionOptions(correction="rescale"))
    labels = models[0](samples).argmax(1)
    found = {**report_data(fusion, samples), "line": line_accuracies(fusion, samples, labels)}
    names = ("parent 1", "parent 2", "balanced 2", "fused")
    networks = [{"name": name, "parameters": 10_000_000, "test_acc": 0.9} for name in names]
    more = {"networks": networks, "seconds": 1.25, "peak_memory_bytes": 2**20, "versions": {"torch": "2.x"}}
    parents = [{"path": f"a/very/long/path/{'x' * 80}.ckpt", "sha256": "0" * 64}] * 2
    return {**fusion.summary(), **more, "parents": parents, "report": found}


def opened(text: str, folder: Path, width: int, dark: bool = False) -> tuple[dict, list[str]]:
    """What the probe measured, and what the browser's console said."""
    page = folder / "page.html"
    page.write_text(text.replace("</main>", "</main>" + PROBE.replace("WIDTH", str(width))), encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900", scheme]
    end = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    [title] = re.findall("<title>(.*?)</title>", end.stdout)[:1]
    return json.loads(unescape(title)), re.findall(r"CONSOLE.*", end.stderr)


@pytest.mark.parametrize(("width", "dark"), [(390, False), (1280, True)])
def test_a_fusion_is_shown_whole(record, tmp_path, width, dark):
    found, said = opened(fusion_report(record).html, tmp_path, width, dark)
    assert said == []
    # Alignment, costs, 5 maps, 4 charts of the features, the line.
    assert found["shown"] == [True] * (1 + 1 + 5 + 4 + 1)
    assert found["width"] == width
    assert found["ground"] == ("rgb(16, 20, 27)" if dark else "rgb(246, 247, 249)")


def test_an_experiment_is_shown_whole(record, tmp_path):
    row = {"parameters": 1234, "seconds": 2.5, "peak_memory_bytes": 2**20, "test_acc_std": None}
    rows = [{"name": name, "test_acc": 0.9, "published_test_acc": None, "seeds": {"0": {"test_acc": 0.9}}, **row}
            for name in ("deep", "fused default, finetuned")]  # fmt: skip
    results = {"experiment": "trial", "scale": "small", "seeds": [0], "failures": [], "networks": rows}
    curves = {"deep, finetuned": [{"val_acc": {0: 0.5, 1: 0.6}, "train_loss": {0: 2.0, 1: 1.0}}]}
    fusions = [NamedFusion("default", "default", record)]
    found, said = opened(experiment_report(results, curves, fusions).html, tmp_path, 390)
    assert said == [] and found["shown"][:3] == [True] * 3 and found["width"] == 390
    assert len(found["shown"]) == 3 + 12  # those of the fusion are folded


def test_the_browser_would_complain(tmp_path):
    broken = '<html><body><main><figure><img src="none.png"></figure></main><script>nobody()</script></body></html>'
    found, said = opened(broken.replace("<body>", "<head><title>x</title></head><body>"), tmp_path, 500)
    assert found["shown"] == [False] and any("nobody is not defined" in line for line in said)
