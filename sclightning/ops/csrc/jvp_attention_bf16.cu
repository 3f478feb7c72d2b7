#include "launch.cuh"

namespace sclightning {

const char* attention_bf16(const SclightningAttention& a, Encode encode, void* stream) {
  return attention<Bf16>(a, encode, stream);
}

const char* cosine_bf16(const SclightningCosine& a, Encode encode, void* stream) {
  return cosine<Bf16>(a, encode, stream);
}

}  // namespace sclightning
