// Bytes per voxel for C classes of s bytes: forward 2 C s, backward 3 C s.
#include "sums.h"

namespace sslfast {
SSLFAST_TERM(MaskedConsistency)
}  // namespace sslfast
