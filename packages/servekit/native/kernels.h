// What each instruction set provides: one table of functions, filled by isa.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "servekit_cpu.h"

namespace servekit {

constexpr int PANEL = 64;        // columns of a packed weight that lie together
constexpr int I4_GROUP = 32;     // weights that share a scale and a lowest value
constexpr int I8_UNIT = 64;      // to a multiple of which rows of 8-bit weights are padded
constexpr int KEY_TILE = 128;    // keys that meet a tile of queries at a time
constexpr int QUERY_ROWS = 64;   // of a tile of queries, all heads of a KV head counted; more if there are more heads
constexpr int PARTIAL_EXTRA = 2; // behind a partial result: the highest score, and the sum

struct Scratch {
  uint8_t* data;
  size_t bytes;
};

struct AttentionTask {
  int64_t first_token;      // of the step
  const int32_t* table;
  int64_t start;            // position of first_token
  int64_t first_key, last_key;  // to look at, before masks; first_key at the border of a block
  int32_t num_tokens;
  int32_t kv_head;
  float* partial;           // null: write to out
};

struct Attention {
  sk_rows queries, out;
  sk_cache cache;
  int32_t heads, window;
  float scale, soft_cap;
};

struct Rotary {
  sk_rows qkv, queries;
  sk_cache cache;
  const float *angles, *q_norm, *k_norm;
  int32_t heads;
  float eps;
};

// Columns of a packed weight: a panel, or a half of one.
struct Slice {
  int panel, first, columns;
};

struct Kernels {
  const char* name;
  bool bf16_inputs;  // products with bf16 weights read bf16 activations
  // Rows first .. last - 1; `next`: the weights that are read afterwards, or null.
  void (*linear)(const sk_matrix& w, const sk_rows& x, Slice slice, int first, int last, int epilogue,
                 const sk_rows& out, const uint8_t* next);
  void (*norm)(const float* x, const float* weight, float eps, const sk_rows& out, int row);
  void (*convert)(const float* x, int width, const sk_rows& out, int row);
  void (*rotary)(const Rotary& op, int token, int64_t position, const int32_t* table, bool is_last);
  // `next`: the task that this thread will come to, or null.
  void (*attention)(const Attention& op, const AttentionTask& task, const AttentionTask* next, Scratch scratch);
  void (*combine)(const Attention& op, const float* partials, int splits, int64_t token, int kv_head);
  // The first of the highest numbers where that is more than `above`, or a NaN; else false, and nothing is written.
  bool (*argmax)(const float* x, int64_t cols, float above, int64_t* id, float* highest);
  void (*pack_i8)(const float* row, int k, uint8_t* words, float* scale);
  void (*pack_i4)(const float* row, int k, uint8_t* words);
  double (*peak)(int format, int rounds, float* out);  // operations done; `out` [16]
};

const Kernels& kernels();  // those selected

size_t attention_scratch(const Attention& op);

#if defined(__aarch64__)
extern const Kernels neon_kernels;
#else
extern const Kernels scalar_kernels;
#endif
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels, avx512_vnni_kernels, avx512_bf16_kernels;
#endif

}  // namespace servekit
