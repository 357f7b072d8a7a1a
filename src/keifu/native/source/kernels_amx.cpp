// x86-64 flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mfma -mamx-tile -mamx-bf16 -mamx-int8
#define SET amx
#include "kernels.h"
