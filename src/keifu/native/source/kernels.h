// All that is compiled once per instruction set: the files that include this say for which (SET), and with which flags.
// Only the table of functions is used by others, so that no code for a better CPU runs on one that lacks it.
#pragma once
#define JOIN_WORDS(a, b) a##b
#define JOIN(a, b) JOIN_WORDS(a, b)
#define KEIFU_NAMESPACE JOIN(keifu_, SET)
#include "model.h"
#if defined(SET_PORTABLE) || defined(SET_EMULATED)
#define SET_IS_COMPILED
#elif !defined(KEIFU_EMULATED) && (defined(SET_ARM) ? defined(__aarch64__) : defined(__x86_64__))
#define SET_IS_COMPILED
#endif
#if defined(SET_IS_COMPILED)
#include "attention.h"
#include "packing.h"
#include "product.h"
#include "step.h"

const keifu::Kernels keifu::JOIN(SET, _kernels) = {KEIFU_NAMESPACE::forward, KEIFU_NAMESPACE::pack, KEIFU_NAMESPACE::unpack};
#else
const keifu::Kernels keifu::JOIN(SET, _kernels) = {};
#endif
