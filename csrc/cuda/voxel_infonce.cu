// InfoNCE, a warp for each anchor: the block stages unit keys in shared memory, a lane takes every 32nd of them, and only the
// log-sum-exp is kept. The backward pass computes the similarities again; a warp owns the row that it writes, so that no
// addition depends on an order.
#include "voxels.cuh"

namespace sslfast::cuda {
namespace {

constexpr int kRowsAtOnce = kWarps;      // anchors, or keys, of a block
constexpr int kMostStaged = 8 * 1024;    // floats
constexpr int kOfLane = kMostWidth / kWarp;  // channels

// Rows that are staged at once: a multiple of 32.
VOXEL_FN int staged_rows(int64_t width) {
  const int64_t rows = kMostStaged / (width + 1) / kWarp * kWarp;
  return int(rows < kWarp ? kWarp : rows < 4 * kWarp ? rows : 4 * kWarp);
}

size_t shared_bytes(int64_t width) {
  return sizeof(float) * (staged_rows(width) * (width + 1) + kRowsAtOnce * width + kRowsAtOnce * staged_rows(width));
}

// Dynamic shared memory: unit keys [staged, K + 1], the warps' own unit rows [warps, K] and weights [warps, staged].
struct Stage {
  int width, rows;
  float *keys, *own, *weights;

  __device__ explicit Stage(int64_t k) : width(int(k)), rows(staged_rows(k)) {
    keys = reinterpret_cast<float*>(dynamic_shared);
    own = keys + rows * (width + 1) + warp() * width;
    weights = keys + rows * (width + 1) + kWarps * width + warp() * rows;
  }

  // The unit vector of a row, by a whole warp; returns 1 / length, 0 for a vector shorter than 1e-12.
  __device__ float unit(const float* from, float* to) const {
    float square = 0;
    for (int k = lane(); k < width; k += kWarp) square += from[k] * from[k];
    const float length = sqrtf(warp_sum(square));
    const float inverse = length < 1e-12f ? 0.f : 1.f / length;
    for (int k = lane(); k < width; k += kWarp) to[k] = inverse == 0.f ? 0.f : from[k] * inverse;
    __syncwarp();
    return inverse;
  }

  // Stages `count` rows, of which row(j) is the j-th. For a whole block.
  template <class Row>
  __device__ void fill(int count, const Row& row) const {
    __syncthreads();
    for (int j = warp(); j < count; j += kWarps) unit(row(j), keys + j * (width + 1));
    __syncthreads();
  }

  // own . key j
  __device__ float similarity(int j) const {
    float total = 0;
    for (int k = 0; k < width; ++k) total = fmaf(own[k], keys[j * (width + 1) + k], total);
    return total;
  }

  // grad += sum over the staged keys of weights[j] key j; a lane keeps every 32nd channel.
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

