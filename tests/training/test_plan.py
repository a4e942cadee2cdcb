"""The plan of a run: what each kind of data gives, what a user's own flags leave of it, and that it is a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

from helpers.training import weights
from helpers.volumes import noise, write_cases, write_volume
from sslfast import UserError
from sslfast.data.classes import Classes
from sslfast.data.folder import TrainingSplit, open_dataset
from sslfast.data.volumes import grid_spacing
from sslfast.options import NetworkOptions, Preprocessing
from sslfast.plan import main as plan
from sslfast.predict import main as predict
from sslfast.prepare import main as prepare
from sslfast.train import main
from sslfast.training import plan as plans
from sslfast.training import step_time
from sslfast.training.checkpoint import load_model
from sslfast.training.config import PLANNED, TrainConfig
from sslfast.training.plan import Plan, make_plan, settled
from sslfast.training.step_time import step_seconds
from sslfast.training.survey import survey_cases


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are not timed."""
    monkeypatch.setattr(plans, "step_seconds", lambda *arguments: 2.0)


def volumes(folder: Path, *kinds: tuple[tuple[int, int, int], tuple[float, float, float]], air: float = 0.0) -> Path:
    """Labelled volumes of these sizes and spacings: a bright box in the middle."""
    for i, (size, spacing) in enumerate(kinds):
        image, label = noise(*size) + air, np.zeros(size, np.uint8)
        middle = tuple(slice(n // 4, n - n // 4) for n in size)
        image[middle] += 100 - air
        label[middle] = 1
        affine = np.diag([*spacing, 1.0])
        write_volume(folder / f"images/c{i}.nii.gz", image, affine)
        write_volume(folder / f"labels/c{i}.nii.gz", label, affine)
    return folder


def planned(data: Path, *given: str, **settings: object) -> Plan:
    return make_plan(TrainConfig(str(data), Path(), device="cpu", **settings), {*given})


def test_volumes_of_one_spacing_keep_it(tmp_path: Path) -> None:
    made = planned(volumes(tmp_path, *[((36, 50, 35), (1.0, 1.0, 1.0))] * 3))
    assert made.values["spacing"] is None
    assert made.reasons["spacing"] == "all volumes have 1 mm already"
    assert made.values["intensity"] == "zscore"
    assert made.values["depth"] == 4
    assert made.values["patch"] == [40, 48, 32]
    assert made.reasons["patch"] == "shows 88 % of a median volume of 36 50 35 voxels"
    assert {*made.values} <= PLANNED
    assert all(made.reasons[name] for name in made.values)


def test_volumes_of_several_spacings_are_resampled_to_the_median(tmp_path: Path) -> None:
    kinds = [((30, 30, 30), (1.0, 1.0, s)) for s in (1.0, 1.5, 2.0)]
    made = planned(volumes(tmp_path, *kinds))
    assert made.values["spacing"] == [1.0, 1.0, 1.5]
    assert made.reasons["spacing"] == "the median; of 3 volumes 1 × 1 × 1 to 2 mm"


def test_thick_slices_are_resampled_less_and_pooled_later(tmp_path: Path) -> None:
    kinds = [((48, 48, 16), (0.8, 0.8, s)) for s in (5.0, 6.5, 6.5)]
    made = planned(volumes(tmp_path, *kinds))
    assert made.values["spacing"] == [0.8, 0.8, 5.3]
    assert "of the thick slices the 10th percentile" in made.reasons["spacing"]
    assert made.values["pooling"] == ["221", "221", "222"]  # 0.8, 1.6 and 3.2 beside 5.3 mm
    assert made.values["patch"][2] == 20  # the median volume has 19.6 slices on this grid
    settings = NetworkOptions(depth=made.values["depth"], pooling=tuple(made.values["pooling"]))
    assert settings.factors == (8, 8, 2)


def test_a_flat_volume_is_halved_less_often_along_its_short_axis(tmp_path: Path) -> None:
    made = planned(volumes(tmp_path, *[((60, 48, 20), (3.0, 3.0, 3.0))] * 2))
    assert made.values["pooling"] == ["222", "222", "221"]
    assert made.values["patch"][2] == 20


def test_a_patch_keeps_the_shape_of_a_long_volume(tmp_path: Path) -> None:
    made = planned(volumes(tmp_path, *[((54, 33, 73), (2.0, 2.0, 2.0))] * 2))
    assert made.values["patch"] == [40, 32, 48]  # the steps of 8 voxels that come nearest to 44 33 44
    assert made.reasons["patch"] == "shows 47 % of a median volume of 54 33 73 voxels"


def test_large_volumes_are_coarser_on_a_cpu_as_far_as_their_structures_allow(tmp_path: Path) -> None:
    data = volumes(tmp_path, ((100, 100, 100), (1.0, 1.0, 1.0)))
    made = planned(data)
    (length,) = {*made.values["spacing"]}
    assert 1.9 <= length <= 2.1  # (10^6 / 2^17)^(1/3) = 1.97
    assert "coarser than the data (1)" in made.reasons["spacing"]
    for path in (data / "labels").iterdir():  # a structure of 4^3 mm
        label = np.zeros((100, 100, 100), np.uint8)
        label[:4, :4, :4] = 1
        write_volume(path, label, np.eye(4))
    assert planned(data).values["spacing"] is None


def test_ct_is_clipped_to_the_percentiles_of_its_structures(tmp_path: Path) -> None:
    data = volumes(tmp_path, *[((30, 30, 30), (1.0, 1.0, 1.0))] * 2, air=-1000.0)
    made = planned(data)
    assert made.values["intensity"] == "ct"
    low, high = made.values["window"]
    assert 95 < low < 100 < high < 105
    assert "air is at" in made.reasons["intensity"]
    (data / "dataset.json").write_text(json.dumps({"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "x"}}))
    assert planned(data, "window").values["intensity"] == "ct"
    warm = volumes(tmp_path / "warm", *[((30, 30, 30), (1.0, 1.0, 1.0))] * 2)
    assert planned(warm).values["intensity"] == "zscore"
    (warm / "dataset.json").write_text(json.dumps({"modality": {"0": "CT"}, "labels": {"0": "background", "1": "x"}}))
    assert planned(warm).reasons["intensity"].startswith("dataset.json says CT")


def test_a_ct_beside_other_channels_is_clipped_alone(tmp_path: Path) -> None:
    data = volumes(tmp_path, *[((30, 30, 30), (1.0, 1.0, 1.0))] * 2)
    for path in [*(data / "images").iterdir()]:
        second = path.with_name(path.name.replace(".nii", "_0001.nii"))
        image = nib.load(path).get_fdata()
        write_volume(second, np.where(image > 50, image + 40, image - 1000).astype(np.float32), np.eye(4))
        path.rename(path.with_name(path.name.replace(".nii", "_0000.nii")))
    labels = {"labels": {"0": "background", "1": "x"}, "channel_names": {"0": "PET", "1": "CT"}}
    (data / "dataset.json").write_text(json.dumps(labels))
    made = planned(data)
    assert made.values["intensity"] == ["zscore", "ct"]
    assert made.reasons["intensity"].startswith("dataset.json says CT: clip CT to --window, then")
    low, high = made.values["window"]
    assert 135 < low < 140 < high < 145
    assert settled(TrainConfig(str(data), Path()), made).preprocessing.intensities(2) == ("zscore", "ct")
    made = planned(data, "window", preprocessing=Preprocessing(window=(0.0, 90.0)))
    assert made.values["intensity"] == ["zscore", "ct"]
    with pytest.raises(UserError, match="--intensity ct none ct: it must be one word, or one for each of 2 channels"):
        planned(data, "intensity", preprocessing=Preprocessing(intensity=("ct", "none", "ct")))


def test_what_is_given_is_kept_and_the_rest_fits_it(tmp_path: Path) -> None:
    data = volumes(tmp_path, *[((36, 50, 35), (1.0, 1.0, 1.0))] * 2)
    made = planned(data, "patch", patch=(20, 20, 12))
    assert "patch" not in made.values
    assert made.values["depth"] == 3
    assert "pooling" not in made.values  # all axes are halved twice
    made = planned(data, "depth", networks=NetworkOptions(depth=2))
    assert "depth" not in made.values
    assert all(size % 2 == 0 for size in made.values["patch"])
    made = planned(data, "steps", steps=7)
    assert "steps" not in made.values
    made = planned(data, "network_b", networks=NetworkOptions(network_b="segresnet"))
    assert "pooling" not in made.values
    thick = volumes(tmp_path / "thick", *[((40, 40, 12), (1.0, 1.0, 5.0))] * 2)
    made = planned(thick, "patch", "depth", patch=(40, 40, 12), networks=NetworkOptions(depth=4))
    assert made.values["pooling"] == ["221", "221", "222"]
    flat = volumes(tmp_path / "flat", *[((40, 40, 4), (1.0, 1.0, 5.0))] * 2)
    made = planned(flat, "network_a", networks=NetworkOptions(network_a="segresnet", network_b="dynunet"))
    assert made.values["patch"][2] == 2 ** made.values["depth"]  # two voxels are left


def test_hours_choose_the_steps_and_long_runs_say_how_to_shorten_them(tmp_path: Path) -> None:
    data = volumes(tmp_path, *[((30, 30, 30), (1.0, 1.0, 1.0))] * 2)
    assert planned(data, hours=0.5).values["steps"] == 900  # 2 s each
    made = planned(data, "steps", steps=60000)
    assert any("THIS RUN TAKES 33 hours" in line for line in made.estimates) or any(
        "THIS RUN TAKES 1.4 days" in line for line in made.estimates
    )
    assert "to fit an hour: --hours 1 (1800 steps)" in made.estimates
    assert "which are few: a smaller --patch or --width" in planned(data, hours=0.1).reasons["steps"]
    assert main(["--data", str(data), "--output", str(tmp_path / "run"), "--no-plan", "--hours", "1"]) == 2


def test_patches_that_no_step_draws_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(plans, "step_seconds", lambda config, *others: drawn.append(config.unlabeled_batch) or 2.0)
    data = volumes(tmp_path, *[((20, 20, 20), (1.0, 1.0, 1.0))] * 2)
    planned(data)
    planned(data, labeled=1)
    planned(data, labeled=1, method="supervised")
    assert drawn == [0, 2, 0]


def test_several_processes_time_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "step_seconds", None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    data = volumes(tmp_path, *[((20, 20, 20), (1.0, 1.0, 1.0))] * 2)
    assert planned(data).estimates[-1].startswith("memory of a step")


def test_a_plan_is_written_and_read_wherever_and_whatever_names_there_are(tmp_path: Path) -> None:
    data = volumes(tmp_path / "data", *[((12, 12, 12), (1.0, 1.0, s)) for s in (1.0, 2.0)])
    labels = {"0": "background", "1": "Herz – größer\nsteps: 3"}
    (data / "dataset.json").write_text(json.dumps({"labels": labels}))
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "sslfast.plan", "--data", str(data), "--width", "2", "--device", "cpu"]
    path = tmp_path / "plan.yaml"
    subprocess.run([*command, "--output", str(path)], env=ascii_only, check=True, capture_output=True)
    assert "of 2 volumes 1 × 1 × 1 to 2 mm" in path.read_text("utf-8")
    assert main(["--config", str(path), "--output", str(tmp_path / "run"), "--steps", "1"]) == 0
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["spacing"] == [1.0, 1.0, 1.5]


def test_a_step_that_does_not_fit_into_memory_gets_a_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = volumes(tmp_path, *[((30, 30, 30), (1.0, 1.0, 1.0))] * 2)
    assert "memory_budget" not in planned(data).values
    monkeypatch.setattr(plans, "_memory", lambda device: 2**26)
    assert planned(data, labeled=1).values["memory_budget"] == 0.05


def test_a_dataset_of_which_nothing_can_be_read_is_named(tmp_path: Path) -> None:
    data = volumes(tmp_path, *[((9, 9, 9), (1.0, 1.0, 1.0))] * 2)
    described = {"labels": {"0": "background", "1": "box"}}
    for path in (data / "images").iterdir():
        path.write_bytes(b"junk")
    for content, message in (
        (described, r"c0\.nii\.gz cannot be read"),
        ({**described, "channel_names": {"0": "CT"}}, r"none of 2 volumes can be read: .*c1\.nii\.gz cannot be read"),
    ):
        (data / "dataset.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            planned(data)


def test_a_side_without_its_counterpart_is_not_mirrored(tmp_path: Path) -> None:
    data = volumes(tmp_path, *[((20, 20, 20), (1.0, 1.0, 1.0))] * 2)
    (data / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "left lung"}}))
    assert planned(data).values["mirror"] == ["front-back", "head-foot"]


def test_a_plan_is_a_run_and_train_makes_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_cases(tmp_path / "data", cases=3, labelled=2)
    flags = ["--device", "cpu", "--precision", "fp32"]
    assert plan(["--data", str(data), "--output", str(tmp_path / "plan.yaml"), *flags]) == 0
    printed = capsys.readouterr().out
    text = (tmp_path / "plan.yaml").read_text()
    for reason in ("all volumes have 2 mm already", "shows 100 % of a median volume of 20 18 16 voxels"):
        assert reason in printed
        assert reason in text
    values = yaml.safe_load(text)
    assert values["data"] == str(data)
    quick = ["--steps", "2", "--width", "2", "--seed", "1"]
    assert main(["--config", str(tmp_path / "plan.yaml"), "--output", str(tmp_path / "a"), *quick]) == 0
    assert main(["--data", str(data), "--output", str(tmp_path / "b"), *quick, *flags]) == 0
    assert "all volumes have 2 mm already" in (tmp_path / "b/plan.yaml").read_text()
    one, other = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(one[name], other[name]) for name in one)
    written = yaml.safe_load((tmp_path / "b/config.yaml").read_text())
    assert written["patch"] == [20, 20, 16]
    assert main(["--data", str(data), "--output", str(tmp_path / "b"), *quick, *flags, "--resume"]) == 0
    assert load_model(tmp_path / "b").patch == (20, 20, 16)


def test_prepare_decodes_what_the_plan_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = [((20, 20, 20), (1.0, 1.0, s)) for s in (1.0, 1.5, 2.0)]
    data = volumes(tmp_path / "data", *kinds)
    assert prepare(["--data", str(data)]) == 0
    assert "--spacing" in capsys.readouterr().out
    assert plan(["--data", str(data), "--output", str(tmp_path / "plan.yaml"), "--device", "cpu"]) == 0
    assert yaml.safe_load((tmp_path / "plan.yaml").read_text())["spacing"] == [1.0, 1.0, 1.5]
    capsys.readouterr()
    assert prepare(["--config", str(tmp_path / "plan.yaml")]) == 0
    assert "--spacing" not in capsys.readouterr().out


def test_axes_of_an_oblique_scan_are_those_of_its_grid(tmp_path: Path) -> None:
    turned = np.array([[0.31, -0.63, 0.72], [-0.73, -0.64, -0.24], [0.61, -0.45, -0.66]])
    affine = np.eye(4)
    affine[:3, :3] = np.linalg.qr(turned)[0] * np.array([1.4, 1.4, 8.0])
    for name in ("images", "labels"):
        array = noise(32, 32, 10) if name == "images" else np.ones((32, 32, 10), np.uint8)
        write_volume(tmp_path / name / "c0.nii.gz", array, affine)
    case = open_dataset(tmp_path).training[0]
    survey = survey_cases(TrainingSplit((case,), (), ()), Classes({0: "background", 1: "x"}), -1)
    assert tuple(survey.spacings[0]) == pytest.approx(grid_spacing([case.images], Preprocessing()))
    assert sorted(survey.extents[0]) == pytest.approx([32 * 1.4, 32 * 1.4, 80])


def test_what_is_typed_replaces_a_files_lines_and_aliases_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_cases(tmp_path / "data", cases=3, labelled=2)
    assert plan(["--data", str(data), "--output", str(tmp_path / "plan.yaml"), "--device", "cpu", "--width", "2"]) == 0
    capsys.readouterr()
    run = ["--config", str(tmp_path / "plan.yaml"), "--output"]
    assert main([*run, str(tmp_path / "a"), "--hours", "0.002"]) == 0  # 3.6 of the 2 s that a step is said to take
    assert yaml.safe_load((tmp_path / "a/config.yaml").read_text())["steps"] == 3
    assert main([*run, str(tmp_path / "b"), "--steps", "1", "--hours", "1"]) == 2
    assert "--hours chooses --steps; give one of them" in capsys.readouterr().err
    assert main([*run, str(tmp_path / "b"), "--steps", "1"]) == 0
    assert "plan, for" not in capsys.readouterr().out  # nothing is left open
    (tmp_path / "alias.yaml").write_text("max-iterations: 1\nbase_lr: 0.01\nwidth: 2\ndevice: cpu\n")
    assert main(["--config", str(tmp_path / "alias.yaml"), "--data", str(data), "--output", str(tmp_path / "c")]) == 0
    assert "--steps" not in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "c/plan.yaml").read_text())["learning_rate"] == 0.01
    assert main(["--data", str(data), "--output", str(tmp_path / "c")]) == 2
    assert capsys.readouterr().out == ""  # it is refused before a plan is made


