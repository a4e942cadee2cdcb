// What a block does for `dual_supervised`: the sums over its labelled voxels, the losses of all, the gradient of its voxels.
#pragma once

#include "voxels.cuh"

namespace sslfast::cuda {

// A row of sums: mask and labels out of range, then CE, discrepancy [2], size [C], overlap and square [2, C].
enum : int { kMask, kOutside, kCe, kDiscrepancy = kCe + 2, kSize = kDiscrepancy + 2 };

__device__ inline int64_t label_at(const Labels& labels, int64_t i) {
  switch (labels.bytes) {
    case 8: return static_cast<const int64_t*>(labels.data)[i];
    case 4: return static_cast<const int32_t*>(labels.data)[i];
    case 2: return static_cast<const int16_t*>(labels.data)[i];
    default: return labels.is_signed ? static_cast<const int8_t*>(labels.data)[i] : static_cast<const uint8_t*>(labels.data)[i];
  }
}

// A voxel's label; -1 where nobody annotated, it is out of range or the volume has ended.
__device__ inline int read_label(const Supervised& s, int64_t volume, int64_t voxel, int classes, bool& outside) {
  outside = false;
  if (voxel >= s.a.voxels) return -1;
  const int64_t label = label_at(s.labels, volume * s.a.voxels + voxel);
  if (label == s.ignore) return -1;
  outside = label < 0 || label >= classes;
  return outside ? -1 : int(label);
}

template <int kMost>
__device__ void supervised_sums(const Supervised& s, int block, int blocks) {
  constexpr int kV = kVoxels<kMost>;
  __shared__ double slots[kWarps][kSize + 5 * kMost];
  BlockSums<kSize + 5 * kMost> sums(slots);
  const int classes = kMost == 2 ? 2 : int(s.a.channels);
  for_each_tile<kV>(s.a, block, blocks, [&](int64_t volume, int64_t voxel) {
    float z[2][kV][kMost];
    Described<kMost> found[2][kV];
    load_voxels(s.a, volume, voxel, classes, z[0]);
    load_voxels(s.b, volume, voxel, classes, z[1]);
    int label[kV];
    float mask = 0, outside = 0, ce[2] = {}, discrepancy[2] = {};
#pragma unroll
    for (int v = 0; v < kV; ++v) {
      bool is_outside;
      label[v] = read_label(s, volume, voxel + v, classes, is_outside);
      if (is_outside) {
        outside += 1;
        atomicMax(s.last_outside, ~static_cast<unsigned long long>(volume * s.a.voxels + voxel + v));
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) found[n][v] = describe_voxel<kMost>(z[n][v], classes, s.threshold);
      if (label[v] < 0) continue;
      const bool differ = found[0][v].confident != found[1][v].confident;
      mask += float(differ);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        float own = 0, wrong = 0;
        FOR_CLASSES(c, 0, kMost, classes) {
          own = select(c == label[v], z[n][v][c], own);
          const float off = found[n][v].p[c] - float(c == label[v]);
          wrong += off * off;
        }
        ce[n] += found[n][v].log_total + found[n][v].highest - own;
        if (differ) discrepancy[n] += 0.5f * wrong;
      }
    }
    sums.add(kMask, mask);
    sums.add(kOutside, outside);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      sums.add(kCe + n, ce[n]);
      sums.add(kDiscrepancy + n, discrepancy[n]);
    }
    FOR_CLASSES(c, 0, kMost, classes) {
      float size = 0, overlap[2] = {}, square[2] = {};
#pragma unroll
      for (int v = 0; v < kV; ++v) {
        size += float(label[v] == c);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const float p = found[n][v].p[c];
          overlap[n] += label[v] == c ? p : 0.f;
          square[n] += label[v] >= 0 ? p * p : 0.f;
        }
      }
      sums.add(kSize + c, size);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        sums.add(kSize + (1 + n) * classes + c, overlap[n]);
        sums.add(kSize + (3 + n) * classes + c, square[n]);
      }
    }
  });
  const int quantities = kSize + 5 * classes;
  sums.write(s.rows + int64_t(block) * quantities, quantities);
  if (!add_rows(s.rows, quantities, block, blocks, s.tickets) || threadIdx.x != 0) return;

  const double* total = s.rows;
  double annotated = 0, dice[2] = {};
  for (int c = 0; c < classes; ++c) annotated += total[kSize + c];
  for (int n = 0; n < 2; ++n)
    for (int c = 1; c < classes; ++c)
      dice[n] += dice_loss(total[kSize + c], total[kSize + (1 + n) * classes + c], total[kSize + (3 + n) * classes + c], s.smooth);
  const bool bad = total[kOutside] > 0;
  const int64_t first = bad ? int64_t(~__ldcg(s.last_outside)) : 0;
  const double invalid = bad ? double(nanf("")) : 0.0;
  for (int n = 0; n < 2; ++n) {
    s.losses[n] = float(total[kCe + n] / (annotated > 1 ? annotated : 1) + invalid);
    s.losses[2 + n] = float(dice[n] / double(classes - 1) + invalid);
    s.losses[4 + n] = float(total[kDiscrepancy + n] / (total[kMask] + 1e-16) + invalid);
  }
  *s.mask = int64_t(total[kMask]);
  s.sums[0] = annotated;
  s.sums[1] = total[kMask];
  s.sums[2] = total[kOutside];
  s.sums[3] = double(first);
  s.sums[4] = bad ? double(label_at(s.labels, first)) : 0.0;
  for (int i = 0; i < 5 * classes; ++i) s.sums[kHeader + i] = total[kSize + i];
  if (s.winner) *s.winner = s.given ? *s.given != 0 : s.losses[3] < s.losses[2];
}

