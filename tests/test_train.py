"""Training end to end on small volumes: resume to the same bits, what the unlabelled path may see, and bad input."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import write_cases, write_volume

from sslfast.methods import METHODS
from sslfast.train import main
from sslfast.training.checkpoint import load_checkpoint

SMALL = [
    "--patch",
    "8",
    "8",
    "8",
    "--depth",
    "2",
    "--width",
    "4",
    "--seed",
    "3",
    "--device",
    "cpu",
    "--precision",
    "fp32",
    "--log-every",
    "1",
]


def run(data: Path, output: Path, *flags: object) -> int:
    return main(["--data", str(data), "--output", str(output), *SMALL, *map(str, flags)])


def weights(output: Path) -> dict[str, torch.Tensor]:
    model = load_checkpoint(output / "checkpoint_last.pt")["model"]
    return {f"{n}.{name}": value for n in "ab" for name, value in model[f"network_{n}"].items()}


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def log_rows(output: Path) -> list[dict[str, str]]:
    with open(output / "log.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_cases(tmp_path / "data", cases=6, labelled=4)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_everything_that_belongs_to_it(data: Path, tmp_path: Path, method: str) -> None:
    output = tmp_path / "run"
    assert (
        run(data, output, "--method", method, "--steps", 4, "--labeled", 2, "--validation", 1, "--validate-every", 2)
        == 0
    )
    assert yaml.safe_load((output / "config.yaml").read_text())["method"] == method
    rows = log_rows(output)
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 3]
    assert all(np.isfinite(float(row["loss_a"])) for row in rows)
    assert [bool(row["validation_dice"]) for row in rows] == [False, True, False, True]
    assert load_checkpoint(output / "checkpoint_last.pt")["step"] == 4
    best = load_checkpoint(output / "checkpoint_best.pt")
    assert best["best_dice"] == pytest.approx(max(float(row["validation_dice"] or 0) for row in rows))
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((output / "tensorboard").glob("events*"))


def test_both_checkpoints_are_tested_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_cases(tmp_path / "data", cases=5, labelled=5)
    parts = {"training": ["case_0", "case_1", "case_2"], "validation": ["case_3"], "test": ["case_4"]}
    (data / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "box"}, **parts}))
    output = tmp_path / "run"
    assert run(data, output, "--steps", 6, "--labeled", 2, "--validate-every", 1) == 0
    best = load_checkpoint(output / "checkpoint_best.pt")["step"]
    printed = capsys.readouterr().out
    assert "last step" in printed
    assert "validation-best" in printed
    for folder in ("test", "test_best"):
        assert json.loads((output / folder / "metrics.json").read_text())["rows"][0]["case"] == "case_4"
        assert (output / folder / "case_4.nii.gz").exists()
    if best == 6:
        assert (output / "test" / "metrics.csv").read_text() == (output / "test_best" / "metrics.csv").read_text()


def test_two_runs_give_the_same_bits_and_another_seed_others(data: Path, tmp_path: Path) -> None:
    for name, flags in (("a", ()), ("b", ("--workers", "2")), ("c", ("--seed", "4"))):
        assert run(data, tmp_path / name, "--steps", 3, "--labeled", 2, *flags) == 0
    assert_same_bits(weights(tmp_path / "a"), weights(tmp_path / "b"))
    first = next(iter(weights(tmp_path / "a")))
    assert not torch.equal(weights(tmp_path / "a")[first], weights(tmp_path / "c")[first])


def test_kill_9_and_resume_to_the_same_bits(data: Path, tmp_path: Path) -> None:
    flags = ["--steps", "30", "--labeled", "2", "--save-every", "4", "--validation", "1", "--validate-every", "6"]
    flags += ["--depth", "3", "--precision", "bf16"]
    assert run(data, tmp_path / "whole", *flags) == 0

    output = tmp_path / "killed"
    command = [sys.executable, "-m", "sslfast.train", "--data", str(data), "--output", str(output), *SMALL, *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (output / "checkpoint_last.pt").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    reached = load_checkpoint(output / "checkpoint_last.pt")["step"]
    assert 4 <= reached < 30

    assert run(data, output, *flags, "--resume") == 0
    assert_same_bits(weights(tmp_path / "whole"), weights(output))
    assert log_rows(output) == log_rows(tmp_path / "whole")
    assert not list(output.glob(".part-*")) or reached  # a part file may remain from the kill, never a half checkpoint


@pytest.mark.parametrize("flag", ["--compile", "--checkpointing"])
def test_compiled_and_checkpointed_networks_learn_the_same(data: Path, tmp_path: Path, flag: str) -> None:
    exact = (
        "--precision",
        "fp32",
        "--optimizer",
        "sgd",
    )  # AdamW's first step is the gradient's sign, which rounding turns
    for name, extra in (("plain", []), ("other", [flag])):
        assert run(data, tmp_path / name, "--steps", 2, "--dropout", 0, *exact, *extra) == 0
    for plain, other in zip(log_rows(tmp_path / "plain"), log_rows(tmp_path / "other"), strict=True):
        for loss in ("loss_a", "loss_b"):
            assert float(other[loss]) == pytest.approx(float(plain[loss]), rel=1e-3)


def test_an_option_out_of_range_is_refused_before_the_run_begins(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(data, tmp_path / "run", "--percentile", 120, 20) == 2
    assert "percentile is 120" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_resume_of_a_finished_run_changes_nothing(data: Path, tmp_path: Path) -> None:
    assert run(data, tmp_path / "run", "--steps", 3) == 0
    before = weights(tmp_path / "run")
    assert run(data, tmp_path / "run", "--steps", 3, "--resume") == 0
    assert_same_bits(before, weights(tmp_path / "run"))


def test_resume_with_other_settings_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data, tmp_path / "run", "--steps", 2) == 0
    assert run(data, tmp_path / "run", "--steps", 5, "--resume") == 2
    assert "--steps (was 2, is 5)" in capsys.readouterr().err
    assert run(data, tmp_path / "run", "--steps", 2) == 2
    assert "add --resume" in capsys.readouterr().err


def test_the_unlabelled_path_cannot_read_a_label(data: Path, tmp_path: Path) -> None:
    assert run(data, tmp_path / "a", "--steps", 4, "--labeled", 2) == 0
    (data / "labels" / "case_2.nii.gz").write_bytes(b"corrupt")
    write_volume(data / "labels" / "case_3.nii.gz", np.full((3, 3, 3), 99, np.int16))
    shutil.rmtree(Path(os.environ["SSLFAST_CACHE"]) / "volumes")
    assert run(data, tmp_path / "b", "--steps", 4, "--labeled", 2) == 0
    assert_same_bits(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_unlabelled_volumes_change_what_is_learnt(data: Path, tmp_path: Path) -> None:
    flags = ["--steps", 3, "--labeled", 2, "--ramp", 0.1]
    assert run(data, tmp_path / "a", *flags) == 0
    for i in (2, 3, 4, 5):
        image = np.random.default_rng(i).normal(size=(20, 18, 16)).astype(np.float32)
        write_volume(data / "images" / f"case_{i}.nii.gz", image)
    assert run(data, tmp_path / "b", *flags) == 0
    one, other = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_partially_annotated_and_multi_class(tmp_path: Path) -> None:
    data = write_cases(tmp_path / "data", cases=3, labelled=2, classes=4)
    label = np.zeros((20, 18, 16), np.uint8)
    label[:4], label[4:6], label[6:] = 1, 3, 255
    write_volume(data / "labels" / "case_0.nii.gz", label)
    assert run(data, tmp_path / "run", "--steps", 3, "--ignore-label", 255) == 0
    assert load_checkpoint(tmp_path / "run" / "checkpoint_last.pt")["model"]["classes"].keys() == {0, 1, 2, 3}


def test_the_paper_s_preset(data: Path, tmp_path: Path) -> None:
    assert run(data, tmp_path / "run", "--steps", 2, "--labeled", 2, "--preset", "paper") == 0
    assert float(log_rows(tmp_path / "run")[0]["kept_fraction"]) > 0.7  # from the 80th percentile on, without views


def test_nan_loss_names_the_volumes_and_keeps_the_checkpoint(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert run(data, output, "--steps", 40, "--learning-rate", "1e30", "--save-every", 1) == 2
    error = capsys.readouterr().err
    assert "the loss is nan at step" in error
    assert "case_" in error
    assert "--learning-rate" in error
    assert load_checkpoint(output / "checkpoint_last.pt")["step"] >= 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--patch", "8", "9", "8"], "such as --patch 8 8 8"),
        (["--labeled", "9"], "choose 1 to 4"),
        (["--labeled", "0"], "choose 1 to 4"),
        (["--steps", "0"], "--steps 0"),
        (["--spacing", "-1"], "--spacing -1.0"),
        (["--device", "cuda"], "--device cuda"),
        (["--streams"], "--streams is for one process with a GPU"),
        (["--method", "magic"], "--method magic: choose one of supervised, ssl-contrastive"),
        (["--method", "nowhere:Magic"], "No module named 'nowhere'"),
        (["--method", "pathlib:Path"], "Path must be a subclass of sslfast.methods.Method"),
        (["--validation", "4"], "--validation 4"),
    ],
)
def test_wrong_values(
    data: Path, tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert run(data, tmp_path / "run", "--steps", 2, *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("flags", [["--stepz", "3"], ["--norm", "magic"], ["--steps", "many"]])
def test_unknown_flags_and_values(
    data: Path, tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(data, tmp_path / "run", *flags)
    assert exit_.value.code == 2
    shown = "".join(capsys.readouterr())
    assert flags[0] in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "images/case_0.nii.gz").write_bytes(b"junk"), "case_0.nii.gz cannot be read"),
        (lambda d: write_volume(d / "images/case_5.nii.gz", np.zeros((9, 9, 9, 3), np.float32)), "shape (9, 9, 9, 3)"),
        (lambda d: write_volume(d / "images/case_5.nii.gz", np.full((9, 9, 9), np.nan, np.float32)), "NaN"),
        (lambda d: write_volume(d / "labels/case_1.nii.gz", np.zeros((9, 9, 9), np.uint8)), "Resample the label"),
        (
            lambda d: write_volume(d / "labels/case_1.nii.gz", np.zeros((20, 18, 16), np.uint8), np.eye(4)),
            "affines differ",
        ),
        (lambda d: shutil.rmtree(d / "labels"), "no training case has a label"),
        (lambda d: [f.unlink() for f in (*d.glob("images/*"), *d.glob("labels/*"))], "the list is empty"),
    ],
)
def test_bad_data(data: Path, tmp_path: Path, spoil: object, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(data)
    assert run(data, tmp_path / "run", "--steps", 2) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "run" / "checkpoint_last.pt").exists()


def test_labels_out_of_range(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "dataset.json").write_text('{"labels": {"0": "background", "1": "box"}}')
    label = np.zeros((20, 18, 16), np.uint8)
    label[0, 0, 0] = 2
    write_volume(data / "labels" / "case_1.nii.gz", label)
    assert run(data, tmp_path / "run", "--steps", 2) == 2
    assert "case_1.nii.gz: labels 2 are outside 0..1" in capsys.readouterr().err


def test_full_disk_keeps_the_last_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    original = Path.write_bytes

    def third_write_fails(path: Path, content: bytes) -> int:
        if path.name.endswith("checkpoint_last.pt"):
            third_write_fails.calls += 1  # type: ignore[attr-defined]
            if third_write_fails.calls == 3:  # type: ignore[attr-defined]
                original(path, bytes(content)[:100])
                raise OSError(28, "No space left on device")
        return original(path, content)

    third_write_fails.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(Path, "write_bytes", third_write_fails)
    assert run(data, output, "--steps", 4, "--save-every", 1) == 2
    error = capsys.readouterr().err
    assert "checkpoint_last.pt: No space left on device" in error
    assert load_checkpoint(output / "checkpoint_last.pt")["step"] == 2
    assert not list(output.glob(".part-*"))
    assert run(data, output, "--steps", 4, "--save-every", 1, "--resume") == 0
    assert run(data, tmp_path / "whole", "--steps", 4, "--save-every", 1) == 0
    assert_same_bits(weights(output), weights(tmp_path / "whole"))


def test_unwritable_output(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert run(data, tmp_path / "file" / "run", "--steps", 2) == 2
    assert "cannot make the folder" in capsys.readouterr().err


def test_a_corrupt_checkpoint_is_named(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    assert run(data, output, "--steps", 2) == 0
    path = output / "checkpoint_last.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    assert run(data, output, "--steps", 2, "--resume") == 2
    assert "checkpoint_last.pt is not a readable checkpoint" in capsys.readouterr().err


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    class Boom:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "executed"),)

    from sslfast import UserError

    torch.save({"model": Boom()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()


def test_a_runs_config_starts_the_same_run(data: Path, tmp_path: Path) -> None:
    assert run(data, tmp_path / "a", "--steps", 3, "--labeled", 2, "--percentile", 70, 90, "--augment", "none") == 0
    assert main(["--config", str(tmp_path / "a" / "config.yaml"), "--output", str(tmp_path / "b")]) == 0
    assert_same_bits(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_names_of_other_code_bases_are_understood(data: Path, tmp_path: Path) -> None:
    flags = ["--max_iterations", "2", "--labeled_num", "2", "--labeled_bs", "1", "--base_lr", "0.01"]
    assert main(["--root_path", str(data), "--output", str(tmp_path / "run"), *SMALL, *flags]) == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["steps"], config["labeled"], config["labeled_batch"], config["learning_rate"]) == (2, 2, 1, 0.01)


def test_the_documented_method_of_ones_own_trains(data: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "adding-a-method.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) < 45
    (tmp_path / "my_method.py").write_text(code)
    command = [sys.executable, "-m", "sslfast.train", "--method", "my_method:EntropyMinimisation", "--steps", "3"]
    command += ["--entropy-weight", "0.2"]
    result = subprocess.run(
        [*command, "--data", data, "--output", tmp_path / "run", *SMALL],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["entropy_weight"] == 0.2
    assert all(0 < float(row["entropy_a"]) < 0.7 for row in log_rows(tmp_path / "run"))
