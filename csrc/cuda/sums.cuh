// The sums of a term over voxel maps, and the gradient of the maps: one pass each, which reads every map once. The
// backward pass recomputes the softmax. The last block to finish adds up the sums of the blocks, in order.
#pragma once

#include "voxels.cuh"
#include "../terms.h"

namespace sslfast::cuda {
namespace {

// The sums of a block: over a thread's voxels in registers, then over each warp in float, and over the warps in double.
// With few classes they stay in registers until the block ends, with many until the end of a tile.
template <class Term, int kClassCapacity>
class BlockSums {
 public:
  static constexpr int kGroups = (Term::kScalars + Term::kRows * kClassCapacity + 15) / 16;
  using Slots = double[kWarps][16 * kGroups];

  __device__ explicit BlockSums(Slots& shared) : slots_(shared) {
    for (int i = int(threadIdx.x); i < kWarps * 16 * kGroups; i += kThreads) (&slots_[0][0])[i] = 0;
    __syncthreads();
  }

  __device__ void scalar(int i, float x) { values_[i / 16][i % 16] += x; }
  __device__ void row(int r, int c, float x) { scalar(Term::kScalars + r * kClassCapacity + c, x); }

  __device__ void end_of_tile() {
    if constexpr (kClassCapacity > 4) add_up();
  }

  // Writes the scalars, then the rows [kRows, C], to `row`.
  __device__ void write(int classes, double* row) {
    if constexpr (kClassCapacity <= 4) add_up();
    __syncthreads();
    for (int i = int(threadIdx.x); i < Term::kScalars + Term::kRows * classes; i += kThreads) {
      const int in_rows = i - Term::kScalars,
                slot = in_rows < 0 ? i : i + in_rows / classes * (kClassCapacity - classes);
      double total = 0;
      for (int w = 0; w < kWarps; ++w) total += slots_[w][slot];
      row[i] = total;
    }
  }

 private:
  Slots& slots_;
  float values_[kGroups][16] = {};

  __device__ void add_up() {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const float sum = sums_by_lane(values_[g]);
      if (lane() < 16) slots_[warp()][16 * g + lane()] += double(sum);
#pragma unroll
      for (int i = 0; i < 16; ++i) values_[g][i] = 0;
    }
  }
};

template <class T, int kVoxelsPerThread>
__device__ void read_values(const Side& side, int64_t first, int64_t count, float (&to)[kVoxelsPerThread]) {
  T values[kVoxelsPerThread] = {};
  load_run(static_cast<const T*>(side.data) + first, count, values);
#pragma unroll
  for (int v = 0; v < kVoxelsPerThread; ++v) {
    const int64_t value = values[v];
    to[v] = v >= count || value == side.ignore ? kIgnored
            : value >= 0 && value <= side.last ? float(int(value))
                                               : kOutOfRange;
  }
}

// Reads the side of kVoxelsPerThread voxels from `first` on, of which `count` are in the volume.
template <int kVoxelsPerThread>
__device__ void read_side(const Side& side, int64_t first, int64_t count, float (&to)[kVoxelsPerThread]) {
  if (!side.data) {
#pragma unroll
    for (int v = 0; v < kVoxelsPerThread; ++v) to[v] = v < count ? 0.f : kIgnored;
    return;
  }
  switch (side.bytes) {
    case 8:
      return read_values<int64_t>(side, first, count, to);
    case 4:
      return read_values<int32_t>(side, first, count, to);
    case 2:
      return read_values<int16_t>(side, first, count, to);
    default:
      return side.is_signed ? read_values<int8_t>(side, first, count, to)
                            : read_values<uint8_t>(side, first, count, to);
  }
}

// Calls body(volume, voxel, logits z[v][map][c], side) for this thread's voxels in each tile of the block.
template <int kClassCapacity, class Term, class Body>
__device__ void for_each_voxels(const OnVoxels<Term>& in, const Body& body) {
  constexpr int kVoxelsPerThread = kVoxelsFor<kClassCapacity>;
  const VoxelMap& map = in.maps[0];
  for_each_tile<kVoxelsPerThread>(map, [&](int64_t volume, int64_t voxel) {
    float z[kVoxelsPerThread][Term::kMaps][kClassCapacity], side[kVoxelsPerThread];
#pragma unroll
    for (int m = 0; m < Term::kMaps; ++m)
      load_voxels<kClassCapacity, kVoxelsPerThread>(in.maps[m], volume, voxel,
                                                    [&](int v, int c, float x) { z[v][m][c] = x; });
    read_side(in.side, volume * map.voxels + voxel, map.voxels - voxel, side);
    body(volume, voxel, z, side);
  });
}

template <class Term, int kClassCapacity>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<kClassCapacity>)
    sums_kernel(OnVoxels<Term> in, Partials partials, double* sums) {
  __shared__ typename BlockSums<Term, kClassCapacity>::Slots slots;
  BlockSums<Term, kClassCapacity> block_sums(slots);
  const int classes = int(in.maps[0].channels), count = Term::kScalars + Term::kRows * classes;
  for_each_voxels<kClassCapacity>(in, [&](int64_t, int64_t, const auto& z, const auto& side) {
#pragma unroll
    for (int v = 0; v < kVoxelsFor<kClassCapacity>; ++v)
      in.term.template sums<kClassCapacity, float>(z[v], side[v], kClassCapacity, block_sums);
    block_sums.end_of_tile();
  });
  block_sums.write(classes, partials.rows + int64_t(blockIdx.x) * count);
  if (!add_rows(partials, count)) return;
  for (int i = int(threadIdx.x); i < count; i += kThreads) sums[i] = partials.rows[i];
}

