// Normalisation of dense activations, contiguous or channels last. Numbers are read in the order of memory, 16 at a
// time; each channel's parameters are laid out beforehand in the same order. Sums of a chunk are float; chunks are
// added up in double, in order.
#include <cmath>

#include "dtypes.h"
#include "kernels.h"

#define SSLFAST_ALWAYS __attribute__((always_inline))

namespace sslfast {
namespace {

constexpr int64_t kChunkNumbers = 65536;  // of all channels together, about, if the channels are last
constexpr int64_t kChunkVoxels = 16384;   // else
constexpr int kAtOnce = 4;                // vectors, so that their sums are independent

// Part of the activations whose numbers are consecutive in memory.
struct Span {
  int64_t offset, length;
  int64_t channel;  // of its first number
};

struct Activations {
  int64_t volumes, channels, voxels;
  bool channels_last;
  int64_t chunk = channels_last ? std::max<int64_t>(kChunkNumbers / channels, 1) : kChunkVoxels;
  int64_t chunks_per_volume = (voxels + chunk - 1) / chunk;
  int64_t pattern = pattern_of();  // numbers after which the channels repeat, a multiple of kAtOnce vectors

  explicit Activations(const VoxelMap& x)
      : volumes(x.volumes),
        channels(x.channels),
        voxels(x.voxels),
        channels_last(x.channels > 1 && x.channel_stride == 1) {}

  int64_t pattern_of() const {
    const int64_t least = kAtOnce * kLanes;
    if (!channels_last) return least;
    int64_t size = channels;
    while (size % least) size += channels;
    return size;
  }

  int64_t chunks() const { return volumes * chunks_per_volume; }
  int64_t volume_of(int64_t chunk_index) const { return chunk_index / chunks_per_volume; }
  int64_t count_of(int64_t chunk_index) const {
    return std::min(chunk, voxels - chunk_index % chunks_per_volume * chunk);
  }
  // body(span) for the spans of a chunk.
  template <class Body>
  void for_each_span(int64_t chunk_index, const Body& body) const {
    const int64_t volume = volume_of(chunk_index), first = chunk_index % chunks_per_volume * chunk;
    const int64_t count = count_of(chunk_index);
    if (channels_last) return body(Span{(volume * voxels + first) * channels, count * channels, 0});
    for (int64_t c = 0; c < channels; ++c) body(Span{(volume * channels + c) * voxels + first, count, c});
  }

  // The pattern in vectors if that is kAtOnce, as for 1, 2, 4, ... 64 channels: then what belongs to it fits in
  // registers.
  template <class Body>
  void with_pattern(const Body& body) const {
    if (pattern == kAtOnce * kLanes)
      body(std::integral_constant<int, kAtOnce>{});
    else
      body(std::integral_constant<int, 0>{});
  }
};

// body(i, v, count): numbers i .. i + count of a span, at vector v of the pattern; count is 16 but for the last.
template <int kVectors, class Body>
SSLFAST_INLINE void for_each_vector(const Activations& of, const Span& span, const Body& body) {
  const int vectors = kVectors ? kVectors : int(of.pattern / kLanes);
  int64_t i = 0;
  for (; i + vectors * kLanes <= span.length; i += vectors * kLanes)
    for (int v = 0; v < vectors; ++v) body(i + v * kLanes, v, std::integral_constant<int, kLanes>{});
  for (int v = 0; i < span.length; i += kLanes, ++v) body(i, v, int(std::min<int64_t>(kLanes, span.length - i)));
}

// A number per channel, laid out as the pattern of a span.
template <int kVectors>
struct Pattern {
  Vec vectors[kVectors ? kVectors : 1];
  std::vector<float> numbers;

  Pattern(const Activations& of, const Span& span, const std::vector<float>& by_channel) {
    if (!of.channels_last) {
      for (auto& vector : vectors) vector = splat(by_channel[span.channel]);
      return;
    }
    numbers.resize(of.pattern);
    for (int64_t i = 0; i < of.pattern; i += of.channels) std::copy(by_channel.begin(), by_channel.end(), &numbers[i]);
    for (int v = 0; v < kVectors; ++v) vectors[v] = load(&numbers[v * kLanes]);
  }
  SSLFAST_INLINE Vec operator[](int v) const {
    if constexpr (kVectors) return vectors[v];
    return load(&numbers[v * kLanes]);
  }
};

// Two sums per channel, likewise.
template <int kVectors>
struct PatternSums {
  Vec first[kVectors ? kVectors : 1] = {}, second[kVectors ? kVectors : 1] = {};
  std::vector<float> numbers;
  const int64_t size;

