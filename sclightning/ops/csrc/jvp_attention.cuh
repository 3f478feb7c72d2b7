// Attention and its tangent on Hopper: one pass over the keys, two accumulators (docs/jvp_attention.md, docs/cuda.md).
//
// A block is a warpgroup that copies and two that compute; for cosine attention one more, between them, that normalises.
// Up to 64 queries and keys a block is one warpgroup, which does all of it for one head.
// Letters as in triton/kernels.py: s scores, ts their tangent, p weights relative to the running maximum m, h = p ts;
// running sums l = sum p, r = sum h, o = sum p v, t = sum (h v + p tv). At the end O = o / l, dO = t / l - (r / l) O.
#pragma once

#ifdef SCLIGHTNING_EMULATION
#include "emulation.hpp"
#else
#include "hopper.cuh"
#endif

#include "interface.h"

namespace sclightning {

constexpr int ROWS = 64;  // queries of a warpgroup, keys of a step, rows of a box that the copy engine moves
constexpr int WARPGROUP = 128;

/// How head dimensions up to WIDTH are laid out. A tile is ROWS rows of q, k, v or a tangent in panels of PANEL columns,
/// each ROWS x PANEL with the rows' 16-byte chunks swizzled: 128-byte rows for 64 columns, 64-byte rows for 32.
/// COSINE: of the convolution's layout (heads, D, 3, N), so transposed, 64 channels by 64 positions, and normalised here.
/// SMALL: of no more than ROWS queries and keys, one block of each.
template <int WIDTH_, int PANEL_, int SPLIT_, int STAGES_, bool COSINE_ = false, bool SMALL_ = false>
struct Layout {
  static constexpr bool COSINE = COSINE_, SMALL = SMALL_;
  static constexpr int FIRST = COSINE ? 2 : 1;  // warpgroup that computes
  static constexpr int THREADS = SMALL ? WARPGROUP : (FIRST + 2) * WARPGROUP;
  static constexpr int BLOCKS = SMALL ? 4 : 1;  // on a multiprocessor
  static constexpr int WIDTH = WIDTH_;
  static constexpr int PANEL = PANEL_;
  static constexpr int SPLIT = SPLIT_;        // warpgroups that share the columns of the values
  static constexpr int STAGES = STAGES_;      // blocks of keys in shared memory
  static constexpr bool AHEAD = STAGES == 1 && !SMALL;  // whether k has a second tile, so that it is there a step earlier
  static constexpr bool WHOLE = STAGES > 2;   // whether a head's keys can stay there for all its queries
  static constexpr bool RESIDENT = WIDTH <= 72 && !COSINE && !SMALL;  // whether queries are multiplied from registers
  static constexpr int SLICES = (WIDTH + 15) / 16;          // products of 16 columns for a tile of scores
  static constexpr int N = WIDTH / SPLIT;     // columns of a warpgroup's accumulators
  static constexpr int GROUPS = SMALL ? 1 : 2 / SPLIT;  // warpgroups with queries of their own
  static constexpr int QUERIES = ROWS * GROUPS;
  static constexpr int PANELS = (WIDTH + PANEL - 1) / PANEL;
  static constexpr int ROW_BYTES = 2 * PANEL;
  static constexpr int PANEL_BYTES = ROWS * ROW_BYTES;
  static constexpr int TILE = PANELS * PANEL_BYTES;
  // Shared memory: q and tq of each group; k, tk, v and tv of each stage; the second k; the barriers.
  static constexpr int KEYS = 2 * GROUPS * TILE;
  static constexpr int BARRIERS = KEYS + (4 * STAGES + AHEAD) * TILE;
  static constexpr int BYTES = BARRIERS + 8 * (3 + 6 * STAGES + 6 * AHEAD);
};

using Layout64 = Layout<64, 64, 1, 6>;
using Layout64Small = Layout<64, 64, 1, 1, false, true>;
using Layout72 = Layout<72, 32, 1, 3>;
using Layout128 = Layout<128, 64, 1, 2>;
using Layout256 = Layout<256, 64, 2, 1>;  // 64 x 256 x 2 accumulators do not fit: two warpgroups take half each
using LayoutCosine = Layout<64, 64, 1, 6, true>;
using LayoutCosineSmall = Layout<64, 64, 1, 1, true, true>;

/// What a kernel gets, by value in constant memory. Strides are in elements.
struct Parameters {
  CUtensorMap q, tq, k, tk, v, tv;  // COSINE: all of them in q and tq
  uint16_t *o, *to;
  float* lse;
  int64_t o_b, o_h, o_n;  // COSINE: o_n is the stride of D, positions are contiguous
  int H, queries, keys, D;
  int query_blocks, key_blocks;
  int items;  // of work, in all
  int parts;  // query blocks of an item, which reads its keys once
  float scale_log2, h_scale;
  float root, eps;  // COSINE: 1 / sqrt(D) and what is added to the norm
};

template <class L>
__device__ int parts(const Parameters& p) {
  return L::WHOLE ? p.parts : 1;
}

template <class L>
struct Shared {
  uint32_t base;
  __device__ uint32_t q(int group) const { return base + 2 * group * L::TILE; }
  __device__ uint32_t tq(int group) const { return q(group) + L::TILE; }
  __device__ uint32_t k(int stage) const { return base + L::KEYS + 4 * stage * L::TILE; }
  __device__ uint32_t tk(int stage) const { return k(stage) + L::TILE; }
  __device__ uint32_t v(int stage) const { return k(stage) + 2 * L::TILE; }
  __device__ uint32_t tv(int stage) const { return k(stage) + 3 * L::TILE; }
  // AHEAD: the n-th tile of k, alternately; tv has barriers of its own.
  __device__ uint32_t k_ahead(int n) const { return n % 2 ? k(1) : k(0); }
  __device__ uint32_t k_ahead_full(int n) const { return k_full(1) + 16 * (n % 2); }
  __device__ uint32_t k_ahead_empty(int n) const { return k_ahead_full(n) + 8; }
  __device__ uint32_t tv_full() const { return k_full(1) + 32; }
  __device__ uint32_t tv_empty() const { return tv_full() + 8; }
  // Full: the copies of a tile pair have arrived. Ready: they are what is multiplied. Empty: no longer needed.
  __device__ uint32_t q_full() const { return base + L::BARRIERS; }
  __device__ uint32_t q_empty() const { return q_full() + 8; }
  __device__ uint32_t q_ready() const { return L::COSINE ? q_full() + 16 : q_full(); }
  __device__ uint32_t k_full(int stage) const { return q_full() + 24 + 48 * stage; }
  __device__ uint32_t k_empty(int stage) const { return k_full(stage) + 8; }
  __device__ uint32_t k_ready(int stage) const { return L::COSINE ? k_full(stage) + 16 : k_full(stage); }
  __device__ uint32_t v_full(int stage) const { return k_full(stage) + 24; }
  __device__ uint32_t v_empty(int stage) const { return v_full(stage) + 8; }
  __device__ uint32_t v_ready(int stage) const { return L::COSINE ? v_full(stage) + 16 : v_full(stage); }
};

/// Copies a tile, rows from ``row`` on of one head; rows and columns beyond the tensor arrive as zeros.
/// COSINE: positions from ``row`` on; ``which`` is 0 for q, 1 for k, 2 for v.
template <class L>
__device__ void load(uint32_t to, const CUtensorMap& from, uint32_t full, int row, const Parameters& p, int head,
                     int which) {
  for (int panel = 0; panel < L::PANELS; ++panel, to += L::PANEL_BYTES) {
    if (L::COSINE) {
      tensor_load(to, &from, full, row, 0, which, head);
    } else {
      tensor_load(to, &from, full, panel * L::PANEL, row, head % p.H, head / p.H);
    }
  }
}

/// Copies x and its tangent.
template <class L>
__device__ void load_pair(uint32_t to, const CUtensorMap& x, const CUtensorMap& tx, uint32_t full, int row,
                          const Parameters& p, int head, int which) {
  load<L>(to, L::COSINE ? p.q : x, full, row, p, head, which);
  load<L>(to + L::TILE, L::COSINE ? p.tq : tx, full, row, p, head, which);
}

/// One thread: keys and values of all items of this block, as far ahead as there are stages.
template <class L>
__device__ void copy_keys(const Parameters& p, Shared<L> shared) {
  int n = 0;  // stages are used in turn: the n-th block of keys goes to n % STAGES, in phase n / STAGES of its barriers
  for (int item = block_index(); item < p.items; item += grid_size()) {
    for (int j = 0; j < p.key_blocks; ++j, ++n) {
      const int head = item * parts<L>(p) / p.query_blocks, row = j * ROWS;
      const int stage = n % L::STAGES;
      const uint32_t parity = n / L::STAGES & 1;
      barrier_wait(shared.k_empty(stage), parity ^ 1);  // a new barrier counts as having completed parity 1
      if constexpr (L::AHEAD) {
        barrier_arrive_expect(shared.k_full(stage), L::TILE);
        load<L>(shared.tk(stage), p.tk, shared.k_full(stage), row, p, head, 1);
        barrier_wait(shared.tv_empty(), parity ^ 1);
        barrier_arrive_expect(shared.tv_full(), L::TILE);
        load<L>(shared.tv(stage), p.tv, shared.tv_full(), row, p, head, 2);
        barrier_wait(shared.v_empty(stage), parity ^ 1);
        barrier_arrive_expect(shared.v_full(stage), L::TILE);
        load<L>(shared.v(stage), p.v, shared.v_full(stage), row, p, head, 2);
      } else {
        barrier_arrive_expect(shared.k_full(stage), 2 * L::TILE);
        load_pair<L>(shared.k(stage), p.k, p.tk, shared.k_full(stage), row, p, head, 1);
        barrier_wait(shared.v_empty(stage), parity ^ 1);
        barrier_arrive_expect(shared.v_full(stage), 2 * L::TILE);
        load_pair<L>(shared.v(stage), p.v, p.tv, shared.v_full(stage), row, p, head, 2);
      }
    }
  }
}

/// AHEAD: k itself, by one thread of another warp.
template <class L>
__device__ void copy_keys_ahead(const Parameters& p, Shared<L> shared) {
  int n = 0;
  for (int item = block_index(); item < p.items; item += grid_size()) {
    for (int j = 0; j < p.key_blocks; ++j, ++n) {
      barrier_wait(shared.k_ahead_empty(n), (n / 2 & 1) ^ 1);
      barrier_arrive_expect(shared.k_ahead_full(n), L::TILE);
      load<L>(shared.k_ahead(n), p.k, shared.k_ahead_full(n), j * ROWS, p, item * parts<L>(p) / p.query_blocks, 1);
    }
  }
}

/// One thread of another warp: the queries, which would hold up the keys of the next item.
template <class L>
__device__ void copy_queries(const Parameters& p, Shared<L> shared) {
  int n = 0;
  for (int item = block_index(); item < p.items; item += grid_size()) {
    for (int part = 0; part < parts<L>(p); ++part, ++n) {
      const int index = item * parts<L>(p) + part;
      const int head = index / p.query_blocks, row = index % p.query_blocks * L::QUERIES;
      barrier_wait(shared.q_empty(), (n & 1) ^ 1);
      barrier_arrive_expect(shared.q_full(), 2 * L::GROUPS * L::TILE);
      for (int group = 0; group < L::GROUPS; ++group) {
        load_pair<L>(shared.q(group), p.q, p.tq, shared.q_full(), row + group * ROWS, p, head, 0);
      }
    }
  }
}

/// Pixel norm of a tile and its tangent, in place: y = x / n, n = eps + |x| / sqrt(D), ty = (tx - y tn) / n for each of 64
/// positions. A warp has 16 of them: thread i two neighbours and every fourth pair of channels, which makes the 32
/// words of each step lie in 32 banks. Products read the result, hence the fence.
template <class Element, class L>
__device__ void normalise(const Parameters& p, uint32_t tile) {
  constexpr int CHANNELS = L::WIDTH / 4;
  const int place = thread_index() % WARPGROUP, column = place / 32 * 32 + place % 8 * 4, row = place % 32 / 8 * 2;
  const uint32_t even = tile + row * L::ROW_BYTES + (column ^ row * 16);
  const uint32_t odd = tile + (row + 1) * L::ROW_BYTES + (column ^ (row + 1) * 16);
  const auto at = [&](int i) { return (i % 2 ? odd : even) + i / 2 * 8 * L::ROW_BYTES; };
  uint32_t x[CHANNELS], tx[CHANNELS];
  float xx[2] = {0, 0}, xt[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < CHANNELS; ++i) {
    x[i] = load_shared(at(i)), tx[i] = load_shared(at(i) + L::TILE);
    const float2 a = unpack(Element{}, x[i]), ta = unpack(Element{}, tx[i]);
    xx[0] += a.x * a.x, xx[1] += a.y * a.y, xt[0] += a.x * ta.x, xt[1] += a.y * ta.y;
  }
  float inverse[2], tn[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    for (int mask = 8; mask < 32; mask *= 2) xx[i] += shuffle_xor(xx[i], mask), xt[i] += shuffle_xor(xt[i], mask);
    const float length = sqrt_approximate(xx[i]);
    inverse[i] = reciprocal_approximate(p.eps + p.root * length);
    tn[i] = p.root * xt[i] * reciprocal_approximate(fmaxf(length, 1e-30f));
  }
#pragma unroll
  for (int i = 0; i < CHANNELS; ++i) {
    const float2 a = unpack(Element{}, x[i]), ta = unpack(Element{}, tx[i]);
    const float y0 = a.x * inverse[0], y1 = a.y * inverse[1];
    store_shared(at(i), pack(Element{}, y0, y1));
    store_shared(at(i) + L::TILE, pack(Element{}, (ta.x - y0 * tn[0]) * inverse[0], (ta.y - y1 * tn[1]) * inverse[1]));
  }
  proxy_fence();
}

/// A warpgroup between the copies and the products of cosine attention. It takes the first keys of an item before the
/// queries, which arrive later.
template <class Element, class L>
__device__ void normalise_all(const Parameters& p, Shared<L> shared) {
  int keys = 0, queries = 0;
  const auto normalise_keys = [&] {
    const int stage = keys % L::STAGES;
    const uint32_t parity = keys++ / L::STAGES & 1;
    barrier_wait(shared.k_full(stage), parity);
    normalise<Element, L>(p, shared.k(stage));
    barrier_arrive(shared.k_ready(stage));
    barrier_wait(shared.v_full(stage), parity);
    normalise<Element, L>(p, shared.v(stage));
    barrier_arrive(shared.v_ready(stage));
  };
  for (int item = block_index(); item < p.items; item += grid_size()) {
    normalise_keys();
    for (int part = 0; part < parts<L>(p); ++part) {
      barrier_wait(shared.q_full(), queries++ & 1);
      for (int group = 0; group < L::GROUPS; ++group) normalise<Element, L>(p, shared.q(group));
      barrier_arrive(shared.q_ready());
      for (int j = 1; j < p.key_blocks && part == 0; ++j) normalise_keys();
    }
  }
}

/// Matrix descriptor of a swizzled tile (PTX ISA, "Matrix descriptor format"), without its address: ``leading`` bytes
/// from one panel to the next (N-major only), and 8 rows from one group of 8 rows to the next.
template <class L>
__device__ constexpr uint64_t descriptor(int leading) {
  const uint64_t swizzle = L::ROW_BYTES == 128 ? 1 : 2;
  return swizzle << 62 | uint64_t(8 * L::ROW_BYTES >> 4) << 32 | uint64_t(leading >> 4) << 16;
}
__device__ inline uint64_t at(uint64_t descriptor, uint32_t address) {
  return descriptor | (address & 0x3ffff) >> 4;
}

/// Where the i-th 16 columns of a tile start: 32 bytes further in the swizzled rows; transposed, 16 rows.
template <class L>
__device__ constexpr uint32_t slice(int i) {
  constexpr int PER_PANEL = L::PANEL / 16;
  return L::COSINE ? i * 16 * L::ROW_BYTES : i / PER_PANEL * L::PANEL_BYTES + i % PER_PANEL * 32;
}

/// Issues d (64 x 64) = x y^T, or += if ``accumulate``, of two tiles.
template <class Element, class L>
__device__ void multiply_tiles(float (&d)[32], uint32_t x, uint32_t y, bool accumulate) {
#pragma unroll
  for (int i = 0; i < L::SLICES; ++i) {
    wgmma_shared<L::COSINE>(Element{}, d, at(descriptor<L>(16), x + slice<L>(i)), at(descriptor<L>(16), y + slice<L>(i)),
                            accumulate || i > 0);
  }
}

/// Likewise with x in registers, which halves what the matrix unit reads from shared memory.
template <class Element, class L>
__device__ void multiply_tiles(float (&d)[32], const uint32_t (&x)[L::SLICES][4], uint32_t y, bool accumulate) {
#pragma unroll
  for (int i = 0; i < L::SLICES; ++i) {
    wgmma_registers<false>(Element{}, d, x[i], at(descriptor<L>(16), y + slice<L>(i)), accumulate || i > 0);
  }
}

/// Loads a tile as the left operand: of each 16 columns, thread i of a warp has rows i / 4 and 8 below, columns 2 (i % 4),
/// the next, and 8 to the right.
template <class L>
__device__ void load_tile(uint32_t (&x)[L::SLICES][4], uint32_t tile) {
  const int lane = thread_index() % 32, row0 = thread_index() % WARPGROUP / 32 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < L::SLICES; ++i) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t offset = slice<L>(i) + (row0 + k % 2 * 8) * L::ROW_BYTES + k / 2 * 16 + lane % 4 * 4;
      x[i][k] = load_shared(tile + (offset ^ (offset >> 7 & (L::ROW_BYTES / 16 - 1)) << 4));
    }
  }
}

