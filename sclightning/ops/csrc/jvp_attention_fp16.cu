#include "launch.cuh"

namespace sclightning {

const char* attention_fp16(const SclightningAttention& a, Encode encode, void* stream) {
  return attention<Fp16>(a, encode, stream);
}

const char* cosine_fp16(const SclightningCosine& a, Encode encode, void* stream) {
  return cosine<Fp16>(a, encode, stream);
}

}  // namespace sclightning
