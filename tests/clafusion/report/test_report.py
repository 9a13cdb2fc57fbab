"""The report: what it measures, that every number and figure is there, and that it is one harmless file."""

import base64
import copy
import json
import re
import warnings
import zlib
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import resvg_py
import torch
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger

from clafusion import FusionError, FusionOptions, align_layers, fuse, linear_cka, trace
from clafusion.callbacks import FusionCallback
from clafusion.datamodules import DigitsDataModule
from clafusion.fusion.record import in_percent
from clafusion.lightning_modules import FusionTrainer, ImageClassifier
from clafusion.lightning_modules.commandline import cli
from clafusion.lightning_modules.commands.figures import Pictures
from clafusion.report.measurements import PIXELS, Observed, averages, diagnose, map_picture
from clafusion.report.pages import (
    experiment_report,
    fusion_report,
    line_accuracies,
    rasterised,
    report_data,
    svg_files,
)
from clafusion.tracing.execution import GraphRunner
from tests.helpers import UNTRAINED, images, mlp, needs_font, plain, resnet, vectors

HOSTILE = "<script>alert('x')</script>\" onload=\"x\x00&amp;"
QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", *UNTRAINED]
QUIET += ["--fusion.num_samples", "70"]


@pytest.fixture(scope="module")
def pair():
    """Two perceptrons, samples, and what came of them."""
    models, samples = [mlp([9, 8, 7, 6, 5], 0), mlp([9, 7, 5], 1)], vectors(40)
    return models, samples, fuse(models, [samples], FusionOptions(seed=3, correction="rescale"))


@pytest.fixture(scope="module")
def record(pair):
    """All that `fusion.json` holds, through JSON."""
    models, samples, fusion = pair
    more = {
        "parents": [{"path": path, "sha256": f"{number}" * 64} for number, path in enumerate(("a.ckpt", "b.ckpt"))],
        "networks": [
            {"name": name, "parameters": 1000 + number, "test_acc": 0.9 + number / 1000}
            for number, name in enumerate(("parent 1", "parent 2", "ensemble", "balanced 2", "fused"))
        ],
        "seconds": 1.25,
        "peak_memory_bytes": 3 * 2**20,
        "seeds": {"fusion": 3, "global": 11},
        "versions": {"torch": "2.x"},
        "report": report_data(fusion, samples),
    }
    return json.loads(json.dumps({**fusion.summary(), **more}, allow_nan=False))


@pytest.fixture
def results():
    runs = {"0": {"test_acc": 0.9}, "1": {"test_acc": 0.92}}
    costs = {"parameters": 1234, "seconds": 2.5, "peak_memory_bytes": 2**20}
    rows = [
        ("deep", 0.91, 0.0141, 0.93),
        ("fused default, finetuned", 0.9234, None, None),
        ("student", None, None, None),
    ]
    return {
        "experiment": "trial", "scale": "small", "seeds": [0, 1], "versions": {"torch": "2.x"},
        "failures": [{"seed": 1, "stage": "distil student", "reason": "no memory"}],
        "networks": [
            {"name": name, "test_acc": mean, "test_acc_std": std, "published_test_acc": other, "seeds": runs, **costs}
            for name, mean, std, other in rows
        ],
    }  # fmt: skip


