// Work on one row at a time: norms, changes of format, rotary positions, the largest value.

namespace {

// Numbers as they stand, and numbers as a norm makes them; `part` reads the last few of a row, zeros behind them.
struct Plain {
  const float* x;
  vf at(int c) const { return load(x + c); }
  vf part(int c, int count) const { return padded(x + c, count); }
  static vf padded(const float* from, int count) {
    alignas(64) float few[LANES] = {};
    std::memcpy(few, from, static_cast<size_t>(count) * 4);
    return load(few);
  }
};

struct Normed {
  const float *x, *weight;
  float by;
  vf at(int c) const { return load(x + c) * by * load(weight + c); }
  vf part(int c, int count) const { return Plain::padded(x + c, count) * by * Plain::padded(weight + c, count); }
};

// To 8 bits, a scale for each group of columns.
template <class Numbers>
void quantize(const Numbers& numbers, int width, const sk_rows& out, int row) {
  int8_t* target = static_cast<int8_t*>(out.data) + static_cast<size_t>(row) * out.stride;
  const auto at = [&](int c) {
    return c + LANES <= width ? numbers.at(c) : c < width ? numbers.part(c, width - c) : vf{};
  };
  size_t place = static_cast<size_t>(row) * (out.stride / out.group);
  for (int first = 0; first < width; first += out.group, ++place) {
    vi mosts = {};  // as bits, without signs: what is no finite number is above all others
    for (int c = first; c < first + out.group; c += LANES)
      mosts = larger(mosts, reinterpret_cast<vi>(at(c)) & 0x7fffffff);
    const int32_t bits = highest(mosts);
    float most;
    std::memcpy(&most, &bits, 4);
    const float inverse = most > 0 ? 127.0f / most : 0.0f;
    const float scale = bits >= 0x7f800000 ? NAN : most / 127.0f;
    vi totals = {};
    for (int c = first; c < first + out.group; c += LANES)
      store_bytes(target + c, scale == scale ? at(c) * inverse : vf{}, &totals);
    const int32_t total = sum(totals);
    out.scales[place] = scale;
    out.sums[place] = scale * static_cast<float>(total);
    out.offsets[place] = -128 * total;
  }
}

void convert(const float* x, int width, const sk_rows& out, int row) {
  if (out.format == SK_I8) return quantize(Plain{x}, width, out, row);
  if (out.format == SK_BF16) {
    store_bf16(static_cast<uint16_t*>(out.data) + static_cast<size_t>(row) * out.stride, x, width);
  } else {
    auto* target = static_cast<float*>(out.data) + static_cast<size_t>(row) * out.stride;
    std::memcpy(target, x, static_cast<size_t>(width) * 4);
  }
}

inline float mean_square(const float* x, int width) {
  constexpr int SUMS = 4;  // so that one need not wait for the other
  vf sums[SUMS] = {};
  int c = 0;
  for (; c + SUMS * LANES <= width; c += SUMS * LANES)
    for (int i = 0; i < SUMS; ++i) sums[i] += load(x + c + i * LANES) * load(x + c + i * LANES);
  for (; c + LANES <= width; c += LANES) sums[0] += load(x + c) * load(x + c);
  float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; c < width; ++c) total += x[c] * x[c];
  return total / static_cast<float>(width);
}

inline void scaled(const float* x, const float* weight, float by, int width, float* out) {
  int c = 0;
  for (; c + LANES <= width; c += LANES) store(out + c, load(x + c) * by * load(weight + c));
  for (; c < width; ++c) out[c] = x[c] * by * weight[c];
}

