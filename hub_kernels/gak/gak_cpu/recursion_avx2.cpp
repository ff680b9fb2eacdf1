#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#define GAK_ISA avx2
#define GAK_VECTOR_BYTES 32
#include "recursion.h"
#endif
