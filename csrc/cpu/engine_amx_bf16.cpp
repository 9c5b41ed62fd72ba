// The engine in bf16 for processors with AMX; compiled with the flags that setup.py names.
#define FASTALPS_AVX512 1
#define FASTALPS_BF16 1
#define FASTALPS_AMX 1
#define FASTALPS_BLOCK engine_bf16_amx
#define FASTALPS_PRECISION BFloat
#include "engine_dot.inl"
