// What two networks' predictions on the same voxels teach each other (voxel_math.h). Every map is read once.
// Bytes a voxel for C classes of s bytes: forward 2 C s (+ 2 of states), backward as much again and the gradients written.
#include "voxels.cuh"

namespace sslfast::cuda {
namespace {

enum : int { kReliableOf, kRectified = kReliableOf + 2, kCosine = kRectified + 2, kProducts };  // of a row; 3 C of the last
enum : int { kCertain, kSquares, kMaskedSums };

template <class T>
__device__ T mean(T sum, int64_t count) {
  return sum / T(count > 1 ? count : 1);
}

__device__ bool is_reliable(const RectifiedConsistency& r, int n, int64_t volume, int64_t voxel) {
  return voxel < r.a.voxels && (r.state[n][volume * r.a.voxels + voxel] & kReliable);
}

template <int kMost>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<kMost>) rectified_kernel(RectifiedConsistency r) {
  constexpr int kV = kVoxels<kMost>;
  constexpr int kMostSums = kProducts + 3 * kMost;
  __shared__ double slots[kWarps][kMostSums];
  BlockSums<kMostSums> sums(slots);
  const int classes = kMost == 2 ? 2 : int(r.a.channels), blocks = int(gridDim.x), block = int(blockIdx.x);
  for_each_tile<kV>(r.a, block, blocks, [&](int64_t volume, int64_t voxel) {
    // zeros, so that what classes beyond C would hold takes no registers from tile to tile
    float z[2][kV][kMost] = {}, reliable[2] = {}, rectified[2] = {}, cosine = 0, products[3][kMost] = {};
    load_voxels(r.a, volume, voxel, classes, z[0]);
    load_voxels(r.b, volume, voxel, classes, z[1]);
#pragma unroll
    for (int v = 0; v < kV; ++v) {
      const Prediction<kMost, float> of[2] = {{z[0][v], classes}, {z[1][v], classes}};
      const Agreement agreement(of, classes);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const bool learns = is_reliable(r, n, volume, voxel + v);
        reliable[n] += float(learns);
        rectified[n] += learns ? agreement.rectified(n) : 0.f;
      }
      const bool inside = voxel + v < r.a.voxels;
      cosine += inside ? 1.f - agreement.cosine : 0.f;
      FOR_CLASSES(c, 0, kMost, classes) {
        const float p[2] = {of[0].p[c], of[1].p[c]};
#pragma unroll
        for (int n = 0; n < 2; ++n) products[n][c] += inside ? p[n] * p[n] : 0.f;
        products[2][c] += inside ? p[0] * p[1] : 0.f;
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      sums.add(kReliableOf + n, reliable[n]);
      sums.add(kRectified + n, rectified[n]);
    }
    sums.add(kCosine, cosine);
#pragma unroll
    for (int i = 0; i < 3; ++i)
      FOR_CLASSES(c, 0, kMost, classes) sums.add(kProducts + i * classes + c, products[i][c]);
  });
  const int quantities = kProducts + 3 * classes;
  sums.write(r.rows + int64_t(block) * quantities, quantities);
  if (!add_rows(r.rows, quantities, block, blocks, r.tickets)) return;
  for (int i = int(threadIdx.x); i < 3 * classes; i += kThreads) r.products[i] = r.rows[kProducts + i];
  if (threadIdx.x != 0) return;
  for (int n = 0; n < 2; ++n) {
    const int64_t count = int64_t(r.rows[kReliableOf + n]);
    r.rectified[n] = float(mean(r.rows[kRectified + n], count));
    r.reliable_voxels[n] = count;
  }
  *r.cosine = float(mean(r.rows[kCosine], r.a.volumes * r.a.voxels));
}

template <int kMost>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<kMost>)
    rectified_gradient_kernel(RectifiedConsistency r, RectifiedGradient g) {
  constexpr int kV = kVoxels<kMost>;
  const int classes = kMost == 2 ? 2 : int(r.a.channels);
  const float scale[2] = {mean(g.rectified[0], r.reliable_voxels[0]), mean(g.rectified[1], r.reliable_voxels[1])};
  const float cosine_scale = mean(*g.cosine, r.a.volumes * r.a.voxels);
  __shared__ float squares[2][kMost], products[kMost];
  for (int i = int(threadIdx.x); i < 3 * classes; i += kThreads) {
    const int of = i / classes, c = i % classes;
    if (of < 2) squares[of][c] = float(2 * g.products[i]);
    else products[c] = float(g.products[i]);
  }
  __syncthreads();
  for_each_tile<kV>(r.a, int(blockIdx.x), int(gridDim.x), [&](int64_t volume, int64_t voxel) {
    float z[2][kV][kMost] = {}, grad[2][kV][kMost] = {};
    load_voxels(r.a, volume, voxel, classes, z[0]);
    load_voxels(r.b, volume, voxel, classes, z[1]);
#pragma unroll
    for (int v = 0; v < kV; ++v) {
      const Prediction<kMost, float> of[2] = {{z[0][v], classes}, {z[1][v], classes}};
      const Agreement agreement(of, classes);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const bool learns = is_reliable(r, n, volume, voxel + v);
        const ProductGradient by_products(of[n], of[1 - n], squares[n], products, classes);
        FOR_CLASSES(c, 0, kMost, classes) {
          const float taught = scale[n] * agreement.rectified_gradient(of, n, c);
          const float everywhere = cosine_scale * agreement.cosine_gradient(of, n, c) + by_products.by_logit(c);
          grad[n][v][c] = everywhere + (learns ? taught : 0.f);
        }
      }
    }
    store_voxels(g.to[0], volume, voxel, classes, grad[0]);
    store_voxels(g.to[1], volume, voxel, classes, grad[1]);
  });
}

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
__device__ bool is_certain(const MaskedConsistency& m, const Prediction<kMost, float>& teacher, int classes) {
  return !(teacher.entropy(classes) >= m.max_entropy);
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
      const bool teaches = voxel + v < m.student.voxels && is_certain(m, teacher, classes);
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
      const bool teaches = is_certain(m, teacher, classes);
      FOR_CLASSES(c, 0, kMost, classes) grad[v][c] = teaches ? scale * distance.gradient(student, teacher, c) : 0.f;
    }
    store_voxels(to, volume, voxel, classes, grad);
  });
}

}  // namespace

int64_t rows_of_rectified(const VoxelMap& map) { return blocks_of_pass(map) * (kProducts + 3 * map.channels); }

int64_t rows_of_masked(const VoxelMap& map) { return blocks_of_pass(map) * kMaskedSums; }

void rectified_consistency(const RectifiedConsistency& r, void* stream) {
  with_blocks(r.a, [&](auto most, int blocks) { launch(rectified_kernel<most>, dim3(blocks), 0, stream, r); });
}

void rectified_consistency_backward(const RectifiedConsistency& r, const RectifiedGradient& g, void* stream) {
  const auto start = [&](auto most, int blocks) { launch(rectified_gradient_kernel<most>, dim3(blocks), 0, stream, r, g); };
  with_blocks(r.a, start, 4 * kMostBlocks);
}

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
