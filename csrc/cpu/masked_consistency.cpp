// What a teacher's predictions teach a student where their entropy is low. Every map is read once.
// Bytes a voxel for C classes of s bytes: forward 2 C s, backward as much again and the gradient written.
#include "kernels.h"
#include "prediction.h"

namespace sslfast {
namespace {

// lanes(student, teacher, member, student's logits in the tile): 16 voxels, member 1 where the teacher's entropy lies below the
// limit. Then tile(volume, first, count, student's logits).
template <int kClasses, class Body, class End>
void for_each_certain(const VoxelMap& student, const VoxelMap& teacher, float temperature, float limit, int64_t chunk,
                      const Body& lanes, const End& tile) {
  const int classes = kClasses ? kClasses : int(student.channels);
  alignas(64) float tiles[2][kMaxClasses * kTile], inside[kTile];
  for_each_tile(chunk, student.voxels, [&](int64_t volume, int64_t first, int count) {
    load_tile(student, volume, first, count, tiles[0]);
    load_tile(teacher, volume, first, count, tiles[1]);
    for (int v = 0; v < kTile; ++v) inside[v] = v < count ? 1.f : 0.f;
    for (int v = 0; v < count; v += kLanes) {
      const VecPrediction own = predict(tiles[0] + v, classes), target = predict(tiles[1] + v, classes, 1.f / temperature);
      const Vec member = select(target.entropy >= limit, Vec{}, load(inside + v));
      lanes(own, target, member, tiles[0] + v);
    }
    tile(volume, first, count, tiles[0]);
  });
}

template <int kClasses>
MaskedSums masked_of_chunk(const VoxelMap& student, const VoxelMap& teacher, float temperature, float limit, int64_t chunk) {
  const int classes = kClasses ? kClasses : int(student.channels);
  Vec squares = {}, certain = {};
  for_each_certain<kClasses>(
      student, teacher, temperature, limit, chunk,
      [&](const VecPrediction& own, const VecPrediction& target, Vec member, float*) {
        squares += select(member > 0.f, Distance(own, target, classes).square, Vec{});
        certain += member;
      },
      [](int64_t, int64_t, int, float*) {});
  return {sum(squares), int64_t(sum(certain))};
}

template <int kClasses>
void masked_gradient_of_chunk(const VoxelMap& student, const VoxelMap& teacher, float temperature, float limit, float scale,
                              const VoxelMap& grad, int64_t chunk) {
  const int classes = kClasses ? kClasses : int(student.channels);
  for_each_certain<kClasses>(
      student, teacher, temperature, limit, chunk,
      [&](const VecPrediction& own, const VecPrediction& target, Vec member, float* logits) {
        const Distance distance(own, target, classes);
        for (int c = 0; c < classes; ++c)
          store(logits + c * kTile, select(member > 0.f, scale * distance.gradient(own, target, c), Vec{}));
      },
      [&](int64_t volume, int64_t first, int count, float* logits) { store_tile(grad, volume, first, count, logits); });
}

}  // namespace

MaskedSums masked_consistency(const VoxelMap& student, const VoxelMap& teacher, float temperature, float limit) {
  std::vector<MaskedSums> partial(chunks_of(student.volumes, student.voxels));
  parallel(int64_t(partial.size()), [&](int64_t chunk) {
    with_classes(student.channels,
                 [&](auto n) { partial[chunk] = masked_of_chunk<n>(student, teacher, temperature, limit, chunk); });
  });
  MaskedSums out{};
  for (const MaskedSums& p : partial) {
    out.squares += p.squares;
    out.certain += p.certain;
  }
  return out;
}

void masked_consistency_backward(const VoxelMap& student, const VoxelMap& teacher, float temperature, float limit, float scale,
                                 const VoxelMap& grad) {
  parallel(chunks_of(student.volumes, student.voxels), [&](int64_t chunk) {
    with_classes(student.channels, [&](auto n) {
      masked_gradient_of_chunk<n>(student, teacher, temperature, limit, scale, grad, chunk);
    });
  });
}

}  // namespace sslfast
