// hopper.cuh on a CPU: the same functions in C++, after the PTX ISA, so that the kernels' own source runs without a GPU.
//
// Every thread of a block is a fiber; blocks run one after the other. What is asynchronous on the chip is made as nasty
// as the ISA allows, by seed: copies land at once, or only when nothing else can run, in any order; matrix products
// read their operands at once, or only when somebody waits for them. Beyond values, these are errors: a product that
// reads a tile with a copy in flight, a copy into a tile that an unfinished product reads, a product without a fence
// since the last wait, an arrival too many, a deadlock, work in flight at the end, misaligned tiles and tensors.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define SCLIGHTNING_HOPPER 1

// --- the little of CUDA's API that launch.cuh uses

enum cudaError_t { cudaSuccess, cudaErrorEmulation };
enum CUresult { CUDA_SUCCESS, CUDA_ERROR_INVALID_VALUE };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_64B = 64, CU_TENSOR_MAP_SWIZZLE_128B = 128 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };
constexpr int cudaEnableDefault = 0;
using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
struct float2 {
  float x, y;
};

struct alignas(128) CUtensorMap {
  const uint8_t* data;
  uint64_t sizes[4], strides[3];
  uint32_t box[4], swizzle;
};

namespace emulation {

constexpr int MAX_SHARED = 227 * 1024, BASE = 1024;  // the first KiB is the system's
constexpr int BLOCK = 512;                                // granularity of the checks of shared memory

struct Barrier {
  int expected = 0, pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;

  void settle() {
    if (pending == 0 && bytes == 0) ++phase, pending = expected;
  }
};

struct Copy {
  CUtensorMap map;
  int at[4];
  uint32_t to, barrier;
};

/// A matrix product of a warpgroup, which each of its 128 threads issues.
struct Product {
  uint64_t a = 0, b = 0;
  bool a_in_registers = false, k_major = true, accumulate = true, fp16 = false, done = false;
  int n = 0, issued = 0, finished = 0;
  float* d[128] = {};
  const uint32_t* registers[128] = {};
  std::set<int> blocks;
};

struct Warpgroup {
  std::deque<std::shared_ptr<Product>> products;  // in order of issue, from number ``first`` on
  int64_t first = 0;
};

struct Warp {
  uint32_t values[2][32];
  int arrived = 0;
  uint32_t generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(128 * 1024);
  bool done = false;
  std::function<bool()> ready;
  const char* waits_for = "";
  int64_t issued = 0;             // products
  std::vector<int64_t> groups;    // numbers of products at each commit that was not waited for
  int64_t retired = 0;
  bool fenced = false;
};

struct Machine {
  uint64_t seed = 0;
  bool late_copies = false, late_products = false;
  int broken = 0;  // for tests of this emulation

  std::mt19937_64 random;
  std::vector<uint8_t> shared;
  std::map<uint32_t, Barrier> barriers;
  std::vector<Copy> copies;
  std::map<int, int> writing, reading;       // operations in flight by block of shared memory
  std::map<int, std::set<int>> unfenced;     // threads that stored to a block without a fence since
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warpgroup> warpgroups;
  std::vector<Warp> warps;
  int block = 0, blocks = 0, current = 0, synced = 0;
  uint32_t sync_generation = 0;
  int64_t passed[2] = {}, waited[2][128] = {};  // turns
  ucontext_t scheduler;
  std::string failure;
  std::function<void()> body;

  Fiber& fiber() { return *fibers[current]; }

  [[noreturn]] void fail(const std::string& message) {
    failure = "thread " + std::to_string(current) + " of block " + std::to_string(block) + ": " + message;
    setcontext(&scheduler);
    std::abort();
  }
  void require(bool condition, const char* message) {
    if (!condition) fail(message);
  }

  void wait_until(const char* what, std::function<bool()> ready) {
    if (ready()) return;
    Fiber& f = fiber();
    f.ready = std::move(ready), f.waits_for = what;
    swapcontext(&f.context, &scheduler);
  }

  static uint32_t swizzle(uint32_t address, uint32_t span) {
    return address ^ ((address >> 7 & (span / 16 - 1)) << 4);
  }

