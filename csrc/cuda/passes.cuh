// The four passes over the voxels: describe, refine and decide forward, gradient backward.
//
// Describe takes the labelled volumes' sums and counts the entropies of the unlabelled ones; refine counts the digits that tell
// the percentiles exactly; decide computes the logits' voxels once more, writes the byte map and takes all sums that hang on it.
// Bytes an unlabelled voxel for C classes of s bytes and K features of t: 4 C s + 8 C s for the three reads of two networks,
// 12 of keys, 2 of state, K t where reliable; a labelled one: 2 C s + label. Backward: 4 C s and the label or state.
#pragma once

#include "class_prototypes.cuh"
#include "dual_supervised.cuh"
#include "pseudo_supervised.cuh"
#include "rectified_consistency.cuh"
#include "reliability.cuh"

namespace sslfast::cuda {

// The launches of the passes with room for kMost classes. Each size has a file, so that nvcc compiles them side by side.
template <int kMost>
struct Passes {
  static void describe(const Supervised& s, const Percentile& p, void* stream);
  static void refine(const Percentile& p, void* stream);
  static void decide(const Decision& d, int blocks, void* stream);
  static void gradient(const Gradient& g, void* stream);
  static void voxel_entropy(const Map& logits, float* out, void* stream);
};

namespace {

constexpr int kMostCounters = 192;  // blocks a network that count in shared memory: more would mostly clear and flush it

template <int kMost>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<kMost>)
    describe_kernel(Supervised s, int labelled_blocks, Percentile p, int counters) {
  const int block = int(blockIdx.x) - labelled_blocks;
  if (block < 0)
    supervised_sums<kMost>(s, int(blockIdx.x), labelled_blocks);
  else
    count_high<kMost>(p, block % 2, block / 2, counters);
}

template <int kMost>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<kMost>) refine_kernel(Percentile p) {
  count_low<kMost>(p, int(blockIdx.y), int(blockIdx.x), int(gridDim.x));
}

template <int kMost, bool kIsRectified>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<kMost>) gradient_kernel(Gradient g, int labelled_blocks) {
  const int block = int(blockIdx.x) - labelled_blocks;
  if (block < 0)
    supervised_gradient<kMost>(g.supervised, g.of_supervised, g.to_supervised, int(blockIdx.x), labelled_blocks);
  else if constexpr (kIsRectified)
    rectified_gradient<kMost>(g, block, int(gridDim.x) - labelled_blocks);
  else
    pseudo_gradient<kMost>(g, block, int(gridDim.x) - labelled_blocks);
}

// The state of one voxel, from both networks' entropies and classes.
__device__ uint8_t decide_voxel(const Decision& d, const float (&h)[2], const float (&predicted)[2], int classes, bool b_wins) {
  const bool per_class = d.options.per_class;
  const bool below_a = h[0] < d.thresholds[per_class ? int(predicted[0]) : 0];
  const bool below_b = h[1] < d.thresholds[per_class ? classes + int(predicted[1]) : 1];
  const bool reliable = d.options.mode == Mode::winner   ? (b_wins ? below_b : below_a)
                        : d.options.mode == Mode::union_ ? below_a || below_b
                                                         : below_a && below_b;
  const float of_winner = b_wins ? predicted[1] : predicted[0], of_loser = b_wins ? predicted[0] : predicted[1];
  const float taught = d.options.union_label && of_loser > of_winner ? of_loser : of_winner;
  const float pulled = d.options.loser_anchor ? of_loser : taught;
  return uint8_t((reliable ? int(taught) | kReliable : int(pulled)) | (below_a ? sure(0) : 0) | (below_b ? sure(1) : 0));
}

enum : int { kReliableSum = 0, kPseudoCe = 1, kPseudoSums = 3 };  // of a row, see Decision

