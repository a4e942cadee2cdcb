"""Exported networks: the probabilities of every architecture, other sizes, what is written beside them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnx
import pytest
import torch

from helpers.models import make_run
from sslfast import exported
from sslfast.export import main
from sslfast.exported import MeanProbabilities, run_exported
from sslfast.model import Model
from sslfast.options import NetworkName, Norm


def expected(model: Model, images: torch.Tensor, chosen: str = "both") -> torch.Tensor:
    networks = {"a": [model.network_a], "b": [model.network_b]}.get(chosen, [model.network_a, model.network_b])
    with torch.no_grad():
        return MeanProbabilities(networks)(images)


@pytest.mark.parametrize("form", ["torchscript", "onnx"])
@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize(("a", "b"), [("vnet", "resvnet"), ("unet", "segresnet"), ("dynunet", "vnet")])
def test_files_give_the_networks_probabilities_at_any_size(
    tmp_path: Path, a: NetworkName, b: NetworkName, norm: Norm, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, model = make_run(tmp_path, a, b, norm)
    assert main([str(checkpoint), "--output", str(tmp_path / "out"), "--format", form]) == 0
    path = Path(capsys.readouterr().out.strip())
    for shape in ((1, 1, 16, 16, 8), (3, 1, 16, 24, 16)):
        images = torch.randn(*shape)
        assert torch.allclose(run_exported(path, images), expected(model, images), atol=1e-4)


@pytest.mark.parametrize("chosen", ["a", "b"])
def test_one_network_may_be_chosen(tmp_path: Path, chosen: str) -> None:
    checkpoint, model = make_run(tmp_path, channels=2)
    assert main([str(checkpoint), "--output", str(tmp_path), "--networks", chosen]) == 0
    images = torch.randn(1, 2, 16, 16, 8)
    assert torch.allclose(run_exported(tmp_path / "model.ts", images), expected(model, images, chosen), atol=1e-5)


def test_metadata_and_page_say_how_to_use_it(tmp_path: Path) -> None:
    checkpoint, _ = make_run(tmp_path, channels=2)
    out = tmp_path / "out"
    assert main([str(checkpoint), "--output", str(out), "--format", "onnx"]) == 0
    described = json.loads((out / "metadata.json").read_text())
    assert described["classes"][1] == {"index": 1, "value": 5, "name": "liver"}
    assert (described["spacing"], described["patch"], described["multiples"]) == ([1, 1, 3], [16, 16, 8], [2, 2, 2])
    assert (described["intensity"], described["window"]) == (["ct", "zscore"], [-125, 275])
    properties = {entry.key: entry.value for entry in onnx.load(out / "model.onnx").metadata_props}
    assert json.loads(properties["sslfast"]) == described
    page = (out / "README.md").read_text()
    for said in ("opset 17", "multiples of 2 × 2 × 2", "window of 16 × 16 × 8", "| 2 | 7 | spleen |", "1 × 1 × 3 mm"):
        assert said in page
    assert main([str(checkpoint), "--output", str(out)]) == 0  # the same folder may hold both forms
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "metadata.json", "model.onnx", "model.ts"]


def test_a_page_of_others_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, _ = make_run(tmp_path)
    (tmp_path / "README.md").write_text("# Mine")
    assert main([str(checkpoint), "--output", str(tmp_path)]) == 2
    assert "is not of an export, and would be replaced" in capsys.readouterr().err
    assert not (tmp_path / "model.ts").exists()


def test_without_onnx_the_remedy_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, _ = make_run(tmp_path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main([str(checkpoint), "--output", str(tmp_path), "--format", "onnx"]) == 2
    assert "onnx is not installed; --format onnx needs: pip install 'sslfast[onnx]'" in capsys.readouterr().err


def test_a_file_that_gives_other_probabilities_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, _ = make_run(tmp_path)
    monkeypatch.setattr(exported, "run_exported", lambda path, images: run_exported(path, images) + 0.5)
    assert main([str(checkpoint), "--output", str(tmp_path / "out")]) == 2
    assert "model.ts gives probabilities that differ from the networks' by 0.5; it is rem" in capsys.readouterr().err
    assert [*(tmp_path / "out").iterdir()] == []