/// Issues d (64 x N) = x y, or += if ``accumulate``: x (64 x 64) in registers, y the tile from column panel ``panel`` on.
template <class Element, class L>
__device__ void multiply_registers(float (&d)[L::N / 2], const uint32_t (&x)[4][4], uint32_t y, int panel,
                                   bool accumulate = true) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t offset = L::COSINE ? i * 32 : panel * L::PANEL_BYTES + i * 16 * L::ROW_BYTES;
    wgmma_registers<!L::COSINE>(Element{}, d, x[i], at(descriptor<L>(L::PANEL_BYTES), y + offset),
                                 accumulate || i > 0);
  }
}

/// Sum or maximum over the four threads that hold a row of an accumulator.
__device__ inline float row_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}
__device__ inline float row_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}

/// h = p ts as the matrix unit gets it, and what it adds to the row's sum: rounded, so that a row with one large weight
/// cancels exactly. bf16 is cut off, in one instruction for two; h_scale makes good the mean loss.
__device__ inline uint32_t pack_h(Bf16, float low, float high, float& r) {
  r += truncate_bf16(low) + truncate_bf16(high);
  return truncate_pair(low, high);
}
__device__ inline uint32_t pack_h(Fp16, float low, float high, float& r) {
  const uint32_t packed = pack(Fp16{}, low, high);
  const float2 rounded = unpack(Fp16{}, packed);
  r += rounded.x + rounded.y;
  return packed;
}
__device__ constexpr float shift(Bf16) { return 0.0f; }
__device__ constexpr float shift(Fp16) { return 6.0f; }  // keeps small tangents out of the subnormal numbers

