#define GAK_ISA portable
#define GAK_VECTOR_BYTES 16
#include "recursion.h"
