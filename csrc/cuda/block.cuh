// Launch of kernels, and operations of warps and blocks.
#pragma once

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace sslfast::cuda {

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

#ifdef __CUDACC__
extern __shared__ __align__(16) unsigned char dynamic_shared[];

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// Allows a kernel as much dynamic shared memory as a block of the current device can have.
void allow_most_shared_memory(const void* kernel);

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, size_t shared, void* stream, const Arguments&... arguments) {
  if (shared > 32 * 1024)  // with static shared memory, more than 48 KB need permission
    allow_most_shared_memory(reinterpret_cast<const void*>(kernel));
  kernel<<<grid, kThreads, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError());
}
#endif

__device__ inline int lane() { return int(threadIdx.x) % kWarp; }
__device__ inline int warp() { return int(threadIdx.x) / kWarp; }

// The sum over a warp, returned in every lane.
template <class T>
__device__ T warp_sum(T value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

__device__ inline float warp_max(float value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

// Sums over a warp of 16 numbers per lane; lane l returns that of number l % 16. Each step halves the numbers.
__device__ __forceinline__ float sums_by_lane(float (&values)[16]) {
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const int half = 8 >> step;
    const bool upper = lane() & half;
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // not up to `half`: the loop must unroll early to keep the values in registers
      if (i >= half) continue;
      const float low = values[i], high = values[i + half];
      values[i] = (upper ? high : low) + __shfl_xor_sync(kAllLanes, upper ? low : high, half);
    }
  }
  return values[0] + __shfl_xor_sync(kAllLanes, values[0], 16);
}

// True in all threads of the last of `blocks` blocks that arrive here. That block sees what the others wrote before.
__device__ inline bool is_last(int* arrival_counters, int blocks) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(arrival_counters, 1) == blocks - 1;
  __syncthreads();
  const bool answer = last;
  __syncthreads();
  __threadfence();
  return answer;
}

// Adds up partials.rows [blocks, n], of which each block has written one row, in a fixed order. The last block of each
// group of 32 adds up the group, and the last block of all adds up the groups. Returns true in that block; the total is
// in rows[0 .. n).
__device__ inline bool add_rows(const Partials& partials, int64_t n) {
  constexpr int kGroup = 32;
  const auto add = [n](double* first, int count, int64_t stride) {
    for (int64_t q = threadIdx.x; q < n; q += kThreads) {
      double total = 0;
#pragma unroll 8
      for (int i = 0; i < count; ++i) total += __ldcg(first + i * stride + q);
      first[q] = total;
    }
  };
  const int blocks = int(gridDim.x), group = int(blockIdx.x) / kGroup, first = group * kGroup;
  const int members = blocks - first < kGroup ? blocks - first : kGroup;
  if (!is_last(partials.arrival_counters + 1 + group, members)) return false;
  add(partials.rows + first * n, members, n);
  const int groups = (blocks + kGroup - 1) / kGroup;
  if (!is_last(partials.arrival_counters, groups)) return false;
  add(partials.rows, groups, kGroup * n);
  __syncthreads();
  return true;
}

// The sum over the threads of the block before this one; total: over all threads.
__device__ inline unsigned long long sum_before(unsigned long long value, unsigned long long& total) {
  __shared__ unsigned long long warps[kWarps];
  unsigned long long upto = value;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const unsigned long long other = __shfl_up_sync(kAllLanes, upto, offset);
    if (lane() >= offset) upto += other;
  }
  if (lane() == kWarp - 1) warps[warp()] = upto;
  __syncthreads();
  unsigned long long before = upto - value;
  total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp()) before += warps[w];
    total += warps[w];
  }
  __syncthreads();
  return before;
}

// Calls add(number) in one lane for all `number` active lanes with the same bin. All lanes of a warp must call it.
template <class Add>
__device__ void count_bin(bool active, unsigned bin, const Add& add) {
  const unsigned peers = __match_any_sync(kAllLanes, active ? bin : ~0u);
  if (active && lane() == __ffs(int(peers)) - 1) add(unsigned(__popc(peers)));
}

}  // namespace sslfast::cuda
