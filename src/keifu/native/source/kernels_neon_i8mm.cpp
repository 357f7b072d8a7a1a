// arm64 flags: -march=armv8.2-a+dotprod+i8mm
#define SET neon_i8mm
#define SET_ARM
#include "kernels.h"