template <int kMost, bool kIsRectified>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<kMost>) decide_kernel(Decision d) {
  constexpr int kV = kVoxels<kMost>;
  constexpr int kOfPseudo = kIsRectified ? kProducts + 3 * kMost : kPseudoSums + 6 * kMost;
  __shared__ double slots[kWarps][kOfPseudo];
  __shared__ unsigned bytes[256];
  BlockSums<kOfPseudo> sums(slots);
  const int classes = kMost == 2 ? 2 : int(d.a.channels), blocks = int(gridDim.x), block = int(blockIdx.x);
  const bool b_wins = d.winner && *d.winner != 0;
  for (int i = int(threadIdx.x); i < 256; i += kThreads) bytes[i] = 0;
  __syncthreads();

  for_each_tile<kV>(d.a, block, blocks, [&](int64_t volume, int64_t voxel) {
    const int64_t place = volume * d.a.voxels + voxel;
    uint8_t state[kV];
    bool wanted = !d.given || kIsRectified;
#pragma unroll
    for (int v = 0; v < kV; ++v) {
      state[v] = d.given && voxel + v < d.a.voxels ? d.state[place + v] : 0;
      wanted = wanted || (d.pseudo && (state[v] & kReliable));
    }
    float z[2][kV][kMost] = {};
    if (wanted) {
      load_voxels(d.a, volume, voxel, classes, z[0]);
      load_voxels(d.b, volume, voxel, classes, z[1]);
    }
    float reliable_voxels = 0;
    RectifiedSums<kMost> rectified;
#pragma unroll
    for (int v = 0; v < kV; ++v) {
      const bool inside = voxel + v < d.a.voxels;
      const auto decide = [&](const float(&h)[2], const float(&predicted)[2]) {
        if (d.given) return;
        state[v] = inside ? decide_voxel(d, h, predicted, classes, b_wins) : 0;
        if (inside) d.state[place + v] = state[v];
      };
      const float(&a)[kMost] = z[0][v], (&b)[kMost] = z[1][v];
      if constexpr (kIsRectified) {
        const Prediction<kMost, float> of[2] = {{a, classes}, {b, classes}};
        decide({of[0].entropy, of[1].entropy}, {of[0].label, of[1].label});
        rectified.add(of, state[v], inside, classes);
      } else if (!d.given) {
        decide({entropy_of<kMost>(a, classes), entropy_of<kMost>(b, classes)}, {argmax<kMost>(a, classes), argmax<kMost>(b, classes)});
      }
      if (d.bytes) count_bin(inside, state[v], [&](unsigned number) { atomicAdd(bytes + state[v], number); });
      reliable_voxels += float((state[v] & kReliable) != 0);
    }
    if constexpr (kIsRectified) {
      rectified.add_to(sums, classes);
    } else if (d.pseudo && __any_sync(kAllLanes, reliable_voxels > 0)) {
      sums.add(kReliableSum, reliable_voxels);
      int target[2][kV];
#pragma unroll
      for (int v = 0; v < kV; ++v) {
        const bool reliable = state[v] & kReliable;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int taught = d.target == Target::other ? int(argmax<kMost>(z[1 - n][v], classes)) : state[v] & kClass;
          target[n][v] = reliable ? taught : -1;
        }
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        float p[kV][kMost], ce = 0;
#pragma unroll
        for (int v = 0; v < kV; ++v) {
          float highest, own = 0;
          const float total = exp_shifted<kMost>(z[n][v], classes, p[v], highest), inverse = 1.f / total;
          FOR_CLASSES(c, 0, kMost, classes) {
            own = select(c == target[n][v], z[n][v][c], own);
            p[v][c] *= inverse;
          }
          if (target[n][v] >= 0) ce += log(total) + highest - own;
        }
        sums.add(kPseudoCe + n, ce);
        FOR_CLASSES(c, 0, kMost, classes) {
          float size = 0, overlap = 0, square = 0;
#pragma unroll
          for (int v = 0; v < kV; ++v) {
            const bool here = target[n][v] == c;
            size += float(here);
            overlap += here ? p[v][c] : 0.f;
            square += target[n][v] >= 0 ? p[v][c] * p[v][c] : 0.f;
          }
          sums.add(kPseudoSums + n * classes + c, size);
          sums.add(kPseudoSums + (2 + n) * classes + c, overlap);
          sums.add(kPseudoSums + (4 + n) * classes + c, square);
        }
      }
    }
  });

  if (d.bytes) {
    __syncthreads();
    for (int i = int(threadIdx.x); i < 256; i += kThreads)
      if (bytes[i]) atomicAdd(d.bytes + i, static_cast<unsigned long long>(bytes[i]));
  }
  const int64_t quantities = d.quantities(), of_pseudo = d.of_pseudo();
  double* row = d.rows + block * quantities;
  sums.write(row, int(of_pseudo));
  if (d.width) {  // a loop of its own, which leaves the one above its registers; the block reads the states that it wrote
    PrototypeSums prototypes(d.features[d.second && *d.second != 0], d.classes, d.width);
    for_each_tile<kV>(d.a, block, blocks, [&](int64_t volume, int64_t voxel) {
      const int64_t first = voxel - int64_t(threadIdx.x) * kV;
      for (int v = 0; v < kV; ++v) {  // neighbouring lanes take neighbouring voxels here
        const int64_t own = first + v * kThreads + int(threadIdx.x);
        const uint8_t state = own < d.a.voxels ? d.state[volume * d.a.voxels + own] : 0;
        prototypes.add(volume, own, (state & kReliable) && (state & kClass) < d.classes ? state & kClass : -1);
      }
    });
    prototypes.write(row + of_pseudo);
  }
  if (!add_rows(d.rows, quantities, block, blocks, d.tickets)) return;

  if constexpr (kIsRectified) {
    rectified_losses(d, d.rows, classes);
  } else if (d.pseudo) {
    for (int i = int(threadIdx.x); i < 6 * classes; i += kThreads) d.pseudo_sums[i] = d.rows[kPseudoSums + i];
    if (threadIdx.x == 0) {
      const double count = d.rows[kReliableSum];
      for (int n = 0; n < 2; ++n) {
        const double* own = d.rows + kPseudoSums + n * classes;
        double dice = 0;
        for (int c = 1; c < classes; ++c) dice += dice_loss(own[c], own[2 * classes + c], own[4 * classes + c], d.smooth);
        d.pseudo[n] = float(mean(d.rows[kPseudoCe + n], int64_t(count)));
        d.pseudo[2 + n] = float(dice / double(classes - 1));
      }
      *d.pseudo_voxels = int64_t(count);
      if (d.kept) *d.kept = float(mean(count, d.a.volumes * d.a.voxels));
    }
  }
  if (!d.width) return;
  for (int64_t i = threadIdx.x; i < d.classes * d.width; i += kThreads) d.prototypes[i] = float(d.rows[of_pseudo + i]);
  for (int c = int(threadIdx.x); c < d.classes; c += kThreads) {
    int64_t members = 0;
    for (int s = 0; s < 256; ++s)
      if ((s & kReliable) && (s & kClass) == c) members += int64_t(__ldcg(d.bytes + s));
    d.prototype_counts[c] = members;
  }
}

