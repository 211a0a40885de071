// What the library says about itself.
#include "common.cuh"

extern "C" const char* ttl_error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
