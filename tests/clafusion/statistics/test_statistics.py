"""What is measured on samples: sums that stream, and what counts as samples."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from clafusion import FusionError, FusionOptions, fuse, trace
from clafusion.statistics import moments as statistics
from clafusion.statistics.memory import CHUNK
from clafusion.statistics.moments import Moments, Observation, paired_moments
from clafusion.statistics.samples import CPU_CHUNK, batch_size, chunks, collect, quick_size, rows
from clafusion.tracing.execution import GraphRunner
from clafusion.transport.solvers import ground_cost
from tests.helpers import images, mlp, resnet, vectors


def runners_of(models, samples):
    return [GraphRunner(trace(model, samples[:2]).capture) for model in models]


def pair(node: str, one: int, other: int, dim: int = 1) -> tuple[Observation, Observation]:
    """The neurons at one node of two networks of one architecture."""
    return Observation(one, node, dim, None), Observation(other, node, dim, None)


def test_moments_are_the_sums_they_name():
    x, y = vectors(20, 3), vectors(20, 4, 1)
    moments = Moments.of(x, y)
    assert moments.count == 20
    for got, expected in [
        (moments.x, x.sum(0)), (moments.yy, (y * y).sum(0)), (moments.xx, (x * x).sum(0)),
        (moments.y, y.sum(0)), (moments.xy, torch.einsum("oi,oj->ij", x, y)),
    ]:  # fmt: skip
        assert torch.allclose(got, expected)


def test_moments_are_float64_whatever_comes():
    assert Moments.of(torch.ones(2, 3).bfloat16(), torch.ones(2, 3)).xy.dtype == torch.float64


def test_a_batch_is_added_onto_earlier_ones():
    x, y = images(20, 3), images(20, 3, 1)
    whole = Moments.of(x, y)
    total = Moments.of(x[12:], y[12:], onto=Moments.of(x[:12], y[:12]))
    assert total.count == whole.count == 180
    for name in ("x", "y", "xx", "yy", "xy"):
        assert torch.allclose(getattr(total, name), getattr(whole, name))


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("count", [30, 300])
def test_single_precision_gives_the_sums_of_one_sample_at_a_time_in_double(count, offset):
    """Stacked sample by sample, the straightforward way; a mean a thousand times the spread loses nothing."""
    x, y = images(count, 8).float() + offset, images(count, 8, 1).float() - 2 * offset
    stacked = [torch.cat([rows(sample[None]) for sample in one]).double() for one in (x, y)]
    moments = Moments.of(x, y)
    assert moments.count == len(stacked[0])
    for got, expected in [
        (moments.x, stacked[0].sum(0)), (moments.yy, stacked[1].square().sum(0)),
        (moments.xy, stacked[0].T @ stacked[1]),
    ]:  # fmt: skip
        assert torch.allclose(got, expected, rtol=1e-6, atol=1e-3)
    correlation = 1 - torch.corrcoef(torch.cat(stacked, 1).T)[:3, 3:]
    assert torch.allclose(ground_cost(moments), correlation, atol=1e-5)


def test_neurons_that_differ_little_are_told_apart_in_single_precision():
    x = images(300, 8).float()
    y = x + 1e-2 * images(300, 8, 1).float()
    expected = (rows(x).double() - rows(y).double()).norm(dim=0)
    assert torch.allclose(ground_cost(Moments.of(x, y), "euclidean").diagonal(), expected, rtol=1e-2)


def test_what_is_zero_stays_zero():
    moments = Moments.of(torch.zeros(5, 3, 4, 4), images(5, 4).float())
    assert not moments.xy.any() and not moments.xx.any() and moments.yy.all()


@pytest.mark.parametrize("make", [lambda seed: resnet([1, 1], seed, batch_norm=True), lambda seed: mlp([6, 5], seed)])
def test_streamed_sums_equal_those_of_all_samples_at_once(make, monkeypatch):
    models = [make(seed) for seed in range(3)]
    samples = images(150, 8) if hasattr(models[0], "conv1") else vectors(150)
    runners = runners_of(models, samples)
    nodes = [layer.pre for layer in trace(models[0], samples[:2]).layers]
    pairs = {(node, one, other): pair(node, one, other) for node in nodes for one, other in ((0, 1), (2, 1))}
    streamed = paired_moments(runners, pairs, samples)
    monkeypatch.setattr(statistics, "chunks", lambda samples, size: (samples,))
    at_once = paired_moments(runners, pairs, samples)
    assert len(chunks(samples)) == 5 and list(streamed) == list(at_once) and streamed.keys() == pairs.keys()
    for key, moments in streamed.items():
        assert moments.count == at_once[key].count
        for name in ("x", "y", "xx", "yy", "xy"):
            assert torch.allclose(getattr(moments, name), getattr(at_once[key], name), rtol=1e-12)


class Branching(torch.nn.Module):
    """With an activation that stays alive for long."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.inner = torch.nn.Conv2d(8, 8, 3, padding=1)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        return self.head((x + self.inner(x).relu()).mean((2, 3)))


