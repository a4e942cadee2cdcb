"""The operations, one file each. `<op>_ref`, in plain PyTorch, is the specification of an op."""

from sslfast.ops.class_prototypes import ClassPrototypes, class_prototypes
from sslfast.ops.dual_contrastive import DualContrastive, dual_contrastive
from sslfast.ops.dual_supervised import DualSupervised, dual_supervised
from sslfast.ops.masked_consistency import MaskedConsistency, masked_consistency
from sslfast.ops.norm_act import NormAct, norm_act
from sslfast.ops.pseudo_supervised import PseudoSupervised, pseudo_supervised
from sslfast.ops.rectified_consistency import RectifiedConsistency, rectified_consistency
from sslfast.ops.reliability import Reliability, reliability
from sslfast.ops.sample_voxels import VoxelSample, gather_voxels, sample_voxels
from sslfast.ops.voxel_infonce import VoxelInfoNCE, voxel_infonce

__all__ = [
    "ClassPrototypes",
    "DualContrastive",
    "DualSupervised",
    "MaskedConsistency",
    "NormAct",
    "PseudoSupervised",
    "RectifiedConsistency",
    "Reliability",
    "VoxelInfoNCE",
    "VoxelSample",
    "class_prototypes",
    "dual_contrastive",
    "dual_supervised",
    "gather_voxels",
    "masked_consistency",
    "norm_act",
    "pseudo_supervised",
    "rectified_consistency",
    "reliability",
    "sample_voxels",
    "voxel_infonce",
]
