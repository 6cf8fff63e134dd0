// The kernels for any CPU: 128-bit vectors with GCC or Clang (SSE2, NEON), plain scalars elsewhere.
#define SEMIDETR_ISA base
#if (defined(__GNUC__) || defined(__clang__)) && !defined(SEMIDETR_SCALAR)
#define SEMIDETR_VW 4
#else
#define SEMIDETR_VW 1
#endif
#include "msda_kernel.h"
