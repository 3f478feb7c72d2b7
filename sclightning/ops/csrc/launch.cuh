// Host side of the kernels for one element type: tensor maps, the division of work, the launch.
#pragma once

#include <algorithm>
#include <cmath>

#include "jvp_attention.cuh"

namespace sclightning {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

const char* attention_bf16(const SclightningAttention& a, Encode encode, void* stream);
const char* attention_fp16(const SclightningAttention& a, Encode encode, void* stream);
const char* cosine_bf16(const SclightningCosine& a, Encode encode, void* stream);
const char* cosine_fp16(const SclightningCosine& a, Encode encode, void* stream);

/// Map of a 4D tensor of 16-bit numbers, the fastest dimension first, for boxes of a panel of 64 rows.
template <class L>
const char* describe(CUtensorMap& map, Encode encode, const void* data, bool bf16, const int64_t (&sizes)[4],
                     const int64_t (&strides)[3]) {
  cuuint64_t extents[4], bytes[3];
  for (int i = 0; i < 4; ++i) extents[i] = sizes[i];
  for (int i = 0; i < 3; ++i) bytes[i] = 2 * strides[i];
  const cuuint32_t box[] = {L::PANEL, ROWS, 1, 1}, steps[] = {1, 1, 1, 1};
  const CUresult error = encode(
      &map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, const_cast<void*>(data),
      extents, bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      L::ROW_BYTES == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return error == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refused a tensor";
}

template <class Element, class L>
constexpr auto kernel() {
  if constexpr (L::SMALL) {
    return jvp_attention_small_kernel<Element, L>;
  } else {
    return jvp_attention_kernel<Element, L>;
  }
}

/// Divides the work over at most ``blocks`` multiprocessors and launches.
template <class Element, class L>
const char* run(Parameters& p, int64_t heads, int blocks, float scale, bool bf16, void* stream) {
  p.query_blocks = (p.queries + L::QUERIES - 1) / L::QUERIES;
  p.key_blocks = (p.keys + ROWS - 1) / ROWS;
  if (heads * p.query_blocks > INT32_MAX / 2) return "more query blocks than 2^30";
  // Whole heads, whose keys stay in shared memory for all their queries, if there are enough to fill the device.
  p.parts = L::WHOLE && p.key_blocks <= L::STAGES && heads >= blocks ? p.query_blocks : 1;
  p.items = heads * p.query_blocks / p.parts;
  p.scale_log2 = scale * 1.4426950408889634f;
  p.h_scale = scale * (bf16 ? 1.00281782f : 1.0f);  // 1 + 2^-8 / (2 ln 2), the mean loss of cutting off
  const int grid = std::min<int64_t>(p.items, int64_t(L::BLOCKS) * blocks);
  const cudaError_t error = launch(kernel<Element, L>(), grid, L::THREADS, L::BYTES, p, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class Element, class L>
const char* launch_attention(const SclightningAttention& a, Encode encode, void* stream) {
  Parameters p{};
  CUtensorMap* maps[] = {&p.q, &p.k, &p.v, &p.tq, &p.tk, &p.tv};
  const void* data[] = {a.q, a.k, a.v, a.tq, a.tk, a.tv};
  for (int i = 0; i < 6; ++i) {
    const int64_t* s = a.strides[i];
    const char* error = describe<L>(*maps[i], encode, data[i], a.bf16, {a.D, i % 3 ? a.keys : a.queries, a.H, a.B},
                                    {s[2], s[1], s[0]});
    if (error) return error;
  }
  p.o = static_cast<uint16_t*>(a.o), p.to = static_cast<uint16_t*>(a.to), p.lse = a.lse;
  p.o_b = a.strides[6][0], p.o_h = a.strides[6][1], p.o_n = a.strides[6][2];
  p.H = a.H, p.queries = a.queries, p.keys = a.keys, p.D = a.D;
  return run<Element, L>(p, int64_t(a.B) * a.H, a.blocks, a.scale, a.bf16, stream);
}

template <class Element>
const char* cosine(const SclightningCosine& a, Encode encode, void* stream) {
  Parameters p{};
  const int64_t N = a.N, D = a.D, heads = int64_t(a.B) * a.H;
  for (bool tangent : {false, true}) {
    const char* error = describe<LayoutCosine>(tangent ? p.tq : p.q, encode, tangent ? a.tx : a.x, a.bf16,
                                               {N, D, 3, heads}, {3 * N, N, 3 * D * N});
    if (error) return error;
  }
  p.o = static_cast<uint16_t*>(a.o), p.to = static_cast<uint16_t*>(a.to), p.lse = a.lse;
  p.o_b = a.H * D * N, p.o_h = D * N, p.o_n = N;
  p.H = a.H, p.queries = p.keys = a.N, p.D = a.D;
  p.root = 1 / std::sqrt(float(a.D)), p.eps = a.eps;
  return (N <= ROWS ? run<Element, LayoutCosineSmall> : run<Element, LayoutCosine>)(p, heads, a.blocks, a.scale, a.bf16,
                                                                                    stream);
}

template <class Element>
const char* attention(const SclightningAttention& a, Encode encode, void* stream) {
  if (a.D <= 64 && a.queries <= ROWS && a.keys <= ROWS) return launch_attention<Element, Layout64Small>(a, encode, stream);
  if (a.D <= 64) return launch_attention<Element, Layout64>(a, encode, stream);
  if (a.D <= 72) return launch_attention<Element, Layout72>(a, encode, stream);
  if (a.D <= 128) return launch_attention<Element, Layout128>(a, encode, stream);
  return launch_attention<Element, Layout256>(a, encode, stream);
}

}  // namespace sclightning
