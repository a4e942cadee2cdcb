// CUDA's kernels as C++ on the CPU, so that the tests of the ops run their code where there is no GPU. Included before
// each .cu file, in place of CUDA's headers. A block's threads are fibers on one thread, resumed in random order; the
// blocks follow each other in random order. Whoever meets a barrier or a warp's exchange alone, or elsewhere than the
// others, ends the process.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __forceinline__ inline
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define VOXEL_FN inline

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulated {

extern dim3 thread, block, grid;

void run(dim3 blocks, size_t shared, const std::function<void()>& kernel);

// Waits for all threads of the block or, with `warp`, of the warp; `line` must be the same for all.
void meet(bool warp, int line);
// Every thread's number, as it was when all had met.
uint64_t* exchange(bool warp, uint64_t mine, int line);

template <class T>
uint64_t to_bits(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulated

#define threadIdx emulated::thread
#define blockIdx emulated::block
#define gridDim emulated::grid

inline void __syncthreads(int line = __builtin_LINE()) { emulated::meet(false, line); }
inline void __syncwarp(int line = __builtin_LINE()) { emulated::meet(true, line); }
inline void __threadfence() {}

template <class T>
T __shfl_sync(unsigned, T mine, int lane, int line = __builtin_LINE()) {
  const T other = emulated::from_bits<T>(emulated::exchange(true, emulated::to_bits(mine), line)[lane]);
  emulated::meet(true, line);
  return other;
}
template <class T>
T __shfl_xor_sync(unsigned, T mine, int mask, int line = __builtin_LINE()) {
  const T other =
      emulated::from_bits<T>(emulated::exchange(true, emulated::to_bits(mine), line)[threadIdx.x % 32 ^ mask]);
  emulated::meet(true, line);
  return other;
}
template <class T>
T __shfl_up_sync(unsigned, T mine, int offset, int line = __builtin_LINE()) {
  const int lane = int(threadIdx.x % 32), from = lane < offset ? lane : lane - offset;
  const T other = emulated::from_bits<T>(emulated::exchange(true, emulated::to_bits(mine), line)[from]);
  emulated::meet(true, line);
  return other;
}
inline unsigned __match_any_sync(unsigned, unsigned mine, int line = __builtin_LINE()) {
  const uint64_t* all = emulated::exchange(true, mine, line);
  unsigned peers = 0;
  for (int i = 0; i < 32; ++i) peers |= unsigned(all[i] == mine) << i;
  emulated::meet(true, line);
  return peers;
}
inline unsigned __ballot_sync(unsigned, int mine, int line = __builtin_LINE()) {
  const uint64_t* all = emulated::exchange(true, mine != 0, line);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= unsigned(all[i]) << i;
  emulated::meet(true, line);
  return votes;
}
inline int __any_sync(unsigned mask, int mine, int line = __builtin_LINE()) {
  return __ballot_sync(mask, mine, line) != 0;
}

template <class T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}

inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(unsigned(bits)) : 32; }
inline unsigned __float_as_uint(float value) { return unsigned(emulated::to_bits(value)); }
inline float __uint_as_float(unsigned bits) { return emulated::from_bits<float>(bits); }

using __half = _Float16;
inline float __half2float(__half value) { return float(value); }
inline __half __float2half(float value) { return __half(value); }
inline __half __ushort_as_half(uint16_t bits) { return emulated::from_bits<__half>(bits); }
inline uint16_t __half_as_ushort(__half value) { return uint16_t(emulated::to_bits(value)); }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline __nv_bfloat16 __float2bfloat16(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }

namespace sslfast::cuda {

extern unsigned char dynamic_shared[];

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, size_t shared, void*, const Arguments&... arguments) {
  emulated::run(grid, shared, [&] { kernel(arguments...); });
}

}  // namespace sslfast::cuda