/// Transposes 4 x 4 words over four neighbouring threads: thread i ends with the i-th word of each, in their order.
__device__ inline void transpose(uint32_t (&x)[4], int thread) {
  const bool odd = thread & 1, high = thread & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t y = shuffle_xor(odd ? x[i] : x[i + 1], 1);
    (odd ? x[i] : x[i + 1]) = y;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t y = shuffle_xor(high ? x[i] : x[i + 2], 2);
    (high ? x[i] : x[i + 2]) = y;
  }
}

/// Stores 8 x 32 columns at a time: the columns of a thread lie apart, so four threads exchange them for 16 bytes each.
template <class Element, class L, class Value>
__device__ void store_row(uint16_t* row, bool valid, int column, int D, int thread, Value value) {
#pragma unroll
  for (int n = 0; n < L::N / 8; n += 4) {
    uint32_t x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i] = n + i < L::N / 8 ? pack(Element{}, value(4 * (n + i)), value(4 * (n + i) + 1)) : 0;
    }
    transpose(x, thread);
    const int mine = 8 * (n + thread);
    if (valid && mine < L::N && column + mine < D) store16(row + column + mine, x[0], x[1], x[2], x[3]);
  }
}

/// Stores 16 positions x all channels, positions being contiguous: 8 x 8 numbers at a time are transposed over the warp, and
/// neighbouring threads exchange words, so that four of them fill a sector of 32 bytes.
template <class Element, class L, class Value>
__device__ void store_columns(uint16_t* to, int64_t stride, int position, int positions, int D, int lane, Value value) {
  const bool odd = lane & 1;
  const int mine = position + (odd ? 8 : 0) + lane % 4 / 2 * 4;  // positions are a multiple of 8
#pragma unroll
  for (int n = 0; n < L::N / 8; ++n) {
    const uint32_t x0 = transpose_8x8(pack(Element{}, value(0, 4 * n), value(0, 4 * n + 1)));
    const uint32_t x1 = transpose_8x8(pack(Element{}, value(1, 4 * n), value(1, 4 * n + 1)));
    const uint32_t other = shuffle_xor(odd ? x0 : x1, 1);
    const int channel = 8 * n + lane / 4;
    if (mine < positions && channel < D) store8(to + channel * stride + mine, odd ? other : x0, odd ? x1 : other);
  }
}

