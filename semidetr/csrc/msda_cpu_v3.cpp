// The kernels for x86-64-v3 (AVX2, FMA): 256-bit vectors. Wider vectors than the instruction set has are 25 times slower.
#if defined(__AVX2__) && defined(__FMA__)
#define SEMIDETR_ISA v3
#define SEMIDETR_VW 8
#include "msda_kernel.h"
#endif
