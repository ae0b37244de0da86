/* The experts' kernels for bfloat16, where the processor multiplies pairs of it; and whether it does. */
#include "tiles.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(HAS_SHUFFLE)
#define MOE_BF16
#include "experts_forward.c"
#include "experts_backward.c"
int moe_cpu_has_bf16(void) { return 1; }
#else
int moe_cpu_has_bf16(void) { return 0; }
#endif
