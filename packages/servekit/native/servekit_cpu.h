/* The C interface of servekit's CPU kernels: no Python, no C++ in it.
 *
 * A program is a list of operations over buffers, recorded once and run once a step by one call; what differs from one
 * step to the next is in sk_step. Buffers belong to the caller and must outlive the program. Nothing here is safe to
 * call from two threads at once on one pool.
 */
#ifndef SERVEKIT_CPU_H
#define SERVEKIT_CPU_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

#define SK_API_VERSION 5
#define SK_MAX_GROUPS 8

typedef enum { SK_F32 = 0, SK_BF16 = 1, SK_I8 = 2, SK_I4 = 3 } sk_format;
typedef enum { SK_STORE = 0, SK_ADD = 1, SK_SWIGLU = 2 } sk_epilogue;

typedef struct sk_pool sk_pool;
typedef struct sk_program sk_program;

/* Activations, one row a token; columns behind `cols` are zero. SK_I8 rows have for each `group` of columns, at
 * row * (stride / group): a scale, the sum of what the numbers stand for, and -128 times the sum of the numbers. */
typedef struct {
  void* data;
  float* scales;
  float* sums;
  int32_t* offsets;
  int32_t format;
  int32_t cols;
  int32_t stride; /* elements, a multiple of 64 */
  int32_t group;
} sk_rows;

/* A packed weight [n, k], see sk_pack. */
typedef struct {
  const void* data;
  const float* scales; /* SK_I8: one a packed column */
  const float* bias;   /* one a packed column, or null */
  int32_t format;
  int32_t n; /* packed columns, a multiple of 64 */
  int32_t k; /* padded, see sk_padded_k */
} sk_matrix;

/* A layer's keys and values: key blocks, then value blocks, each [num_blocks][kv_heads][block_size * padded width].
 * Whole numbers of 8 bits have a scale for each head of each token, [2][num_blocks][kv_heads][block_size]. */
typedef struct {
  void* data;
  float* scales; /* SK_I8 */
  int64_t num_blocks;
  int32_t format; /* SK_F32, SK_BF16 or SK_I8 */
  int32_t block_size;
  int32_t kv_heads;
  int32_t head_dim;
  int32_t padded_dim; /* head_dim rounded up to 16 */
  int32_t group;      /* whose block tables it follows */
} sk_cache;

typedef struct {
  int32_t tokens;
  int32_t sequences;
  const int64_t* token_ids; /* [tokens] */
  const int64_t* positions; /* [tokens] */
  const int64_t* starts;    /* [sequences] position of its first new token */
  const int64_t* counts;    /* [sequences] new tokens, which stand one after the other */
  const int32_t* tables[SK_MAX_GROUPS]; /* [sequences][table_strides] */
  int64_t table_strides[SK_MAX_GROUPS];
  const float* input; /* [tokens][input_stride], of programs that begin with sk_add_convert */
  int64_t input_stride;
  const int64_t* picks; /* [num_picks] tokens, for what comes after sk_add_pick */
  int32_t num_picks;
} sk_step;

int32_t sk_api_version(void);
/* The instruction sets that this machine can run, best first, separated by spaces. */
const char* sk_supported(void);
/* Chooses one; 0 where this machine cannot run it. Not while programs exist. */
int32_t sk_select(const char* name);
const char* sk_selected(void);
/* The format that activations must have for weights of `weight_format`. */
int32_t sk_input_format(int32_t weight_format);

/* `pinned`: threads stay on cores of their own, the first of which is left to the caller; Linux only. */
sk_pool* sk_pool_new(int32_t threads, int32_t pinned);
void sk_pool_free(sk_pool* pool);

int32_t sk_padded_k(int32_t format, int32_t k);
int64_t sk_packed_bytes(int32_t format, int32_t n, int32_t k);
/* Packs rows of k numbers (SK_F32 or SK_BF16), one a packed column: `rows` [n] are their addresses, null for zeros.
 * `scales` [n] is written for SK_I8 only. */
void sk_pack(sk_pool* pool, int32_t format, int32_t n, int32_t k, const void* const* rows, int32_t row_format,
             void* target, float* scales);

sk_program* sk_program_new(sk_pool* pool);
void sk_program_free(sk_program* program);
void sk_run(sk_program* program, const sk_step* step);
/* Nanoseconds spent in each operation since the last call, written to `out` [sk_num_operations]. */
int32_t sk_num_operations(const sk_program* program);
void sk_profile(sk_program* program, int64_t* out);

void sk_add_embed(sk_program* program, const void* table, int32_t format, int32_t width, const sk_rows* out);
void sk_add_norm(sk_program* program, const sk_rows* x, const float* weight, float eps, const sk_rows* out);
void sk_add_convert(sk_program* program, const sk_rows* x_or_null, int32_t width, const sk_rows* out);
/* The rows of sk_step.picks one after the other, in the format of `out`; what is added after it works on these. */
void sk_add_pick(sk_program* program, const sk_rows* x, int32_t width, const sk_rows* out);
/* x += y; both SK_F32. */
void sk_add_sum(sk_program* program, const sk_rows* y, const sk_rows* x);
void sk_add_linear(sk_program* program, const sk_rows* x, const sk_matrix* weight, int32_t epilogue,
                   const sk_rows* out);
/* Of x times `weight`, `columns` of whose columns count, the largest of each row and where it is first, NaN where a row
 * holds one: for up to `capacity` rows, without keeping the product. */
void sk_add_highest(sk_program* program, const sk_rows* x, const sk_matrix* weight, int32_t columns, int32_t capacity,
                    int64_t* ids, float* highest);
/* Turns queries and keys, and writes keys and values to their blocks. `angles` is [positions][head_dim]: the cosines of
 * a head's first half, then the sines. `q_norm`, `k_norm`: [head_dim] or null. */
void sk_add_rotary(sk_program* program, const sk_rows* qkv, int32_t heads, const float* angles, const float* q_norm,
                   const float* k_norm, float eps, const sk_cache* cache, const sk_rows* queries);
void sk_add_attention(sk_program* program, const sk_rows* queries, int32_t heads, const sk_cache* cache, float scale,
                      float soft_cap, int32_t window, const sk_rows* out);

/* The largest of each row and where it is first; NaN where a row holds one. */
void sk_argmax(sk_pool* pool, const float* logits, int64_t rows, int64_t cols, int64_t stride, int64_t* ids,
               float* highest);

/* Multiplies and adds numbers that stay in registers, 64 times `rounds`; how many operations that were. What a product
 * with weights of `format` could do at most. */
double sk_peak(sk_pool* pool, int32_t format, int32_t rounds);
/* Reads all of it, and gives the sum of its words of 8 bytes, so that it must. */
uint64_t sk_read(sk_pool* pool, const void* data, int64_t bytes);

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
#ifdef __cplusplus
}
#endif
#endif
