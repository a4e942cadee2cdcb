// Bytes per voxel for C classes of s bytes: forward 2 C s + 1, backward 3 C s + 1.
#include "sums.h"

namespace sslfast {
SSLFAST_TERM(RectifiedConsistency)
}  // namespace sslfast
