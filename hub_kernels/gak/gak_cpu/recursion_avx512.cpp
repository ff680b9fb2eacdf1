#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512dq,avx512vl,avx2,fma")
#define GAK_ISA avx512
#define GAK_VECTOR_BYTES 64
#include "recursion.h"
#endif
