// The kernels for processors with AVX-512; compiled with the flags that setup.py names.
#define FASTALPS_AVX512 1
#define FASTALPS_TABLE kernels_avx512
#define FASTALPS_NAME "avx512"
#include "kernels.inl"