  explicit PatternSums(const Activations& of) : numbers(of.channels_last ? 2 * of.pattern : 0), size(of.pattern) {}

  SSLFAST_INLINE void add(int v, Vec one, Vec two) {
    if constexpr (kVectors) {
      first[v] += one;
      second[v] += two;
    } else {
      float* at = &numbers[v * kLanes];
      store(at, load(at) + one);
      store(at + size, load(at + size) + two);
    }
  }

  // Adds them to sums [2, C].
  void add_to(double* sums, const Activations& of, const Span& span) {
    if (!of.channels_last) {
      for (auto& vector : first) sums[span.channel] += sum(vector);
      for (auto& vector : second) sums[of.channels + span.channel] += sum(vector);
      return;
    }
    for (int v = 0; v < kVectors; ++v) {
      store(&numbers[v * kLanes], first[v]);
      store(&numbers[size + v * kLanes], second[v]);
    }
    for (int64_t i = 0; i < size; i += of.channels)
      for (int64_t c = 0; c < of.channels; ++c) {
        sums[c] += numbers[i + c];
        sums[of.channels + c] += numbers[size + i + c];
      }
  }
};

template <class T>
SSLFAST_INLINE Vec load_some(const typename T::Element* from, int count) {
  if (count == kLanes) return T::load_lanes(from);
  typename T::Element row[kLanes] = {};
  std::memcpy(row, from, count * sizeof *from);
  return T::load_lanes(row);
}
template <class T>
SSLFAST_INLINE void store_some(typename T::Element* to, int count, Vec v) {
  if (count == kLanes) return T::store_lanes(to, v);
  typename T::Element row[kLanes];
  T::store_lanes(row, v);
  std::memcpy(to, row, count * sizeof *to);
}

// The first `count` lanes; 0 in the others.
SSLFAST_INLINE Vec first_lanes(Vec v, int count) {
  if (count == kLanes) return v;
  float lanes[kLanes];
  store(lanes, v);
  std::fill(lanes + count, lanes + kLanes, 0.f);
  return load(lanes);
}

template <class T>
const typename T::Element* numbers(const VoxelMap& map) {
  return static_cast<const typename T::Element*>(map.data);
}

// The mean of up to 64 numbers, which is exact if they are equal.
template <class T>
float mean_of_first(const typename T::Element* from, int64_t count, int64_t stride) {
  const int64_t taken = std::min<int64_t>(count, 64);
  const float first = T::to_float(*from);
  float sum = 0;
  for (int64_t i = 1; i < taken; ++i) sum += T::to_float(from[i * stride]) - first;
  return first + sum / float(taken);
}

// Mean and variance of each channel over chunks begin .. end, from the chunks' means and sums of squared deviations.
void combine(const Activations& of, const std::vector<double>& partial, int64_t begin, int64_t end,
             double* statistics) {
  double count = 0;
  for (int64_t i = begin; i < end; ++i) count += double(of.count_of(i));
  for (int64_t c = 0; c < of.channels; ++c) {
    double mean = 0, squares = 0;
    for (int64_t i = begin; i < end; ++i) mean += double(of.count_of(i)) / count * partial[2 * i * of.channels + c];
    for (int64_t i = begin; i < end; ++i) {
      const double d = partial[2 * i * of.channels + c] - mean;
      squares += partial[(2 * i + 1) * of.channels + c] + double(of.count_of(i)) * d * d;
    }
    statistics[c] = mean;
    statistics[of.channels + c] = squares / count;
  }
}

// z = (x - mean) scale + shift, with the mean rounded to float; `left` is what the rounding left over.
struct Affine {
  std::vector<float> mean, scale, shift;
  std::vector<double> inverse, left;