/// Scores become weights, relative to the maximum so far of their rows, which moves: sums are to be rescaled by ``alpha`` if
/// the result is true.
template <class Element>
__device__ bool weigh(const Parameters& p, float (&s)[32], int keys, float (&m)[2], float (&l)[2], float (&r)[2],
                      float (&alpha)[2], uint32_t (&weights)[4][4]) {
  const int lane = thread_index() % 32;
  bool rescale = false;
  if (keys < ROWS) {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      if (i / 4 * 8 + lane % 4 * 2 + i % 2 >= keys) s[i] = -INFINITY;
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = s[2 * half];
#pragma unroll
    for (int n = 0; n < 8; ++n) top = fmaxf(top, fmaxf(s[4 * n + 2 * half], s[4 * n + 2 * half + 1]));
    const float m_new = fmaxf(m[half], row_max(top) * p.scale_log2 - shift(Element{}));
    alpha[half] = exp2_approximate(m[half] - m_new);
    rescale |= m[half] != m_new;
    m[half] = m_new;
    l[half] *= alpha[half];
    r[half] *= alpha[half];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      float &low = s[4 * n + 2 * half], &high = s[4 * n + 2 * half + 1];
      low = exp2_approximate(low * p.scale_log2 - m_new);
      high = exp2_approximate(high * p.scale_log2 - m_new);
      l[half] += low + high;
    }
  }
  hold(s);  // not packed before, in registers that are lacking
