#include "launch.cuh"

#ifndef SCLIGHTNING_BUILD
#define SCLIGHTNING_BUILD "unknown"
#endif

namespace sclightning {

/// ``function`` with cuTensorMapEncodeTiled of the driver that is loaded. It is not linked to: the library must load where
/// there is none.
template <class Arguments>
const char* with_encode(const char* (*function)(const Arguments&, Encode, void*), const Arguments* arguments,
                        void* stream) {
  void* encode = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (found != cudaDriverEntryPointSuccess) return "the driver has no cuTensorMapEncodeTiled";
  return function(*arguments, reinterpret_cast<Encode>(encode), stream);
}

}  // namespace sclightning

const char* sclightning_build() { return SCLIGHTNING_BUILD; }

const char* sclightning_attention(const SclightningAttention* arguments, void* stream) {
  using namespace sclightning;
  return with_encode(arguments->bf16 ? attention_bf16 : attention_fp16, arguments, stream);
}

const char* sclightning_cosine(const SclightningCosine* arguments, void* stream) {
  using namespace sclightning;
  return with_encode(arguments->bf16 ? cosine_bf16 : cosine_fp16, arguments, stream);
}
