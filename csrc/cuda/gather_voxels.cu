// The features of sampled voxels, and their gradient, which is added to that of the map.
#include "voxels.cuh"

namespace sslfast::cuda {
namespace {

__global__ void __launch_bounds__(kThreads)
    gather_kernel(VoxelMap features, const int64_t* indices, int64_t count, float* rows) {
  const int64_t width = features.channels;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count * width;
       i += int64_t(gridDim.x) * kThreads) {
    const int64_t voxel = indices[i / width], k = i % width;
    rows[i] = is_voxel(features, voxel)
                  ? load(features, features.offset(voxel / features.voxels, voxel % features.voxels) +
                                       k * features.channel_stride)
              : voxel == -1 ? 0.f
                            : NAN;
  }
}

// One warp per row. The warp of a voxel's first row adds all rows of the voxel to the map, in order, and writes once.
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(const float* rows, const int64_t* indices, int64_t count, VoxelMap to) {
  const int64_t width = to.channels;
  for (int64_t i = int64_t(blockIdx.x) * kWarps + warp(); i < count; i += int64_t(gridDim.x) * kWarps) {
    const int64_t voxel = indices[i];
    if (!is_voxel(to, voxel)) continue;
    bool seen = false;
    for (int64_t j = lane(); j < i; j += kWarp) seen = seen || indices[j] == voxel;
    if (__any_sync(kAllLanes, seen)) continue;
    const int64_t first = to.offset(voxel / to.voxels, voxel % to.voxels);
    for (int64_t begin = 0; begin < width; begin += kWarp) {
      const int64_t k = begin + lane();
      float total = k < width ? rows[i * width + k] : 0.f;
      for (int64_t j = i + 1; j < count; j += kWarp) {
        unsigned equal = __ballot_sync(kAllLanes, j + lane() < count && indices[j + lane()] == voxel);
        for (; equal; equal &= equal - 1) {
          const int64_t other = j + __ffs(int(equal)) - 1;
          if (k < width) total += rows[other * width + k];
        }
      }
      if (k < width) store(to, first + k * to.channel_stride, load(to, first + k * to.channel_stride) + total);
    }
  }
}

}  // namespace

void gather_voxels(const VoxelMap& features, const int64_t* indices, int64_t count, float* rows, void* stream) {
  const dim3 blocks(blocks_for((count * features.channels + kThreads - 1) / kThreads));
  if (count) launch(gather_kernel, blocks, 0, stream, features, indices, count, rows);
}

void gather_voxels_backward(const float* rows, const int64_t* indices, int64_t count, const VoxelMap& grad,
                            void* stream) {
  if (count)
    launch(scatter_kernel, dim3(blocks_for((count + kWarps - 1) / kWarps)), 0, stream, rows, indices, count, grad);
}

}  // namespace sslfast::cuda
