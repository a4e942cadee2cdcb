"""The operations: each has a plain PyTorch twin, `<op>_ref`, that is its specification."""

from sslfast.ops.class_prototypes import ClassPrototypes, class_prototypes
from sslfast.ops.dual_contrastive import DualContrastive, dual_contrastive
from sslfast.ops.dual_supervised import DualSupervised, dual_supervised
from sslfast.ops.pseudo_supervised import PseudoSupervised, pseudo_supervised
from sslfast.ops.reliability import Reliability, reliability
from sslfast.ops.sample_voxels import VoxelSample, gather_voxels, sample_voxels
from sslfast.ops.voxel_infonce import VoxelInfoNCE, voxel_infonce

__all__ = [
    "ClassPrototypes",
    "DualContrastive",
    "DualSupervised",
    "PseudoSupervised",
    "Reliability",
    "VoxelInfoNCE",
    "VoxelSample",
    "class_prototypes",
    "dual_contrastive",
    "dual_supervised",
    "gather_voxels",
    "pseudo_supervised",
    "reliability",
    "sample_voxels",
    "voxel_infonce",
]
