// A network's softmax at 16 voxels of a tile.
#pragma once

#include "../voxel_math.h"
#include "voxels.h"

namespace sslfast {

using VecPrediction = Prediction<kMaxClasses, Vec>;

SSLFAST_INLINE VecPrediction predict(const float* tile, int classes, float scale = 1.f) {
  Vec z[kMaxClasses];
  for (int c = 0; c < classes; ++c) z[c] = load(tile + c * kTile) * scale;
  return {z, classes};
}

}  // namespace sslfast
