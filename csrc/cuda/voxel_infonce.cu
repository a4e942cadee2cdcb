// InfoNCE with one warp per anchor. The block stages unit keys in shared memory, a lane takes every 32nd of them, and
// only the log-sum-exp is kept. The backward pass recomputes the similarities; each warp writes the row of its anchor.
#include "voxels.cuh"

namespace sslfast::cuda {
namespace {

constexpr int kRowsAtOnce = kWarps;          // anchors per block
constexpr int kMostStaged = 8 * 1024;        // floats
constexpr int kOfLane = kMostWidth / kWarp;  // channels per lane

// Rows that are staged at once, a multiple of 32.
VOXEL_FN int staged_rows(int64_t width) {
  const int64_t rows = kMostStaged / (width + 1) / kWarp * kWarp;
  return int(rows < kWarp ? kWarp : rows < 4 * kWarp ? rows : 4 * kWarp);
}

size_t shared_bytes(int64_t width) {
  return sizeof(float) * (staged_rows(width) * (width + 1) + kRowsAtOnce * width + kRowsAtOnce * staged_rows(width));
}

// Dynamic shared memory: unit keys [staged, K + 1]; per warp its unit row [warps, K] and weights [warps, staged].
struct Stage {
  int width, rows;
  float *keys, *anchor, *weights;

  __device__ explicit Stage(int64_t k) : width(int(k)), rows(staged_rows(k)) {
    keys = reinterpret_cast<float*>(dynamic_shared);
    anchor = keys + rows * (width + 1) + warp() * width;
    weights = keys + rows * (width + 1) + kWarps * width + warp() * rows;
  }

  // The unit vector of a row, computed by a warp; returns 1 / length, 0 for a vector shorter than 1e-12.
  __device__ float unit(const float* from, float* to) const {
    float square = 0;
    for (int k = lane(); k < width; k += kWarp) square += from[k] * from[k];
    const float inverse = inverse_length(warp_sum(square));
    for (int k = lane(); k < width; k += kWarp) to[k] = from[k] * inverse;
    __syncwarp();
    return inverse;
  }

  // Stages the unit vectors of rows row(0) .. row(count - 1), one thread per row; 0 where a row is null. All threads of
  // a block must call it.
  template <class Row>
  __device__ void fill(int count, const Row& row) const {
    __syncthreads();
    for (int j = int(threadIdx.x); j < count; j += kThreads) {
      const float* from = row(j);
      float square = 0;
#pragma unroll 8
      for (int k = 0; from && k < width; ++k) square += from[k] * from[k];
      const float inverse = inverse_length(square);
      for (int k = 0; k < width; ++k) keys[j * (width + 1) + k] = from ? from[k] * inverse : 0.f;
    }
    __syncthreads();
  }

  // anchor . key j
  __device__ float similarity(int j) const {
    float total = 0;
    for (int k = 0; k < width; ++k) total = fmaf(anchor[k], keys[j * (width + 1) + k], total);
    return total;
  }

  // grad += sum over the staged keys of weights[j] key j; a lane has every 32nd channel.
  __device__ void accumulate(int count, float (&grad)[kOfLane]) const {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const int k = i * kWarp + lane();
      if (k < width)
        for (int j = 0; j < count; ++j) grad[i] = fmaf(weights[j], keys[j * (width + 1) + k], grad[i]);
    }
    __syncwarp();
  }

  // From the gradient g of a row's unit vector u (`anchor`) to that of the row: (g - u (u . g)) / |row|, in place.
  __device__ void through_unit(float (&grad)[kOfLane], float inverse) const {
    float along = 0;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i)
      if (i * kWarp + lane() < width) along += grad[i] * anchor[i * kWarp + lane()];
    along = warp_sum(along);
#pragma unroll
    for (int i = 0; i < kOfLane; ++i)
      if (i * kWarp + lane() < width) grad[i] = inverse * (grad[i] - along * anchor[i * kWarp + lane()]);
  }
};

// The keys of one class: all prototypes, then its negatives.
__device__ int64_t keys_of(const Contrast& c, int t) { return c.classes + rows_of(c.negative_counts[t], c.negatives); }

__device__ bool exists(const Contrast& c, int64_t j) { return j >= c.classes || c.prototype_counts[j] > 0; }

__device__ const float* key(const Contrast& c, int t, int64_t j) {
  if (!exists(c, j)) return nullptr;
  return j < c.classes ? c.prototype + j * c.width : c.negative + (t * c.negatives + j - c.classes) * c.width;
}

__device__ int64_t anchors_of(const Contrast& c, int t) {
  return c.prototype_counts[t] > 0 ? rows_of(c.anchor_counts[t], c.anchors) : 0;
}

// Calls body(class, first row) for each group of kRowsAtOnce rows of this block, among `rows` rows of every class.
template <class Body>
__device__ void for_each_turn(int64_t classes, int64_t rows, const Body& body) {
  const int64_t turns = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
  for (int64_t i = blockIdx.x; i < classes * turns; i += gridDim.x) body(int(i / turns), i % turns * kRowsAtOnce);
}