void norm(const float* x, const float* weight, float eps, const sk_rows& out, int row) {
  const int width = out.cols;
  const float by = 1.0f / std::sqrt(mean_square(x, width) + eps);
  if (out.format == SK_F32) {
    scaled(x, weight, by, width, static_cast<float*>(out.data) + static_cast<size_t>(row) * out.stride);
    return;
  }
  if (out.format == SK_I8) return quantize(Normed{x, weight, by}, width, out, row);
  auto* target = static_cast<uint16_t*>(out.data) + static_cast<size_t>(row) * out.stride;
  int c = 0;
  for (; c + LANES <= width; c += LANES) store_bf16(target + c, load(x + c) * by * load(weight + c));
  for (; c < width; ++c) target[c] = to_bf16(x[c] * by * weight[c]);
}

inline void copy_as(float* to, const float* from, int count) { std::memcpy(to, from, static_cast<size_t>(count) * 4); }
inline void copy_as(uint16_t* to, const float* from, int count) { store_bf16(to, from, count); }

// The halves of a head turn against each other.
inline void turn(const float* x, const float* cosines, const float* sines, int half, float* out) {
  int d = 0;
  for (; d + LANES <= half; d += LANES) {
    const vf a = load(x + d), b = load(x + half + d), c = load(cosines + d), s = load(sines + d);
    store(out + d, a * c - b * s);
    store(out + half + d, b * c + a * s);
  }
  for (; d < half; ++d) {
    out[d] = x[d] * cosines[d] - x[half + d] * sines[d];
    out[half + d] = x[half + d] * cosines[d] + x[d] * sines[d];
  }
}

// The numbers of a head as whole ones of at most 127; what these are times, which is no number where one of them is not.
inline float whole_numbers(const float* x, int count, int8_t* out) {
  vf mosts = {}, broken = {};
  int d = 0;
  for (; d + LANES <= count; d += LANES) {
    const vf v = load(x + d);
    mosts = larger(mosts, larger(v, -v));
    broken += v - v;  // NaN once there is a NaN or an infinity
  }
  float most = highest(mosts), rest = sum(broken);
  for (; d < count; ++d) {
    most = std::fabs(x[d]) > most ? std::fabs(x[d]) : most;
    rest += x[d] - x[d];
  }
  const bool is_sound = rest == 0.0f;
  const float inverse = is_sound && most > 0 ? 127.0f / most : 0.0f;
  vi ignored = {};
  for (d = 0; is_sound && d + LANES <= count; d += LANES) store_bytes(out + d, load(x + d) * inverse, &ignored);
  for (; d < count; ++d) out[d] = is_sound ? static_cast<int8_t>(std::nearbyint(x[d] * inverse)) : int8_t{0};
  return is_sound ? most / 127.0f : NAN;
}

