// The engine in int8 for processors with AMX; compiled with the flags that setup.py names.
#define FASTALPS_AVX512 1
#define FASTALPS_VNNI 1
#define FASTALPS_AMX 1
#define FASTALPS_BLOCK engine_int8_amx
#define FASTALPS_PRECISION Int8
#include "engine_dot.inl"
