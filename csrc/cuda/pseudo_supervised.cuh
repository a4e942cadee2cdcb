// What a block does for the gradient of `pseudo_supervised`; its values come from the decision, which has the logits at hand.
#pragma once

#include "voxels.cuh"

namespace sslfast::cuda {

template <int kMost>
__device__ void pseudo_gradient(const Gradient& g, int block, int blocks) {
  constexpr int kV = kVoxels<kMost>;
  const int classes = kMost == 2 ? 2 : int(g.a.channels);
  const PseudoGradient& of = g.of_pseudo;
  __shared__ float ce[2], linear[2][kMost], square[2][kMost];
  for (int i = int(threadIdx.x); i < 2 * classes; i += kThreads) {
    const int n = i / classes, c = i % classes;
    const bool learns = !of.winner || *of.winner != n;
    const double* own = g.pseudo_sums + i;
    const double share = learns ? double(of.dice * of.values[of.stride + n]) / double(classes - 1) : 0.0;
    dice_gradient(c, own[0], own[2 * classes], own[4 * classes], g.smooth, share, linear[n][c], square[n][c]);
    const int64_t count = *g.pseudo_voxels;
    if (c == 0) ce[n] = learns ? of.ce * of.values[n] / float(count > 1 ? count : 1) : 0.f;
  }
  __syncthreads();
  for_each_tile<kV>(g.a, block, blocks, [&](int64_t volume, int64_t voxel) {
    uint8_t state[kV];
    bool any = false;
#pragma unroll
    for (int v = 0; v < kV; ++v) {
      state[v] = voxel + v < g.a.voxels ? g.state[volume * g.a.voxels + voxel + v] : 0;
      any = any || (state[v] & kReliable);
    }
    float z[2][kV][kMost] = {};
    if (any) {
      load_voxels(g.a, volume, voxel, classes, z[0]);
      load_voxels(g.b, volume, voxel, classes, z[1]);
#pragma unroll
      for (int v = 0; v < kV; ++v) {
        const bool reliable = state[v] & kReliable;
        const int taught = state[v] & kClass;
        int target[2] = {taught, taught};
        if (g.target == Target::other) target[0] = int(argmax<kMost>(z[1][v], classes)), target[1] = int(argmax<kMost>(z[0][v], classes));
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          // dL/dz = p (G - sum p G) + ce (p - onehot) with G = dL/dp of Dice
          float p[kMost], highest, mean = 0;
          const float inverse = 1.f / exp_shifted<kMost>(z[n][v], classes, p, highest);
          FOR_CLASSES(c, 0, kMost, classes) {
            p[c] *= inverse;
            z[n][v][c] = (c == target[n] ? linear[n][c] : 0.f) + square[n][c] * p[c];
            mean += p[c] * z[n][v][c];
          }
          FOR_CLASSES(c, 0, kMost, classes) {
            const float grad = p[c] * (z[n][v][c] - mean) + ce[n] * (p[c] - float(c == target[n]));
            z[n][v][c] = reliable ? grad : 0.f;
          }
        }
      }
    }
    store_voxels(g.to_pseudo[0], volume, voxel, classes, z[0]);
    store_voxels(g.to_pseudo[1], volume, voxel, classes, z[1]);
  });
}

}  // namespace sslfast::cuda