def test_what_is_alive_at_once_is_counted():
    [chain], [branching] = runners_of([mlp([6, 5])], vectors(2)), runners_of([Branching().double()], images(2, 4))
    assert chain.live_numbers() == 12 + 12  # the input and its flattened view; later layers are smaller
    assert branching.live_numbers() == 3 * 8 * 16  # the stream, and the branch before and after its ReLU


def test_a_batch_is_small_where_its_largest_activation_is_large(monkeypatch):
    runners = runners_of([Branching().double()], images(2, 4))
    assert runners[0].largest_output() == 8 * 16 and quick_size(runners, 50) == 50
    monkeypatch.setattr("clafusion.statistics.samples.REUSED_BYTES", 5 * 8 * 8 * 16)
    assert quick_size(runners, 50) == 5 and quick_size(runners, 3) == 3


def test_the_batch_follows_from_the_memory_budget():
    runners = runners_of([resnet([1, 1], seed, width=64) for seed in range(2)], images(2, 32))
    each = sum(8 * runner.live_numbers() for runner in runners)
    assert each > 2**20  # MiB
    assert batch_size(runners, 1) == 1 < batch_size(runners, 20) == 20 * 2**20 // each < CPU_CHUNK
    assert batch_size(runners, 10**6) == CPU_CHUNK


@pytest.mark.parametrize("correction", ["none", "repair", "refit"])
def test_the_memory_budget_changes_nothing_but_rounding(correction, monkeypatch):
    models, samples = [resnet([1, 1], 0), resnet([2, 1], 1)], images(70, 8)
    monkeypatch.setattr(GraphRunner, "live_numbers", lambda self: 2**15)  # 256 KiB a sample
    sizes, fused = [], []
    cut = statistics.chunks
    monkeypatch.setattr(
        "clafusion.correction.correct.chunks", lambda samples, size: sizes.append(size) or cut(samples, size)
    )
    for budget in (1, 256):
        options = FusionOptions(correction=correction, targets="matched", memory_budget=budget)
        fused.append(fuse(models, [samples], options).model(samples))
    assert torch.allclose(*fused, atol=1e-6)
    assert sizes == ([] if correction == "none" else [1, CPU_CHUNK])


def test_sums_are_those_of_the_features():
    a, b = mlp([6, 5], 0), mlp([6, 5], 1)
    samples = vectors(100)
    node = trace(a, samples[:2]).layers[0].post
    moments = paired_moments(runners_of([a, b], samples), {node: pair(node, 0, 1)}, samples)[node]
    with torch.no_grad():
        expected = Moments.of(a.fc1(samples).relu(), b.fc1(samples).relu())
    assert torch.allclose(moments.xy, expected.xy)