#pragma unroll
  for (int i = 0; i < 32; i += 2) weights[i / 8][i / 2 % 4] = pack(Element{}, s[i], s[i + 1]);
  return rescale;
}

/// h of weights and the scores' tangents.
template <class Element>
__device__ void weigh_tangents(const Parameters& p, const float (&weights)[32], const float (&ts)[32], float (&r)[2],
                               uint32_t (&h)[4][4]) {
#pragma unroll
  for (int i = 0; i < 32; i += 2) {
    const float low = weights[i] * (ts[i] * p.h_scale), high = weights[i + 1] * (ts[i + 1] * p.h_scale);
    h[i / 8][i / 2 % 4] = pack_h(Element{}, low, high, r[i / 2 % 2]);
  }
}

/// Output, its tangent and the log-sum-exp of a warpgroup's queries, from row ``first`` of their head on.
template <class Element, class L>
__device__ void store(const Parameters& p, const float (&o)[L::N / 2], const float (&t)[L::N / 2], const float (&m)[2],
                      const float (&l)[2], const float (&r)[2], int head, int first, int panel) {
  const int place = opaque(thread_index()), lane = place % 32, thread = lane % 4;
  const int top = first + place % WARPGROUP / 32 * 16;  // row of the warp
  const int64_t offset = head / p.H * p.o_b + head % p.H * p.o_h;
  float inverse[2], mu[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = top + lane / 4 + 8 * half;
    const float sum = row_sum(l[half]);
    inverse[half] = reciprocal_approximate(sum);
    mu[half] = row_sum(r[half]) * inverse[half];
    if (thread == 0 && panel == 0 && row < p.queries) {
      p.lse[int64_t(head) * p.queries + row] = (m[half] + log2_approximate(sum)) * 0.6931471805599453f;
    }
  }
  const auto y = [&](int half, int i) { return o[i + 2 * half] * inverse[half]; };
  const auto ty = [&](int half, int i) { return t[i + 2 * half] * inverse[half] - mu[half] * y(half, i); };
  if constexpr (L::COSINE) {
    store_columns<Element, L>(p.o + offset, p.o_n, top, p.queries, p.D, lane, y);
    store_columns<Element, L>(p.to + offset, p.o_n, top, p.queries, p.D, lane, ty);
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = top + lane / 4 + 8 * half, column = panel * L::PANEL;
      const int64_t to = offset + row * p.o_n;
      store_row<Element, L>(p.o + to, row < p.queries, column, p.D, thread, [&](int i) { return y(half, i); });
      store_row<Element, L>(p.to + to, row < p.queries, column, p.D, thread, [&](int i) { return ty(half, i); });
    }
  }
}

