#include "passes.cuh"

template struct sslfast::cuda::Passes<16>;