class Reader(HTMLParser):
    """Collects the elements of a document and refuses one whose elements do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return "\n".join(self.words)


def read(text: str) -> Reader:
    """The document, after what must hold for every report."""
    assert text.startswith("<!DOCTYPE html>\n")
    ElementTree.fromstring(text.partition("\n")[2])  # well-formed XML, too
    document = Reader(text)
    for tag, attributes in document.seen:
        assert tag not in {"script", "link", "iframe", "object", "base", "form", "a"}
        assert not [name for name in attributes if name.startswith("on") or name == "href"]
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
        assert tag != "img" or attributes["alt"]
        assert tag != "svg" or attributes.get("aria-hidden") or attributes["aria-label"]
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    return document


# --- what is measured ---


def features(model, samples) -> list[torch.Tensor]:
    """The outputs of the Linear layers of a perceptron, by hooks."""
    found = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: found.append(output.detach()))
        for module in model.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    model(samples)
    for hook in hooks:
        hook.remove()
    return found


def compared(networks, parents, samples):
    """What `diagnose` says of networks that are traced for it."""
    structures = [[trace(model, samples[:1]) for model in models] for models in (networks, parents)]
    observed = [
        [Observed(GraphRunner(one.capture), {layer.name: layer.pre for layer in one.layers}) for one in side]
        for side in structures
    ]
    return diagnose([layer.name for layer in structures[0][0].layers], *observed, samples)


def test_diagnosis_is_variance_and_cka_of_the_features():
    one, other, samples = mlp([9, 8, 7], 0), mlp([6, 5, 4], 1), vectors(30)
    [[found]] = compared([one], [other], samples)
    pairs = list(zip(features(one, samples), features(other, samples), strict=True))
    ratios = [float(x.var(0).mean() / y.var(0).mean()) for x, y in pairs]
    assert found.variance_ratio == pytest.approx(ratios)
    assert found.cka == pytest.approx([float(linear_cka(x, y)) for x, y in pairs])
    assert len(found.layers) == 4


def test_diagnosis_is_streamed():
    one, other, samples = mlp([9, 8], 0), mlp([6, 5], 1), vectors(100)
    [[found]] = compared([one], [other], samples)
    pairs = list(zip(features(one, samples), features(other, samples), strict=True))
    assert found.variance_ratio == pytest.approx([float(x.var(0).mean() / y.var(0).mean()) for x, y in pairs])
    whole = [float(linear_cka(x, y)) for x, y in pairs]
    assert found.cka == pytest.approx(whole, abs=0.1)  # another unbiased estimate of the same


def test_diagnosis_says_when_it_cannot_tell():
    one, samples = mlp([9, 8], 0), vectors(3)
    [[found]] = compared([one], [one], samples)
    assert found.cka == (None, None, None) and found.variance_ratio == pytest.approx([1, 1, 1])
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
    [[found]] = compared([one], [one], vectors(8))
    assert found.variance_ratio == (None, None, None)


def test_before_the_correction_is_the_fusion_without_one(pair, record):
    models, samples, fusion = pair
    bare = fuse(models, [samples], plain(seed=3))
    expected = compared([bare.model, fusion.model], fusion.balanced, samples)
    for k, found in enumerate(record["report"]["diagnosis"]["parents"]):
        for name, agreement in (("before", expected[0][k]), ("after", expected[1][k])):
            assert found[name]["variance_ratio"] == pytest.approx(agreement.variance_ratio)
            assert found[name]["cka"] == pytest.approx(agreement.cka)
    assert report_data(bare, samples)["diagnosis"]["parents"][0]["before"] is None


def test_layers_that_a_parent_lacks_are_left_out():
    models, samples = [resnet([2, 1], 0), resnet([1, 1], 1)], images(6, 8)
    fusion = fuse(models, [samples], FusionOptions(correction="rescale"))
    found = report_data(fusion, samples)["diagnosis"]
    bare = report_data(fuse(models, [samples], plain()), samples)["diagnosis"]
    for ours, theirs in zip(found["parents"], bare["parents"], strict=True):
        assert ours["before"]["variance_ratio"] == pytest.approx(theirs["after"]["variance_ratio"])
    missing = [
        {layer for layer, value in zip(found["layers"], parent["after"]["cka"], strict=True) if value is None}
        for parent in found["parents"]
    ]
    assert missing == [set(), {"layer1.1.conv1"}]


def test_a_parent_that_was_fused_before_the_result_had_its_depth_has_nothing_to_compare():
    models, samples = [mlp([9] * depth, depth) for depth in (1, 2, 3)], vectors(40)
    fusion = fuse(models, [samples], plain(many="iterative"))
    data = report_data(fusion, samples)
    found = [parent["after"]["cka"] for parent in data["diagnosis"]["parents"]]
    assert found[:2] == [[None] * 4] * 2 and None not in found[2]
    read(fusion_report({**fusion.summary(), "report": data}).html)


def right(model, samples, labels) -> float:
    return float((model(samples).argmax(1) == labels).double().mean())


def test_the_line_runs_from_the_anchor_to_the_other_parent(pair):
    models, samples, fusion = pair
    labels = models[0](samples).argmax(1)
    found = line_accuracies(fusion, samples, labels)
    assert found["samples"] == 40 and found["shares"][::5] == [0, 0.5, 1] and list(found["accuracies"]) == ["1"]
    line = found["accuracies"]["1"]
    assert line[0] == 1 == right(models[0], samples, labels)  # at one end the anchor itself
    bare = fuse(models, [samples], plain(seed=3))
    assert line[5] == right(bare.model, samples, labels)  # in the middle the fusion without its correction
    assert found["fused"] == right(fusion.model, samples, labels)
    assert not torch.equal(fusion.model(samples), bare.model(samples))


def test_the_line_of_a_permuted_network_is_flat():
    one = mlp([9, 8], 0)
    samples, order = vectors(40), torch.randperm(9, generator=torch.Generator().manual_seed(1))
    other = copy.deepcopy(one)
    with torch.no_grad():
        other.fc1.weight.copy_(one.fc1.weight[order])
        other.fc2.weight.copy_(one.fc2.weight[:, order])
    found = line_accuracies(fuse([one, other], [samples], plain()), samples, one(samples).argmax(1))
    assert found["accuracies"] == {"1": [1.0] * 11} and found["fused"] == 1


def test_there_is_no_line_where_networks_were_fused_one_after_another():
    models, samples = [mlp([9, 8, 7], 0), mlp([9, 6], 1), mlp([7, 6], 2)], vectors(40)
    labels = models[0](samples).argmax(1)
    assert line_accuracies(fuse(models, [samples], plain(many="iterative")), samples, labels) is None
    fusion = fuse(models, [samples], plain(anchor=2))
    found = line_accuracies(fusion, samples, labels)["accuracies"]
    assert list(found) == ["0", "1"] and found["0"][0] == found["1"][0] == right(models[2], samples, labels)
    assert found["1"][10] == right(next(averages(fusion, [[0, 1, 0]])).run, samples, labels)


def test_a_map_that_permutes_has_a_clean_diagonal():
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    found = map_picture(torch.eye(40)[order])
    levels = torch.tensor(list(zlib.decompress(base64.b64decode(found["image"])))).reshape(found["pixels"])
    assert torch.equal(levels, 255 * torch.eye(40, dtype=levels.dtype))
    assert found["mixes"] == pytest.approx(1) and found["shape"] == [40, 40]
    assert map_picture(torch.full((12, 5), 1 / 12))["mixes"] == pytest.approx(12)


def test_pictures_of_maps_are_small():
    found = map_picture(torch.rand(300, 500, generator=torch.Generator().manual_seed(0)))
    assert found["pixels"] == [PIXELS, PIXELS] and found["shape"] == [300, 500]
    assert len(found["image"]) < 1.5 * PIXELS**2


# --- the report on a fusion ---


def test_every_figure_of_a_fusion_is_there(pair, record):
    document = read(fusion_report(record).html)
    titles = [word for word in ("Results", "Which layers correspond", "What layers cost to match", "Where neurons go",
              "What became of the features", "How it was made") if word in document.words]  # fmt: skip
    assert len(titles) == 6
    labels = [attributes.get("aria-label", "") for tag, attributes in document.seen if tag == "svg"]
    assert sum("correspond" in label for label in labels) == 1
    assert sum(label.startswith("Layer costs") for label in labels) == 1
    assert sum("layer by layer" in label for label in labels) == 4
    assert sum(tag == "img" for tag, _ in document.seen) == sum(len(maps) for maps in pair[2].maps) == 5
    assert document.text.count("+ inserted") == 2


def test_the_numbers_are_those_of_the_fusion(pair, record):
    _, _, fusion = pair
    document = read(fusion_report(record).html)
    cost, alignment = fusion.layer_costs[1][0], fusion.alignments[1][0]
    for row in range(cost.shape[0]):
        for column in range(cost.shape[1]):
            chosen = ", chosen" if alignment[column] == row else ""
            assert f"{row + 1} – {column + 1}: {float(cost[row, column]):.6g}{chosen}" in document.words
    path = sum(float(cost[row, column]) for column, row in enumerate(alignment))
    assert f"Chosen path: {path:.4f} in all." in document.words
    for space, value in fusion.costs[1].items():
        at = document.words.index(space)
        assert f"cost {value:.4f}" in document.words[at : at + 4]
        assert f"correlation {1 - value:.4f}" in document.words[at : at + 4]
    for parent in record["report"]["diagnosis"]["parents"]:
        for values in (*parent["before"].values(), *parent["after"].values()):
            assert all(f"{value:.4g}" in document.words for value in values)
    for row in record["networks"]:
        assert f"{row['test_acc']:.2%}" in document.words and f"{row['parameters']:,}" in document.words
    for word in ("1.25 s", "3 MiB", "0" * 64, "2.x", "11", *map(str, fusion.options.to_dict().values())):
        assert word in document.words


@pytest.mark.parametrize("options", [plain(balance="merge"), plain(combine="average"), FusionOptions.paper(pin_last=0)])
def test_other_fusions_are_drawn_too(options):
    shallow = [9, 9] if options.combine == "transport" else [9, 9, 9]
    models, samples = [mlp([9, 9, 9], 0), mlp(shallow, 1)], vectors(40)
    fusion = fuse(models, [samples], options)
    document = read(fusion_report({**fusion.summary(), "report": report_data(fusion, samples)}).html)
    assert ("+ merged" in document.text) == (options.balance == "merge")
    assert ("Where neurons go" in document.words) == (options.combine == "transport")
    read(fusion_report(json.loads(json.dumps(fusion.summary()))).html)  # what older files hold


@pytest.mark.parametrize("many", ["many_to_one", "iterative"])
def test_several_parents_are_drawn(many):
    models, samples = [mlp([9, 8, 7], 0), mlp([9, 6], 1), mlp([7, 6], 2)], vectors(40)
    fusion = fuse(models, [samples], FusionOptions(many=many, correction="rescale"))
    data = report_data(fusion, samples)
    assert (data["diagnosis"]["parents"][0]["before"] is None) == (many == "iterative")
    document = read(fusion_report({**fusion.summary(), "report": data}).html)
    assert sum("correspond" in a.get("aria-label", "") for tag, a in document.seen if tag == "svg") == 2


def test_parents_have_the_names_of_their_files_and_in_older_records_numbers(record):
    record = copy.deepcopy(record)
    page = read(fusion_report(record).html)
    assert "best parent, parent 2" in page.words and "Layers of parent 1 and parent 2 that correspond" in page.text
    for file, name in zip(record["parents"], ("deep.ckpt", "fused"), strict=True):
        file["name"] = name
    for row, (name, role) in zip(record["networks"], (("deep.ckpt", "parent"), ("fused", "parent")), strict=False):
        row |= {"name": name, "role": role, "knows": 2}
    record["networks"][-1] |= {"name": "result", "role": "fused"}
    page = read(fusion_report({**record, "classes": ["a", "b", "c"]}).html)
    assert "parent 1" not in page.text and "best parent, fused" in page.words
    assert "deep.ckpt (knows 2 of 3 classes)" in page.words and "Layer costs of stage 1, fused" in page.text


def test_the_choice_of_a_network_and_the_trust_in_parents_are_shown(record):
    scores = {"anchor": 0.51, "matched": 0.3, "union": 0.12345}
    changes = {"candidates": scores, "chosen": "union", "teacher": "gated", "trust": [0.256, 0.744]}
    options = {**record["options"], "targets": "auto"}
    document = read(fusion_report({**record, **changes, "options": options}).html)
    assert {"Which network was chosen", "Which parents were trusted", "0.1235", "25.6%", "74.4%"} <= {*document.words}
    assert document.words.index("kept") > document.words.index("0.1235") and document.words.count("kept") == 1
    alike = {**record, "options": options, "candidates": {}, "chosen": "anchor", "teacher": "mean"}
    document = read(fusion_report(alike).html)
    assert "“anchor”, without a comparison" in document.text and "Which parents were trusted" not in document.words


def test_files_of_earlier_versions_are_drawn_as_ever(record):
    older = {k: v for k, v in record.items() if k not in ("classes", "candidates", "chosen", "teacher", "trust")}
    assert fusion_report(older).html == fusion_report(record).html
    older["options"] = {**record["options"], "targets": "auto"}
    assert "Which network was chosen" not in read(fusion_report(older).html).words


def test_layers_that_were_only_aligned_are_drawn():
    models, options = [mlp([9, 8, 7, 6], 0), mlp([9, 8, 6], 1)], FusionOptions()
    found = align_layers(models, [vectors(40)], options)
    document = read(fusion_report(json.loads(json.dumps({**found.summary(), "options": options.to_dict()}))).html)
    assert "The layers of 2 networks; nothing was fused." in document.words
    assert document.words.count("fc4") >= 1 and "Where neurons go" not in document.words
    assert any(f": {float(found.costs[1][0][1, 2]):.6g}" in word for word in document.words)


def test_hostile_names_stay_text(record):
    record = json.loads(
        json.dumps(record).replace('"fc2"', json.dumps(HOSTILE)).replace('"a.ckpt"', json.dumps(HOSTILE))
    )
    text = fusion_report(record).html
    assert "<script" not in text and HOSTILE.replace("\x00", "\ufffd") in read(text).words


def test_hostile_names_stay_text_in_the_files_of_the_figures(record):
    record = json.loads(json.dumps(record).replace('"fc2"', json.dumps(HOSTILE)))
    files = svg_files(fusion_report(record).figures)
    shown = HOSTILE.replace("\x00", "\ufffd")
    assert any(shown in "".join(ElementTree.fromstring(text).itertext()) for text in files.values())
    assert not [text for text in files.values() if "<script" in text]
    assert all(re.fullmatch("[a-z0-9-]+", name) for name in files)


def test_the_report_is_small_and_always_the_same(record):
    text = fusion_report(record).html
    assert len(text) < 60_000 and fusion_report(record).html == text


@pytest.mark.parametrize(
    "change",
    [{"alignments": 3}, {"options": None}, {"layer_costs": [[], [[["x"] * 3] * 5]]}, {"report": {"units": []}},
     {"transport_costs": [{}, {"fc1": {}}]}, {"networks": [{}]},
     {"units": [[["a"]]] * 2, "alignments": [[[0]], [[9**9]]]}],
)  # fmt: skip
def test_what_is_no_record_is_refused(record, change):
    with pytest.raises(FusionError, match="Expected the record of a fusion as `clafusion fuse` writes it, got"):
        fusion_report({**record, **change})


def test_more_diagnoses_than_parents_are_refused(record):
    record = json.loads(json.dumps(record))
    record["report"]["diagnosis"]["parents"] *= 1000
    with pytest.raises(FusionError, match="got ValueError"):
        fusion_report(record)


@pytest.mark.parametrize("picture", [{"pixels": [9**9, 9]}, {"pixels": [2, 2]}, {"pixels": [0, 4]}, {"image": "?"}])
def test_pictures_that_are_not_what_they_say_are_refused(record, picture):
    record = json.loads(json.dumps(record))
    record["report"]["maps"][1]["fc1"] |= picture
    with pytest.raises(FusionError, match="Expected the record of a fusion"):
        fusion_report(record)


# --- the report on an experiment ---


def test_every_network_of_an_experiment_is_there(results):
    curves = {
        "fused default, finetuned": [
            {"val_acc": {0: 0.5, 1: 0.75}, "train_loss": {0: 2.0, 1: 1.0}},
            {"val_acc": {0: 0.7}},
        ],
        "deep, finetuned": [{"val_acc": {0: 0.25}, "train_loss": {}}],
    }  # fmt: skip
    document = read(experiment_report(results, curves).html)
    for word in ("91.00 ± 1.41", "92.34", "–", "93.00", "published: 93.00", "no memory", "1,234", "2.5", "1"):
        assert word in document.words
    for word in ("epoch 0: 0.6", "epoch 1: 0.75", "epoch 1: 1"):
        assert f"fused default, finetuned, {word}" in document.words
    assert "deep, finetuned, epoch 0: 0.25" in document.words
    labels = [attributes.get("aria-label", "") for tag, attributes in document.seen if tag == "svg"]
    assert [sum(part in label for label in labels) for part in ("Test accuracy", "by epoch")] == [1, 2]


def test_hostile_names_of_an_experiment_stay_text(results):
    curves = {f"{HOSTILE}, finetuned": [{"val_acc": {0: 0.5}}]}
    text = experiment_report({**results, "experiment": HOSTILE}, curves).html
    assert "<script" not in text and HOSTILE.replace("\x00", "\ufffd") in read(text).words


ROLES = {"fusednet": "parent", "default": "fused", "fusednet, finetuned": "control", "default, finetuned": "finetuned"}


@pytest.mark.parametrize("first_version", [False, True])
def test_roles_tell_which_networks_are_fused(results, first_version):
    curves = {f"{name}, finetuned": [{"val_acc": {0: 0.5}}] for name in ("fusednet", "default")}
    template = results["networks"][0]
    rows = [{**template, "name": name, "role": role, "test_acc": 0.5} for name, role in ROLES.items()]
    fused = {"default", "default, finetuned"}
    if first_version:
        # Their results have no roles; the names of fused networks began with this word.
        rows = [{**row, "name": f"fused {row['name']}" if row["name"] in fused else row["name"]} for row in rows]
        for row in rows:
            del row["role"]
        fused = {f"fused {name}" for name in fused}
        curves["fused default, finetuned"] = curves.pop("default, finetuned")
    report = experiment_report({**results, "networks": rows}, curves)
    drawn = ElementTree.fromstring(svg_files(report.figures)["test-accuracy-of-every-network"])
    groups = [group for group in drawn.iter() if group.get("class", "").startswith("interval")]
    assert {group[0].text for group in groups if group.get("class") == "interval fused"} == fused
    words = read(report.html).words
    assert any(word == f"best fused: {name}" for name in fused for word in words)
    assert "best of the others: fusednet" in words
    # The first colour is that of fused networks.
    assert [line.style for figure in report.figures for line in figure.lines if line.name[:-11] in fused] == ["c0"]


def test_what_are_no_results_is_refused(results):
    with pytest.raises(FusionError, match="Expected results as `clafusion pipeline` writes them, got KeyError"):
        experiment_report({**results, "networks": [{}]}, {})


# --- the command line ---


@pytest.fixture
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(capsys, *arguments: str) -> str:
    before = {path: path.read_bytes() for path in Path.cwd().rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as end:
        cli.main(list(arguments))
    assert end.value.code == 2
    assert {path: path.read_bytes() for path in Path.cwd().rglob("*") if path.is_file()} == before
    error = capsys.readouterr().err
    assert re.fullmatch(r"clafusion: error: [^\n]+\n", error), error
    return error


def test_fuse_writes_a_report_that_can_be_drawn_again(mlp_checkpoints, in_an_empty_folder, capsys, monkeypatch):
    command = ["fuse", "--parents", f"[{', '.join(map(str, mlp_checkpoints))}]", "--output", "fused.ckpt", *QUIET]
    taken = []
    original = DigitsDataModule.alignment_batches
    monkeypatch.setattr(
        DigitsDataModule, "alignment_batches", lambda self, *given: taken.append(given) or original(self, *given)
    )
    cli.main(command)
    assert len(taken) == 1  # what the report measures on are the samples that the fusion had
    assert sorted(path.name for path in Path.cwd().iterdir()) == [
        *("fused.ckpt", "fused.html", "fused.json", "fused.yaml", "fused_figures")
    ]
    assert "fused.html: all of it to look at\n" in capsys.readouterr().out
    document = read(Path("fused.html").read_text())
    record = json.loads(Path("fused.json").read_text())
    assert in_percent(record["networks"][-1]) in document.words and " ± " in in_percent(record["networks"][-1])
    assert {"host", "device", "date", record["host"], record["date"]} <= {*document.words}
    assert record["report"]["diagnosis"]["samples"] == 70
    Path("fused.ckpt").unlink()
    Path("fused.json").rename("kept.json")
    assert "got fused.html, which exists" in refused(capsys, *command)
    cli.main(["report", "kept.json", "--output", "again.html"])
    for path in Path("fused_figures").iterdir():
        assert Path("again_figures", path.name).read_bytes() == path.read_bytes()
    assert Path("again.html").read_bytes() == Path("fused.html").read_bytes()
    assert "got again.html, which exists" in refused(capsys, "report", "kept.json", "--output", "again.html")


def test_fuse_draws_no_report_that_nobody_wants(mlp_checkpoints, in_an_empty_folder):
    command = ["fuse", *map(str, mlp_checkpoints), "-o", "fused.ckpt", *QUIET, "--report", "false"]
    cli.main(command)
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["fused.ckpt", "fused.json", "fused.yaml"]
    assert "report" not in json.loads(Path("fused.json").read_text())


def pixels_of(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(BytesIO(data)).convert("RGB")))


@needs_font
def test_every_figure_is_a_drawing_and_an_image_that_stand_alone(record):
    drawings = svg_files(fusion_report(record).figures)
    assert len(drawings) == 1 + 1 + 4 + 5 and "layers-of-parent-1-and-parent-2-that-correspond" in drawings
    assert rasterised(drawings).keys() == drawings.keys()
    for name, data in rasterised(drawings).items():
        drawn = ElementTree.fromstring(drawings[name])
        assert drawn.tag == "{http://www.w3.org/2000/svg}svg" and "var(" not in drawings[name]
        assert ("after rescale</text>" in drawings[name]) == ("layer-by-layer" in name)  # a chart has its legend
        image = pixels_of(data)
        assert list(image.shape[:2]) == [round(float(drawn.attrib[side])) for side in ("height", "width")]
        assert image[0, 0].tolist() == [255] * 3 and len(image.flatten(0, 1).unique(dim=0)) > 2


def test_without_a_font_there_are_drawings_only(record, monkeypatch, tmp_path):
    draw = resvg_py.svg_to_bytes
    monkeypatch.setattr(resvg_py, "svg_to_bytes", lambda **given: draw(**given, skip_system_fonts=True))
    with pytest.warns(UserWarning, match="Expected a font to draw PNG files with, got none; install one"):
        pictures = Pictures.of(fusion_report(record).figures)
    pictures.write(tmp_path / "figures")
    assert {path.suffix for path in (tmp_path / "figures").iterdir()} == {".svg"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rasterised({}) == {}  # nothing is missing then


def test_any_font_that_is_there_will_do(monkeypatch):
    def only_one_font(svg_string, sans_serif_family=None, **given):
        return svg_string.encode() if sans_serif_family == "Liberation Sans" else b"nothing"

    monkeypatch.setattr(resvg_py, "svg_to_bytes", only_one_font)
    assert rasterised({"a": "<svg/>"}) == {"a": b"<svg/>"}


@needs_font
def test_report_writes_every_figure_beside_the_page(record, in_an_empty_folder, capsys):
    Path("fusion.json").write_text(json.dumps(record))
    cli.main(["report", "fusion.json"])
    assert capsys.readouterr().out == "wrote report.html and 11 figures in report_figures\n"
    assert len(list(Path("report_figures").iterdir())) == 2 * 11
    Path("report.html").unlink()
    assert "got report_figures, which exists; give --overwrite" in refused(capsys, "report", "fusion.json")
    for name in ("of-an-earlier-report.svg", "notes.txt"):
        Path("report_figures", name).touch()
    cli.main(["report", "fusion.json", "--overwrite"])
    names = {path.name for path in Path("report_figures").iterdir()}
    assert len(names) == 2 * 11 + 1 and "notes.txt" in names  # what is no figure is left alone
    cli.main(["report", "fusion.json", "--output", "other.html", "--figures", "false"])
    assert not Path("other_figures").exists()


def images_in(folder: Path) -> dict[str, bytes]:
    """The images that TensorBoard would show, as PNG."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [log] = folder.rglob("version_*")
    events = EventAccumulator(str(log), size_guidance={"images": 0}).Reload()
    return {tag: events.Images(tag)[0].encoded_image_string for tag in events.Tags()["images"]}


