// The kernels for any processor (SSE2 on x86-64, NEON on Arm); compiled with the flags that
// setup.py names.
#define FASTALPS_TABLE kernels_default
#define FASTALPS_NAME "default"
#include "kernels.inl"
