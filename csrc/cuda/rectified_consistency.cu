// Bytes per voxel for C classes of s bytes: forward 2 C s + 1, backward 3 C s + 1.
#include "sums.cuh"

namespace sslfast::cuda {
SSLFAST_TERM(RectifiedConsistency)
}  // namespace sslfast::cuda
