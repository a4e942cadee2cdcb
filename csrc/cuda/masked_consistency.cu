// What a teacher's predictions teach where it is certain (voxel_math.h). Every map is read once.
// Bytes a voxel for C classes of s bytes: forward 2 C s, backward as much again and the gradient written.
#include "voxels.cuh"

namespace sslfast::cuda {
namespace {

enum : int { kCertain, kSquares, kMaskedSums };  // of a row

// Logits of the student, and of the teacher divided by the temperature.
template <int kMost, int kV>
__device__ void load_pair(const MaskedConsistency& m, int64_t volume, int64_t voxel, int classes, float (&z)[2][kV][kMost]) {
  load_voxels(m.student, volume, voxel, classes, z[0]);
  load_voxels(m.teacher, volume, voxel, classes, z[1]);
#pragma unroll
  for (int v = 0; v < kV; ++v)
    FOR_CLASSES(c, 0, kMost, classes) z[1][v][c] *= m.sharpness;
}

// NaN teaches NaN.
template <int kMost>
__device__ bool is_certain(const MaskedConsistency& m, const Prediction<kMost, float>& teacher) {
  return !(teacher.entropy >= m.max_entropy);
}

template <int kMost>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<kMost>) masked_kernel(MaskedConsistency m) {
  constexpr int kV = kVoxels<kMost>;
  __shared__ double slots[kWarps][kMaskedSums];
  BlockSums<kMaskedSums> sums(slots);
  const int classes = kMost == 2 ? 2 : int(m.student.channels), blocks = int(gridDim.x), block = int(blockIdx.x);
  for_each_tile<kV>(m.student, block, blocks, [&](int64_t volume, int64_t voxel) {
    float z[2][kV][kMost] = {}, certain = 0, squares = 0;
    load_pair(m, volume, voxel, classes, z);
#pragma unroll
    for (int v = 0; v < kV; ++v) {
      const Prediction<kMost, float> student(z[0][v], classes), teacher(z[1][v], classes);
      const bool teaches = voxel + v < m.student.voxels && is_certain(m, teacher);
      certain += float(teaches);
      squares += teaches ? Distance(student, teacher, classes).square : 0.f;
    }
    sums.add(kCertain, certain);
    sums.add(kSquares, squares);
  });
  sums.write(m.rows + int64_t(block) * kMaskedSums, kMaskedSums);
  if (!add_rows(m.rows, kMaskedSums, block, blocks, m.tickets) || threadIdx.x != 0) return;
  const int64_t count = int64_t(m.rows[kCertain]);
  *m.loss = float(mean(m.rows[kSquares] / double(classes), count));
  *m.certain_voxels = count;
}

template <int kMost>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<kMost>)
    masked_gradient_kernel(MaskedConsistency m, const float* grad_loss, Map to) {
  constexpr int kV = kVoxels<kMost>;
  const int classes = kMost == 2 ? 2 : int(m.student.channels);
  const float scale = mean(2.f * *grad_loss / float(classes), *m.certain_voxels);
  for_each_tile<kV>(m.student, int(blockIdx.x), int(gridDim.x), [&](int64_t volume, int64_t voxel) {
    float z[2][kV][kMost] = {}, grad[kV][kMost] = {};
    load_pair(m, volume, voxel, classes, z);
#pragma unroll
    for (int v = 0; v < kV; ++v) {
      const Prediction<kMost, float> student(z[0][v], classes), teacher(z[1][v], classes);
      const Distance distance(student, teacher, classes);
      const bool teaches = is_certain(m, teacher);
      FOR_CLASSES(c, 0, kMost, classes) grad[v][c] = teaches ? scale * distance.gradient(student, teacher, c) : 0.f;
    }
    store_voxels(to, volume, voxel, classes, grad);
  });
}

}  // namespace

int64_t rows_of_masked(const VoxelMap& map) { return blocks_of_pass(map) * kMaskedSums; }

void masked_consistency(const MaskedConsistency& m, void* stream) {
  with_blocks(m.student, [&](auto most, int blocks) { launch(masked_kernel<most>, dim3(blocks), 0, stream, m); });
}

void masked_consistency_backward(const MaskedConsistency& m, const float* grad_loss, const Map& to, void* stream) {
  const auto start = [&](auto most, int blocks) {
    launch(masked_gradient_kernel<most>, dim3(blocks), 0, stream, m, grad_loss, to);
  };
  with_blocks(m.student, start, 4 * kMostBlocks);
}

}  // namespace sslfast::cuda
