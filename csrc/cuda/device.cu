// What the bindings need of the CUDA runtime beside the launches.
#include "block.cuh"

namespace sslfast::cuda {

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
