// Checks the C interface against plain loops in double precision, where there is no Python to do so: on another
// processor, or on an emulated one. Prints what it did and ends with 1 at the first difference that is too large.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "servekit_cpu.h"

namespace {

uint32_t state = 1;
float draw() {  // in [-1, 1)
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int32_t>(state)) / 2147483648.0f;
}

std::vector<float> numbers(size_t count) {
  std::vector<float> made(count);
  for (float& x : made) x = draw();
  return made;
}

void check(const char* what, double found, double exact, double allowed) {
  if (std::fabs(found - exact) <= allowed) return;
  std::printf("%s: %g, not %g: off by more than %g\n", what, found, exact, allowed);
  std::exit(1);
}

struct Rows {
  std::vector<uint8_t> data;
  std::vector<float> scales, sums;
  std::vector<int32_t> offsets;
  sk_rows c;
  Rows(int capacity, int cols, int format = SK_F32, int group = 64) {
    const int stride = (cols + 63) / 64 * 64;
    const size_t places = static_cast<size_t>(capacity) * (stride / group);
    data.resize(static_cast<size_t>(capacity) * stride * 4), scales.resize(places), sums.resize(places);
    offsets.resize(places);
    c = {data.data(), scales.data(), sums.data(), offsets.data(), format, cols, stride, group};
  }
  float* row(int i) { return reinterpret_cast<float*>(data.data()) + static_cast<size_t>(i) * c.stride; }
};

// Relative to the length of a row: bf16 and int8 activations are rounded, and so are weights of fewer bits.
double allowed_of(int format) {
  return format == SK_F32 ? 2e-6 : format == SK_BF16 ? 1.2e-2 : format == SK_I8 ? 3e-2 : 0.15;
}

void products(sk_pool* pool, int format, int rows, int outs, int width) {
  const int packed = (outs + 63) / 64 * 64;
  const auto weight = numbers(static_cast<size_t>(outs) * width), x = numbers(static_cast<size_t>(rows) * width);
  std::vector<const void*> addresses(packed, nullptr);
  for (int i = 0; i < outs; ++i) addresses[i] = weight.data() + static_cast<size_t>(i) * width;
  std::vector<uint8_t> data(sk_packed_bytes(format, packed, width));
  std::vector<float> scales(packed);
  sk_pack(pool, format, packed, width, addresses.data(), SK_F32, data.data(), scales.data());
  Rows in(rows, width, sk_input_format(format), format == SK_I4 ? 32 : 64), out(rows, packed);
  const sk_matrix matrix = {data.data(), format == SK_I8 ? scales.data() : nullptr, nullptr, format, packed,
                            sk_padded_k(format, width)};
  sk_program* program = sk_program_new(pool);
  sk_add_convert(program, nullptr, width, &in.c);
  sk_add_linear(program, &in.c, &matrix, SK_STORE, &out.c);
  sk_step step = {};
  step.tokens = rows, step.input = x.data(), step.input_stride = width;
  sk_run(program, &step);
  sk_program_free(program);
  for (int r = 0; r < rows; ++r)
    for (int o = 0; o < outs; ++o) {
      double exact = 0, lengths[2] = {0, 0};
      for (int i = 0; i < width; ++i) {
        const double a = x[static_cast<size_t>(r) * width + i], b = weight[static_cast<size_t>(o) * width + i];
        exact += a * b, lengths[0] += a * a, lengths[1] += b * b;
      }
      check("product", out.row(r)[o], exact, std::sqrt(lengths[0] * lengths[1]) * allowed_of(format) + 1e-6);
    }
}