@needs_font
def test_the_figures_are_in_tensorboard_where_that_is_the_logger(mlp_checkpoints, in_an_empty_folder, capsys):
    pytest.importorskip("tensorboard")
    board = ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "board"]
    cli.main(["fuse", *map(str, mlp_checkpoints), "-o", "fused.ckpt", *QUIET, *board, "--quiet"])
    assert capsys.readouterr() == ("", "")
    shown = images_in(Path("board"))
    files = {path.stem: path.read_bytes() for path in Path("fused_figures").glob("*.png")}
    assert shown.keys() == {f"report/{name}" for name in files} and len(files) == 10
    name = "layers-of-deep-ckpt-and-shallow-ckpt-that-correspond"
    assert torch.equal(pixels_of(shown[f"report/{name}"]), pixels_of(files[name]))


@needs_font
def test_a_training_that_begins_with_a_fusion_shows_it_in_tensorboard(mlp_checkpoints, in_an_empty_folder):
    pytest.importorskip("tensorboard")
    callback = FusionCallback([str(path) for path in mlp_checkpoints], FusionOptions(num_samples=70))
    options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    trainer = FusionTrainer(max_epochs=1, callbacks=[callback], logger=TensorBoardLogger("board"), **options)
    trainer.fit(ImageClassifier(lr=0.01), DigitsDataModule())
    assert "report/layers-of-deep-ckpt-and-shallow-ckpt-that-correspond" in images_in(Path("board"))


