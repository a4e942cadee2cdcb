"""Triton kernels, installed as `sslfast.kernels`: one file an op, named alike, each op's functions by its name."""

from sslfast.kernels import (
    class_prototypes,
    dual_supervised,
    masked_consistency,
    pseudo_supervised,
    rectified_consistency,
    reliability,
    sample_voxels,
    voxel_infonce,
)

IMPLEMENTATIONS = {
    function.__name__: function
    for function in (
        dual_supervised.dual_supervised,
        dual_supervised.dual_supervised_backward,
        reliability.reliability,
        reliability.voxel_entropy,
        pseudo_supervised.pseudo_supervised,
        pseudo_supervised.pseudo_supervised_backward,
        rectified_consistency.rectified_consistency,
        rectified_consistency.rectified_consistency_backward,
        masked_consistency.masked_consistency,
        masked_consistency.masked_consistency_backward,
        class_prototypes.class_prototypes,
        class_prototypes.class_prototypes_backward,
        sample_voxels.sample_voxels,
        sample_voxels.gather_voxels,
        sample_voxels.gather_voxels_backward,
        voxel_infonce.voxel_infonce,
        voxel_infonce.voxel_infonce_backward,
    )
}
