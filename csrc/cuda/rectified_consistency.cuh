// What a block does for `rectified_consistency`: sums of what the decision has at hand, the losses of all, the gradient.
#pragma once

#include "voxels.cuh"

namespace sslfast::cuda {

enum : int { kTaught, kRectified = kTaught + 2, kCosine = kRectified + 2, kProducts };  // of a row; 3 C of the last

// A thread's sums.
template <int kMost>
struct RectifiedSums {
  float taught[2] = {}, rectified[2] = {}, cosine = 0, products[3][kMost] = {};

  __device__ void add(const Prediction<kMost, float> (&of)[2], uint8_t state, bool inside, int classes) {
    const Agreement agreement(of, classes);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const bool learns = state & sure(1 - n);
      taught[n] += float(learns);
      rectified[n] += learns ? agreement.rectified(n) : 0.f;
    }
    cosine += inside ? 1.f - agreement.cosine : 0.f;
    FOR_CLASSES(c, 1, kMost, classes) {
      const float p[2] = {of[0].p[c], of[1].p[c]};
#pragma unroll
      for (int n = 0; n < 2; ++n) products[n][c] += inside ? p[n] * p[n] : 0.f;
      products[2][c] += inside ? p[0] * p[1] : 0.f;
    }
  }

  template <class Sums>
  __device__ void add_to(Sums& sums, int classes) const {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      sums.add(kTaught + n, taught[n]);
      sums.add(kRectified + n, rectified[n]);
    }
    sums.add(kCosine, cosine);
#pragma unroll
    for (int i = 0; i < 3; ++i)
      FOR_CLASSES(c, 1, kMost, classes) sums.add(kProducts + i * classes + c, products[i][c]);
  }
};

// From the sums over all blocks. For a whole block.
__device__ inline void rectified_losses(const Decision& d, const double* row, int classes) {
  const double* products = row + kProducts;
  for (int i = int(threadIdx.x); i < 3 * classes; i += kThreads) d.pseudo_sums[i] = products[i];
  if (threadIdx.x != 0) return;
  const int64_t voxels[3] = {int64_t(row[kTaught]), int64_t(row[kTaught + 1]), d.a.volumes * d.a.voxels};
  for (int i = 0; i < 3; ++i) {
    d.pseudo_voxels[i] = voxels[i];
    d.pseudo[i] = float(mean(row[kRectified + i], voxels[i]));
  }
  double dice = 0;
  for (int c = 1; c < classes; ++c) dice += dice_loss(products[c], products[2 * classes + c], products[classes + c], d.smooth);
  d.pseudo[3] = float(dice / double(classes - 1));
  if (d.kept) *d.kept = float(mean(double(voxels[0] + voxels[1]), 2 * voxels[2]));
}

template <int kMost>
__device__ void rectified_gradient(const Gradient& g, int block, int blocks) {
  constexpr int kV = kVoxels<kMost>;
  const int classes = kMost == 2 ? 2 : int(g.a.channels);
  const PseudoGradient& of = g.of_pseudo;
  const float both = (of.values[0] + of.values[1]) / 2;
  const float scale[2] = {mean(of.ce * of.values[0], g.pseudo_voxels[0]), mean(of.ce * of.values[1], g.pseudo_voxels[1])};
  const float cosine_scale = mean(of.ce * (of.stride ? of.values[2] : both), g.pseudo_voxels[2]);
  __shared__ float square[kMost], product[kMost];
  for (int c = int(threadIdx.x); c < classes; c += kThreads) {
    const double* own = g.pseudo_sums + c;
    const double share = double(of.dice * (of.stride ? of.values[3] : both)) / double(classes - 1);
    dice_gradient(c, own[0], own[2 * classes], own[classes], g.smooth, share, product[c], square[c]);
  }
  __syncthreads();
  for_each_tile<kV>(g.a, block, blocks, [&](int64_t volume, int64_t voxel) {
    float z[2][kV][kMost] = {}, grad[2][kV][kMost] = {};
    load_voxels(g.a, volume, voxel, classes, z[0]);
    load_voxels(g.b, volume, voxel, classes, z[1]);
#pragma unroll
    for (int v = 0; v < kV; ++v) {
      const uint8_t state = voxel + v < g.a.voxels ? g.state[volume * g.a.voxels + voxel + v] : 0;
      const Prediction<kMost, float> found[2] = {{z[0][v], classes}, {z[1][v], classes}};
      const Agreement agreement(found, classes);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const ProductGradient by_products(found[n], found[1 - n], square, product, classes);
        FOR_CLASSES(c, 0, kMost, classes) {
          const float taught = scale[n] * agreement.rectified_gradient(found, n, c);
          const float everywhere = cosine_scale * agreement.cosine_gradient(found, n, c) + by_products.by_logit(c);
          grad[n][v][c] = everywhere + (state & sure(1 - n) ? taught : 0.f);
        }
      }
    }
    store_voxels(g.to_pseudo[0], volume, voxel, classes, grad[0]);
    store_voxels(g.to_pseudo[1], volume, voxel, classes, grad[1]);
  });
}

}  // namespace sslfast::cuda