  uint8_t* memory(uint32_t address, int bytes) {
    require(address >= BASE && address + bytes <= BASE + shared.size(), "shared memory is out of bounds");
    return &shared[address - BASE];
  }

  Barrier& barrier(uint32_t address) {
    require(barriers.count(address) == 1, "there is no barrier yet");
    return barriers[address];
  }

  void land(size_t i) {
    const Copy c = copies[i];
    copies.erase(copies.begin() + i);
    for (uint32_t row = 0; row < c.map.box[1]; ++row) {
      for (uint32_t column = 0; column < c.map.box[0]; ++column) {
        uint16_t value = 0;
        const int64_t at[4] = {int64_t(c.at[0]) + column, int64_t(c.at[1]) + row, c.at[2], c.at[3]};
        bool inside = true;
        for (int d = 0; d < 4; ++d) inside &= at[d] >= 0 && at[d] < int64_t(c.map.sizes[d]);
        if (inside) {
          const uint8_t* from = c.map.data + 2 * at[0];
          for (int d = 1; d < 4; ++d) from += at[d] * c.map.strides[d - 1];
          std::memcpy(&value, from, 2);
        }
        std::memcpy(memory(swizzle(c.to + (row * c.map.box[0] + column) * 2, c.map.swizzle), 2), &value, 2);
      }
    }
    const int bytes = c.map.box[0] * c.map.box[1] * 2;
    for (int b = c.to / BLOCK; b < int(c.to + bytes) / BLOCK; ++b) --writing[b];
    barriers[c.barrier].bytes -= bytes;
    barriers[c.barrier].settle();
  }

  // Where row (of A) or column (of B) ``i`` and ``k`` of an operand are: the canonical layouts of the PTX ISA.
  uint32_t locate(uint64_t descriptor, int i, int k, bool k_major) {
    const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
    const uint32_t stride = (descriptor >> 32 & 0x3fff) << 4, mode = descriptor >> 62;
    require(mode != 0 && (descriptor >> 49 & 7) == 0, "a descriptor is not of a swizzled tile at its start");
    const uint32_t span = 256 >> mode;
    require((start >> 7 & (span / 16 - 1)) == 0, "a descriptor does not start where its swizzle pattern does");
    const int wide = span / 2;
    const uint32_t address = k_major ? start + i / 8 * stride + i % 8 * span + k * 2
                                     : start + i / wide * leading + i % wide * 2 + k / 8 * stride + k % 8 * span;
    return swizzle(address, span);
  }

  static float number(uint16_t bits, bool fp16) {
    if (fp16) {
      _Float16 x;
      std::memcpy(&x, &bits, 2);
      return float(x);
    }
    const uint32_t wide = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  }