/// A computing warpgroup. In its accumulators, thread ``lane`` of warp ``warp`` holds rows 16 warp + lane / 4 and 8 rows
/// below, columns 8 n + 2 (lane % 4) and the next: elements 4 n to 4 n + 3.
template <class Element, class L>
__device__ void compute(const Parameters& p, Shared<L> shared, int warpgroup) {
  const int lane = thread_index() % 32;
  const int group = L::SPLIT == 1 ? warpgroup : 0;
  const int panel = L::SPLIT == 1 ? 0 : warpgroup * (L::PANELS / 2);
  if (warpgroup == 1) pass_turn(0);
  for (int visit = 0, item; (item = block_index() + visit * grid_size()) < p.items; ++visit) {
    for (int part = 0; part < parts<L>(p); ++part) {
      const bool last_part = part == parts<L>(p) - 1;
      float o[L::N / 2], t[L::N / 2], m[2], l[2] = {0, 0}, r[2] = {0, 0};
#pragma unroll
      for (int i = 0; i < L::N / 2; ++i) o[i] = t[i] = 0;
      m[0] = m[1] = -INFINITY;
      barrier_wait(shared.q_ready(), (visit * parts<L>(p) + part) & 1);
      uint32_t q[L::SLICES][4], tq[L::SLICES][4];
      if constexpr (L::RESIDENT) {
        load_tile<L>(q, shared.q(group)), load_tile<L>(tq, shared.tq(group));
        sync_warp();
        if (lane == 0) barrier_arrive(shared.q_empty());
      }
      const auto multiply_queries = [&](float (&d)[32], bool tangent, uint32_t y, bool accumulate) {
        if constexpr (L::RESIDENT) {
          multiply_tiles<Element, L>(d, tangent ? tq : q, y, accumulate);
        } else {
          multiply_tiles<Element, L>(d, tangent ? shared.tq(group) : shared.q(group), y, accumulate);
        }
      };

      for (int j = 0; j < p.key_blocks; ++j) {
        const int n = visit * p.key_blocks + j, stage = opaque(n % L::STAGES);  // the same for all parts of an item
        const uint32_t parity = n / L::STAGES & 1;
        const int keys = p.keys - j * ROWS;  // that are left
        float s[32], ts[32];
        wait_turn(warpgroup);
        const uint32_t k = L::AHEAD ? shared.k_ahead(n) : shared.k(stage);
        barrier_wait(L::AHEAD ? shared.k_ahead_full(n) : shared.k_ready(stage), L::AHEAD ? n / 2 & 1 : parity);
        wgmma_fence();
        multiply_queries(s, false, k, false);
        wgmma_commit();
        multiply_queries(ts, true, k, false);
        if (L::AHEAD) {
          barrier_wait(shared.k_ready(stage), parity);
          wgmma_fence();
        }
        multiply_queries(ts, false, shared.tk(stage), true);
        wgmma_commit();
        pass_turn(1 - warpgroup);
        wgmma_wait<1>();
        hold(s);

        float alpha[2];
        uint32_t weights[4][4];
        const bool rescale = weigh<Element>(p, s, keys, m, l, r, alpha, weights);
        if (any_of_warp(rescale)) {
#pragma unroll
          for (int i = 0; i < L::N / 2; ++i) o[i] *= alpha[i / 2 % 2], t[i] *= alpha[i / 2 % 2];
        }

        barrier_wait(shared.v_ready(stage), parity);
        if (L::AHEAD) barrier_wait(shared.tv_full(), parity);
        hold(o), hold(t);
        wgmma_fence();
        multiply_registers<Element, L>(o, weights, shared.v(stage), panel);
        multiply_registers<Element, L>(t, weights, shared.tv(stage), panel);
        wgmma_commit();
        wgmma_wait<1>();  // for ts, while those run
        hold(ts);
        if (lane == 0) {
          if (last_part) barrier_arrive(shared.k_empty(stage));
          if (L::AHEAD) barrier_arrive(shared.k_ahead_empty(n));
          if (!L::RESIDENT && j == p.key_blocks - 1) barrier_arrive(shared.q_empty());
        }
        uint32_t h[4][4];
        weigh_tangents<Element>(p, s, ts, r, h);
        if constexpr (L::AHEAD) {  // tv is needed no longer, v is
          wgmma_wait<0>();
          hold(o), hold(t);
          if (lane == 0) barrier_arrive(shared.tv_empty());
        }
        wgmma_fence();
        multiply_registers<Element, L>(t, h, shared.v(stage), panel);
        wgmma_commit();
        wgmma_wait<0>();
        hold(o), hold(t);
        if (lane == 0 && last_part) barrier_arrive(shared.v_empty(stage));
      }
      if constexpr (L::RESIDENT) {
        // Never run. Without it ptxas 13.0 gives h registers of q and tq, which the next round reads.
        if (p.D < 0) {
          for (int i = 0; i < L::SLICES; ++i) {
            store16(p.o + 16 * i, q[i][0], q[i][1], q[i][2], q[i][3]);
            store16(p.o + 16 * i + 8, tq[i][0], tq[i][1], tq[i][2], tq[i][3]);
          }
        }
      }

      const int index = item * parts<L>(p) + part;
      store<Element, L>(p, o, t, m, l, r, index / p.query_blocks, index % p.query_blocks * L::QUERIES + group * ROWS, panel);
    }
  }
}

