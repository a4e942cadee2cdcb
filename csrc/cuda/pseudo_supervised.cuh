// What a block does for the gradient of `pseudo_supervised`; its values come from the decision, which has the logits at hand.
#pragma once

#include "voxels.cuh"

namespace sslfast::cuda {

template <int kMost>
__device__ void pseudo_gradient(const Gradient& g, int block, int blocks) {
  constexpr int kV = kVoxels<kMost>;
  const int classes = kMost == 2 ? 2 : int(g.a.channels);
  const int64_t count = *g.reliable_voxels;
  float scale[2];
  for (int n = 0; n < 2; ++n) {
    const bool learns = !g.of_pseudo.winner || *g.of_pseudo.winner != n;
    scale[n] = learns ? g.of_pseudo.factor * g.of_pseudo.values[n] / float(count > 1 ? count : 1) : 0.f;
  }
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
        if (g.other) target[0] = int(argmax<kMost>(z[1][v], classes)), target[1] = int(argmax<kMost>(z[0][v], classes));
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          float e[kMost], highest;
          const float inverse = 1.f / exp_shifted<kMost>(z[n][v], classes, e, highest);
          FOR_CLASSES(c, 0, kMost, classes)
            z[n][v][c] = reliable ? scale[n] * (e[c] * inverse - float(c == target[n])) : 0.f;
        }
      }
    }
    store_voxels(g.to_pseudo[0], volume, voxel, classes, z[0]);
    store_voxels(g.to_pseudo[1], volume, voxel, classes, z[1]);
  });
}

}  // namespace sslfast::cuda
