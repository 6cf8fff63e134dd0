// The kernels for x86-64-v4 (AVX-512 F, BW, CD, DQ, VL): 512-bit vectors.
#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__AVX512BW__)
#define SEMIDETR_ISA v4
#define SEMIDETR_VW 16
#include "msda_kernel.h"
#endif
