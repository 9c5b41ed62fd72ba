// The engine in int8 for processors with AVX-VNNI, most of which have no AVX-512; compiled with the
// flags that setup.py names.
#define FASTALPS_AVX2 1
#define FASTALPS_VNNI 1
#define FASTALPS_BLOCK engine_int8_avx_vnni
#define FASTALPS_PRECISION Int8
#include "engine_dot.inl"
