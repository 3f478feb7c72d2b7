#include "launch.cuh"

#ifndef SCLIGHTNING_BUILD
#define SCLIGHTNING_BUILD "unknown"
#endif

const char* sclightning_build() { return SCLIGHTNING_BUILD; }

const char* sclightning_attention(const SclightningAttention* a, void* stream) {
  // From the driver that is loaded, without linking to it: the library must load where there is none.
  void* encode = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (found != cudaDriverEntryPointSuccess) return "the driver has no cuTensorMapEncodeTiled";
  const auto launch = a->bf16 ? sclightning::attention_bf16 : sclightning::attention_fp16;
  return launch(*a, reinterpret_cast<sclightning::Encode>(encode), stream);
}
