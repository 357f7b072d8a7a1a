// x86-64 flags: -mavx2 -mfma -mf16c
#define SET avx2
#include "kernels.h"
