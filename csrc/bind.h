// Shared parts of the bindings of all devices: conversion of tensors to the kernels' arguments. They use LibTorch's
// stable ABI: one build works with every torch from 2.10 on, and compiles in a second.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "arguments.h"

namespace sslfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

inline Tensor empty(const Tensor& like, std::vector<int64_t> size, ScalarType dtype) {
  return torch::stable::new_empty(like, size, dtype);
}

// True if the spatial dimensions have a common stride.
inline bool has_one_voxel_stride(const Tensor& t) {
  int64_t next = -1;  // required stride of the next outer dimension
  for (int64_t d = t.dim() - 1; d >= 2; --d) {
    if (t.size(d) == 1) continue;
    if (next >= 0 && t.stride(d) != next) return false;
    next = t.stride(d) * t.size(d);
  }
  return true;
}

// A tensor [N, channels, *spatial] and its VoxelMap; owns a copy if the spatial dimensions have no common stride.
struct OwnedMap {
  Tensor owned;
  VoxelMap map;

  explicit OwnedMap(const Tensor& t) : owned(has_one_voxel_stride(t) ? t : torch::stable::contiguous(t)) {
    map.data = owned.data_ptr();
    map.dtype = owned.scalar_type() == ScalarType::BFloat16 ? DType::bf16
                : owned.scalar_type() == ScalarType::Half   ? DType::f16
                                                            : DType::f32;
    map.volumes = owned.size(0);
    map.channels = owned.size(1);
    map.voxels = 1;
    map.voxel_stride = 1;
    for (int64_t d = owned.dim() - 1; d >= 2; --d) {
      if (owned.size(d) != 1 && map.voxels == 1) map.voxel_stride = owned.stride(d);
      map.voxels *= owned.size(d);
    }
    map.volume_stride = owned.stride(0);
    map.channel_stride = owned.stride(1);
  }

  operator const VoxelMap&() const { return map; }
};

inline Side labels_side(const Tensor& t, int64_t classes, int64_t ignore) {
  return {t.data_ptr(), int(t.element_size()), t.scalar_type() != ScalarType::Byte, classes - 1, ignore};
}

// A reliable voxel with a class that does not exist is out of range.
inline Side flags_side(const Tensor& t, int64_t classes) {
  return {t.data_ptr(), 1, false, kReliable + classes - 1, -1};
}

inline std::vector<int64_t> voxel_shape(const Tensor& t) {
  std::vector<int64_t> shape{t.size(0)};
  for (int64_t d = 2; d < t.dim(); ++d) shape.push_back(t.size(d));
  return shape;
}

// Contiguous arguments of InfoNCE, which own their memory while the kernel runs.
struct OwnedContrast {
  Tensor anchors, anchor_counts, prototypes, prototype_counts, negatives, negative_counts;

  Contrast view(double temperature) const {
    return {anchors.size(0),
            anchors.size(1),
            negatives.size(1),
            anchors.size(2),
            data<float>(anchors),
            data<float>(prototypes),
            data<float>(negatives),
            data<int64_t>(anchor_counts),
            data<int64_t>(prototype_counts),
            data<int64_t>(negative_counts),
            float(temperature)};
  }
};

inline OwnedContrast own_contrast(const Tensor& anchors, const Tensor& anchor_counts, const Tensor& prototypes,
                                  const Tensor& prototype_counts, const Tensor& negatives,
                                  const Tensor& negative_counts) {
  using torch::stable::contiguous;
  return {contiguous(anchors),          contiguous(anchor_counts), contiguous(prototypes),
          contiguous(prototype_counts), contiguous(negatives),     contiguous(negative_counts)};
}

}  // namespace sslfast
