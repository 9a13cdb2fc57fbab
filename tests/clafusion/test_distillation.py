"""The distillation loss against the published implementation, its definition and its limits."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from clafusion import FusionError, distillation_loss
from tests.helpers import REFERENCE

SETTINGS = [(temperature, alpha) for temperature in (1, 4, 20) for alpha in (0.05, 0.7, 0.99)]


@pytest.fixture(scope="module")
def reference():
    with np.load(REFERENCE / "distillation.npz") as file:
        return {name: torch.from_numpy(np.asarray(value)) for name, value in file.items()}


def loss_and_gradient(reference, temperature, alpha, **options):
    student = reference["student_logits"].clone().requires_grad_()
    loss = distillation_loss(student, reference["teacher_logits"], reference["labels"], temperature, alpha, **options)
    loss.backward()
    return loss.detach(), student.grad


@pytest.mark.parametrize(("temperature", "alpha"), SETTINGS)
def test_the_mean_is_the_published_loss_with_its_gradient(reference, temperature, alpha):
    loss, gradient = loss_and_gradient(reference, temperature, alpha, reduction="mean")
    key = f"T{temperature}_a{alpha}"
    assert torch.allclose(loss, reference[f"loss_{key}"], rtol=1e-5)
    assert torch.allclose(gradient, reference[f"grad_{key}"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("temperature", "alpha"), SETTINGS)
def test_the_default_is_the_definition(reference, temperature, alpha):
    student, teacher, labels = (reference[name].double() for name in ("student_logits", "teacher_logits", "labels"))
    p, q = ((logits / temperature).softmax(1) for logits in (teacher, student))
    divergence = (p * (p / q).log()).sum(1).mean()
    expected = alpha * temperature**2 * divergence + (1 - alpha) * cross_entropy(student, labels.long())
    loss = distillation_loss(student, teacher, labels.long(), temperature, alpha)
    assert torch.allclose(loss, expected, rtol=1e-9)
    # The control: the reductions differ.
    assert not torch.allclose(distillation_loss(student, teacher, labels.long(), temperature, alpha, "mean"), expected)


def test_the_ends_of_alpha_are_the_labels_and_the_teacher(reference):
    student, teacher, labels = (reference[name] for name in ("student_logits", "teacher_logits", "labels"))
    assert torch.equal(distillation_loss(student, teacher, labels, 4, 0), cross_entropy(student, labels))
    assert distillation_loss(student, student + 3, labels, 4, 1).abs() < 1e-5
    log_probabilities = teacher.log_softmax(1)
    assert torch.allclose(
        distillation_loss(student, log_probabilities, labels, 4, 1), distillation_loss(student, teacher, labels, 4, 1)
    )


def test_confident_teachers_do_no_harm():
    student = torch.tensor([[200.0, -200.0]], requires_grad=True)
    loss = distillation_loss(student, -student.detach(), torch.tensor([1]), 1, 0.5)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((0, 0.5), "Expected temperature to be a finite number above 0, got 0"),
        ((-1.0, 0.5), "temperature"),
        ((float("nan"), 0.5), "temperature"),
        ((float("inf"), 0.5), "temperature"),
        ((1, -0.1), r"Expected alpha in \[0, 1\], got -0.1"),
        ((1, 1.1), "alpha"),
        ((1, float("nan")), "alpha"),
        ((1, 0.5, "sum"), "Expected reduction batchmean or mean, got 'sum'"),
    ],
)
def test_settings_out_of_their_domain_are_refused(settings, message):
    with pytest.raises(FusionError, match=message):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), *settings)


@pytest.mark.parametrize(
    ("student", "teacher", "labels"), [((2, 3), (2, 4), (2,)), ((2, 3), (2, 3), (3,)), ((2,), (2,), ())]
)
def test_shapes_that_do_not_fit_are_refused(student, teacher, labels):
    with pytest.raises(FusionError, match=r"Expected logits \[N, classes\] of student and teacher and labels \[N\]"):
        distillation_loss(torch.zeros(student), torch.zeros(teacher), torch.zeros(labels, dtype=torch.long), 1, 0.5)


def test_without_a_share_labels_are_not_read(reference):
    student, teacher = reference["student_logits"], reference["teacher_logits"]
    unknown = torch.full((len(student),), 10**6)
    known = distillation_loss(student, teacher, reference["labels"], 4, 1)
    assert torch.equal(distillation_loss(student, teacher, unknown, 4, 1), known)


def test_a_class_that_the_teacher_excludes_has_no_part_in_the_divergence():
    student = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    teacher = torch.tensor([[0.3, -torch.inf, 0.1]], dtype=torch.float64).expand(5, 3)
    p, q = (logits.div(2).softmax(1) for logits in (teacher, student))
    expected = 4 * (p[:, ::2] * (p[:, ::2] / q[:, ::2]).log()).sum(1).mean()
    loss = distillation_loss(student, teacher, torch.zeros(5, dtype=torch.long), 2.0, 1.0)
    loss.backward()
    assert torch.allclose(loss, expected) and student.grad is not None and student.grad.isfinite().all()
