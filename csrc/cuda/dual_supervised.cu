// Bytes per voxel for C classes of s bytes: forward 2 C s + label, backward 4 C s + label.
#include "sums.cuh"

namespace sslfast::cuda {
SSLFAST_TERM(DualSupervised)
}  // namespace sslfast::cuda