// The gradients of the sums, as g.scalar and g.row of a term.
template <class Term, int kClassCapacity>
struct SumsGradient {
  float scalars[Term::kScalars], rows[Term::kRows + 1][kClassCapacity];

  __device__ float scalar(int i) const { return scalars[i]; }
  __device__ float row(int r, int c) const { return rows[r][c]; }
};

template <class Term, int kClassCapacity>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<kClassCapacity>)
    gradient_kernel(OnVoxels<Term> in, const double* grad_sums, Students<Term> to) {
  __shared__ SumsGradient<Term, kClassCapacity> g;
  const int classes = int(in.maps[0].channels);
  for (int i = int(threadIdx.x); i < Term::kScalars; i += kThreads) g.scalars[i] = float(grad_sums[i]);
  for (int i = int(threadIdx.x); i < Term::kRows * kClassCapacity; i += kThreads) {
    const int c = i % kClassCapacity;
    g.rows[i / kClassCapacity][c] =
        c < classes ? float(grad_sums[Term::kScalars + i / kClassCapacity * classes + c]) : 0.f;
  }
  __syncthreads();
  for_each_voxels<kClassCapacity>(in, [&](int64_t volume, int64_t voxel, const auto& z, const auto& side) {
    constexpr int kVoxelsPerThread = kVoxelsFor<kClassCapacity>;
    float grad[kVoxelsPerThread][Term::kStudents][kClassCapacity];
#pragma unroll
    for (int v = 0; v < kVoxelsPerThread; ++v)
      in.term.template gradient<kClassCapacity, float>(z[v], side[v], kClassCapacity, g, grad[v]);
#pragma unroll
    for (int n = 0; n < Term::kStudents; ++n)
      store_voxels<kClassCapacity, kVoxelsPerThread>(to.maps[n], volume, voxel,
                                                     [&](int v, int c) { return grad[v][n][c]; });
  });
}

}  // namespace

template <class Term>
void sum_over_voxels(const OnVoxels<Term>& in, const Partials& partials, double* sums, void* stream) {
  with_class_capacity(in.maps[0].channels, [&](auto capacity) {
    launch(sums_kernel<Term, capacity>, dim3(blocks_for_logits(in.maps[0])), 0, stream, in, partials, sums);
  });
}

template <class Term>
void gradient_of_sums(const OnVoxels<Term>& in, const double* grad_sums, const Students<Term>& to, void* stream) {
  with_class_capacity(in.maps[0].channels, [&](auto capacity) {
    const int64_t tiles = Tiles<kVoxelsFor<capacity>>(in.maps[0]).count;
    if (tiles)
      launch(gradient_kernel<Term, capacity>, dim3(blocks_for(tiles, 4 * kMostBlocks)), 0, stream, in, grad_sums, to);
  });
}

#define SSLFAST_TERM(Term)                                                               \
  template void sum_over_voxels(const OnVoxels<Term>&, const Partials&, double*, void*); \
  template void gradient_of_sums(const OnVoxels<Term>&, const double*, const Students<Term>&, void*);

}  // namespace sslfast::cuda
