#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#define GAK_ISA avx2
#define GAK_VECTOR_BYTES 32
#define GAK_WIDEN(values) __builtin_ia32_cvtps2pd256(values)
#include "recursion.h"
#endif
