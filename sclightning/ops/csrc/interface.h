// The C interface of the extension: plain structs and functions, so that one binary serves every version of PyTorch.
#pragma once

#include <cstdint>

/// Arguments of attention and its tangent; launch.py has the same fields. Tensors are (B, H, N, D) with D contiguous,
/// strides in elements, data and strides multiples of 16 bytes.
struct SclightningAttention {
  const void *q, *k, *v, *tq, *tk, *tv;
  void *o, *to;
  float* lse;              // (B, H, queries), contiguous
  int64_t strides[7][3];   // of b, h and n: q, k, v, tq, tk, tv, and o with its tangent
  int32_t B, H, queries, keys, D;
  int32_t bf16;            // or fp16
  int32_t blocks;          // multiprocessors to work on at most
  float scale;             // positive
};

/// Arguments of cosine attention and its tangent: x and tx (B, H, D, 3, N), o and to (B, H, D, N), contiguous.
struct SclightningCosine {
  const void *x, *tx;
  void *o, *to;
  float* lse;  // (B, H, N)
  int32_t B, H, N, D;
  int32_t bf16;
  int32_t blocks;
  float scale, eps;
};

extern "C" {
/// Hash of source, architecture and compiler, which Python compares.
const char* sclightning_build();
/// Launches on a stream; null, or what went wrong.
const char* sclightning_attention(const SclightningAttention* arguments, void* stream);
const char* sclightning_cosine(const SclightningCosine* arguments, void* stream);
}
