"""Old names: the errors say the new ones."""

from __future__ import annotations

from importlib import import_module

import pytest

from sslfast import ops
from sslfast.renamed import FLAGS, MODULES, NAMES
from sslfast.train import main


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("sslfast", "taught_view", "sslfast.teacher_view"),
        ("sslfast.build", "cpu_library", "sslfast.kernel_library.cpu_library"),
        ("sslfast.data.demo", "write_cohort", "sslfast.data.demo.cohorts.write_cohort"),
        ("sslfast.evaluate", "evaluate_folder", "sslfast.evaluation.evaluate_folder"),
        ("sslfast.predict", "predict_cases", "sslfast.segmentations.predict_cases"),
        ("sslfast.train", "Trainer", "sslfast.training.trainer.Trainer"),
        ("sslfast.views", "TaughtView", "sslfast.TeacherView"),
    ],
)
def test_the_import_of_an_old_name_is_answered_with_the_new_one(module: str, old: str, new: str) -> None:
    with pytest.raises(ImportError, match=rf"^{module}\.{old} was renamed to {new} in 0\.2\.0$"):
        exec(f"from {module} import {old}")


def test_every_new_name_exists() -> None:
    for new in {new for names in NAMES.values() for new in names.values()}:
        module, _, name = new.rpartition(".")
        assert hasattr(import_module(module), name), new
    for module in set(MODULES.values()):
        import_module(module.partition(" ")[0])


@pytest.mark.parametrize("op", ["class_prototypes", "sample_voxels", "pseudo_supervised", "rectified_consistency"])
def test_the_old_name_of_flags_is_answered_with_the_new_one(op: str) -> None:
    with pytest.raises(TypeError, match=rf"^{op}: state was renamed to flags in 0\.2\.0$"):
        getattr(ops, op)(state=None)


NEVER_HAD_RANKS = {"gather_voxels", "norm_act"}  # the latter is new in 0.2.0


@pytest.mark.parametrize("op", [name for name in ops.__all__ if name.islower() and name not in NEVER_HAD_RANKS])
def test_an_old_argument_of_an_op_is_answered_with_the_new_one(op: str) -> None:
    with pytest.raises(TypeError, match=rf"^{op}: ranks was renamed to reducer in 0\.2\.0$"):
        getattr(ops, op)(ranks=None)


@pytest.mark.parametrize(
    ("old", "new"), [("files", "atomic_io"), ("ops.ranks", "ops.reduce"), ("data.donor", "data.demo.brain_atlas")]
)
def test_an_old_module_is_answered_with_the_new_one(old: str, new: str) -> None:
    with pytest.raises(
        ModuleNotFoundError, match=rf"^sslfast\.{old} was renamed to sslfast\.{new}( \(.*\))? in 0\.2\.0$"
    ):
        import_module(f"sslfast.{old}")
    import_module(f"sslfast.{new}")


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_that_is_gone_is_answered_with_what_replaces_it(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", "DIR", "--output", "OUT", f"--{flag.replace('_', '-')}", "winner"]) == 2
    assert f"is no option any more: {FLAGS[flag]}; remove it" in capsys.readouterr().err
