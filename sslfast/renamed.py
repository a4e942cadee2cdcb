"""Old names, and the errors that say what they were renamed to in 0.2.0."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NoReturn, ParamSpec, TypeVar

MODULES = {
    "sslfast.checkpoint": "sslfast.training.checkpoint",
    "sslfast.distributed": "sslfast.training.distributed",
    "sslfast.files": "sslfast.atomic_io",
    "sslfast.log": "sslfast.training.training_log",
    "sslfast.memory": "sslfast.training.memory_budget",
    "sslfast.pictures": "sslfast.training.plots",
    "sslfast.streams": "sslfast.training.streams",
    "sslfast.ops.ranks": "sslfast.ops.reduce (Ranks is Reducer, ALONE is SINGLE_PROCESS)",
    "sslfast.ops.state": "sslfast.ops.flags",
    "sslfast.data.conversion": "sslfast.data.public.conversion",
    "sslfast.data.donor": "sslfast.data.demo.brain_atlas",
    "sslfast.data.download": "sslfast.data.demo.download",
    "sslfast.data.splits": "sslfast.data.public.splits",
    "sslfast.data.subject": "sslfast.data.demo.subject",
}
"""Old module names and their new ones."""

_KERNEL_LIBRARY = (
    "ABI", "BuildError", "cpu_library", "cuda_architecture", "cuda_library", "find_nvcc", "host_module", "library_name"
)  # fmt: skip
_COHORTS = "BRAIN", "COHORTS", "Cohort", "data_folder", "heart", "write_cohort"
NAMES = {
    "sslfast": {"taught_view": "sslfast.teacher_view", "TaughtView": "sslfast.TeacherView"},
    "sslfast.build": {name: f"sslfast.kernel_library.{name}" for name in _KERNEL_LIBRARY},
    "sslfast.data.demo": {name: f"sslfast.data.demo.cohorts.{name}" for name in _COHORTS},
    "sslfast.evaluate": {name: f"sslfast.evaluation.{name}" for name in ("Evaluation", "evaluate_folder")},
    "sslfast.predict": {"predict_cases": "sslfast.segmentations.predict_cases"},
    "sslfast.train": {
        "Trainer": "sslfast.training.trainer.Trainer",
        "RunResult": "sslfast.training.run.RunResult",
        "CONFIG": "sslfast.training.config.CONFIG",
    },
    "sslfast.views": {"taught_view": "sslfast.teacher_view", "TaughtView": "sslfast.TeacherView"},
}
"""Old names and their new ones, in modules that still exist, by module."""

METHOD_ATTRIBUTES = {
    "turns_unlabelled": "augments_unlabelled",
    "count_as_one": "set_process_group",
}
"""Old attributes that a user's own method may define, and their new names."""

LOSS_OPTIONS = {
    "alpha": "it was renamed to discrepancy_weight",
    "mode": "the entropy of the teacher, or of the winner without a teacher, decides which voxels are reliable",
    "pseudo_label": "choose by preset: 'paper' uses the winner's class, 'recommended' rectified pseudo-labels",
    "students": "choose by preset: 'paper' trains the loser on unlabelled volumes, 'recommended' both networks",
    "winner": "the winner is the network with the lower Dice loss on the batch",
    "ema_decay": "the winner is decided on each batch",
    "contrast": "it is always InfoNCE; 'distance' is part of sslfast.methods.as_released",
    "anchor_label": "the class of an anchor is the one that the teacher predicts",
    "grad_keys": "prototypes and negatives have no gradient",
    "per_class_percentile": "the percentile is taken over the voxels of all classes",
    "threshold": "a foreground prediction is confident from 0.6 on",
    "rescale": "it is part of sslfast.methods.as_released",
}
"""Options of `DualContrastiveLoss` that are gone, and what replaces them."""

FLAGS = {
    "reliable": LOSS_OPTIONS["mode"],
    "percentile_per_class": LOSS_OPTIONS["per_class_percentile"],
    **{name: LOSS_OPTIONS[name] for name in ("pseudo_label", "students", "winner")},
}
"""Flags of `sslfast train` that are gone, and what replaces them."""

P = ParamSpec("P")
R = TypeVar("R")


def message(old: str, new: str) -> str:
    """The message of all these errors."""
    return f"{old} was renamed to {new} in 0.2.0"


class OldModules:
    """A finder for `sys.meta_path`, asked when no other finder knows a module."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name in MODULES:
            raise ModuleNotFoundError(message(name, MODULES[name]), name=name)


def old_names(module: str) -> Callable[[str], NoReturn]:
    """The `__getattr__` of a module in `NAMES`. It raises ImportError for old names, so that `from module import name`
    shows the message, and AttributeError for others."""

    new_names = NAMES.get(module, {})  # none for __main__

    def getattr_(name: str) -> NoReturn:
        if name in new_names:
            raise ImportError(message(f"{module}.{name}", new_names[name]), name=module)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return getattr_


def old_arguments(**new_names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: keyword arguments that were renamed, old=new, raise TypeError."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            for old, new in new_names.items():
                if old in kwargs:
                    raise TypeError(f"{function.__name__}: {message(old, new)}")
            return function(*args, **kwargs)

        return checked

    return decorate