  // The gradient of a row whose unit vector `own` has this gradient: (g - u (u . g)) / |row|, times a scale.
  __device__ void through_unit(float (&grad)[kOfLane], float inverse) const {
    float along = 0;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i)
      if (i * kWarp + lane() < width) along += grad[i] * own[i * kWarp + lane()];
    along = warp_sum(along);
#pragma unroll
    for (int i = 0; i < kOfLane; ++i)
      if (i * kWarp + lane() < width) grad[i] = inverse * (grad[i] - along * own[i * kWarp + lane()]);
  }
};

// The keys of one class: all prototypes, then its negatives.
__device__ int64_t keys_of(const Contrast& c, int t) { return c.classes + c.negative_counts[t]; }

__device__ const float* key(const Contrast& c, int t, int64_t j) {
  return j < c.classes ? c.prototype + j * c.width : c.negative + (t * c.negatives + j - c.classes) * c.width;
}

__device__ bool exists(const Contrast& c, int64_t j) { return j >= c.classes || c.prototype_counts[j] > 0; }

__device__ int64_t anchors_of(const Contrast& c, int t) {
  const int64_t count = c.anchor_counts[t] < c.anchors ? c.anchor_counts[t] : c.anchors;
  return c.prototype_counts[t] > 0 ? count : 0;
}

__device__ float inverse_count(const Contrast& c) {
  int64_t total = 0;
  for (int t = 0; t < int(c.classes); ++t) total += anchors_of(c, t);
  return 1.f / float(total > 1 ? total : 1);
}

// body(class, first row) for each block's turn at `rows` rows of every class.
template <class Body>
__device__ void for_each_turn(int64_t classes, int64_t rows, const Body& body) {
  const int64_t turns = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
  for (int64_t i = blockIdx.x; i < classes * turns; i += gridDim.x) body(int(i / turns), i % turns * kRowsAtOnce);
}

__global__ void __launch_bounds__(kThreads, 2)
    loss_kernel(Contrast c, float* loss, float* lse, double* rows, int* tickets, Total total) {
  __shared__ double slots[kWarps];
  const Stage stage(c.width);
  double own_loss = 0;
  for_each_turn(c.classes, c.anchors, [&](int t, int64_t first) {
    const int64_t i = first + warp(), count = anchors_of(c, t), keys = keys_of(c, t);
    const bool used = i < count;
    if (i < c.anchors && !used && lane() == 0) lse[t * c.anchors + i] = 0;
    if (first >= count) return;
    __syncwarp();
    if (used) stage.unit(c.anchor + (t * c.anchors + i) * c.width, stage.own);
    float highest = -INFINITY, sum = 0, positive = 0;  // of this lane's keys
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
    const float found = top + logf(warp_sum(highest == -INFINITY ? 0.f : sum * expf(highest - top)));
    positive = warp_sum(positive);
    if (!used) return;
    own_loss += double(found) - double(positive);
    if (lane() == 0) lse[t * c.anchors + i] = found;
  });
  __syncthreads();
  if (lane() == 0) slots[warp()] = own_loss;
  __syncthreads();
  if (threadIdx.x == 0) {
    double sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += slots[w];
    rows[blockIdx.x] = sum;
  }
  if (!add_rows(rows, 1, int(blockIdx.x), int(gridDim.x), tickets) || threadIdx.x != 0) return;
  *loss = float(rows[0] * double(inverse_count(c)));
  if (!total.losses) return;
  float unseen = 0;  // NaN if a logit is NaN or infinite
  for (int i = 0; i < total.thresholds_count; ++i) unseen += total.thresholds[i] * 0.f;
  const int winner = *total.winner != 0;
  for (int n = 0; n < 2; ++n) {
    const bool loses = n != winner;
    const float* of = total.pseudo;  // CE [2], Dice [2]; or rectified [2], cosine and Dice, of which each has half
    const float taught = total.target == Target::rectified
                             ? total.pseudo_weight * (of[n] + of[2] / 2) + total.pseudo_dice_weight * of[3] / 2
                             : total.pseudo_weight * of[n] + total.pseudo_dice_weight * of[2 + n];
    total.losses[n] = total.supervised[n] + total.supervised[2 + n] + total.discrepancy * total.supervised[4 + n] +
                      (loses || !total.loser_learns ? taught : 0.f) + (loses ? total.contrast * *loss : 0.f) + unseen;
  }
}

__global__ void __launch_bounds__(kThreads, 2)
    anchors_kernel(Contrast c, const float* lse, const float* grad, float* grad_anchor, Scatter to) {
  const Stage stage(c.width);
  const int loser = to.winner ? *to.winner == 0 : 0;
  const float scale = grad[loser] * (grad_anchor ? 1.f : to.factor) / c.temperature * inverse_count(c);
  for_each_turn(c.classes, c.anchors, [&](int t, int64_t first) {
    const int64_t i = first + warp(), count = anchors_of(c, t), keys = keys_of(c, t), row = t * c.anchors + i;
    const bool used = i < count;
    float gradient[kOfLane] = {};
    if (first < count) {
      float inverse = 0;
      __syncwarp();
      if (used) inverse = stage.unit(c.anchor + row * c.width, stage.own);
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
    const int64_t voxel = to.indices ? to.indices[row] : -1;
    const Map& map = to.to[loser];
    const int64_t place = voxel >= 0 && used ? map.offset(voxel / map.voxels, voxel % map.voxels) : -1;
#pragma unroll
    for (int n = 0; n < kOfLane; ++n) {
      const int k = n * kWarp + lane();
      if (k >= c.width) continue;
      if (grad_anchor) grad_anchor[row * c.width + k] = gradient[n];
      else if (place >= 0) store(map, place + k * map.channel_stride, gradient[n]);
    }
  });
}

// The gradients of the keys: a warp for each negative of a class, or with `prototypes` a block for each prototype, whose warps
// take the anchors of every class in turns.
__global__ void __launch_bounds__(kThreads, 2)
    negatives_kernel(Contrast c, const float* lse, const float* grad, float* grad_negative) {
  const Stage stage(c.width);
  const float scale = *grad / c.temperature * inverse_count(c);
  for_each_turn(c.classes, c.negatives, [&](int t, int64_t first) {
    const int64_t i = first + warp(), anchors = anchors_of(c, t), row = t * c.negatives + i;
    const bool used = i < c.negative_counts[t];
    float gradient[kOfLane] = {};
    if (first < c.negative_counts[t]) {
      float inverse = 0;
      __syncwarp();
      if (used) inverse = stage.unit(c.negative + row * c.width, stage.own);
      for (int64_t begin = 0; begin < anchors; begin += stage.rows) {
        const int staged = int(anchors - begin < stage.rows ? anchors - begin : stage.rows);
        stage.fill(staged, [&](int j) { return c.anchor + (t * c.anchors + begin + j) * c.width; });
        if (!used) continue;
        for (int j = lane(); j < staged; j += kWarp)
          stage.weights[j] = scale * expf(stage.similarity(j) / c.temperature - lse[t * c.anchors + begin + j]);
        stage.accumulate(staged, gradient);
      }
      if (used) stage.through_unit(gradient, inverse);
    }
    if (i >= c.negatives) return;
#pragma unroll
    for (int n = 0; n < kOfLane; ++n)
      if (n * kWarp + lane() < c.width) grad_negative[row * c.width + n * kWarp + lane()] = gradient[n];
  });
}

__global__ void __launch_bounds__(kThreads, 2)
    prototypes_kernel(Contrast c, const float* lse, const float* grad, float* grad_prototype) {
  __shared__ float parts[kWarps][kMostWidth];
  const Stage stage(c.width);
  const float scale = *grad / c.temperature * inverse_count(c);
  const int p = int(blockIdx.x);
  float gradient[kOfLane] = {}, inverse = stage.unit(c.prototype + p * c.width, stage.own);
  for (int t = 0; t < int(c.classes) && c.prototype_counts[p] > 0; ++t) {
    const int64_t anchors = anchors_of(c, t);
    for (int64_t begin = 0; begin < anchors; begin += stage.rows) {
      const int staged = int(anchors - begin < stage.rows ? anchors - begin : stage.rows);
      stage.fill(staged, [&](int j) { return c.anchor + (t * c.anchors + begin + j) * c.width; });
      for (int j = lane(); j < staged; j += kWarp) {
        const float weight = expf(stage.similarity(j) / c.temperature - lse[t * c.anchors + begin + j]);
        stage.weights[j] = j % kWarps == warp() ? scale * (t == p ? weight - 1.f : weight) : 0.f;
      }
      stage.accumulate(staged, gradient);
    }
  }
#pragma unroll
  for (int n = 0; n < kOfLane; ++n) parts[warp()][n * kWarp + lane()] = gradient[n];
  __syncthreads();
  if (warp() != 0) return;
#pragma unroll
  for (int n = 0; n < kOfLane; ++n) {
    gradient[n] = 0;
    for (int w = 0; w < kWarps; ++w) gradient[n] += parts[w][n * kWarp + lane()];
  }
  stage.through_unit(gradient, inverse);
#pragma unroll
  for (int n = 0; n < kOfLane; ++n)
    if (n * kWarp + lane() < c.width) grad_prototype[p * c.width + n * kWarp + lane()] = gradient[n];
}

int blocks_of(int64_t classes, int64_t rows) { return blocks_for(classes * ((rows + kRowsAtOnce - 1) / kRowsAtOnce)); }

}  // namespace

int64_t rows_of_contrast(const Contrast& c) { return blocks_of(c.classes, c.anchors); }

void voxel_infonce(const Contrast& c, float* loss, float* lse, double* rows, int* tickets, const Total& total, void* stream) {
  launch(loss_kernel, dim3(blocks_of(c.classes, c.anchors)), shared_bytes(c.width), stream, c, loss, lse, rows, tickets, total);
}

void anchors_backward(const Contrast& c, const float* lse, const float* grad, float* grad_anchor, const Scatter& to,
                      void* stream) {
  launch(anchors_kernel, dim3(blocks_of(c.classes, c.anchors)), shared_bytes(c.width), stream, c, lse, grad, grad_anchor, to);
}

void keys_backward(const Contrast& c, const float* lse, const float* grad, float* grad_prototype, float* grad_negative,
                   void* stream) {
  launch(prototypes_kernel, dim3(int(c.classes)), shared_bytes(c.width), stream, c, lse, grad, grad_prototype);
  if (c.negatives)
    launch(negatives_kernel, dim3(blocks_of(c.classes, c.negatives)), shared_bytes(c.width), stream, c, lse, grad, grad_negative);
}

}  // namespace sslfast::cuda
