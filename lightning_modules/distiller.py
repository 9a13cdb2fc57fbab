"""The classifier that learns from the labels and from a frozen teacher."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from clafusion import FusionOptions
from clafusion.distillation import Reduction, check_distillation, distillation_loss
from clafusion.ensemble import Ensemble, Space
from clafusion.errors import FusionError
from clafusion.lightning import checkpoint_to_restore
from clafusion.lightning_modules.checkpoints.reading import load_classes, load_fusion, load_parent
from clafusion.lightning_modules.classifier import Batch, ImageClassifier
from clafusion.lightning_modules.compatibility import ImageData, check_images, load_alike
from clafusion.lightning_modules.files import sha256
from clafusion.teachers.label_sets import check_classes

TeacherKind = Literal["mean", "gated", "auto"]
#: Where a checkpoint keeps the teachers' checksums.
_TAUGHT_BY = "teachers_sha256"


class Distiller(ImageClassifier):
    """An `ImageClassifier`, the student, that is trained with `clafusion.distillation_loss`.

    The student is built from `architecture`, read from the file `student`, or fused by `FusionCallback`. The teachers
    are read when training begins, and only then: they are frozen, in eval mode, and no part of the module or of its
    checkpoints, so that those are ordinary checkpoints of `ImageClassifier` that can be tested without them.

    Args:
        teachers: Checkpoints of fit or fuse, or files of save_network.
        student: Such a file, whose network the student starts from. A resumed training does not read it again.
        temperature: Softens what teachers and student say, see `distillation_loss`.
        alpha: Share of the teachers in the loss, in `[0, 1]`.
        reduction: `batchmean`, or `mean` as in the published runs, see `distillation_loss`.
        teacher: What several teachers say together: the `mean` of their probabilities; `gated`: for every image those
            of the teachers that know it, see `Ensemble`; `auto`: gated unless they agree on more than nine of ten.
        gate_temperature: Of the gate; the smaller, the more often one teacher decides alone.
        num_samples: Unlabelled training images that the gate is learned from before the first step, at most.
        classes: Per teacher the labels that its outputs stand for, where they are not those of the data.
        **recipe: The arguments of `ImageClassifier`.

    Raises:
        FusionError: There is no teacher, or a setting is out of its domain or does not fit the number of teachers.

    Example:
        >>> student = {"name": "MLP", "in_features": 64, "hidden": [16], "num_classes": 10}
        >>> distiller = Distiller(["teacher.ckpt"], architecture=student, temperature=4.0)
        >>> distiller(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        teachers: list[str],
        student: str | None = None,
        temperature: float = 4.0,
        alpha: float = 0.9,
        reduction: Reduction = "batchmean",
        teacher: TeacherKind = "mean",
        gate_temperature: float = 1.0,
        num_samples: int = 2000,
        classes: list[list[int]] | None = None,
        **recipe: Any,
    ) -> None:
        if isinstance(teachers, str) or not teachers:
            raise FusionError(f"Expected a list of teachers, got {teachers!r}; give --model.teachers '[a.ckpt]'")
        check_distillation(temperature, alpha, reduction)
        if classes is not None and len(classes) != len(teachers):
            raise FusionError(f"Expected the classes of {len(teachers)} teachers, got {classes}; change them")
        # Checks what a fusion can be asked for, too.
        FusionOptions(teacher=teacher, gate_temperature=gate_temperature, num_samples=num_samples)
        super().__init__(**recipe)
        self.teachers = [str(path) for path in teachers]
        self.student = student
        self.temperature = temperature
        self.alpha = alpha
        self.reduction: Reduction = reduction
        self.teacher: TeacherKind = teacher
        self.gate_temperature = gate_temperature
        self.num_samples = num_samples
        self.classes = classes
        # In a tuple, where no module looks for children: not to be trained, saved, switched to training or counted.
        self._teacher: tuple[nn.Module, ...] = ()
        #: The teachers' checksums, while training.
        self._taught_by: list[str] = []
        # Lightning has collected the arguments as they were given; what is saved is plain and canonical.
        self.hparams.update(self._saved, teachers=self.teachers)

    def setup(self, stage: str) -> None:
        """Read the student, if it comes from a file, and the teachers, and check that all fits the data."""
        if stage == "fit":
            self._load_student()
        super().setup(stage)
        if stage == "fit":
            self._teacher = (self._load_teacher(),)
            self._taught_by = [sha256(path) for path in self.teachers]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The distillation loss of a batch."""
        images, labels = batch
        [teacher] = self._teacher
        with torch.no_grad():
            target = teacher(images)
        settings = (self.temperature, self.alpha, self.reduction, self.label_smoothing)
        loss = distillation_loss(self(images), target, labels, *settings)
        return self._learnt(loss, len(labels))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the teachers' checksums, besides what every classifier adds."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_TAUGHT_BY] = self._taught_by

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with other teachers than the training began with.

        Raises:
            FusionError: The file of a teacher is another one.
        """
        super().on_load_checkpoint(checkpoint)
        known = checkpoint.get(_TAUGHT_BY)
        if self._taught_by and known and known != self._taught_by:
            raise FusionError(
                f"Expected the teachers that this training began with, got other ones in {', '.join(self.teachers)}; "
                "put the files back, or begin anew"
            )

    def teardown(self, stage: str) -> None:
        """Let the teachers go."""
        self._teacher = ()

    def _load_student(self) -> None:
        """Start from the student's file; a training that is resumed has its network from its checkpoint."""
        if self.student is None or checkpoint_to_restore(self.trainer) is not None:
            return
        if self.network is not None:
            raise FusionError(
                f"Expected one origin of the student, got a network besides the file {self.student}; leave out "
                "--model.student, or --model.architecture and FusionCallback"
            )
        self.set_network(load_parent(self.student).float().train())
        self.fusion = load_fusion(self.student)
        for names in load_classes([self.student]) or []:
            self.class_names = names

    def _load_teacher(self) -> nn.Module:
        """The teacher, or the teachers as one, on the device and in the precision of the training."""
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(datamodule, "image_shape"):
            teachers = self._load_teachers(datamodule)
        else:
            teachers = [load_parent(path) for path in self.teachers]
        device = self.trainer.strategy.root_device
        frozen = [teacher.float().requires_grad_(False).eval().to(device) for teacher in teachers]
        together = frozen[0] if len(frozen) == 1 and self.classes is None else self._together(frozen, datamodule)
        if hasattr(datamodule, "image_shape"):
            self._check_classes(together, datamodule)
        return self.trainer.precision_plugin.convert_module(together.eval())

    def _load_teachers(self, data: ImageData) -> list[nn.Module]:
        """The teachers' networks, each with the classes of the data, or with the labels that it is said to have."""
        if self.classes is None:
            return load_alike(self.teachers, data, "teachers")
        teachers = [load_parent(path) for path in self.teachers]
        paths = zip(self.teachers, teachers, strict=True)
        check_classes(self.classes, [check_images(teacher, data, path, 1) for path, teacher in paths])
        return teachers

    def _together(self, teachers: list[nn.Module], datamodule: Any) -> Ensemble:
        """The teachers as one; its gate is that of the first rank on all of them."""
        if self.teacher == "mean":
            return Ensemble(teachers, classes=self.classes)
        if not hasattr(datamodule, "alignment_batches"):
            raise FusionError(
                f"Expected a data module with alignment_batches to learn a gate from, got {type(datamodule).__name__}; "
                "choose teacher mean"
            )
        device = self.trainer.strategy.root_device
        samples = torch.cat(list(datamodule.alignment_batches(self.num_samples, 0))).to(device)
        space: Space = "auto" if self.teacher == "auto" else "gated"
        ensemble = Ensemble(teachers, None, space, samples, self.gate_temperature, self.classes)
        learned = self.trainer.strategy.broadcast(ensemble.teacher.to(torch.device("cpu")))
        ensemble.teacher = learned.to(device)
        return ensemble

    def _check_classes(self, teacher: nn.Module, datamodule: Any) -> None:
        if self.network is None:
            return
        taught = check_images(teacher, datamodule, self.teachers[0])
        learnt = check_images(self.network, datamodule, "the student")
        if taught != learnt:
            raise FusionError(
                f"Expected a teacher with the student's {learnt} classes, got {taught} from {self.teachers[0]}; "
                "choose another"
            )
