"""C++ and CUDA sources, installed as `sslfast.csrc` and compiled at first use."""
