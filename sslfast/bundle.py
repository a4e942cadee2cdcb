"""A run's networks as a MONAI bundle, which segments scans without sslfast."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from textwrap import fill
from typing import Any

import monai
import nibabel
import numpy
import torch
from monai.utils import IgniteInfo

from sslfast import bundle_transforms
from sslfast.atomic_io import make_folder, whole_file
from sslfast.errors import UserError
from sslfast.exported import BOTH, Chosen, check_page, metadata, readme, write_model
from sslfast.model import Model

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
MODEL = "models/model.ts"
METADATA = "configs/metadata.json"
PAGE = "docs/README.md"
TRANSFORMS = "scripts.transforms"  # the module in the bundle that is a copy of `sslfast.bundle_transforms`


def export_bundle(model: Model, output: Path, chosen: Chosen = "both") -> Path:
    """Writes the files of the bundle to `output`; returns `output`.

    Raises:
        UserError: see `sslfast.exported.export_model`; or MONAI would read a name as code.
    """
    if as_code := [name for name in (*model.channels, *model.classes.values()) if {*name} & {*"$@%"}]:
        raise UserError(
            f"the name {as_code[0]!r} has a $, @ or %, which MONAI evaluates in the files of a bundle; choose --format "
            "torchscript or onnx"
        )
    described = metadata(model, "torchscript", chosen)
    texts = {
        PAGE: readme(described, MODEL, METADATA) + how_to_run(described),
        METADATA: json.dumps(bundle_metadata(described) | _filled_in(output / METADATA), indent=1),
        "configs/inference.json": json.dumps(inference(described), indent=1),
        "scripts/__init__.py": "",
        "scripts/transforms.py": inspect.getsource(bundle_transforms),
    }
    page = make_folder(output) / PAGE
    if page.exists():
        check_page(page)
    elif there := [path for path in (MODEL, *texts) if (output / path).exists()]:
        raise UserError(f"{output / there[0]} is not of an export, and would be replaced; choose another folder")
    for path, text in texts.items():  # the page first: with it, an export that was interrupted can be repeated
        with whole_file(output / path) as part:
            part.write_text(text)
    write_model(model, output / MODEL, described, "torchscript", chosen)
    return output


def _filled_in(path: Path) -> dict[str, Any]:
    """What the metadata of an earlier export says, and only its user knows."""
    try:
        earlier = json.loads(path.read_text())
        return {name: earlier[name] for name in ("authors", "copyright", "version", "changelog")}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def bundle_metadata(described: dict[str, Any]) -> dict[str, Any]:
    """metadata.json by MONAI's schema; under "sslfast" is what the other formats have."""
    foreground = [c["name"] for c in described["classes"][1:]]
    values = {str(c["value"]): c["name"] for c in described["classes"]}
    is_ct = {*described["intensity"]} == {"ct"}
    patch = {"type": "image", "spatial_shape": described["patch"], "dtype": "float32", "is_patch_data": True}
    return {
        "schema": SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": f"made by {described['made_by']}"},
        "monai_version": monai.__version__,
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": numpy.__version__,
        "required_packages_version": {
            "nibabel": nibabel.__version__,
            "pytorch-ignite": str(IgniteInfo.OPT_IMPORT_VERSION),
        },
        "task": f"Segmentation of {', '.join(foreground)}",
        "description": f"Networks that were trained by {described['made_by']}: {described['networks']}",
        "authors": "not stated",
        "copyright": "not stated",
        "network_data_format": {
            "inputs": {
                "image": {
                    **patch,
                    "format": "hounsfield" if is_ct else "magnitude",
                    "modality": "CT" if is_ct else "n/a",
                    "num_channels": len(described["channels"]),
                    "value_range": [],
                    "channel_def": {str(i): name for i, name in enumerate(described["channels"])},
                }
            },
            "outputs": {
                "pred": {
                    **patch,
                    "format": "labels",
                    "num_channels": len(values),
                    "value_range": [0, 1],
                    "channel_def": {str(c["index"]): c["name"] for c in described["classes"]},
                }
            },
            "post_processed_outputs": {
                "pred": {
                    "type": "image",
                    "format": "segmentation",
                    "num_channels": 1,
                    "spatial_shape": ["*", "*", "*"],
                    "dtype": _dtype(described),
                    "value_range": [0, max(map(int, values))],
                    "is_patch_data": False,
                    "channel_def": values,
                }
            },
        },
        "sslfast": described,
    }