template <class Element, class L>
__global__ void __launch_bounds__(L::THREADS, 1) jvp_attention_kernel(const __grid_constant__ Parameters p) {
#if SCLIGHTNING_HOPPER
  const Shared<L> shared{shared_base()};
  if (thread_index() == 0) {
    constexpr int WARPS = 8;  // that compute, each of which says for itself that it is done
    const auto init = [](uint32_t full, uint32_t ready, uint32_t empty) {
      barrier_init(full, 1);
      if (L::COSINE) barrier_init(ready, WARPGROUP);
      barrier_init(empty, WARPS);
    };
    init(shared.q_full(), shared.q_ready(), shared.q_empty());
    for (int stage = 0; stage < L::STAGES; ++stage) {
      init(shared.k_full(stage), shared.k_ready(stage), shared.k_empty(stage));
      init(shared.v_full(stage), shared.v_ready(stage), shared.v_empty(stage));
    }
    if constexpr (L::AHEAD) {
      for (int n = 0; n < 2; ++n) init(shared.k_ahead_full(n), 0, shared.k_ahead_empty(n));
      init(shared.tv_full(), 0, shared.tv_empty());
    }
    barrier_init_fence();
  }
  sync_threads();
  const int warpgroup = thread_index() / WARPGROUP;
  if (warpgroup == 0) {  // 128 x 24 + 256 x 240 registers are the 384 x 168 of the launch
    registers_decrease<24>();
    if (thread_index() == 0) copy_keys<L>(p, shared);
    if (thread_index() == 32) copy_queries<L>(p, shared);
    if constexpr (L::AHEAD) {
      if (thread_index() == 64) copy_keys_ahead<L>(p, shared);
    }
  } else if (warpgroup < L::FIRST) {  // and 128 x 24 + 128 x 88 + 256 x 200 the 512 x 128
    registers_decrease<88>();
    if constexpr (L::COSINE) normalise_all<Element, L>(p, shared);
  } else {
    registers_increase<L::COSINE ? 200 : 240>();
    compute<Element, L>(p, shared, warpgroup - L::FIRST);
  }
#else
  __trap();
#endif
}

