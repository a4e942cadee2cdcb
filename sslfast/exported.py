"""Networks as files that run without sslfast: TorchScript and ONNX. `sslfast.bundle` puts one into a MONAI bundle."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sslfast
from sslfast.atomic_io import make_folder, whole_file
from sslfast.errors import UserError
from sslfast.model import Model
from sslfast.networks.norm_act import NormAct
from sslfast.ops.norm_act import EPS

Format = Literal["torchscript", "onnx"]
Chosen = Literal["both", "a", "b"]
OPSET = 17
FILES: dict[Format, str] = {"torchscript": "model.ts", "onnx": "model.onnx"}
BOTH = "the mean of both networks"
LARGEST_DIFFERENCE = 1e-4  # of a probability, between the file and the networks


class _PlainNormAct(nn.Module):
    """A `NormAct` of torch's own operations."""

    running_mean: Tensor | None
    running_var: Tensor | None

    def __init__(self, norm: NormAct) -> None:
        super().__init__()
        self.weight, self.bias, self.relu = norm.weight, norm.bias, norm.relu
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)

    def forward(self, x: Tensor, *, residual: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        if self.running_mean is None:
            y = F.instance_norm(x, weight=self.weight, bias=self.bias, eps=EPS)
        else:
            y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=EPS)
        y = y if residual is None else y + residual
        y = y.relu() if self.relu else y
        return y if skip is None else y + skip


class MeanProbabilities(nn.Module):
    """Class probabilities [N, C, D, H, W] of patches [N, M, D, H, W]: the mean of the networks' softmax."""

    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> Tensor:
        """The probabilities."""
        return torch.stack([network(images)[0].softmax(1) for network in self.networks]).mean(0)


def export_model(model: Model, output: Path, form: Format, chosen: Chosen = "both") -> Path:
    """Writes model.ts or model.onnx, metadata.json and README.md to `output`; returns the model's path.

    Raises:
        UserError: `onnx` is not installed; the folder holds other files of these names or cannot be written; or the
            file does not give the networks' probabilities.
    """
    path = make_folder(output) / FILES[form]
    page = output / "README.md"
    if page.exists():
        check_page(page)
    described = metadata(model, form, chosen)
    write_model(model, path, described, form, chosen)
    with whole_file(output / "metadata.json") as part:
        part.write_text(json.dumps(described, indent=1))
    with whole_file(page) as part:
        part.write_text(readme(described, FILES[form], "metadata.json"))
    return path


def check_page(page: Path) -> None:
    """Raises UserError if a page is not of an export."""
    if not page.read_text(errors="replace").startswith(HEADLINE):
        raise UserError(f"{page} is not of an export, and would be replaced; choose another folder")


