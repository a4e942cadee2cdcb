// The facts that only C++ knows, as a Python module by pybind11: no training step calls it. `python -m sslfast.doctor`
// prints the processor and the compiler; tests/test_kernel_library_host.py checks them against torch, and the constants
// of arguments.h and terms.h against their copies in sslfast/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "terms.h"

namespace {

// The vector extensions that processor and operating system both support.
std::vector<std::string> cpu_features() {
  std::vector<std::string> names;
#if defined(__x86_64__)
  __builtin_cpu_init();
#define SSLFAST_FEATURE(name) \
  if (__builtin_cpu_supports(name)) names.push_back(name)
  SSLFAST_FEATURE("avx2");
  SSLFAST_FEATURE("fma");
  SSLFAST_FEATURE("avx512f");
  SSLFAST_FEATURE("avx512bw");
  SSLFAST_FEATURE("avx512dq");
  SSLFAST_FEATURE("avx512vl");
  SSLFAST_FEATURE("avx512bf16");
#undef SSLFAST_FEATURE
#elif defined(__ARM_NEON)
  names.push_back("neon");
#endif
  return names;
}

// True if the compiler rounds a * a - b once, which makes other bits than its two roundings on another processor.
bool contracts() {
  volatile float a = 1.f + 1.f / 4096, b = 1.f + 1.f / 2048;  // a * a rounds to b
  const float x = a, y = b;
  return x * x - y != 0.f;
}

// The compiler and what its flags allow: this file is compiled with the kernels' own.
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
  facts["contracts"] = contracts();
  return facts;
}

template <class Term>
std::map<std::string, int> layout_of() {
  return {{"maps", Term::kMaps}, {"students", Term::kStudents}, {"scalars", Term::kScalars}, {"rows", Term::kRows}};
}

// What sslfast/ops states too.
pybind11::dict constants() {
  using namespace sslfast;
  pybind11::dict facts;
  facts["MAX_CLASSES"] = kMaxClasses;
  facts["CLASS"] = int(kClass);
  facts["RELIABLE"] = int(kReliable);
  facts["dual_supervised"] = layout_of<DualSupervised>();
  facts["pseudo_supervised"] = layout_of<PseudoSupervised>();
  facts["rectified_consistency"] = layout_of<RectifiedConsistency>();
  facts["masked_consistency"] = layout_of<MaskedConsistency>();
  return facts;
}

}  // namespace

PYBIND11_MODULE(sslfast_host, m) {
  m.def("cpu_features", &cpu_features);
  m.def("build_facts", &build_facts);
  m.def("constants", &constants);
}