def test_prepare_sees_what_training_sees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = volumes(tmp_path, *[((20, 20, 20), (1.0, 1.0, 1.0))] * 3)
    for name, value in (("c1", 3), ("c2", 2)):
        label = np.zeros((20, 20, 20), np.uint8)
        label[:4] = value
        write_volume(data / f"labels/{name}.nii.gz", label, np.eye(4))
    flags = ["--data", str(data), "--device", "cpu"]
    for count, said in ((1, "classes: background 0, class 1\n"), (3, "class 2, class 3")):
        assert prepare([*flags, "--labeled", str(count)]) == 0
        assert said in capsys.readouterr().out
    assert prepare([*flags, "--labeled", "2"]) == 2
    fault = "the label maps hold the values 0, 1, 3, not 0, 1, 2 and so on"
    assert fault in capsys.readouterr().err
    with pytest.raises(UserError, match=fault):
        planned(data, labeled=2)


def test_parts_of_what_is_planned_together_may_be_given(tmp_path: Path) -> None:
    data = volumes(tmp_path, *[((30, 30, 30), (1.0, 1.0, 1.0))] * 2, air=-1000.0)
    made = planned(data, "window", preprocessing=Preprocessing(window=(0.0, 90.0)))
    assert (made.values["intensity"], "window" in made.values) == ("ct", False)
    made = planned(data, "intensity", preprocessing=Preprocessing(intensity="ct"))
    assert made.values["window"][0] > 90
    made = planned(data, "pooling", networks=NetworkOptions(pooling=("221", "222")))
    assert made.values["depth"] == 3
    assert made.values["patch"][2] % 2 == 0
    flat = volumes(tmp_path / "flat", *[((30, 30, 1), (1.0, 1.0, 5.0))] * 2)
    assert planned(flat, "network_a", networks=NetworkOptions(network_a="dynunet")).values["depth"] >= 3


