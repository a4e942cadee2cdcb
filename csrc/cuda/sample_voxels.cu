// A uniform sample of voxels of each class. For each class, several blocks collect the candidates of low priority; the
// last of these blocks sorts them and takes the sample. Bytes per voxel: 1 to count the flags, and 1 per class.
#include "voxels.cuh"

namespace sslfast::cuda {
namespace {

constexpr int kBytes = 16;             // bytes that a thread reads at a time
constexpr int kSortedInShared = 2048;  // candidates
constexpr int64_t kNowhere = INT64_MAX;

// Calls body(voxel, flags) for each voxel of this thread.
template <class Body>
__device__ void for_each_flags(const uint8_t* flags, int64_t voxels, const Body& body) {
  const bool whole = reinterpret_cast<uintptr_t>(flags) % kBytes == 0;
  const int64_t stride = int64_t(gridDim.x) * kThreads * kBytes;
  for (int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kBytes; first < voxels; first += stride) {
    const int count = voxels - first < kBytes ? int(voxels - first) : kBytes;
    uint32_t words[kBytes / 4] = {};
    if (whole && count == kBytes) {
      const uint4 four = *reinterpret_cast<const uint4*>(flags + first);
      words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
    } else {
#pragma unroll
      for (int v = 0; v < kBytes; ++v)
        if (v < count) words[v / 4] |= uint32_t(flags[first + v]) << (v % 4 * 8);
    }
#pragma unroll
    for (int w = 0; w < kBytes / 4; ++w)
      for (int v = 4 * w; v < 4 * w + 4 && v < count; ++v) body(first + v, int(words[w] >> (v % 4 * 8) & 0xff));
  }
}

// Each warp has its own counters, so that fewer threads wait for the counter of a frequent value.
__global__ void __launch_bounds__(kThreads)
    histogram_kernel(const uint8_t* flags, int64_t voxels, unsigned long long* histogram) {
  static_assert(kThreads == 256, "a thread for each byte");
  __shared__ unsigned counts[kWarps][kThreads];
#pragma unroll
  for (int w = 0; w < kWarps; ++w) counts[w][threadIdx.x] = 0;
  __syncthreads();
  int last = 0;
  unsigned number = 0;  // length of a run of equal flags
  for_each_flags(flags, voxels, [&](int64_t, int byte) {
    if (byte != last && number) atomicAdd(&counts[warp()][last], number), number = 0;
    last = byte, ++number;
  });
  if (number) atomicAdd(&counts[warp()][last], number);
  __syncthreads();
  unsigned long long total = 0;
  for (int w = 0; w < kWarps; ++w) total += counts[w][threadIdx.x];
  if (total) atomicAdd(histogram + threadIdx.x, total);
}

__device__ bool is_candidate(int flags, int c, bool negatives) {
  return ((flags & kReliable) != 0) == negatives && ((flags & kClass) == c) != negatives;
}

// Sorts `count` candidates, a power of two, with a bitonic network. All threads of a block must call it.
template <class Less>
__device__ void sort(Candidate* list, int count, const Less& less) {
  for (int size = 2; size <= count; size *= 2)
    for (int stride = size / 2; stride > 0; stride /= 2) {
      __syncthreads();
      for (int i = int(threadIdx.x); i < count / 2; i += kThreads) {
        const int low = 2 * i - (i & (stride - 1)), high = low + stride;
        const Candidate a = list[low], b = list[high];
        if (less(b, a) == ((low & size) == 0)) list[low] = b, list[high] = a;
      }
    }
  __syncthreads();
}

__device__ int next_power_of_two(int n) { return n <= 1 ? 1 : 1 << (32 - __clz(n - 1)); }

__global__ void __launch_bounds__(kThreads, 2) sample_kernel(Sampling s) {
  const int c = int(blockIdx.y);
  Candidate* list = s.list + int64_t(c) * s.room;

  // the number of voxels to draw, and the bound on their priorities
  unsigned long long candidates;
  sum_before(is_candidate(int(threadIdx.x), c, s.negatives) ? s.histogram[threadIdx.x] : 0ull, candidates);
  const int64_t quota = s.quotas[c], drawn = quota < int64_t(candidates) ? quota : int64_t(candidates);
  const double fraction = (double(quota) + 8 * sqrt(double(quota)) + 16) / double(candidates > 1 ? candidates : 1);
  const uint64_t bound = uint64_t((fraction < 1 ? fraction : 1.0) * 4294967296.0);
  const uint32_t step = uint32_t(*s.step), stream = uint32_t(2 * c + s.negatives);
  for_each_flags(s.flags, drawn ? s.voxels : 0, [&](int64_t voxel, int flags) {
    if (!is_candidate(flags, c, s.negatives)) return;
    const uint64_t number = s.counted_from + uint64_t(voxel);
    const uint32_t priority = voxel_priority(uint32_t(number), uint32_t(number >> 32), s.seed, step, stream);
    if (priority >= bound) return;
    const int slot = atomicAdd(s.num_collected + c, 1);
    if (slot < s.room) list[slot] = {voxel, priority};
  });
  if (!is_last(s.arrival_counters + c, int(gridDim.x))) return;

  const int collected = __ldcg(s.num_collected + c), kept = collected < s.room ? collected : s.room,
            power = next_power_of_two(kept);
  Candidate* sorted = power <= kSortedInShared ? reinterpret_cast<Candidate*>(dynamic_shared) : list;
  for (int i = int(threadIdx.x); i < power; i += kThreads) {
    Candidate one = {kNowhere, ~0u};
    if (i < kept) one.voxel = __ldcg(&list[i].voxel), one.priority = __ldcg(&list[i].priority);
    sorted[i] = one;
  }
  sort(sorted, power, [](const Candidate& a, const Candidate& b) {
    return a.priority != b.priority ? a.priority < b.priority : a.voxel < b.voxel;
  });
  const int number = int(drawn < kept ? drawn : kept), sorted_again = next_power_of_two(number);
  for (int i = number + int(threadIdx.x); i < sorted_again; i += kThreads) sorted[i].voxel = kNowhere;
  sort(sorted, sorted_again, [](const Candidate& a, const Candidate& b) { return a.voxel < b.voxel; });

  int64_t* row = s.indices + c * s.capacity;
  for (int64_t i = threadIdx.x; i < s.capacity; i += kThreads) row[i] = i < number ? sorted[i].voxel : -1;
  if (threadIdx.x == 0) s.counts[c] = number;
}

}  // namespace

int room_for(int64_t capacity) {
  const double expected = double(capacity) + 8 * sqrt(double(capacity)) + 16;
  int room = 1;
  while (room < 2 * expected) room *= 2;
  return room;
}

void sample_voxels(const Sampling& s, void* stream) {
  const int64_t a_block = int64_t(kThreads) * kBytes;
  const int blocks = blocks_for((s.voxels + a_block - 1) / a_block, 256);
  launch(histogram_kernel, dim3(blocks), 0, stream, s.flags, s.voxels, s.histogram);
  launch(sample_kernel, dim3(blocks, s.classes), kSortedInShared * sizeof(Candidate), stream, s);
}

}  // namespace sslfast::cuda