  Affine(const Norm& norm, int64_t channels, int64_t group)
      : mean(channels), scale(channels), shift(channels), inverse(channels), left(channels) {
    const double* statistics = norm.statistics + group * 2 * channels;
    for (int64_t c = 0; c < channels; ++c) {
      mean[c] = float(statistics[c]);
      left[c] = std::isfinite(mean[c]) ? statistics[c] - mean[c] : 0;
      inverse[c] = 1 / std::sqrt(statistics[channels + c] + norm.eps);
      scale[c] = float(norm.weight[c] * inverse[c]);
      shift[c] = float(norm.bias[c] - left[c] * norm.weight[c] * inverse[c]);
    }
  }
};

std::vector<Affine> affine_of(const Norm& norm, int64_t channels) {
  std::vector<Affine> all;
  for (int64_t group = 0; group < norm.groups; ++group) all.emplace_back(norm, channels, group);
  return all;
}

float lowest(const Norm& norm) { return norm.relu ? 0.f : -INFINITY; }

// body(Flag<true>) or body(Flag<false>)
template <class Body>
void with_flag(bool flag, const Body& body) {
  if (flag)
    body(std::true_type{});
  else
    body(std::false_type{});
}

}  // namespace

void norm_statistics(const VoxelMap& x, bool per_volume, double* statistics) {
  const Activations of(x);
  std::vector<double> partial(of.chunks() * 2 * of.channels);
  with_dtype(x.dtype, [&](auto type) {
    using T = decltype(type);
    parallel(of.chunks(), [&](int64_t chunk) {
      double* sums = &partial[chunk * 2 * of.channels];
      std::vector<float> shift(of.channels);  // the mean of each channel's first numbers, so that a large mean cancels
      of.for_each_span(chunk, [&](const Span& span) {
        const auto* from = numbers<T>(x) + span.offset;
        const int64_t here = of.channels_last ? of.channels : 1;
        for (int64_t c = 0; c < here; ++c)
          shift[span.channel + c] = mean_of_first<T>(from + c, span.length / here, here);
        of.with_pattern([&](auto vectors) {
          const Pattern<vectors> center(of, span, shift);
          PatternSums<vectors> pattern_sums(of);
          for_each_vector<vectors>(of, span, [&](int64_t i, int v, auto count) SSLFAST_ALWAYS {
            const Vec d = first_lanes(load_some<T>(from + i, count) - center[v], count);
            pattern_sums.add(v, d, d * d);
          });
          pattern_sums.add_to(sums, of, span);
        });
      });
      const double count = double(of.count_of(chunk));
      for (int64_t c = 0; c < of.channels; ++c) {
        const double d = sums[c] / count;
        const double squares = sums[of.channels + c] - sums[c] * d;
        sums[c] = shift[c] + d;
        sums[of.channels + c] = squares < 0 ? 0 : squares;  // not std::max, which would hide a NaN
      }
    });
  });
  if (per_volume)
    for (int64_t n = 0; n < of.volumes; ++n)
      combine(of, partial, n * of.chunks_per_volume, (n + 1) * of.chunks_per_volume, statistics + n * 2 * of.channels);
  else
    combine(of, partial, 0, of.chunks(), statistics);
}

void norm_apply(const VoxelMap& x, const Norm& norm, const VoxelMap* residual, const VoxelMap* skip,
                const VoxelMap& y) {
  const Activations of(x);
  const std::vector<Affine> affine = affine_of(norm, of.channels);
  const Vec least = splat(lowest(norm));
  with_dtype(x.dtype, [&](auto type) {
    using T = decltype(type);
    with_flag(residual, [&](auto has_residual) {
      with_flag(skip, [&](auto has_skip) {
        parallel(of.chunks(), [&](int64_t chunk) {
          const Affine& by = affine[norm.groups > 1 ? of.volume_of(chunk) : 0];
          of.for_each_span(chunk, [&](const Span& span) {
            const auto* from = numbers<T>(x) + span.offset;
            auto* to = static_cast<typename T::Element*>(y.data) + span.offset;
            of.with_pattern([&](auto vectors) {
              const Pattern<vectors> mean(of, span, by.mean), scale(of, span, by.scale), shift(of, span, by.shift);
              for_each_vector<vectors>(of, span, [&](int64_t i, int v, auto count) SSLFAST_ALWAYS {
                Vec z = multiply_add(load_some<T>(from + i, count) - mean[v], scale[v], shift[v]);
                if constexpr (has_residual) z = z + load_some<T>(numbers<T>(*residual) + span.offset + i, count);
                z = select(z <= least, least, z);
                if constexpr (has_skip) z = z + load_some<T>(numbers<T>(*skip) + span.offset + i, count);
                store_some<T>(to + i, count, z);
              });
            });
          });
        });
      });
    });
  });
}

void norm_backward_sums(const VoxelMap& grad, const VoxelMap& x, const Norm& norm, const VoxelMap* residual,
                        double* sums) {
  const Activations of(x);
  const std::vector<Affine> affine = affine_of(norm, of.channels);
  const Vec least = splat(lowest(norm));
  std::vector<double> partial(of.chunks() * 2 * of.channels);
  with_dtype(x.dtype, [&](auto type) {
    using T = decltype(type);
    with_flag(residual, [&](auto has_residual) {
      parallel(of.chunks(), [&](int64_t chunk) {
        const Affine& by = affine[norm.groups > 1 ? of.volume_of(chunk) : 0];
        of.for_each_span(chunk, [&](const Span& span) {
          const auto *from = numbers<T>(x) + span.offset, *from_grad = numbers<T>(grad) + span.offset;
          of.with_pattern([&](auto vectors) {
            const Pattern<vectors> mean(of, span, by.mean), scale(of, span, by.scale), shift(of, span, by.shift);
            PatternSums<vectors> pattern_sums(of);
            for_each_vector<vectors>(of, span, [&](int64_t i, int v, auto count) SSLFAST_ALWAYS {
              const Vec d = load_some<T>(from + i, count) - mean[v];
              Vec z = multiply_add(d, scale[v], shift[v]);
              if constexpr (has_residual) z = z + load_some<T>(numbers<T>(*residual) + span.offset + i, count);
              const Vec dz = select(z <= least, Vec{}, load_some<T>(from_grad + i, count));
              pattern_sums.add(v, dz, dz * d);
            });
            pattern_sums.add_to(&partial[chunk * 2 * of.channels], of, span);
          });
        });
      });
    });
  });
  std::fill(sums, sums + norm.groups * 2 * of.channels, 0.0);
  for (int64_t chunk = 0; chunk < of.chunks(); ++chunk) {
    double* to = sums + (norm.groups > 1 ? of.volume_of(chunk) : 0) * 2 * of.channels;
    for (int64_t i = 0; i < 2 * of.channels; ++i) to[i] += partial[chunk * 2 * of.channels + i];
  }
  for (int64_t group = 0; group < norm.groups; ++group) {
    double* of_group = sums + group * 2 * of.channels;
    for (int64_t c = 0; c < of.channels; ++c) {
      double& with_x = of_group[of.channels + c];
      with_x = (with_x - affine[group].left[c] * of_group[c]) * affine[group].inverse[c];
    }
  }
}

void norm_backward(const VoxelMap& grad, const VoxelMap& x, const Norm& norm, const VoxelMap* residual,
                   const double* means, const VoxelMap& grad_x, const VoxelMap* grad_residual) {
  const Activations of(x);
  const std::vector<Affine> affine = affine_of(norm, of.channels);
  const Vec least = splat(lowest(norm));
  // grad_x = scale (dz - center) + slope (x - mean) + constant, where the constant is what rounding left over
  std::vector<std::vector<float>> centers(norm.groups), slopes(norm.groups), constants(norm.groups);
  for (int64_t group = 0; group < norm.groups; ++group) {
    const Affine& by = affine[group];
    for (int64_t c = 0; c < of.channels; ++c) {
      const double a = norm.weight[c] * by.inverse[c], center = means[group * 2 * of.channels + c];
      const double slope = -a * by.inverse[c] * means[(group * 2 + 1) * of.channels + c];
      centers[group].push_back(float(center));
      slopes[group].push_back(float(slope));
      constants[group].push_back(float(a * (float(center) - center) - slope * by.left[c]));
    }
  }
  with_dtype(x.dtype, [&](auto type) {
    using T = decltype(type);
    with_flag(residual, [&](auto has_residual) {
      with_flag(grad_residual, [&](auto has_grad_residual) {
        parallel(of.chunks(), [&](int64_t chunk) {
          const int64_t group = norm.groups > 1 ? of.volume_of(chunk) : 0;
          const Affine& by = affine[group];
          of.for_each_span(chunk, [&](const Span& span) {
            const auto *from = numbers<T>(x) + span.offset, *from_grad = numbers<T>(grad) + span.offset;
            auto* to = static_cast<typename T::Element*>(grad_x.data) + span.offset;
            of.with_pattern([&](auto vectors) {
              const Pattern<vectors> mean(of, span, by.mean), scale(of, span, by.scale), shift(of, span, by.shift),
                  center(of, span, centers[group]), slope(of, span, slopes[group]),
                  constant(of, span, constants[group]);
              for_each_vector<vectors>(of, span, [&](int64_t i, int v, auto count) SSLFAST_ALWAYS {
                const Vec d = load_some<T>(from + i, count) - mean[v];
                Vec z = multiply_add(d, scale[v], shift[v]);
                if constexpr (has_residual) z = z + load_some<T>(numbers<T>(*residual) + span.offset + i, count);
                const Vec dz = select(z <= least, Vec{}, load_some<T>(from_grad + i, count));
                const Vec rest = multiply_add(d, slope[v], constant[v]);
                store_some<T>(to + i, count, multiply_add(dz - center[v], scale[v], rest));
                if constexpr (has_grad_residual)
                  store_some<T>(static_cast<typename T::Element*>(grad_residual->data) + span.offset + i, count, dz);
              });
            });
          });
        });
      });
    });
  });
}

}  // namespace sslfast
