// Calls of the CUDA runtime for the bindings.
#include <mutex>
#include <set>
#include <utility>

#include "block.cuh"

namespace sslfast::cuda {

// The maximum, not the size of one launch: otherwise one of two threads that launch the same kernel could lower the
// limit of the other.
void allow_most_shared_memory(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<int, const void*>> done;
  int device = 0, most = 0;
  check(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  if (done.count({device, kernel})) return;
  cudaFuncAttributes attributes{};
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  check(cudaFuncGetAttributes(&attributes, kernel));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             most - int(attributes.sharedSizeBytes)));
  done.insert({device, kernel});
}

void fill_zero(void* data, size_t bytes, void* stream) {
  if (bytes) check(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)));
}

void copy(const void* from, void* to, size_t bytes, void* stream) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream)));
}

int set_device(int device) {
  int before = 0;
  check(cudaGetDevice(&before));
  if (before != device) check(cudaSetDevice(device));
  return before;
}

}  // namespace sslfast::cuda
