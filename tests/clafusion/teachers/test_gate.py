"""The gate: which of several classifiers is trusted, without labels; the teacher that it makes; the gated ensemble."""

import pytest
import torch
from torch import Tensor, nn

from clafusion import Ensemble, FusionError
from clafusion.teachers.gate import Gate
from clafusion.teachers.teacher import Teacher, agreement, teacher_of

CLASSES = 6


def experts(count: int = 600, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Logits of two classifiers, each sure of three of six classes and noisy on the others, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    logits = []
    for first in (0, 3):
        noise = torch.randn(count, CLASSES, generator=generator)
        noise[:, [c for c in range(CLASSES) if not first <= c < first + 3]] -= 8
        own = (labels >= first) & (labels < first + 3)
        noise[own, labels[own]] += 4
        noise[~own, first] += 3  # confidently wrong
        logits.append(noise)
    return logits, labels


def accuracy(answers: Tensor, labels: Tensor) -> float:
    return float((answers.argmax(1) == labels).double().mean())


def test_the_gate_finds_who_knows_a_sample():
    logits, labels = experts()
    gated = teacher_of(logits, (0.5, 0.5), "gated", 1.0)
    plain = teacher_of(logits, (0.5, 0.5), "mean", 1.0)
    assert accuracy(gated.log_probabilities(logits), labels) > accuracy(plain.log_probabilities(logits), labels) + 0.05
    trusted = gated.shares(logits).argmax(1)
    assert float((trusted == (labels >= 3)).double().mean()) > 0.75


def test_shares_are_a_distribution_and_do_not_depend_on_scale_and_shift_of_the_logits():
    logits, _ = experts()
    shares = Gate.learn(logits).shares(logits)
    assert torch.allclose(shares.sum(1), torch.ones(len(shares), dtype=torch.float64))
    changed = [5 * logits[0] + 3, logits[1]]
    torch.testing.assert_close(Gate.learn(changed).shares(changed), shares, rtol=1e-6, atol=1e-6)


def test_the_order_of_the_classifiers_does_not_matter():
    logits, _ = experts()
    forwards, backwards = Gate.learn(logits).shares(logits), Gate.learn(logits[::-1]).shares(logits[::-1])
    torch.testing.assert_close(backwards.flip(1), forwards, rtol=1e-6, atol=1e-9)


def test_classifiers_that_say_the_same_share_equally():
    logits, _ = experts()
    shares = Gate.learn([logits[0], logits[0]]).shares([logits[0], logits[0]])
    torch.testing.assert_close(shares, torch.full_like(shares, 0.5))


def test_a_classifier_of_weight_zero_has_no_share():
    logits, _ = experts()
    teacher = Teacher((1.0, 0.0), Gate.learn(logits))
    torch.testing.assert_close(teacher.log_probabilities(logits), logits[0].log_softmax(1))


def test_without_a_gate_it_is_the_weighted_mean_of_the_probabilities():
    logits, _ = experts()
    expected = 0.3 * logits[0].softmax(1) + 0.7 * logits[1].softmax(1)
    torch.testing.assert_close(Teacher((0.3, 0.7)).log_probabilities(logits).exp(), expected)


def test_auto_takes_a_gate_where_classifiers_disagree():
    logits, _ = experts()
    assert agreement(logits) < 0.75 and agreement([logits[0], logits[0]]) == 1
    assert teacher_of(logits, (0.5, 0.5), "auto", 1.0).gate is not None
    assert teacher_of([logits[0], 2 * logits[0]], (0.5, 0.5), "auto", 1.0).gate is None


def test_a_gate_is_the_softer_the_more_the_classifiers_agree():
    logits, _ = experts()
    often = [logits[0], torch.where(torch.arange(len(logits[0]))[:, None] % 2 == 0, logits[0], logits[1])]
    temperatures = [teacher_of(one, (0.5, 0.5), "gated", 3.0).gate.temperature for one in (logits, often)]
    shares = [agreement(one) for one in (logits, often)]
    assert temperatures == pytest.approx([3.0 / (1 - share**2) for share in shares]) and shares[0] < shares[1]
    same = teacher_of([logits[0], logits[0]], (0.5, 0.5), "gated", 1.0)
    assert same.shares([logits[0], logits[0]]) == pytest.approx(0.5)


def test_a_lower_temperature_decides_more():
    logits, _ = experts()
    shares = [Gate.learn(logits, temperature).shares(logits).max(1).values.mean() for temperature in (4.0, 1.0, 0.25)]
    assert shares[0] < shares[1] < shares[2]


def test_what_a_gate_cannot_be_learned_from_is_refused():
    with pytest.raises(FusionError, match="Expected at least 2 samples to learn a gate from, got 1"):
        Gate.learn([torch.zeros(1, 3), torch.zeros(1, 3)])
    with pytest.raises(FusionError, match="Expected finite logits"):
        Gate.learn([torch.full((4, 3), float("nan")), torch.zeros(4, 3)])


def test_the_gated_ensemble_is_its_teacher():
    torch.manual_seed(0)
    members, samples = [nn.Linear(4, 3), nn.Linear(4, 3)], torch.randn(100, 4)
    ensemble = Ensemble(members, space="gated", samples=samples)
    logits = [member(samples) for member in members]
    expected = teacher_of([one.detach() for one in logits], (0.5, 0.5), "gated", 1.0).log_probabilities(logits)
    torch.testing.assert_close(ensemble(samples), expected)
    ensemble(samples).sum().backward()
    assert members[0].weight.grad is not None


def test_samples_belong_to_the_gate_alone():
    members = [nn.Linear(4, 3), nn.Linear(4, 3)]
    for given in ({"space": "gated"}, {"samples": torch.zeros(5, 4)}):
        with pytest.raises(FusionError, match="Expected samples with space gated or auto, and with no other"):
            Ensemble(members, **given)
