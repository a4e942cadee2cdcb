// The sums of a term over voxel maps, and the gradient of the maps: one pass each, which reads every map once, tile by
// tile. The backward pass recomputes the softmax. The sums of a chunk are float, 16 lanes each; chunks are added up in
// double, in order.
#pragma once

#include "../terms.h"
#include "kernels.h"

namespace sslfast {

void read_side(const Side& side, int64_t first, int count, float* to);  // for a tile; kIgnored beyond count

// The gradients of the sums, as g.scalar and g.row of a term.
template <class Term>
struct SumsGradient {
  const float* values;
  int classes;

  float scalar(int i) const { return values[i]; }
  float row(int r, int c) const { return values[Term::kScalars + r * classes + c]; }
};

// kClasses: the number of classes, or 0 if it is not a constant.
template <class Term, int kClasses>
struct TermOnTiles {
  static constexpr int kClassCapacity = kClasses ? kClasses : kMaxClasses;

  const Term& term;
  const VoxelMap* maps;  // [kMaps]
  const Side& side;
  const int classes = kClasses ? kClasses : int(maps[0].channels);

  struct Sums {
    Vec scalars[Term::kScalars] = {}, rows[Term::kRows + 1][kClassCapacity] = {};

    SSLFAST_INLINE void scalar(int i, Vec x) { scalars[i] += x; }
    SSLFAST_INLINE void row(int r, int c, Vec x) { rows[r][c] += x; }
  };

  // body(volume, first, count, tiles [kMaps], side of the tile) for each tile of a chunk.
  template <class Body>
  void for_each(int64_t chunk, const Body& body) const {
    alignas(64) float tiles[Term::kMaps][kClassCapacity * kTile], of_side[kTile];
    for_each_tile(chunk, maps[0].voxels, [&](int64_t volume, int64_t first, int count) {
      for (int m = 0; m < Term::kMaps; ++m) load_tile(maps[m], volume, first, count, tiles[m]);
      read_side(side, volume * maps[0].voxels + first, count, of_side);
      body(volume, first, count, tiles, of_side);
    });
  }

  SSLFAST_INLINE void load_logits(const float (&tiles)[Term::kMaps][kClassCapacity * kTile], int v,
                                  Vec (&z)[Term::kMaps][kClassCapacity]) const {
    for (int m = 0; m < Term::kMaps; ++m)
      for (int c = 0; c < classes; ++c) z[m][c] = load(tiles[m] + c * kTile + v);
  }

  void add_up(int64_t chunk, double* out) const {
    Sums sums;
    for_each(chunk, [&](int64_t, int64_t, int count, const auto& tiles, const float* of_side) {
      for (int v = 0; v < count; v += kLanes) {
        Vec z[Term::kMaps][kClassCapacity];
        load_logits(tiles, v, z);
        term.template sums<kClassCapacity, Vec>(z, load(of_side + v), classes, sums);
      }
    });
    for (int i = 0; i < Term::kScalars; ++i) out[i] = sum(sums.scalars[i]);
    for (int r = 0; r < Term::kRows; ++r)
      for (int c = 0; c < classes; ++c) out[Term::kScalars + r * classes + c] = sum(sums.rows[r][c]);
  }

  void write_gradient(int64_t chunk, const float* grad_sums, const VoxelMap* to) const {
    const SumsGradient<Term> g{grad_sums, classes};
    for_each(chunk, [&](int64_t volume, int64_t first, int count, auto& tiles, const float* of_side) {
      for (int v = 0; v < count; v += kLanes) {
        Vec z[Term::kMaps][kClassCapacity], grad[Term::kStudents][kClassCapacity];
        load_logits(tiles, v, z);
        term.template gradient<kClassCapacity, Vec>(z, load(of_side + v), classes, g, grad);
        for (int n = 0; n < Term::kStudents; ++n)
          for (int c = 0; c < classes; ++c) store(tiles[n] + c * kTile + v, grad[n][c]);
      }
      for (int n = 0; n < Term::kStudents; ++n) store_tile(to[n], volume, first, count, tiles[n]);
    });
  }
};

template <class Term>
void sum_over_voxels(const Term& term, const VoxelMap* maps, const Side& side, double* sums) {
  const int64_t classes = maps[0].channels, chunks = chunks_of(maps[0].volumes, maps[0].voxels);
  const int64_t count = Term::kScalars + Term::kRows * classes;
  std::vector<double> partial(chunks * count);
  parallel(chunks, [&](int64_t chunk) {
    with_classes(classes,
                 [&](auto n) { TermOnTiles<Term, n>{term, maps, side}.add_up(chunk, &partial[chunk * count]); });
  });
  std::fill(sums, sums + count, 0.0);
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t i = 0; i < count; ++i) sums[i] += partial[chunk * count + i];
}

template <class Term>
void gradient_of_sums(const Term& term, const VoxelMap* maps, const Side& side, const double* grad_sums,
                      const VoxelMap* to) {
  const std::vector<float> g(grad_sums, grad_sums + Term::kScalars + Term::kRows * maps[0].channels);
  parallel(chunks_of(maps[0].volumes, maps[0].voxels), [&](int64_t chunk) {
    with_classes(maps[0].channels,
                 [&](auto n) { TermOnTiles<Term, n>{term, maps, side}.write_gradient(chunk, g.data(), to); });
  });
}

#define SSLFAST_TERM(Term)                                                           \
  template void sum_over_voxels(const Term&, const VoxelMap*, const Side&, double*); \
  template void gradient_of_sums(const Term&, const VoxelMap*, const Side&, const double*, const VoxelMap*);

}  // namespace sslfast