def inference(described: dict[str, Any]) -> dict[str, Any]:
    """inference.json: from the files in `dataset_dir` to label maps in `output_dir`, as `python -m sslfast.predict`."""
    spacing = described["spacing"]
    resample = {
        "_target_": "Spacingd",
        "keys": "image",
        "pixdim": spacing,
        "mode": "bilinear",
        "padding_mode": "border",
        "align_corners": True,
    }
    return {
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/data'",
        "output_dir": "$@bundle_root + '/eval'",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "datalist": {
            "_target_": f"{TRANSFORMS}.find_scans",
            "folder": "@dataset_dir",
            "channels": len(described["channels"]),
        },
        "network_def": f"$torch.jit.load(@bundle_root + '/{MODEL}', map_location=@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {
                    "_target_": "LoadImaged",
                    "keys": "image",
                    "reader": {"_target_": f"{TRANSFORMS}.ScanReader"},
                    "ensure_channel_first": True,
                },
                {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS", "labels": None},
                *([resample] if spacing else []),
                {
                    "_target_": f"{TRANSFORMS}.NormaliseChannelsd",
                    "keys": ["image"],
                    "intensity": described["intensity"],
                    **({"window": described["window"]} if described["window"] else {}),
                },
            ],
        },
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1},
        "inferer": {
            "_target_": f"{TRANSFORMS}.PaddedWindowInferer",
            "roi_size": described["patch"],
            "sw_batch_size": "$4 if @device.type == 'cuda' else 1",
            "overlap": 0.5,
            "mode": "gaussian",
            "sw_device": "@device",
            "device": "cpu",
        },
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {
                    "_target_": f"{TRANSFORMS}.MostProbabled",
                    "keys": ["pred"],
                    "values": [c["value"] for c in described["classes"]],
                    "transform": "@preprocessing",
                    "orig_keys": "image",
                },
                {
                    "_target_": "SaveImaged",
                    "keys": "pred",
                    "output_dir": "@output_dir",
                    "output_postfix": "",
                    "output_dtype": f"$np.{_dtype(described)}",
                    "separate_folder": False,
                    "resample": False,
                    "writer": f"{TRANSFORMS}.LabelWriter",
                },
            ],
        },
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network_def",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
        },
        "run": ["$@evaluator.run()"],
    }


def how_to_run(described: dict[str, Any]) -> str:
    """The part of the page that belongs to a bundle alone."""
    names = described["channels"]
    files = "`case.nii.gz`"
    if len(names) > 1:
        numbered = ", ".join(f"`case_{number:04}.nii.gz` ({name})" for number, name in enumerate(names))
        files = f"a file for each channel, {numbered}, or a 4D file `case.nii.gz`"
    same = "`python -m sslfast.predict` takes the mean of both networks, so its label maps differ."
    if described["networks"] == BOTH:
        same = (
            "It is the label map of `python -m sslfast.predict --precision fp32`, except for voxels in which two "
            "classes are equally probable up to rounding. Without this flag, `predict` computes in bfloat16 where the "
            "hardware multiplies it, and more voxels differ."
        )
    made = (
        f"`SCANS` holds NIfTI files, of each scan {files}. Its segmentation is `SEGMENTATIONS/case.nii.gz`, on the "
        f"grid of the scan, with the values of the table. {same}"
    )
    return f"""
## Run the bundle

In this folder, with `pip install 'monai[nibabel,ignite,fire]'`; sslfast is not needed:

```bash
python -m monai.bundle run --config_file configs/inference.json --dataset_dir SCANS --output_dir SEGMENTATIONS
```

{fill(made, 120, break_on_hyphens=False)}

Not in the bundle: NRRD, MetaImage and DICOM; a folder for each channel; `quality.csv` and its flags; `--mirror` and
`--largest-component`. A scan that cannot be segmented ends the command, and files in `SEGMENTATIONS` are replaced.

`authors` and `copyright` in `{METADATA}` are yours to fill in.
"""


def _dtype(described: dict[str, Any]) -> str:
    return "uint8" if max(c["value"] for c in described["classes"]) < 256 else "int16"