/// One warpgroup for one head of up to ROWS queries and keys at a time: there is nothing to pipeline in a head, so several of
/// these blocks share a multiprocessor, and while one waits for its copies another multiplies. Each begins the copies of its
/// next head as soon as the tiles are free.
template <class Element, class L>
__global__ void __launch_bounds__(L::THREADS, L::BLOCKS) jvp_attention_small_kernel(const __grid_constant__ Parameters p) {
#if SCLIGHTNING_HOPPER
  const Shared<L> shared{shared_base()};
  const auto copy = [&](uint32_t full, uint32_t to, const CUtensorMap& x, const CUtensorMap& tx, int head, int which) {
    barrier_arrive_expect(full, 2 * L::TILE);
    load_pair<L>(to, x, tx, full, 0, p, head, which);
  };
  const auto copy_scores = [&](int head) {
    copy(shared.q_full(), shared.q(0), p.q, p.tq, head, 0);
    copy(shared.k_full(0), shared.k(0), p.k, p.tk, head, 1);
  };
  const auto copy_values = [&](int head) { copy(shared.v_full(0), shared.v(0), p.v, p.tv, head, 2); };
  if (thread_index() == 0) {
    for (uint32_t full : {shared.q_full(), shared.k_full(0), shared.v_full(0)}) barrier_init(full, 1);
    barrier_init_fence();
    copy_scores(block_index());
    copy_values(block_index());
  }
  sync_threads();
  uint32_t parity = 0;
  for (int head = block_index(); head < p.items; head += grid_size(), parity ^= 1) {
    const bool copies_next = thread_index() == 0 && head + grid_size() < p.items;
    float s[32], ts[32], m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0}, r[2] = {0, 0}, alpha[2];
    if constexpr (L::COSINE) {  // of the values too before there are scores, whose registers the norm has
#pragma unroll 1
      for (int i = 0; i < 3; ++i) {  // queries, keys, values: tiles and barriers lie alike
        barrier_wait(shared.q_full() + i * (shared.k_full(0) - shared.q_full()), parity);
        normalise<Element, L>(p, shared.q(0) + 2 * i * L::TILE);
      }
      sync_threads();
    } else {
      barrier_wait(shared.q_full(), parity);
      barrier_wait(shared.k_full(0), parity);
    }
    wgmma_fence();
    multiply_tiles<Element, L>(s, shared.q(0), shared.k(0), false);
    multiply_tiles<Element, L>(ts, shared.tq(0), shared.k(0), false);
    multiply_tiles<Element, L>(ts, shared.q(0), shared.tk(0), true);
    wgmma_commit();
    if constexpr (!L::COSINE) barrier_wait(shared.v_full(0), parity);
    wgmma_wait<0>();
    hold(s), hold(ts);
    sync_threads();  // each warp waited for its own products
    if (copies_next) copy_scores(head + grid_size());

    uint32_t weights[4][4], h[4][4];
    weigh<Element>(p, s, p.keys, m, l, r, alpha, weights);
    weigh_tangents<Element>(p, s, ts, r, h);
    float o[L::N / 2], t[L::N / 2];
    wgmma_fence();
    multiply_registers<Element, L>(o, weights, shared.v(0), 0, false);
    multiply_registers<Element, L>(t, weights, shared.tv(0), 0, false);
    multiply_registers<Element, L>(t, h, shared.v(0), 0);
    wgmma_commit();
    wgmma_wait<0>();
    hold(o), hold(t);
    sync_threads();
    if (copies_next) copy_values(head + grid_size());
    store<Element, L>(p, o, t, m, l, r, head, 0, 0);
  }
#else
  __trap();
#endif
}

}  // namespace sclightning
