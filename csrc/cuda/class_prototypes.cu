// Sums of the unit features of each class's reliable voxels. Each lane has one voxel. A warp sums each class that it
// holds, mostly one or two, 16 channels at a time.
// Bytes per voxel for K features of s bytes: 1, and K s if reliable.
#include "voxels.cuh"

namespace sslfast::cuda {
namespace {

constexpr int kGroup = 16;              // channels per call of sums_by_lane
constexpr int kMostSums = 8 * 1024;     // floats per block
constexpr int64_t kMostRows = 1 << 20;  // doubles in all blocks

// Parts of the sums [parts, C, K] in shared memory: one per warp, or fewer that warps share if memory is short.
int parts_of(const Prototypes& p) {
  const int64_t parts = kMostSums / (p.classes * p.features.channels);
  return int(parts < 1 ? 1 : parts < kWarps ? parts : kWarps);
}

int64_t quantities_of(const Prototypes& p) { return p.classes * (p.features.channels + 1); }

int blocks_of(const Prototypes& p) {
  const int64_t room = kMostRows / quantities_of(p);
  return blocks_for(Tiles<1>(p.features).count, room < 64 ? 64 : room < kMostBlocks ? room : kMostBlocks);
}

// Loads channels begin .. begin + 15 of a voxel; 0 beyond the last channel.
__device__ void load_group(const VoxelMap& map, int64_t voxel, int64_t begin, float (&f)[kGroup]) {
  with_dtype(map.dtype, [&](auto type) {
    using T = decltype(type);
    const auto* from = static_cast<const typename T::Element*>(map.data) + voxel + begin * map.channel_stride;
    typename T::Element read[kGroup] = {};
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (begin + i < map.channels) read[i] = *from;
      from += map.channel_stride;
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) f[i] = T::to_float(read[i]);
  });
}

__global__ void __launch_bounds__(kThreads, 4) prototypes_kernel(Prototypes p, int parts) {
  __shared__ int members[kWarps][kMaxClasses];
  const VoxelMap& map = p.second && *p.second != 0 ? p.other : p.features;
  const int classes = p.classes, width = int(map.channels), cells = classes * width;
  float* sums = reinterpret_cast<float*>(dynamic_shared);
  for (int i = int(threadIdx.x); i < parts * cells; i += kThreads) sums[i] = 0;
  members[warp()][lane()] = 0;
  __syncthreads();

  for_each_tile<1>(map, [&](int64_t volume, int64_t voxel) {
    const uint8_t flags = voxel < map.voxels ? p.flags[volume * map.voxels + voxel] : 0;
    const int label = (flags & kReliable) && (flags & kClass) < classes ? flags & kClass : -1;
    const unsigned labelled = __ballot_sync(kAllLanes, label >= 0);
    const int64_t first = map.offset(volume, voxel);
    float f[kGroup] = {}, square = 0;
    for (int begin = 0; label >= 0 && begin < width; begin += kGroup) {
      load_group(map, first, begin, f);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) square += f[i] * f[i];
    }
    const float inverse = inverse_length(square);
    // warps that share a part take turns
    for (int turn = 0; turn < kWarps; turn += parts) {
      const bool is_mine = warp() / parts * parts == turn;
      for (int begin = 0; is_mine && labelled && begin < width; begin += kGroup) {
        if (width > kGroup && label >= 0) load_group(map, first, begin, f);
        for (unsigned left = labelled; left;) {
          const int c = __shfl_sync(kAllLanes, label, __ffs(int(left)) - 1);
          const unsigned members_of_class = __ballot_sync(kAllLanes, label == c);
          left &= ~members_of_class;
          float values[kGroup];
#pragma unroll
          for (int i = 0; i < kGroup; ++i) values[i] = label == c ? inverse * f[i] : 0.f;
          const float total = sums_by_lane(values);
          const int k = begin + lane();
          if (lane() < kGroup && k < width) sums[(warp() % parts) * cells + c * width + k] += total;
          if (begin == 0 && lane() == 0) members[warp()][c] += __popc(members_of_class);
        }
      }
      if (parts < kWarps) __syncthreads();
    }
  });

  __syncthreads();
  double* row = p.partials.rows + int64_t(blockIdx.x) * (cells + classes);
  for (int i = int(threadIdx.x); i < cells + classes; i += kThreads) {
    double total = 0;
    for (int w = 0; i < cells && w < parts; ++w) total += sums[w * cells + i];
    for (int w = 0; i >= cells && w < kWarps; ++w) total += members[w][i - cells];
    row[i] = total;
  }
  if (!add_rows(p.partials, cells + classes)) return;
  for (int i = int(threadIdx.x); i < cells; i += kThreads) p.sums[i] = float(p.partials.rows[i]);
  for (int c = int(threadIdx.x); c < classes; c += kThreads) p.counts[c] = int64_t(p.partials.rows[cells + c]);
}

}  // namespace

int64_t partials_of(const Prototypes& p) { return blocks_of(p) * quantities_of(p); }

void class_prototypes(const Prototypes& p, void* stream) {
  const int parts = parts_of(p);
  launch(prototypes_kernel, dim3(blocks_of(p)), parts * p.classes * p.features.channels * sizeof(float), stream, p,
         parts);
}

}  // namespace sslfast::cuda
