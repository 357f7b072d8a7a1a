// x86-64 flags: -mavx2 -mfma
#define SET avx2
#include "kernels.h"
