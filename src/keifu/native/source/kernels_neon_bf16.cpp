// arm64 flags: -march=armv8.2-a+dotprod+i8mm+bf16
#define SET neon_bf16
#define SET_ARM
#include "kernels.h"