def test_a_run_on_thick_slices_predicts_on_their_grid(tmp_path: Path) -> None:
    data = volumes(tmp_path / "data", *[((24, 24, 9), (0.8, 0.8, 4.0))] * 2)
    quick = ["--steps", "2", "--width", "2", "--device", "cpu", "--depth", "3", "--baseline"]
    (data / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "box"}, "test": ["c1"]}))
    assert main(["--data", str(data), "--output", str(tmp_path / "run"), *quick]) == 0
    model = load_model(tmp_path / "run")
    assert model.options.strides == ((2, 2, 1), (2, 2, 1))
    segmented = nib.load(tmp_path / "run/test/c1.nii.gz")
    assert segmented.shape == (24, 24, 9)
    np.testing.assert_allclose(segmented.affine, np.diag([0.8, 0.8, 4.0, 1.0]), rtol=1e-6)


def test_a_volume_of_another_spacing_than_in_training_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = volumes(tmp_path / "data", *[((20, 20, 20), (1.0, 1.0, 1.0))] * 2)
    quick = ["--steps", "1", "--width", "2", "--device", "cpu"]
    assert main(["--data", str(data), "--output", str(tmp_path / "run"), *quick]) == 0
    assert load_model(tmp_path / "run").spacing == (1, 1, 1)
    other = volumes(tmp_path / "other", ((12, 12, 12), (1.0, 2.0, 2.0)))
    for scans in (data, other):
        capsys.readouterr()
        flags = ["--checkpoint", str(tmp_path / "run"), "--images", str(scans / "images"), "--device", "cpu"]
        assert predict([*flags, "--output", str(tmp_path / scans.name / "out")]) == 0
        assert ("its voxels have 1 2 2 mm, those in training had 1" in capsys.readouterr().err) == (scans == other)


@pytest.mark.parametrize("patch", [(16, 16, 8), (48, 8, 8), (8, 8, 8)], ids=["small", "cut", "smallest"])
def test_the_time_of_a_step_is_measured(patch: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_time, "MEASURED", 2048)
    config = TrainConfig("", Path(), patch=patch, networks=NetworkOptions(width=2, depth=3), device="cpu")
    state = torch.random.get_rng_state()
    assert 0 < step_seconds(config, 3, 2, torch.device("cpu")) < 60
    assert torch.equal(state, torch.random.get_rng_state())