  void execute(Product& p) {
    if (p.done) return;
    p.done = true;
    const auto load = [&](uint64_t descriptor, int i, int k, bool k_major) {
      uint16_t bits;
      std::memcpy(&bits, memory(locate(descriptor, i, k, k_major), 2), 2);
      return number(bits, p.fp16);
    };
    std::vector<float> a(64 * 16), b(p.n * 16);
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < p.n; ++n) b[n * 16 + k] = load(p.b, n, k, p.k_major);
      for (int row = 0; row < 64; ++row) {
        if (p.a_in_registers) {
          const int thread = row / 16 * 32 + row % 8 * 4 + k % 8 / 2;
          const uint32_t pair = p.registers[thread][row % 16 / 8 + 2 * (k / 8)];
          a[row * 16 + k] = number(uint16_t(k % 2 ? pair >> 16 : pair), p.fp16);
        } else {
          a[row * 16 + k] = load(p.a, row, k, p.k_major);
        }
      }
    }
    for (int row = 0; row < 64; ++row) {
      for (int n = 0; n < p.n; ++n) {
        float& d = p.d[row / 16 * 32 + row % 8 * 4 + n % 8 / 2][n / 8 * 4 + row % 16 / 8 * 2 + n % 2];
        float sum = p.accumulate ? d : 0;
        for (int k = 0; k < 16; ++k) sum += a[row * 16 + k] * b[n * 16 + k];
        d = sum;
      }
    }
  }

  void issue(float* d, int n, const uint32_t* registers, uint64_t a, uint64_t b, bool k_major, bool accumulate,
             bool fp16) {
    Fiber& f = fiber();
    require(f.fenced, "wgmma without wgmma.fence since the last wait");
    Warpgroup& w = warpgroups[current / 128];
    if (f.issued == w.first + int64_t(w.products.size())) {
      auto p = std::make_shared<Product>();
      p->n = n, p->a = a, p->b = b, p->a_in_registers = registers, p->accumulate = accumulate, p->fp16 = fp16;
      p->k_major = k_major;
      for (int k = 0; k < 16; ++k) {
        for (int i = 0; i < n; ++i) p->blocks.insert(locate(b, i, k, k_major) / BLOCK);
        for (int i = 0; i < 64 && !registers; ++i) p->blocks.insert(locate(a, i, k, k_major) / BLOCK);
      }
      for (int block : p->blocks) {
        require(writing[block] == 0, "a matrix product reads a tile with a copy in flight");
        require(unfenced[block].empty(), "a matrix product reads what a thread stored without a fence");
        ++reading[block];
      }
      w.products.push_back(p);
    }
    Product& p = *w.products.at(f.issued++ - w.first);
    require(p.n == n && p.a == a && p.b == b && p.accumulate == accumulate, "a warpgroup's threads disagree");
    p.d[current % 128] = d, p.registers[current % 128] = registers;
    if (++p.issued == 128 && !late_products) execute(p);
  }

  void wait_products(int pending) {
    Fiber& f = fiber();
    f.fenced = false;
    if (int(f.groups.size()) <= pending) return;
    const int64_t target = f.groups[f.groups.size() - 1 - pending];
    f.groups.erase(f.groups.begin(), f.groups.end() - pending);
    Warpgroup& w = warpgroups[current / 128];
    wait_until("wgmma.wait_group", [&w, target] {
      for (int64_t i = w.first; i < target; ++i) {
        if (w.products[i - w.first]->issued < 128) return false;
      }
      return true;
    });
    for (; f.retired < target; ++f.retired) {
      Product& p = *w.products.at(f.retired - w.first);
      execute(p);
      if (++p.finished == 128) {
        for (int block : p.blocks) --reading[block];
      }
    }
    while (!w.products.empty() && w.products.front()->finished == 128) w.products.pop_front(), ++w.first;
  }

  uint32_t exchange(uint32_t value, int mask) {
    Warp& w = warps[current / 32];
    const uint32_t mine = w.generation;
    w.values[mine % 2][current % 32] = value;
    if (++w.arrived == 32) {
      w.arrived = 0, ++w.generation;
    } else {
      wait_until("shfl.sync", [&w, mine] { return w.generation != mine; });
    }
    return w.values[mine % 2][current % 32 ^ mask];
  }

  // bar.sync and bar.arrive of 128 threads each
  void pass_turn(int warpgroup) { ++passed[warpgroup]; }
  void wait_turn(int warpgroup) {
    const int64_t target = 128 * (++waited[warpgroup][current % 128]);
    wait_until("its turn", [this, warpgroup, target] {
      return passed[warpgroup] >= target && *std::min_element(waited[warpgroup], waited[warpgroup] + 128) * 128 >= target;
    });
  }

  void sync() {
    const uint32_t mine = sync_generation;
    if (++synced == int(fibers.size())) {
      synced = 0, ++sync_generation;
    } else {
      wait_until("bar.sync", [this, mine] { return sync_generation != mine; });
    }
  }

  static void enter();

  void run_block(int threads, int shared_bytes) {
    shared.assign(shared_bytes, 0xff);  // NaN until written
    barriers.clear(), copies.clear(), writing.clear(), reading.clear(), unfenced.clear();
    warpgroups.assign(threads / 128, {}), warps.assign(threads / 32, {});
    synced = 0;
    std::fill_n(passed, 2, 0), std::fill_n(waited[0], 256, 0);
    fibers.resize(threads);
    for (auto& f : fibers) {
      auto stack = f ? std::move(f->stack) : std::vector<char>(128 * 1024);
      f = std::make_unique<Fiber>();
      f->stack = std::move(stack);
      getcontext(&f->context);
      f->context.uc_stack.ss_sp = f->stack.data(), f->context.uc_stack.ss_size = f->stack.size();
      f->context.uc_link = &scheduler;
      makecontext(&f->context, &Machine::enter, 0);
    }
    std::vector<int> order(threads / 32);
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    const int slow = random() % order.size();  // one warp that seldom runs
    for (volatile bool progress = true; failure.empty();) {
      std::shuffle(order.begin(), order.end(), random);
      progress = false;
      bool all_done = true, skipped = false;
      for (volatile size_t o = 0; o < order.size(); o = o + 1) {
        const int warp = order[o];
        if (random() % 4 == 0 || (warp == slow && random() % 8)) {
          skipped = true, all_done = false;
          continue;
        }
        for (volatile int thread = warp * 32; thread < warp * 32 + 32; thread = thread + 1) {
          Fiber& f = *fibers[thread];
          if (f.done) continue;
          all_done = false;
          current = thread;
          if (f.ready && !f.ready()) continue;
          f.ready = nullptr;
          progress = true;
          swapcontext(&scheduler, &f.context);
          if (!failure.empty()) return;
        }
      }
      if (all_done) break;
      if (!copies.empty() && !late_copies) {
        while (!copies.empty() && random() % 4) land(random() % copies.size()), progress = true;
      }
      if (!progress && !skipped) {
        if (copies.empty()) fail_deadlock();
        else land(random() % copies.size());
      }
    }
    if (!failure.empty()) return;
    current = 0;
    for (auto& [address, barrier] : barriers) {
      if (barrier.bytes) failure = "a barrier still expects bytes at the end";
    }
    if (!copies.empty()) failure = "a copy is in flight at the end";
    for (auto& w : warpgroups) {
      if (!w.products.empty()) failure = "a matrix product is in flight at the end";
    }
  }

  void fail_deadlock() {
    std::map<std::string, int> reasons;
    for (auto& f : fibers) {
      if (!f->done) ++reasons[f->waits_for];
    }
    failure = "deadlock in block " + std::to_string(block) + ":";
    for (auto& [reason, count] : reasons) failure += " " + std::to_string(count) + " threads wait for " + reason + ";";
  }
};

