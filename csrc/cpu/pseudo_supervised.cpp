// Bytes per voxel for C classes of s bytes: forward C s + 1, backward 2 C s + 1.
#include "sums.h"

namespace sslfast {
SSLFAST_TERM(PseudoSupervised)
}  // namespace sslfast
