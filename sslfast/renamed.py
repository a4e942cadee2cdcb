"""Names of version 0.1. Using one raises an error that says what it is called now."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NoReturn, TypeVar

_MODULES = {
    "sslfast.checkpoint": "sslfast.training.checkpoint",
    "sslfast.distributed": "sslfast.training.distributed",
    "sslfast.files": "sslfast.atomic_io",
    "sslfast.log": "sslfast.training.training_log",
    "sslfast.memory": "sslfast.training.memory_budget",
    "sslfast.pictures": "sslfast.training.plots",
    "sslfast.streams": "sslfast.training.streams",
    "sslfast.ops.ranks": "sslfast.ops.reduce",
    "sslfast.ops.state": "sslfast.ops.flags",
    "sslfast.data.conversion": "sslfast.data.public.conversion",
    "sslfast.data.donor": "sslfast.data.demo.brain_atlas",
    "sslfast.data.download": "sslfast.data.demo.download",
    "sslfast.data.splits": "sslfast.data.public.splits",
    "sslfast.data.subject": "sslfast.data.demo.subject",
}
"""Modules that are gone, and today's."""

_KERNEL_LIBRARY = (
    "ABI", "BuildError", "cpu_library", "cuda_architecture", "cuda_library", "find_nvcc", "host_module", "library_name"
)  # fmt: skip
_COHORTS = "BRAIN", "COHORTS", "Cohort", "data_folder", "heart", "write_cohort"
_NAMES = {
    "sslfast": {"taught_view": "sslfast.teacher_view", "TaughtView": "sslfast.TeacherView"},
    "sslfast.build": {name: f"sslfast.kernel_library.{name}" for name in _KERNEL_LIBRARY},
    "sslfast.data.demo": {name: f"sslfast.data.demo.cohorts.{name}" for name in _COHORTS},
    "sslfast.evaluate": {name: f"sslfast.evaluation.{name}" for name in ("Evaluation", "evaluate_folder")},
    "sslfast.predict": {"predict_cases": "sslfast.inference.predict_cases"},
    "sslfast.train": {
        "Trainer": "sslfast.training.trainer.Trainer",
        "RunResult": "sslfast.training.run.RunResult",
        "CONFIG": "sslfast.training.config.CONFIG",
    },
    "sslfast.views": {"taught_view": "sslfast.teacher_view", "TaughtView": "sslfast.TeacherView"},
}
"""Names that moved out of modules that stay, by module."""

F = TypeVar("F", bound=Callable[..., object])


def _since(old: str, new: str) -> str:
    """The message of all these errors."""
    return f"{old} is called {new} since 0.2.0"


class OldModules:
    """A finder for `sys.meta_path`, asked when no other finder knows a module."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name in _MODULES:
            raise ModuleNotFoundError(_since(name, _MODULES[name]), name=name)


def old_names(module: str) -> Callable[[str], NoReturn]:
    """The `__getattr__` of a module in `_NAMES`. It raises ImportError for old names, so that `from module import name`
    shows the message, and AttributeError for others."""

    today = _NAMES.get(module, {})  # none for __main__

    def getattr_(name: str) -> NoReturn:
        if name in today:
            raise ImportError(_since(f"{module}.{name}", today[name]), name=module)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return getattr_


def old_arguments(**today: str) -> Callable[[F], F]:
    """A decorator: keyword arguments that were renamed, old=new, raise TypeError."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def checked(*args: object, **kwargs: object) -> object:
            for old, new in today.items():
                if old in kwargs:
                    raise TypeError(f"{function.__name__}: the argument {_since(old, new)}")
            return function(*args, **kwargs)

        return checked  # type: ignore[return-value]

    return decorate
