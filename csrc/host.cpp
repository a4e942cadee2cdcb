// What is no tensor op: what this processor can do and what the kernels' compiler made of it, for `python -m
// sslfast.doctor`.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

namespace {

// The vector extensions that processor and operating system both support.
std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
#define SSLFAST_FEATURE(name) \
  if (__builtin_cpu_supports(name)) found.push_back(name)
  SSLFAST_FEATURE("avx2");
  SSLFAST_FEATURE("fma");
  SSLFAST_FEATURE("avx512f");
  SSLFAST_FEATURE("avx512bw");
  SSLFAST_FEATURE("avx512dq");
  SSLFAST_FEATURE("avx512vl");
  SSLFAST_FEATURE("avx512bf16");
#undef SSLFAST_FEATURE
#elif defined(__ARM_NEON)
  found.push_back("neon");
#endif
  return found;
}

// The compiler and the width that its flags allow: this file is compiled with the kernels' own.
pybind11::dict build_facts() {
  pybind11::dict facts;
#if defined(__clang__)
  facts["compiler"] = __VERSION__;
#else
  facts["compiler"] = "GCC " __VERSION__;
#endif
#if defined(__AVX512F__)
  facts["vector_bits"] = 512;
#elif defined(__AVX2__)
  facts["vector_bits"] = 256;
#else
  facts["vector_bits"] = 128;
#endif
  return facts;
}

}  // namespace

PYBIND11_MODULE(sslfast_host, m) {
  m.def("cpu_features", &cpu_features);
  m.def("build_facts", &build_facts);
}
