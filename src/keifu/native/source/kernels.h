// All that is compiled once per instruction set: the files that include this say in which namespace, and with which
// flags. Only their tables of functions are used by others, so that no code for a better CPU runs on one that lacks it.
#pragma once
#include "attention.h"
#include "packing.h"
#include "product.h"
#include "step.h"
#include "vector.h"