// `Stored` is what the cache holds, in groups of DEPTH: [width / DEPTH][block_size][DEPTH] for keys, and
// [block_size / DEPTH][width][DEPTH] for values.
template <class D, class Stored, int DEPTH>
void rotary_as(const servekit::Rotary& op, int token, int64_t position, const int32_t* table, bool is_last) {
  constexpr bool is_bytes = sizeof(Stored) == 1;
  constexpr size_t group_bytes = DEPTH * sizeof(Stored);
  const int width = op.cache.head_dim, half = width / 2, padded = op.cache.padded_dim, size = op.cache.block_size;
  const int kv_heads = op.cache.kv_heads;
  const float* from = static_cast<const float*>(op.qkv.data) + static_cast<size_t>(token) * op.qkv.stride;
  const float *cosines = op.angles + position * width, *sines = cosines + half;
  auto* queries = static_cast<typename D::Value*>(op.queries.data) + static_cast<size_t>(token) * op.queries.stride;
  const size_t head_values = static_cast<size_t>(size) * padded;
  const size_t place = static_cast<size_t>(table[position / size]) * kv_heads;  // of the block's first head
  const size_t halves = static_cast<size_t>(op.cache.num_blocks) * kv_heads;    // from keys to values
  Stored* keys = static_cast<Stored*>(op.cache.data) + place * head_values;
  Stored* values = keys + halves * head_values;
  const int offset = static_cast<int>(position % size);
  const auto keep_scale = [&](size_t head, float scale) { op.cache.scales[(place + head) * size + offset] = scale; };
  for (int head = 0; head < kv_heads; ++head)  // each pair of numbers is in a line of its own: ask while queries turn
    for (int d = 0; d < width; d += DEPTH)
      __builtin_prefetch(keys + static_cast<size_t>(head) * head_values + static_cast<size_t>(d) * size + offset * DEPTH, 1);
  alignas(64) float normed[512], turned[512];
  alignas(64) Stored ready[512];
  for (int head = 0; head < op.heads + kv_heads; ++head) {
    const float* x = from + static_cast<size_t>(head) * width;
    const bool is_query = head < op.heads;
    const float* weight = is_query ? op.q_norm : op.k_norm;
    if (weight) {
      scaled(x, weight, 1.0f / std::sqrt(mean_square(x, width) + op.eps), width, normed);
      x = normed;
    }
    turn(x, cosines, sines, half, turned);
    if (is_query) {
      copy_as(queries + static_cast<size_t>(head) * padded, turned, width);
      continue;
    }
    const size_t key_head = static_cast<size_t>(head - op.heads);
    if constexpr (is_bytes) keep_scale(key_head, whole_numbers(turned, width, ready));
    else copy_as(ready, turned, width);
    Stored* target = keys + key_head * head_values + offset * DEPTH;
    for (int d = 0; d < width; d += DEPTH) std::memcpy(target + static_cast<size_t>(d) * size, ready + d, group_bytes);
  }
  for (int head = 0; head < kv_heads; ++head) {
    const float* x = from + static_cast<size_t>(op.heads + kv_heads + head) * width;
    if constexpr (is_bytes) keep_scale(halves + static_cast<size_t>(head), whole_numbers(x, width, ready));
    else copy_as(ready, x, width);
    Stored* target = values + static_cast<size_t>(head) * head_values;
    target += static_cast<size_t>(offset / DEPTH) * padded * DEPTH + offset % DEPTH;
    if (DEPTH == 2 && is_last && offset % 2 == 0)  // its partner is read with it: it must be a number
      for (int d = 0; d < width; ++d) {
        target[static_cast<size_t>(d) * DEPTH] = ready[d];
        target[static_cast<size_t>(d) * DEPTH + 1] = 0;
      }
    else
      for (int d = 0; d < width; ++d) target[static_cast<size_t>(d) * DEPTH] = ready[d];
  }
}

void rotary(const servekit::Rotary& op, int token, int64_t position, const int32_t* table, bool is_last) {
  switch (op.cache.format) {
    case SK_F32: return rotary_as<F32, float, 1>(op, token, position, table, is_last);
    case SK_I8: return rotary_as<BF16, int8_t, 2>(op, token, position, table, is_last);
    default: return rotary_as<BF16, uint16_t, 2>(op, token, position, table, is_last);
  }
}

bool argmax(const float* x, int64_t cols, float above, int64_t* id, float* best) {
  vf most = all(-INFINITY);
  vf broken = {};
  int64_t c = 0;
  for (; c + LANES <= cols; c += LANES) {
    const vf v = load(x + c);
    most = larger(most, v);
    broken = broken + (v - v) * 0.0f;  // NaN once there is a NaN or an infinity
  }
  float top = highest(most), rest = sum(broken);
  for (; c < cols; ++c) {
    top = x[c] > top ? x[c] : top;
    rest += (x[c] - x[c]) * 0.0f;
  }
  if (rest != rest)
    for (c = 0; c < cols; ++c)
      if (x[c] != x[c]) {
        *best = NAN;
        *id = c;
        return true;
      }
  if (!(top > above)) return false;
  *best = top;
  const vf tops = all(top);
  for (c = 0; c + LANES <= cols; c += LANES) {
    const vi same = load(x + c) == tops;
    bool any = false;
    for (int i = 0; i < LANES; ++i) any |= same[i] != 0;
    if (any) break;
  }
  for (; c < cols; ++c)
    if (x[c] == top) {
      *id = c;
      break;
    }
  return true;
}

}  // namespace
