// Host side of the kernels for one element type: tensor maps, the division of work, the launch.
#pragma once

#include "jvp_attention.cuh"

namespace sclightning {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

const char* attention_bf16(const SclightningAttention& a, Encode encode, void* stream);
const char* attention_fp16(const SclightningAttention& a, Encode encode, void* stream);

template <class Element, class L>
const char* launch_attention(const SclightningAttention& a, Encode encode, void* stream) {
  Parameters p;
  CUtensorMap* maps[] = {&p.q, &p.k, &p.v, &p.tq, &p.tk, &p.tv};
  const void* data[] = {a.q, a.k, a.v, a.tq, a.tk, a.tv};
  for (int i = 0; i < 6; ++i) {
    const int rows = i == 0 || i == 3 ? a.queries : a.keys;
    const cuuint64_t sizes[] = {cuuint64_t(a.D), cuuint64_t(rows), cuuint64_t(a.H), cuuint64_t(a.B)};
    const cuuint64_t strides[] = {cuuint64_t(2 * a.strides[i][2]), cuuint64_t(2 * a.strides[i][1]),
                                  cuuint64_t(2 * a.strides[i][0])};
    const cuuint32_t box[] = {L::PANEL, ROWS, 1, 1}, steps[] = {1, 1, 1, 1};
    const CUresult error = encode(
        maps[i], a.bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
        const_cast<void*>(data[i]), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        L::ROW_BYTES == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (error != CUDA_SUCCESS) return "cuTensorMapEncodeTiled refused a tensor";
  }
  p.o = static_cast<uint16_t*>(a.o), p.to = static_cast<uint16_t*>(a.to), p.lse = a.lse;
  p.o_b = a.strides[6][0], p.o_h = a.strides[6][1], p.o_n = a.strides[6][2];
  p.H = a.H, p.queries = a.queries, p.keys = a.keys, p.D = a.D;
  p.query_blocks = (a.queries + L::QUERIES - 1) / L::QUERIES;
  p.key_blocks = (a.keys + ROWS - 1) / ROWS;
  const int64_t heads = int64_t(a.B) * a.H;
  if (heads * p.query_blocks > INT32_MAX / 2) return "more query blocks than 2^30";
  // Whole heads, whose keys stay in shared memory for all their queries, if there are enough to fill the device.
  p.parts = L::WHOLE && p.key_blocks <= L::STAGES && heads >= a.blocks ? p.query_blocks : 1;
  p.items = heads * p.query_blocks / p.parts;
  p.scale_log2 = a.scale * 1.4426950408889634f;
  p.h_scale = a.scale * (a.bf16 ? 1.00281782f : 1.0f);  // 1 + 2^-8 / (2 ln 2), the mean loss of cutting off
  const int blocks = p.items < a.blocks ? p.items : a.blocks;
  const cudaError_t error = launch(jvp_attention_kernel<Element, L>, blocks, THREADS, L::BYTES, p, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class Element>
const char* attention(const SclightningAttention& a, Encode encode, void* stream) {
  if (a.D <= 64) return launch_attention<Element, Layout64>(a, encode, stream);
  if (a.D <= 72) return launch_attention<Element, Layout72>(a, encode, stream);
  if (a.D <= 128) return launch_attention<Element, Layout128>(a, encode, stream);
  return launch_attention<Element, Layout256>(a, encode, stream);
}

}  // namespace sclightning