template <int kMost>
__device__ void supervised_gradient(const Supervised& s, const SupervisedGradient& g, const Map (&to)[2], int block, int blocks) {
  constexpr int kV = kVoxels<kMost>;
  // d p_c = linear[c] [y = c] + square[c] p_c of Dice
  __shared__ float ce[2], discrepancy[2], linear[2][kMost], square[2][kMost];
  const int classes = kMost == 2 ? 2 : int(s.a.channels);
  for (int i = int(threadIdx.x); i < 2 * classes; i += kThreads) {
    const int n = i / classes, c = i % classes;
    const double* own = s.sums + kHeader + c;
    const double share = double(g.values[g.stride + n]) / double(classes - 1);
    dice_gradient(c, own[0], own[(1 + n) * classes], own[(3 + n) * classes], s.smooth, share, linear[n][c], square[n][c]);
    if (c == 0) {
      ce[n] = float(g.values[n] / (s.sums[0] > 1 ? s.sums[0] : 1.0));
      discrepancy[n] = float(g.discrepancy * g.values[2 * g.stride + n] / (s.sums[1] + 1e-16));
    }
  }
  __syncthreads();
  for_each_tile<kV>(s.a, block, blocks, [&](int64_t volume, int64_t voxel) {
    float z[2][kV][kMost];
    load_voxels(s.a, volume, voxel, classes, z[0]);
    load_voxels(s.b, volume, voxel, classes, z[1]);
#pragma unroll
    for (int v = 0; v < kV; ++v) {
      bool outside;
      const int label = read_label(s, volume, voxel + v, classes, outside);
      Described<kMost> found[2];
#pragma unroll
      for (int n = 0; n < 2; ++n) found[n] = describe_voxel<kMost>(z[n][v], classes, s.threshold);
      const bool differ = found[0].confident != found[1].confident;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        // dL/dz = p (G - sum p G) + ce (p - onehot) with G = dL/dp of Dice and discrepancy
        const float on_mask = differ ? discrepancy[n] : 0.f;
        float mean = 0;
        FOR_CLASSES(c, 0, kMost, classes) {
          const float p = found[n].p[c], onehot = float(c == label);
          z[n][v][c] = linear[n][c] * onehot + square[n][c] * p + on_mask * (p - onehot);
          mean += p * z[n][v][c];
        }
        FOR_CLASSES(c, 0, kMost, classes) {
          const float p = found[n].p[c], onehot = float(c == label);
          const float grad = p * (z[n][v][c] - mean) + ce[n] * (p - onehot);
          z[n][v][c] = label >= 0 ? grad : 0.f;
        }
      }
    }
    store_voxels(to[0], volume, voxel, classes, z[0]);
    store_voxels(to[1], volume, voxel, classes, z[1]);
  });
}

}  // namespace sslfast::cuda
