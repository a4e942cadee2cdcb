// Bytes per voxel for C classes of s bytes: forward 2 C s + label, backward 4 C s + label.
#include "sums.h"

namespace sslfast {
namespace {

template <class T>
void read_values(const Side& side, int64_t first, int count, float* to) {
  const T* from = static_cast<const T*>(side.data) + first;
  const T last = T(side.last), ignore = T(side.ignore);
  const bool can_ignore = ignore == side.ignore;  // false if T cannot represent it, such as -1 in an unsigned type
  for (int v = 0; v < count; ++v) {
    const bool ignored = can_ignore & (from[v] == ignore), inside = (from[v] >= 0) & (from[v] <= last);
    to[v] = ignored ? kIgnored : inside ? float(int32_t(from[v])) : kOutOfRange;
  }
}

}  // namespace

void read_side(const Side& side, int64_t first, int count, float* to) {
  std::fill(to + count, to + kTile, kIgnored);
  if (!side.data) return std::fill(to, to + count, 0.f);
  switch (side.bytes) {
    case 8:
      return read_values<int64_t>(side, first, count, to);
    case 4:
      return read_values<int32_t>(side, first, count, to);
    case 2:
      return read_values<int16_t>(side, first, count, to);
    default:
      return side.is_signed ? read_values<int8_t>(side, first, count, to)
                            : read_values<uint8_t>(side, first, count, to);
  }
}

SSLFAST_TERM(DualSupervised)

}  // namespace sslfast