// One sequence: a prompt of `tokens`, then one token more; keys and values are found again in their blocks.
void attention(sk_pool* pool, int format, int heads, int kv_heads, int width, int tokens, int size) {
  const int padded = (width + 15) / 16 * 16, cols = (heads + 2 * kv_heads) * width, all = tokens + 1;
  const int blocks = (all + size - 1) / size;
  std::vector<uint8_t> cache(static_cast<size_t>(2) * (blocks + 1) * size * kv_heads * padded * 4);
  std::vector<float> scales(static_cast<size_t>(2) * (blocks + 1) * size * kv_heads);
  const sk_cache seen = {cache.data(), scales.data(), blocks + 1, format, size, kv_heads, width, padded, 0};
  std::vector<float> angles(static_cast<size_t>(all) * width);
  for (int p = 0; p < all; ++p)
    for (int d = 0; d < width / 2; ++d)
      angles[static_cast<size_t>(p) * width + d] = std::cos(p * 0.1f * d),
      angles[static_cast<size_t>(p) * width + width / 2 + d] = std::sin(p * 0.1f * d);
  const auto given = numbers(static_cast<size_t>(all) * cols);
  const int queries_format = format == SK_F32 ? SK_F32 : sk_input_format(SK_BF16);
  Rows qkv(all, cols), queries(all, heads * padded, queries_format), out(all, heads * width);
  const float scale = 1.0f / std::sqrt(static_cast<float>(width));
  sk_program* program = sk_program_new(pool);
  sk_add_rotary(program, &qkv.c, heads, angles.data(), nullptr, nullptr, 1e-6f, &seen, &queries.c);
  sk_add_attention(program, &queries.c, heads, &seen, scale, 0, 0, &out.c);
  std::vector<int32_t> table(blocks);
  for (int b = 0; b < blocks; ++b) table[b] = blocks - b;
  for (int64_t start = 0; start < all; start = tokens) {
    const int64_t count = start ? 1 : tokens;
    std::vector<int64_t> positions;
    for (int64_t p = 0; p < count; ++p) {
      positions.push_back(start + p);
      std::memcpy(qkv.row(static_cast<int>(p)), given.data() + (start + p) * cols, static_cast<size_t>(cols) * 4);
    }
    sk_step step = {};
    step.tokens = static_cast<int32_t>(count), step.sequences = 1, step.token_ids = step.positions = positions.data();
    step.starts = &start, step.counts = &count, step.tables[0] = table.data(), step.table_strides[0] = blocks;
    sk_run(program, &step);
    if (start) break;
  }
  sk_program_free(program);
  const auto turned = [&](int p, int head, int d) {
    const float* x = given.data() + static_cast<size_t>(p) * cols + static_cast<size_t>(head) * width;
    const float *cosines = angles.data() + static_cast<size_t>(p) * width, *sines = cosines + width / 2;
    const int h = width / 2, e = d % h;
    const float first = x[e] * cosines[e] - x[h + e] * sines[e], second = x[h + e] * cosines[e] + x[e] * sines[e];
    return static_cast<double>(d < h ? first : second);
  };
  for (int head = 0; head < heads; ++head) {
    const int kv = head / (heads / kv_heads);
    std::vector<double> weights(all);
    double total = 0;
    for (int p = 0; p < all; ++p) {
      double score = 0;
      for (int d = 0; d < width; ++d) score += turned(tokens, head, d) * turned(p, heads + kv, d);
      total += weights[p] = std::exp(score * scale);
    }
    const size_t first = static_cast<size_t>(heads + kv_heads + kv) * width;
    for (int d = 0; d < width; ++d) {
      double exact = 0;
      for (int p = 0; p < all; ++p) exact += weights[p] / total * given[static_cast<size_t>(p) * cols + first + d];
      check("attention", out.row(0)[head * width + d], exact, format == SK_F32 ? 2e-5 : 3e-2);
    }
  }
}

}  // namespace

int main() {
  if (sk_api_version() != SK_API_VERSION) return 1;
  for (int threads : {1, 2}) {
    sk_pool* pool = sk_pool_new(threads, threads == 2);
    for (int format : {SK_F32, SK_BF16, SK_I8, SK_I4})
      for (int rows : {1, 3, 13, 67}) products(pool, format, rows, 150, 97 + rows);
    for (int format : {SK_F32, SK_BF16, SK_I8})
      for (int size : {8, 16}) attention(pool, format, 6, 2, 40, 77, size);
    sk_pool_free(pool);
  }
  std::printf("%s: all agree\n", sk_selected());
  return 0;
}
