// The instructions of Hopper (sm_90a) that the kernels use, one function each and nothing else. tests/cuda_emulation
// has the same functions in C++, so the kernels run on a CPU too. Names follow the PTX ISA 8.x, section 9.7.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
#define SCLIGHTNING_HOPPER 1  // other architectures compile to kernels that trap; Python never launches them
#else
#define SCLIGHTNING_HOPPER 0
#endif

namespace sclightning {

struct Bf16 {};
struct Fp16 {};

__device__ inline unsigned thread_index() { return threadIdx.x; }
__device__ inline int block_index() { return blockIdx.x; }
__device__ inline int grid_size() { return gridDim.x; }
__device__ inline void sync_threads() { __syncthreads(); }
__device__ inline void sync_warp() { __syncwarp(); }

/// Address of the block's dynamic shared memory in the shared window, a multiple of 1024.
__device__ inline uint32_t shared_base() {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory));
}

__device__ inline float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
__device__ inline uint32_t shuffle_xor(uint32_t x, int mask) { return __shfl_xor_sync(~0u, x, mask); }

__device__ inline float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float log2_approximate(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float sqrt_approximate(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float reciprocal_approximate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline void store16(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  *static_cast<uint4*>(to) = make_uint4(a, b, c, d);
}

__device__ inline void store8(void* to, uint32_t a, uint32_t b) { *static_cast<uint2*>(to) = make_uint2(a, b); }

__device__ inline uint32_t load_shared(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}
__device__ inline void store_shared(uint32_t address, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
/// Lets the copy engine and the matrix unit see what this thread stored.
__device__ inline void proxy_fence() {
#if SCLIGHTNING_HOPPER
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

/// Transposes an 8 x 8 matrix of 16-bit numbers, of which thread i of a warp has row i / 4, columns 2 (i % 4) and next.
__device__ inline uint32_t transpose_8x8(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

/// Whether ``x`` is true in any thread of the warp.
__device__ inline bool any_of_warp(bool x) { return __any_sync(~0u, x); }

/// Named barriers of two warpgroups: who waits for its turn, and who gives it.
__device__ inline void wait_turn(int warpgroup) {
  asm volatile("bar.sync %0, 256;" ::"r"(warpgroup + 1) : "memory");
}
__device__ inline void pass_turn(int warpgroup) {
  asm volatile("bar.arrive %0, 256;" ::"r"(warpgroup + 1) : "memory");
}

/// Two numbers rounded to nearest, the first in the low half.
__device__ inline uint32_t pack(Bf16, float low, float high) {
  uint32_t x;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}
__device__ inline uint32_t pack(Fp16, float low, float high) {
  uint32_t x;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}

/// Both halves as float32.
__device__ inline float2 unpack(Bf16, uint32_t x) {
  return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
}
__device__ inline float2 unpack(Fp16, uint32_t x) { return __half22float2(*reinterpret_cast<__half2*>(&x)); }

/// Two numbers cut off to bf16: the upper halves of their bits in one instruction.
__device__ inline uint32_t truncate_pair(float low, float high) {
  return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
}
__device__ inline float truncate_bf16(float x) { return __uint_as_float(__float_as_uint(x) & 0xffff0000u); }

// --- mbarriers

__device__ inline void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

/// Makes the initialised barriers visible to the copy engine; sync_threads() makes them visible to the threads.
__device__ inline void barrier_init_fence() {
#if SCLIGHTNING_HOPPER
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ inline void barrier_arrive(uint32_t barrier) {
#if SCLIGHTNING_HOPPER
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}

/// One arrival, and ``bytes`` that copies must deliver before the phase completes.
__device__ inline void barrier_arrive_expect(uint32_t barrier, int bytes) {
#if SCLIGHTNING_HOPPER
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#endif
}

/// Waits until the phase of this parity has completed.
__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
#if SCLIGHTNING_HOPPER
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
#endif
}

// --- tensor copies (TMA)

/// Copies a box of a 4D tensor, from column x, row y of head z of batch w on, to shared memory.
__device__ inline void tensor_load(uint32_t to, const CUtensorMap* map, uint32_t barrier, int x, int y, int z, int w) {
#if SCLIGHTNING_HOPPER
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
#endif
}

// --- registers of a warpgroup

template <int COUNT>
__device__ inline void registers_increase() {
#if SCLIGHTNING_HOPPER
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}
template <int COUNT>
__device__ inline void registers_decrease() {
#if SCLIGHTNING_HOPPER
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

// --- matrix products of a warpgroup (wgmma)

__device__ inline void wgmma_fence() {
#if SCLIGHTNING_HOPPER
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ inline void wgmma_commit() {
#if SCLIGHTNING_HOPPER
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
/// Waits until at most PENDING committed groups are still running.
template <int PENDING>
__device__ inline void wgmma_wait() {
#if SCLIGHTNING_HOPPER
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#endif
}

/// Keeps the compiler from moving uses of these accumulators across the fence or wait next to it.
template <int COUNT>
__device__ inline void hold(float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

/// Keeps the compiler from computing what follows from ``x`` ahead of time, in registers that it then lacks.
template <class Integer>
__device__ Integer opaque(Integer x) {
  asm volatile("" : "+r"(x));
  return x;
}

#define D8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
                 "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define D32(d, i) D8(d, i), D8(d, i + 8), D8(d, i + 16), D8(d, i + 24)
#define R32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
            "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define R36 R32 ", %32, %33, %34, %35"
#define R64 R36 ", %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
            "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#if SCLIGHTNING_HOPPER
// D (64 x 64) = A B^T, plus D if ``accumulate``; A (64 x 16) and B (64 x 16) in shared memory, both K-major or TRANSPOSED.
#define PRODUCT(Element, TYPE)                                                                                  \
  template <bool TRANSPOSED>                                                                                    \
  __device__ inline void wgmma_shared(Element, float (&d)[32], uint64_t a, uint64_t b, int accumulate) {       \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                                  \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                                    \
                 " {" R32 "}, %32, %33, p, 1, 1, %35, %35;\n}"                                                  \
                 : D32(d, 0)                                                                                    \
                 : "l"(a), "l"(b), "r"(accumulate), "n"(int(TRANSPOSED)));                                      \
  }
PRODUCT(Bf16, "bf16")
PRODUCT(Fp16, "f16")
#undef PRODUCT

// D (64 x N) = A B, plus D if ``accumulate``; A (64 x 16) in registers, B (16 x N) in shared memory, N-major or K-major.
#define PRODUCT(Element, TYPE, N, REGISTERS, A0, A1, A2, A3, B, ACCUMULATE, MAJOR, ...)                         \
  template <bool N_MAJOR>                                                                                       \
  __device__ inline void wgmma_registers(Element, float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,        \
                                         int accumulate) {                                                      \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ACCUMULATE ", 0;\n"                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                                \
                 " {" REGISTERS "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " B ", p, 1, 1, " MAJOR ";\n}"            \
                 : __VA_ARGS__                                                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(int(N_MAJOR)));     \
  }
#define PRODUCTS(Element, TYPE)                                                                                 \
  PRODUCT(Element, TYPE, 64, R32, "%32", "%33", "%34", "%35", "%36", "%37", "%38", D32(d, 0))                   \
  PRODUCT(Element, TYPE, 72, R36, "%36", "%37", "%38", "%39", "%40", "%41", "%42", D32(d, 0), "+f"(d[32]),      \
          "+f"(d[33]), "+f"(d[34]), "+f"(d[35]))                                                                \
  PRODUCT(Element, TYPE, 128, R64, "%64", "%65", "%66", "%67", "%68", "%69", "%70", D32(d, 0), D32(d, 32))
PRODUCTS(Bf16, "bf16")
PRODUCTS(Fp16, "f16")
#undef PRODUCTS
#undef PRODUCT
#else
template <bool, class Element>
__device__ void wgmma_shared(Element, float (&)[32], uint64_t, uint64_t, int) {}
template <bool, class Element, int N>
__device__ void wgmma_registers(Element, float (&)[N], const uint32_t (&)[4], uint64_t, int) {}
#endif

#undef D8
#undef D32
#undef R32
#undef R36
#undef R64

// --- host side

/// Launches ``kernel(parameters)``.
template <class Parameters>
cudaError_t launch(void (*kernel)(Parameters), int blocks, int threads, int shared_bytes, const Parameters& parameters,
                   void* stream) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  void* arguments[] = {const_cast<Parameters*>(&parameters)};
  auto function = reinterpret_cast<const void*>(kernel);
  return cudaLaunchKernel(function, dim3(blocks), dim3(threads), arguments, shared_bytes, cudaStream_t(stream));
}

}  // namespace sclightning
