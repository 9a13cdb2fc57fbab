"""The options of a fusion: plain, frozen values, checked when they are made."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from clafusion.errors import FusionError

#: The least value of what is counted.
LEAST = {"pin_first": 0, "pin_last": 0, "anchor": 0, "anchor_lead": 1, "num_samples": 2, "memory_budget": 1}
#: A lead with which the hidden layers are the anchor's.
ALONE = 1e9


@dataclass(frozen=True)
class FusionOptions:
    """How to fuse. The defaults are the best measured ones; `FusionOptions.paper()` gives the published ones.

    Attributes:
        layer_measure: dissimilarity of layers: 1 - CKA, 1 - CCA, Wasserstein distance of their neurons, squared
            difference of their neuron counts, or of their indices.
        debiased: use the debiased CKA, streamed over batches; biased CKA needs all samples at once.
        pin_first: leading layers of every stage that are matched by force.
        pin_last: trailing layers of every stage that are matched by force.
        mapping: the layer map: `optimal`, or the baselines `chain` (1..n) and `random`.
        balance: `insert` identities into the shallower parent, or `merge` layers of the deeper.
        relu: when merging, what replaces a ReLU between merged layers: per neuron the sign of its `sum` over the
            samples, whether it is active in the `majority`, or the share of samples in which it is (`average`).
        features: what neurons are compared by: `activations` (after the activation function), `preactivations`, or
            incoming `weights`.
        cost: ground cost between the features of two neurons.
        squared: square the euclidean distance.
        normalize: how a cost matrix is normalised.
        solver: optimal transport solver.
        regularization: entropic regularisation of `sinkhorn` and `unbalanced`.
        marginal_regularization: weight of the marginals of `unbalanced`.
        mass: mass of a neuron: uniform, or the l1 or l2 norm of its incoming weights.
        streams: `shared`: one map for a whole residual stream; `per_layer`: one map per layer, as published.
        head: the output layer: `average` label by label, `transport` its outputs too (published), or keep the
            `anchor`'s.
        anchor: index of the parent whose neurons and widths the result has, or its name where the parents have names
            (`for_parents`): in `fuse` and `FusionCallback` those of their files; `agreement`: the parent that agrees
            most often with what all parents predict together, which without labels is the best guess at the best of
            them.
        weights: weight of every parent in the average; None: equal.
        combine: `transport` the neurons before averaging, or plainly `average`.
        many: more than two parents: all onto the anchor at once, or one after another (`iterative`).
        correction: what is done about the shrunken variance of an average: nothing, `rescale` or `repair` the neurons,
            or `refit` the layers.
        anchor_lead: how many times its weight the anchor counts in what hidden layers are refit to, against one other
            parent (against more, as much more for each of them); the output layer is fitted to what all parents
            predict, at their weights. With 1 the features are the mean of the parents', which one layer can only
            approximate; the larger, the closer they are to the anchor's; with 1e9 they are the anchor's as they are.
        teacher: what all parents say together, which the output layer is refit to: the `mean` of their probabilities;
            `gated`: for every sample those of the parents that know it (`Gate`), which it takes where they know
            different things; `auto`: gated unless they agree on more than nine of ten samples.
        gate_temperature: of the gate of parents that never agree; the smaller, the more often one parent decides alone.
            The more they agree, the softer it is.
        targets: what hidden layers are refit to: `matched`: every neuron of the anchor and what is like it in the other
            parents; `union`: neurons chosen among those of all parents; `centroids`: means of similar neurons of all
            parents; `auto`: whichever gives a network nearer to the teacher on samples that are held back, the anchor
            with a new output layer among them.
        width: neurons of the result as a multiple of the anchor's, with targets union.
        budget: how neurons are shared out among the layers, with targets union. `none`: each has `width` times the
            anchor's. `parameters` or `macs` (multiply-adds): those are kept that change what the parents say most for
            what they cost, in all no more than the anchor would with `width` times its neurons in every layer.
        ridge: pull of a refit layer towards the averaged weights, in units of the mean square of its inputs.
        num_samples: unlabelled samples to measure on, at most.
        memory_budget: MiB for the activations that are computed at once, from which the batch follows.
        seed: seed of the random layer map and of the choice of samples.

    Raises:
        FusionError: on construction, for any value outside its domain.
    """

    layer_measure: Literal["cka", "cca", "wasserstein", "neurons", "index"] = "cka"
    debiased: bool = True
    pin_first: int = 1
    pin_last: int = 1
    mapping: Literal["optimal", "chain", "random"] = "optimal"
    balance: Literal["insert", "merge"] = "insert"
    relu: Literal["sum", "majority", "average"] = "sum"
    features: Literal["activations", "preactivations", "weights"] = "activations"
    cost: Literal["correlation", "euclidean", "cosine"] = "correlation"
    squared: bool = False
    normalize: Literal["none", "max", "mean", "median", "log"] = "none"
    solver: Literal["exact", "sinkhorn", "unbalanced", "gromov"] = "exact"
    regularization: float = 0.05
    marginal_regularization: float = 1.0
    mass: Literal["uniform", "l1", "l2"] = "uniform"
    streams: Literal["shared", "per_layer"] = "shared"
    head: Literal["average", "transport", "anchor"] = "average"
    anchor: int | str = 0
    weights: Sequence[float] | None = None
    combine: Literal["transport", "average"] = "transport"
    many: Literal["many_to_one", "iterative"] = "many_to_one"
    correction: Literal["none", "rescale", "repair", "refit"] = "refit"
    anchor_lead: float = 6.0
    teacher: Literal["auto", "mean", "gated"] = "auto"
    gate_temperature: float = 1.0
    targets: Literal["auto", "matched", "union", "centroids"] = "auto"
    width: float = 1.0
    budget: Literal["none", "parameters", "macs"] = "none"
    ridge: float = 1e-4
    num_samples: int = 2000
    memory_budget: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            _check(name, getattr(self, name), hint)
        for name, least in LEAST.items():
            value = getattr(self, name)
            if isinstance(value, int) and value < least:
                raise FusionError(f"Expected {name} of at least {least}, got {value}")
        for name in ("regularization", "marginal_regularization", "anchor_lead", "ridge", "gate_temperature", "width"):
            if not 0 < getattr(self, name) < float("inf"):
                raise FusionError(f"Expected a positive {name}, got {getattr(self, name)}")
        if self.squared and self.cost != "euclidean":
            raise FusionError(f"Expected squared only with cost euclidean, got cost {self.cost}")
        if self.correction != "none" and self.streams != "shared":
            raise FusionError(
                f"Expected correction none with streams per_layer, got {self.correction}; share the streams"
            )
        for name, plain in (("teacher", "mean"), ("targets", "matched")):
            if self.correction != "refit" and getattr(self, name) not in ("auto", plain):
                raise FusionError(
                    f"Expected correction refit with {name} {getattr(self, name)}, got {self.correction}; nothing else "
                    "is fitted to it"
                )
        for name, without in (("width", 1.0), ("budget", "none")):
            if getattr(self, name) != without and self.targets not in ("union", "centroids"):
                raise FusionError(f"Expected targets union with {name} {getattr(self, name)}, got {self.targets}")
        if self.width != 1 and self.many != "many_to_one":
            raise FusionError(f"Expected many many_to_one with width {self.width}, got {self.many}")
        if self.weights is not None:
            if not _are_weights(self.weights):
                raise FusionError(f"Expected weights of at least 0 with a positive sum, got {list(self.weights)}")
            object.__setattr__(self, "weights", tuple(float(weight) for weight in self.weights))

    @property
    def only_anchor(self) -> bool:
        """Whether the hidden layers are those of the anchor, as they are."""
        return self.correction == "refit" and self.targets == "matched" and self.anchor_lead >= ALONE

    def for_parents(self, *names: Sequence[str]) -> "FusionOptions":
        """Return the options with the number of the anchor where they give its name.

        Args:
            names: what the parents are called, one list or several: a file by its name and by its path.

        Raises:
            FusionError: no parent has that name.

        Example:
            >>> FusionOptions(anchor="b.ckpt").for_parents(["a.ckpt", "b.ckpt"]).anchor
            1
        """
        if isinstance(self.anchor, int) or self.anchor == "agreement":
            return self
        found = next((called.index(self.anchor) for called in names if self.anchor in called), None)
        if found is None:
            raise FusionError(
                f"Expected anchor to be {', '.join(names[0])}, a number from 0, or agreement, got {self.anchor}; "
                "choose one of them"
            )
        return replace(self, anchor=found)

    @property
    def anchor_index(self) -> int:
        """The anchor, where it is not left to `fuse` to choose it."""
        assert isinstance(self.anchor, int)
        return self.anchor

    @classmethod
    def paper(cls, **changes: Any) -> "FusionOptions":
        """The published settings (CLAFusion, Nguyen et al. 2023), with changes if any."""
        published: dict[str, Any] = {
            "debiased": False,
            "features": "preactivations",
            "cost": "euclidean",
            "streams": "per_layer",
            "head": "transport",
            "correction": "none",
            "num_samples": 200,
        }
        return cls(**{**published, **changes})

    def to_dict(self) -> dict[str, Any]:
        """The options as plain containers."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def _check(name: str, value: Any, hint: Any) -> None:
    """One value against its type hint: a Literal, bool, int, float, or optional sequence of numbers."""
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise FusionError(f"Expected {name} to be one of {', '.join(get_args(hint))}, got {value!r}")
        return
    if name == "weights":
        ok = value is None or (isinstance(value, list | tuple) and all(_is_number(item) for item in value))
        expected = "a list of numbers or None"
    elif name == "anchor":
        ok, expected = type(value) in (int, str), "a whole number, agreement, or the name of a parent"
    elif hint is float:
        ok, expected = _is_number(value), "a number"
    else:
        ok, expected = type(value) is hint, f"{hint.__name__}"
    if not ok:
        raise FusionError(f"Expected {name} to be {expected}, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def normalized(weights: Sequence[float] | None, count: int) -> list[float]:
    """Weights that sum to one.

    Raises:
        FusionError: if there is not one weight per network.
    """
    shares = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(shares) != count or not _are_weights(shares):
        raise FusionError(f"Expected {count} weights of at least 0 with a positive sum, got {list(weights or [])}")
    return [share / sum(shares) for share in shares]


def _are_weights(values: Sequence[float]) -> bool:
    return all(0 <= value < math.inf for value in values) and sum(values) > 0