def test_report_reads_the_folder_of_an_experiment(results, record, in_an_empty_folder):
    Path("run").mkdir()
    Path("run/results.json").write_text(json.dumps(results))
    logs = {
        ("seed_0", 9): "epoch,train_loss,val_acc\n0,,0.5\n0,3.5,\n1,,0.125\n",
        ("seed_0", 10): "epoch,train_loss,val_acc\n1,,0.75\n2,,nan\n",  # the training went on here
        ("seed_1", 0): "epoch,val_acc\n0,0.25\n",
    }
    for (seed, version), text in logs.items():
        folder = Path(f"run/{seed}/finetune_fused_default/logs/version_{version}")
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text(text)
    Path("run/seed_1/fuse_default").mkdir()
    Path("run/seed_1/fuse_default/fusion.json").write_text(json.dumps(record))
    cli.main(["report", "run"])
    names = {path.stem for path in Path("report_figures").iterdir()}
    assert {"test-accuracy-of-every-network", "default-layer-costs-of-stage-1-parent-2"} < names
    words = read(Path("report.html").read_text()).words
    for word in ("epoch 0: 0.375", "epoch 1: 0.75", "epoch 0: 3.5"):
        assert f"fused default, finetuned, {word}" in words
    assert "trial" in words and "Fusions" in words and "+ inserted" in words
    # Folders of later versions have the names themselves, which "_" for every other sign has not.
    for folder, name in (("seed_1/fuse_default", "a_b=1"), ("seed_0/finetune_fused_default", "fused a_b=1")):
        Path("run", folder, "stage.json").write_text(json.dumps({"name": name, "description": {}, "inputs": {}}))
    cli.main(["report", "run", "--output", "named.html"])
    assert {path.stem for path in Path("named_figures").iterdir()} == names
    words = read(Path("named.html").read_text()).words
    assert {"a_b=1", "fused a_b=1, finetuned"} < set(words) and "default" not in words
    words = read(Path("report.html").read_text()).words
    assert all(word in words for word in ("1.25", "0" * 64))


@pytest.mark.parametrize(
    "content, message",
    [(None, "which is none; check the path"), ("{", "Expected the JSON that fuse or pipeline writes"),
     ("[]", "got a list"), ('{"x": NaN}', "NaN is no number of JSON"), ("{}", "got KeyError: 'alignments'"),
     ("[" * 10**6, "Expected the JSON")],
)  # fmt: skip
def test_files_that_cannot_be_shown_are_refused(in_an_empty_folder, capsys, content, message):
    if content is not None:
        Path("fusion.json").write_text(content)
    assert message in refused(capsys, "report", "fusion.json")


def test_outputs_that_are_no_page_are_refused(in_an_empty_folder, capsys):
    Path("fusion.json").write_text("{}")
    assert "NAME.html" in refused(capsys, "report", "fusion.json", "--output", "report.txt")
