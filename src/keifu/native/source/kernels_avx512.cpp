// x86-64 flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mfma
#define SET avx512
#include "kernels.h"
