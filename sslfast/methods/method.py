"""`Method`, the base class of the training methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from torch import Tensor, nn

from sslfast.errors import MAX_CLASSES, too_many_classes
from sslfast.losses import DualContrastiveLoss, DualLoss
from sslfast.ops.reduce import SINGLE_PROCESS, Reducer
from sslfast.options import MethodOptions
from sslfast.ranges import Range
from sslfast.renamed import METHOD_ATTRIBUTES, message


@dataclass(frozen=True)
class ConsistencyOptions(MethodOptions):
    """Options of a method that adds a weighted loss on the unlabelled volumes."""

    consistency_weight: Annotated[float, Range(0, 10**6)] = 0.1
    """Weight of the loss on the unlabelled volumes at the end of the ramp."""
    ramp: Annotated[float, Range(0, 1)] = 0.6
    """Fraction of the run over which this weight rises to its full value."""


class Method(nn.Module, ABC):
    """One training step of two networks. State that a checkpoint must keep (averages, memories) is in parameters or
    buffers.

    Args:
        num_classes: C, at most 32.
        steps: length of the run.
        seed: seed of the method's random numbers.
        options: an instance of the class's `Options`.
    """

    Options: ClassVar[Any] = MethodOptions
    """Dataclass of the method's own options; each field is a flag of `sslfast train`, its docstring the help."""
    uses_unlabelled = True
    """False if the method uses only labelled volumes; the loader then gives it no others."""
    augments_unlabelled = False
    """True if the method applies its own affine augmentation to unlabelled volumes; the loader then skips it."""
    uses_contrast = False
    """True if a contrastive loss teaches the networks; the run then says when it is idle."""
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Spacing of the networks' grid along D, H and W, mm; set before the first step."""
    reducer: Reducer = SINGLE_PROCESS
    """Process group over which sums are all-reduced. Every rank must call every method."""

    def __init_subclass__(cls) -> None:
        for old, new in METHOD_ATTRIBUTES.items():
            if old in vars(cls):
                raise TypeError(message(f"{cls.__name__}.{old}", new))

    def __init__(self, num_classes: int, steps: int, seed: int, options: MethodOptions) -> None:
        super().__init__()
        if num_classes > MAX_CLASSES:
            raise ValueError(too_many_classes(num_classes))
        if not isinstance(options, self.Options):
            raise TypeError(f"options of {type(self).__name__} must be its Options, got {type(options).__name__}")
        self.options: Any = options  # of the class's own type
        self.num_classes = num_classes
        self.steps = steps
        self.seed = seed

    def ramp_steps(self, fraction: float) -> int:
        """Length in steps of a ramp over this fraction of the run; at least 1."""
        return max(1, round(fraction * self.steps))

    def set_process_group(self, reducer: Reducer) -> None:
        """Called once, before `prepare`."""
        self.reducer = reducer
        for module in self.modules():
            if isinstance(module, DualContrastiveLoss):
                module.reducer = reducer

    def prepare(self, network_a: nn.Module, network_b: nn.Module) -> None:
        """Called once, before the first step of a new or resumed run: makes what depends on the networks (teachers,
        memories as wide as the features)."""

    @abstractmethod
    def step(self, network_a: nn.Module, network_b: nn.Module, images: Tensor, labels: Tensor, step: int) -> DualLoss:
        """The losses of one batch.

        Args:
            network_a, network_b: return (logits, features); with `linear=True` the logits are `LinearLogits`.
            images: [N, M, D, H, W]; the first L = len(labels) are labelled.
            labels: [L, D, H, W] int64, -1 where not annotated.
            step: 0, 1, …
        """
