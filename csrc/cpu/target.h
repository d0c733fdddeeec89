// LM_TARGET_BEGIN("avx512f,...") ... LM_TARGET_END turns instructions on for the functions between them. Include every
// header first: an inline function of another header compiled for these instructions could be the copy the linker
// keeps.
#pragma once

#define LM_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define LM_TARGET_BEGIN(list) LM_PRAGMA(clang attribute push(__attribute__((target(list))), apply_to = function))
#define LM_TARGET_END _Pragma("clang attribute pop")
#else
#define LM_TARGET_BEGIN(list) LM_PRAGMA(GCC push_options) LM_PRAGMA(GCC target(list))
#define LM_TARGET_END _Pragma("GCC pop_options")
#endif

// Before a loop of a small constant count over registers.
#if defined(__clang__)
#define LM_UNROLL _Pragma("clang loop unroll(full)")
#else
#define LM_UNROLL _Pragma("GCC unroll 16")
#endif