__global__ void __launch_bounds__(kThreads, 2) loss_kernel(Contrast c, Partials partials, double* sums, float* lse) {
  __shared__ double slots[kWarps];
  const Stage stage(c.width);
  double own_loss = 0;
  for_each_turn(c.classes, c.anchors, [&](int t, int64_t first) {
    const int64_t i = first + warp(), count = anchors_of(c, t), keys = keys_of(c, t);
    const bool used = i < count;
    if (i < c.anchors && !used && lane() == 0) lse[t * c.anchors + i] = 0;
    if (first >= count) return;
    __syncwarp();
    if (used) stage.unit(c.anchor + (t * c.anchors + i) * c.width, stage.anchor);
    float highest = -INFINITY, sum = 0, positive = 0;  // over this lane's keys
    for (int64_t begin = 0; begin < keys; begin += stage.rows) {
      const int staged = int(keys - begin < stage.rows ? keys - begin : stage.rows);
      stage.fill(staged, [&](int j) { return key(c, t, begin + j); });
      for (int j = lane(); used && j < staged; j += kWarp) {
        if (!exists(c, begin + j)) continue;
        const float s = stage.similarity(j) / c.temperature;
        if (begin + j == t) positive = s;
        const float higher = s > highest ? s : highest;
        sum = sum * expf(highest - higher) + expf(s - higher);
        highest = higher;
      }
    }
    const float top = warp_max(highest);
    const float log_sum_exp = top + logf(warp_sum(sum == 0.f ? 0.f : sum * expf(highest - top)));  // 0: no key
    positive = warp_sum(positive);
    if (!used) return;
    own_loss += double(log_sum_exp) - double(positive);
    if (lane() == 0) lse[t * c.anchors + i] = log_sum_exp;
  });
  __syncthreads();
  if (lane() == 0) slots[warp()] = own_loss;
  __syncthreads();
  if (threadIdx.x == 0) {
    double sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += slots[w];
    partials.rows[blockIdx.x] = sum;
  }
  if (!add_rows(partials, 1) || threadIdx.x != 0) return;
  int64_t used = 0;
  bool fits = true;
  for (int t = 0; t < int(c.classes); ++t) {
    used += anchors_of(c, t);
    fits = fits && is_count(c.anchor_counts[t], c.anchors) && is_count(c.negative_counts[t], c.negatives);
  }
  sums[0] = fits ? partials.rows[0] : NAN, sums[1] = double(used);
}

__global__ void __launch_bounds__(kThreads, 2)
    anchors_kernel(Contrast c, const float* lse, const double* grad_sums, float* grad_anchor) {
  const Stage stage(c.width);
  const float scale = float(grad_sums[0]) / c.temperature;
  for_each_turn(c.classes, c.anchors, [&](int t, int64_t first) {
    const int64_t i = first + warp(), count = anchors_of(c, t), keys = keys_of(c, t), row = t * c.anchors + i;
    const bool used = i < count;
    float gradient[kOfLane] = {};
    if (first < count) {
      float inverse = 0;
      __syncwarp();
      if (used) inverse = stage.unit(c.anchor + row * c.width, stage.anchor);
      for (int64_t begin = 0; begin < keys; begin += stage.rows) {
        const int staged = int(keys - begin < stage.rows ? keys - begin : stage.rows);
        stage.fill(staged, [&](int j) { return key(c, t, begin + j); });
        if (!used) continue;
        for (int j = lane(); j < staged; j += kWarp) {
          float p = exists(c, begin + j) ? expf(stage.similarity(j) / c.temperature - lse[row]) : 0.f;
          stage.weights[j] = scale * (begin + j == t ? p - 1.f : p);
        }
        stage.accumulate(staged, gradient);
      }
      if (used) stage.through_unit(gradient, inverse);
    }
    if (i >= c.anchors) return;
#pragma unroll
    for (int n = 0; n < kOfLane; ++n)
      if (n * kWarp + lane() < c.width) grad_anchor[row * c.width + n * kWarp + lane()] = gradient[n];
  });
}

int blocks_of(const Contrast& c) { return blocks_for(c.classes * ((c.anchors + kRowsAtOnce - 1) / kRowsAtOnce)); }

}  // namespace

int64_t partials_of(const Contrast& c) { return blocks_of(c); }

void voxel_infonce(const Contrast& c, const Partials& partials, double* sums, float* lse, void* stream) {
  launch(loss_kernel, dim3(blocks_of(c)), shared_bytes(c.width), stream, c, partials, sums, lse);
}

void voxel_infonce_backward(const Contrast& c, const float* lse, const double* grad_sums, float* grad_anchor,
                            void* stream) {
  launch(anchors_kernel, dim3(blocks_of(c)), shared_bytes(c.width), stream, c, lse, grad_sums, grad_anchor);
}

}  // namespace sslfast::cuda
