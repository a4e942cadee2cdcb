// The CPU kernels' tasks run on the threads of torch.
#include <torch/csrc/stable/ops.h>

#include "cpu/voxels.h"

namespace sslfast {

void run_parallel(int64_t count, void (*body)(void*, int64_t), void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(context, i);
  });
}

int64_t num_threads() { return torch::stable::get_num_threads(); }

}  // namespace sslfast