def write_model(model: Model, path: Path, described: dict[str, Any], form: Format, chosen: Chosen) -> None:
    """Writes the networks as a file, with its description inside, and compares it with the networks.

    Raises:
        UserError: see `export_model`.
    """
    own = {"a": [model.network_a], "b": [model.network_b], "both": [model.network_a, model.network_b]}[chosen]
    networks = MeanProbabilities(own).eval()
    plain = _without_kernels(copy.deepcopy(networks)).cpu().float().eval()
    example = torch.randn(1, len(model.channels), *model.patch, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python conditions on shapes, whose outcome does not depend on the patch
        if form == "torchscript":
            traced = torch.jit.trace(plain, example, check_trace=False)
            with whole_file(path) as part:
                traced.save(str(part), _extra_files={"metadata.json": json.dumps(described)})
        else:
            _write_onnx(plain, example, described, path)
        expected = networks.cpu().float()(example)
    difference = float((run_exported(path, example) - expected).abs().max())
    if not difference <= LARGEST_DIFFERENCE:
        path.unlink()
        raise UserError(f"{path} gives probabilities that differ from the networks' by {difference:.2g}; it is removed")


def run_exported(path: Path, images: Tensor) -> Tensor:
    """The probabilities that an exported file gives for patches."""
    if path.suffix == ".ts":
        with torch.no_grad():
            probabilities: Tensor = torch.jit.load(str(path), map_location="cpu")(images)
        return probabilities
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def metadata(model: Model, form: Format, chosen: Chosen) -> dict[str, Any]:
    """What a program needs to know to segment with the file."""
    preprocessing = model.preprocessing
    return {
        "made_by": f"sslfast {sslfast.__version__}",
        "networks": {"both": BOTH, "a": model.options.network_a, "b": model.options.network_b}[chosen],
        "input": {"name": "images", "shape": ["N", len(model.channels), "X", "Y", "Z"], "dtype": "float32"},
        "output": {"name": "probabilities", "shape": ["N", len(model.classes), "X", "Y", "Z"], "dtype": "float32"},
        "channels": model.channels,
        "classes": [
            {"index": i, "value": value, "name": name} for i, (value, name) in enumerate(model.classes.items())
        ],
        "orientation": "RAS",
        "spacing": preprocessing.spacing,
        "spacing_in_training": model.spacing,
        "intensity": preprocessing.intensities(len(model.channels)),
        "window": preprocessing.window if "ct" in preprocessing.intensity else None,
        "patch": model.patch,
        "multiples": model.options.factors,
        **({"opset": OPSET} if form == "onnx" else {}),
    }


HEADLINE = "# Networks exported by sslfast"


def readme(described: dict[str, Any], file: str, described_in: str) -> str:
    """The page that lies beside the file, and beside a file with its description for programs."""
    patch, multiples = (" × ".join(map(str, described[name])) for name in ("patch", "multiples"))
    spacing = described["spacing"]
    grid = (
        f"resample to {' × '.join(f'{s:g}' for s in spacing)} mm, linearly" if spacing else "keep the voxels' spacing"
    )
    seen = described["spacing_in_training"]
    grid += f" (in training {' × '.join(f'{s:.3g}' for s in seen)} mm)" if seen and not spacing else ""
    kinds = {
        "zscore": "subtract the mean of the volume and divide by its standard deviation",
        "ct": f"clip to {described['window']} Hounsfield units, then subtract the mean of the volume and divide by its "
        "standard deviation",
        "none": "as stored",
    }
    pairs = zip(described["channels"], described["intensity"], strict=True)
    channels = "\n".join(f"   - {name}: {kinds[kind]}" for name, kind in pairs)
    classes = "\n".join(f"| {c['index']} | {c['value']} | {c['name']} |" for c in described["classes"])
    opset = f" ONNX, opset {described['opset']}." if "opset" in described else " TorchScript: `torch.jit.load`."
    return f"""{HEADLINE}

`{file}` gives class probabilities of patches: {described["networks"]}.{opset}
`{described_in}` has the following for programs.

- Input `images`, float32 [N, {len(described["channels"])}, X, Y, Z]; output `probabilities`, float32
  [N, {len(described["classes"])}, X, Y, Z].
- N, X, Y and Z may change from call to call. X, Y and Z must be multiples of {multiples}. The networks were trained on
  patches of {patch} voxels, and are best at that size.

## A whole volume

1. Reorder its axes to R, A, S: from left to right, from back to front, from foot to head; {grid}.
2. Intensities of each channel:
{channels}
3. Slide a window of {patch} voxels over the volume, by half of its size. Pad a volume that is smaller on both sides,
   with the lowest value of each channel. Average the windows' probabilities with Gaussian weights (MONAI's
   `sliding_window_inference`, `mode="gaussian"`, `overlap=0.5`).
4. Bring the probabilities back to the grid of the scan, linearly, and take the class of the highest.

| index | value in label maps | class |
|---|---|---|
{classes}
"""


def _without_kernels(module: nn.Module) -> nn.Module:
    """The same module of torch's own operations alone."""
    for name, child in module.named_children():
        setattr(module, name, _PlainNormAct(child) if isinstance(child, NormAct) else _without_kernels(child))
    return module


def _write_onnx(module: nn.Module, example: Tensor, described: dict[str, Any], path: Path) -> None:
    try:
        import onnx
        import onnxruntime  # noqa: F401 (which tests the file)
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; --format onnx needs: pip install 'sslfast[onnx]'") from error
    axes = {0: "N", 2: "X", 3: "Y", 4: "Z"}
    with whole_file(path) as part:
        torch.onnx.export(
            module,
            (example,),
            str(part),
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_axes={"images": axes, "probabilities": axes},
            opset_version=OPSET,
            dynamo=False,
        )
        exported = onnx.load(str(part))
        onnx.helper.set_model_props(exported, {"sslfast": json.dumps(described)})
        onnx.save(exported, str(part))