template <int kMost>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<kMost>) entropy_kernel(Map map, float* out) {
  constexpr int kV = kVoxels<kMost>;
  const int classes = kMost == 2 ? 2 : int(map.channels);
  for_each_tile<kV>(map, int(blockIdx.x), int(gridDim.x), [&](int64_t volume, int64_t voxel) {
    float z[kV][kMost];
    load_voxels(map, volume, voxel, classes, z);
#pragma unroll
    for (int v = 0; v < kV; ++v)
      if (voxel + v < map.voxels) out[volume * map.voxels + voxel + v] = entropy_of<kMost>(z[v], classes);
  });
}

}  // namespace

template <int kMost>
void Passes<kMost>::describe(const Supervised& s, const Percentile& p, void* stream) {
  const bool labelled = s.rows, unlabelled = p.keys;
  const int labelled_blocks = labelled ? blocks_for(Tiles<kVoxels<kMost>>(s.a).count) : 0;
  const int counters = unlabelled ? blocks_for(Tiles<kVoxels<kMost>>(p.maps[0]).count, kMostCounters) : 0;
  const size_t shared = unlabelled && p.groups == 1 ? kCounterWords * sizeof(uint32_t) : 0;
  launch(describe_kernel<kMost>, dim3(labelled_blocks + 2 * counters), shared, stream, s, labelled_blocks, p, counters);
}

template <int kMost>
void Passes<kMost>::refine(const Percentile& p, void* stream) {
  launch(refine_kernel<kMost>, dim3(blocks_for(Tiles<4>(p.maps[0]).count), 2), 0, stream, p);
}

template <int kMost>
void Passes<kMost>::decide(const Decision& d, int blocks, void* stream) {
  const auto kernel = d.target == Target::rectified ? decide_kernel<kMost, true> : decide_kernel<kMost, false>;
  launch(kernel, dim3(blocks), PrototypeSums::shared_bytes(d.classes, d.width), stream, d);
}

template <int kMost>
void Passes<kMost>::gradient(const Gradient& g, void* stream) {
  const bool labelled = g.supervised.a.volumes, unlabelled = g.a.volumes;
  const int labelled_blocks = labelled ? blocks_for(Tiles<kVoxels<kMost>>(g.supervised.a).count, 4 * kMostBlocks) : 0;
  const int others = unlabelled ? blocks_for(Tiles<kVoxels<kMost>>(g.a).count, 4 * kMostBlocks) : 0;
  const auto kernel = g.target == Target::rectified ? gradient_kernel<kMost, true> : gradient_kernel<kMost, false>;
  if (labelled_blocks + others) launch(kernel, dim3(labelled_blocks + others), 0, stream, g, labelled_blocks);
}

template <int kMost>
void Passes<kMost>::voxel_entropy(const Map& logits, float* out, void* stream) {
  launch(entropy_kernel<kMost>, dim3(blocks_for(Tiles<kVoxels<kMost>>(logits).count)), 0, stream, logits, out);
}

}  // namespace sslfast::cuda