inline Machine machine;

inline void Machine::enter() {
  machine.body();
  machine.fiber().done = true;
}

inline CUresult encode(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data, const cuuint64_t* sizes,
                       const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
                       CUtensorMapInterleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                       CUtensorMapFloatOOBfill) {
  *map = {};
  if (rank != 4 || reinterpret_cast<uintptr_t>(data) % 16 || box[0] * 2 != uint32_t(swizzle)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  for (int d = 0; d < 4; ++d) {
    if (sizes[d] == 0 || sizes[d] > uint64_t(1) << 32 || box[d] == 0 || box[d] > 256 || steps[d] != 1) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    if (d && (strides[d - 1] % 16 || strides[d - 1] >= uint64_t(1) << 40)) return CUDA_ERROR_INVALID_VALUE;
    map->sizes[d] = sizes[d], map->box[d] = box[d];
    if (d) map->strides[d - 1] = strides[d - 1];
  }
  map->data = static_cast<const uint8_t*>(data), map->swizzle = swizzle;
  return CUDA_SUCCESS;
}

}  // namespace emulation

inline const char* cudaGetErrorString(cudaError_t) { return emulation::machine.failure.c_str(); }

inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, int,
                                                    cudaDriverEntryPointQueryResult* found) {
  *found = cudaDriverEntryPointSuccess;
  *function = std::strcmp(name, "cuTensorMapEncodeTiled") ? nullptr : reinterpret_cast<void*>(&emulation::encode);
  return cudaSuccess;
}

// --- hopper.cuh

