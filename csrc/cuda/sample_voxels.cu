// The samples: for each class and role some blocks collect the candidates of low priority, and the last of them picks from those
// the wanted number, sorts them and gathers their features.
#include "voxels.cuh"

namespace sslfast::cuda {
namespace {

constexpr int kBytes = 16;                 // that a thread reads at a time
constexpr int kSortedInShared = 2048;      // candidates
constexpr int64_t kNowhere = INT64_MAX;

__device__ bool is_candidate(int state, int c, bool negatives) {
  return ((state & kReliable) != 0) == negatives && ((state & kClass) == c) != negatives;
}

// Sorts `count` candidates, a power of two, in a bitonic network. For a whole block.
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
  const int c = int(blockIdx.y) % s.classes, r = s.first + int(blockIdx.y) / s.classes;
  const bool negatives = r == 1;
  const Role& role = s.role[r];
  Candidate* list = role.list + int64_t(c) * role.room;
  int* found = s.found + r * s.classes + c;

  // how many are drawn, and the priority below which they surely are
  static_assert(kThreads == 256, "a thread for each byte");
  unsigned long long candidates;
  sum_before(is_candidate(int(threadIdx.x), c, negatives) ? s.bytes[threadIdx.x] : 0ull, candidates);
  const int64_t quota = role.quotas[c], drawn = quota < int64_t(candidates) ? quota : int64_t(candidates);
  const double share = (double(quota) + 8 * sqrt(double(quota)) + 16) / double(candidates > 1 ? candidates : 1);
  const uint64_t bound = drawn == 0 ? 0 : uint64_t((share < 1 ? share : 1.0) * 4294967296.0);

  const bool whole = reinterpret_cast<uintptr_t>(s.state) % kBytes == 0;
  const int64_t stride = int64_t(gridDim.x) * kThreads * kBytes;
  for (int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kBytes; bound && first < s.voxels; first += stride) {
    const int count = s.voxels - first < kBytes ? int(s.voxels - first) : kBytes;
    uint32_t words[kBytes / 4] = {};
    if (whole && count == kBytes) {
      const uint4 four = *reinterpret_cast<const uint4*>(s.state + first);
      words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
    } else {
#pragma unroll
      for (int v = 0; v < kBytes; ++v)
        if (v < count) words[v / 4] |= uint32_t(s.state[first + v]) << (v % 4 * 8);
    }
#pragma unroll
    for (int w = 0; w < kBytes / 4; ++w)
      for (int v = 4 * w; v < 4 * w + 4 && v < count; ++v) {
        if (!is_candidate(int(words[w] >> (v % 4 * 8) & 0xff), c, negatives)) continue;
        const uint64_t number = s.counted_from + uint64_t(first + v);
        const uint32_t priority =
            voxel_priority(uint32_t(number), uint32_t(number >> 32), s.seed, s.step, uint32_t(2 * c + negatives));
        if (priority >= bound) continue;
        const int slot = atomicAdd(found, 1);
        if (slot < role.room) list[slot] = {first + v, priority};
      }
  }
  if (!is_last(s.tickets + r * s.classes + c, int(gridDim.x))) return;

  const int kept = __ldcg(found) < role.room ? __ldcg(found) : role.room;
  const int power = next_power_of_two(kept);
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

  for (int64_t i = threadIdx.x; i < role.capacity; i += kThreads)
    role.indices[c * role.capacity + i] = i < number ? sorted[i].voxel : -1;
  if (threadIdx.x == 0) role.counts[c] = number;
  if (!role.rows) return;
  const Map& features = s.features[s.second && *s.second != 0];
  const int64_t width = features.channels;
  for (int64_t i = threadIdx.x; i < role.capacity * width; i += kThreads) {
    const int64_t row = i / width, k = i % width;
    float value = 0;
    if (row < number) {
      const int64_t voxel = sorted[row].voxel;
      value = load(features, features.offset(voxel / features.voxels, voxel % features.voxels) + k * features.channel_stride);
    }
    role.rows[c * role.capacity * width + i] = value;
  }
}

__global__ void __launch_bounds__(kThreads) gather_kernel(Map features, const int64_t* indices, int64_t count, float* rows) {
  const int64_t width = features.channels;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count * width; i += int64_t(gridDim.x) * kThreads) {
    const int64_t voxel = indices[i / width], k = i % width;
    rows[i] = voxel < 0 ? 0.f
                        : load(features, features.offset(voxel / features.voxels, voxel % features.voxels) +
                                             k * features.channel_stride);
  }
}

// A warp for each row: the first row of a voxel adds all of them to what is there, in their order, and writes once.
__global__ void __launch_bounds__(kThreads) scatter_kernel(const float* rows, const int64_t* indices, int64_t count, Map to) {
  const int64_t width = to.channels;
  for (int64_t i = int64_t(blockIdx.x) * kWarps + warp(); i < count; i += int64_t(gridDim.x) * kWarps) {
    const int64_t voxel = indices[i];
    if (voxel < 0) continue;
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

int room_for(int64_t capacity) {
  const double expected = double(capacity) + 8 * sqrt(double(capacity)) + 16;
  int room = 1;
  while (room < 2 * expected) room *= 2;
  return room;
}

void sample_voxels(const Sampling& s, void* stream) {
  const int64_t a_block = int64_t(kThreads) * kBytes;
  const int blocks = blocks_for((s.voxels + a_block - 1) / a_block, 256);
  launch(sample_kernel, dim3(blocks, s.classes * s.roles), kSortedInShared * sizeof(Candidate), stream, s);
}

void gather_voxels(const Map& features, const int64_t* indices, int64_t count, float* rows, void* stream) {
  const int64_t values = count * features.channels;
  if (!values) return;
  launch(gather_kernel, dim3(blocks_for((values + kThreads - 1) / kThreads)), 0, stream, features, indices, count, rows);
}

void gather_voxels_backward(const float* rows, const int64_t* indices, int64_t count, const Map& grad, void* stream) {
  if (count) launch(scatter_kernel, dim3(blocks_for((count + kWarps - 1) / kWarps)), 0, stream, rows, indices, count, grad);
}

}  // namespace sslfast::cuda