def test_measuring_leaves_gradients_as_they_were():
    a, samples = mlp([6]), vectors(10)
    node = trace(a, samples[:2]).layers[0].pre
    moments = paired_moments(runners_of([a, a], samples), {node: pair(node, 0, 1)}, samples)
    assert not any(m.xy.requires_grad or m.xy.is_inference() for m in moments.values())
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_an_error_while_measuring_does_not_leave_inference_mode_on(monkeypatch):
    a, samples = mlp([6]), vectors(10)
    node, runners = trace(a, samples[:2]).layers[0].pre, runners_of([a, a], samples)
    monkeypatch.setattr(Moments, "of", classmethod(lambda cls, x, y, onto: 1 / 0))
    try:
        paired_moments(runners, {node: pair(node, 0, 1)}, samples)
    except ZeroDivisionError as error:
        kept = error  # a notebook keeps the last traceback, and with it every frame
    assert kept and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_neurons_are_observed_wherever_they_lie():
    """As channels of images or of tokens, or flattened, where each of their turns is an observation of its own."""
    maps = images(4, 4)
    expected = Moments.of(maps, maps)
    tokens = maps.flatten(2).movedim(1, -1)
    turns = torch.arange(3 * 16).reshape(3, 16).T
    for output, dim, entries in ((maps, 1, None), (tokens, 2, None), (maps.flatten(1), 1, turns)):
        seen = Observation(0, "", dim, entries).of(output)
        found = Moments.of(seen, seen)
        assert found.count == expected.count == 64
        assert torch.allclose(found.x, expected.x) and torch.allclose(found.xy, expected.xy)


def test_rows_are_samples_times_positions():
    maps = images(2, 4)
    assert rows(maps).shape == (32, 3)
    assert torch.equal(rows(maps)[5], maps[0, :, 1, 1])
    assert torch.equal(rows(vectors(3)), vectors(3))


@pytest.mark.parametrize("count", [1, 4, 63, 64, 65, 128, 129, 500])
def test_chunks_are_even_so_that_none_is_too_small_to_estimate_from(count):
    sizes = [len(part) for part in chunks(torch.zeros(count, 1))]
    assert sum(sizes) == count and max(sizes) <= CHUNK and max(sizes) - min(sizes) <= 1


def test_collect_takes_tensors_tuples_and_loaders():
    samples = vectors(10)
    loader = DataLoader(TensorDataset(samples, torch.arange(10)), batch_size=4)
    for batches in (
        [samples], [samples[:4], samples[4:]], [(samples, torch.arange(10))], [[samples, 1, "label"]],
        loader, iter(loader),
    ):  # fmt: skip
        assert torch.equal(collect(batches, 7), samples[:7])
        assert not collect([samples], 20).requires_grad


def test_collect_reads_no_further_than_needed():
    read = []

    def batches():
        for number in range(10):
            read.append(number)
            yield torch.full((3, 2), float(number))

    assert collect(batches(), 6).shape == (6, 2) and read == [0, 1]


def test_collect_gives_what_there_is_when_there_is_less():
    assert collect([vectors(3)], 10).shape == (3, 12)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "Expected at least one batch of samples, got none"),
        (
            [{"label": torch.zeros(2).long()}],
            r"batches of samples \[batch, ...\], got dict with 'label'; say with `inputs`",
        ),
        ([[1.0, 2.0]], r"batches of samples \[batch, ...\], got list of float, float"),
        ([[]], r"batches of samples \[batch, ...\], got list of nothing"),
        (torch.zeros(4), r"batches of samples \[batch, ...\], got Tensor"),
        ([torch.zeros(4)], r"batches of samples \[batch, ...\], got Tensor"),
        ([torch.zeros(2, 3), torch.zeros(2, 4)], r"samples of one shape, got \[3\] and \[4\]"),
        ([torch.full((2, 3), float("nan"))], "Expected finite samples, got NaN or infinity"),
        ([torch.full((2, 3), float("inf"))], "Expected finite samples, got NaN or infinity"),
    ],
)
def test_collect_refuses(batches, message):
    with pytest.raises(FusionError, match=message):
        collect(batches, 10)
