// x86-64 flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mfma -mavx512bf16
#define SET avx512_bf16
#include "kernels.h"