namespace sclightning {

struct Bf16 {};
struct Fp16 {};

inline unsigned thread_index() { return emulation::machine.current; }
inline int block_index() { return emulation::machine.block; }
inline int grid_size() { return emulation::machine.blocks; }
inline void sync_threads() { emulation::machine.sync(); }
inline void sync_warp() { emulation::machine.exchange(0, 0); }
inline uint32_t shared_base() { return emulation::BASE; }

inline uint32_t bits(float x) {
  uint32_t b;
  std::memcpy(&b, &x, 4);
  return b;
}
inline float from_bits(uint32_t b) {
  float x;
  std::memcpy(&x, &b, 4);
  return x;
}
inline uint32_t shuffle_xor(uint32_t x, int mask) { return emulation::machine.exchange(x, mask); }
inline float shuffle_xor(float x, int mask) { return from_bits(shuffle_xor(bits(x), mask)); }
inline bool any_of_warp(bool x) {
  uint32_t any = x;
  for (int mask = 1; mask < 32; mask *= 2) any |= shuffle_xor(any, mask);
  return any;
}
inline void wait_turn(int warpgroup) { emulation::machine.wait_turn(warpgroup); }
inline void pass_turn(int warpgroup) { emulation::machine.pass_turn(warpgroup); }
inline float exp2_approximate(float x) { return std::exp2(x); }
inline float log2_approximate(float x) { return std::log2(x); }
inline float reciprocal_approximate(float x) { return 1 / x; }
inline float sqrt_approximate(float x) { return std::sqrt(x); }

inline void store16(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  emulation::machine.require(reinterpret_cast<uintptr_t>(to) % 16 == 0, "a store of 16 bytes is not aligned");
  const uint32_t words[4] = {a, b, c, d};
  std::memcpy(to, words, 16);
}

inline void store8(void* to, uint32_t a, uint32_t b) {
  emulation::machine.require(reinterpret_cast<uintptr_t>(to) % 8 == 0, "a store of 8 bytes is not aligned");
  const uint32_t words[2] = {a, b};
  std::memcpy(to, words, 8);
}

inline uint8_t* touch_shared(uint32_t address) {
  auto& m = emulation::machine;
  m.require(address % 4 == 0, "a word of shared memory is not aligned");
  m.require(m.writing[address / emulation::BLOCK] == 0, "a thread touches a tile with a copy in flight");
  return m.memory(address, 4);
}
inline uint32_t load_shared(uint32_t address) {
  uint32_t x;
  std::memcpy(&x, touch_shared(address), 4);
  return x;
}
inline void store_shared(uint32_t address, uint32_t x) {
  auto& m = emulation::machine;
  m.require(m.reading[address / emulation::BLOCK] == 0, "a thread stores to a tile that an unfinished product reads");
  m.unfenced[address / emulation::BLOCK].insert(m.current);
  std::memcpy(touch_shared(address), &x, 4);
}
inline void proxy_fence() {
  for (auto& [block, threads] : emulation::machine.unfenced) threads.erase(emulation::machine.current);
}

/// Thread i has row i / 4, columns 2 (i % 4) and next, of the transposed matrix: two threads' halves.
inline uint32_t transpose_8x8(uint32_t x) {
  auto& m = emulation::machine;
  const int lane = m.current % 32;
  const uint32_t mine = m.exchange(x, 0);
  (void)mine;
  const auto& values = m.warps[m.current / 32].values[(m.warps[m.current / 32].generation - 1) % 2];
  const auto at = [&](int row, int column) { return values[row * 4 + column / 2] >> column % 2 * 16 & 0xffff; };
  const int row = lane / 4, column = lane % 4 * 2;
  return at(column, row) | at(column + 1, row) << 16;
}

inline uint32_t round_bf16(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint32_t b = bits(x);
  return (b + 0x7fff + (b >> 16 & 1)) >> 16;
}
inline uint32_t round_fp16(float x) {
  const _Float16 h = x;
  uint16_t b;
  std::memcpy(&b, &h, 2);
  return b;
}
inline uint32_t pack(Bf16, float low, float high) { return round_bf16(low) | round_bf16(high) << 16; }
inline uint32_t pack(Fp16, float low, float high) { return round_fp16(low) | round_fp16(high) << 16; }
inline float2 unpack(Bf16, uint32_t x) { return {from_bits(x << 16), from_bits(x & 0xffff0000u)}; }
inline float2 unpack(Fp16, uint32_t x) {
  return {emulation::Machine::number(uint16_t(x), true), emulation::Machine::number(uint16_t(x >> 16), true)};
}
inline uint32_t truncate_pair(float low, float high) { return bits(low) >> 16 | (bits(high) & 0xffff0000u); }
inline float truncate_bf16(float x) { return from_bits(bits(x) & 0xffff0000u); }

inline void barrier_init(uint32_t barrier, int arrivals) {
  auto& m = emulation::machine;
  m.require(barrier % 8 == 0 && m.barriers.count(barrier) == 0, "a barrier is misaligned or initialised twice");
  m.memory(barrier, 8);
  m.barriers[barrier].expected = m.barriers[barrier].pending = arrivals;
}
inline void barrier_init_fence() {}
inline void barrier_arrive_expect(uint32_t barrier, int bytes) {
  auto& b = emulation::machine.barrier(barrier);
  emulation::machine.require(b.pending > 0, "more arrivals than a barrier expects");
  b.bytes += bytes, --b.pending;
  b.settle();
}
inline void barrier_arrive(uint32_t barrier) { barrier_arrive_expect(barrier, 0); }
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  auto& b = emulation::machine.barrier(barrier);
  emulation::machine.wait_until("an mbarrier", [&b, parity] { return (b.phase & 1) != parity; });
}

