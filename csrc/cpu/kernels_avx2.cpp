// The kernels for processors with AVX2; compiled with the flags that setup.py names.
#define FASTALPS_AVX2 1
#define FASTALPS_TABLE kernels_avx2
#define FASTALPS_NAME "avx2"
#include "kernels.inl"