inline void tensor_load(uint32_t to, const CUtensorMap* map, uint32_t barrier, int x, int y, int z, int w) {
  auto& m = emulation::machine;
  const int bytes = map->box[0] * map->box[1] * 2;
  m.require(map->box[2] == 1 && map->box[3] == 1 && bytes % emulation::BLOCK == 0, "the emulation moves 2D boxes");
  m.require(to % (8 * map->swizzle) == 0, "a box does not start where its swizzle pattern does");
  m.require(m.barriers.count(barrier) == 1, "a copy without a barrier");
  for (int b = to / emulation::BLOCK; b < int(to + bytes) / emulation::BLOCK; ++b) {
    m.require(m.reading[b] == 0, "a copy into a tile that an unfinished matrix product reads");
    m.require(m.writing[b] == 0, "two copies into one tile");
    m.require(m.unfenced[b].empty(), "a copy into what a thread stored without a fence");
    ++m.writing[b];
  }
  m.copies.push_back({*map, {x, y, z, w}, to, barrier});
  if (!m.late_copies && m.random() % 2) m.land(m.copies.size() - 1);
}

template <int COUNT>
void registers_increase() {}
template <int COUNT>
void registers_decrease() {}

inline void wgmma_fence() { emulation::machine.fiber().fenced = true; }
inline void wgmma_commit() {
  auto& f = emulation::machine.fiber();
  f.groups.push_back(f.issued);
}
template <int PENDING>
void wgmma_wait() {
  emulation::machine.wait_products(PENDING);
}
template <int COUNT>
void hold(float (&)[COUNT]) {}
template <class Integer>
Integer opaque(Integer x) {
  return x;
}

template <bool TRANSPOSED, class Element>
void wgmma_shared(Element, float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
  emulation::machine.issue(d, 64, nullptr, a, b, !TRANSPOSED, accumulate, std::is_same<Element, Fp16>::value);
}
template <bool N_MAJOR, class Element, int COUNT>
void wgmma_registers(Element, float (&d)[COUNT], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  emulation::machine.issue(d, 2 * COUNT, a, 0, b, !N_MAJOR, accumulate, std::is_same<Element, Fp16>::value);
}

template <class Parameters>
cudaError_t launch(void (*kernel)(Parameters), int blocks, int threads, int shared_bytes, const Parameters& parameters,
                   void*) {
  auto& m = emulation::machine;
  m.failure.clear();
  m.random.seed(m.seed);
  m.blocks = blocks;
  m.body = [&] { kernel(parameters); };
  if (shared_bytes > emulation::MAX_SHARED) m.failure = "more shared memory than a multiprocessor has";
  for (m.block = 0; m.block < blocks && m.failure.empty(); ++m.block) m.run_block(threads, shared_bytes);
  return m.failure.empty() ? cudaSuccess : cudaErrorEmulation;
}

}  // namespace sclightning
