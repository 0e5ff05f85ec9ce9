// Attention of a tile of queries to keys in blocks, by the online softmax (Milakov and Gimelshein 2018).
//
// Keys of a block lie as [head_dim / DEPTH][block_size][DEPTH], values as [block_size / DEPTH][head_dim][DEPTH]: both
// are what a product's tile reads, so scores and their use run on the same instructions as the linear layers.
//
// Of keys and values of 8 bits a tile's blocks are spread to bf16 first, which holds them exactly, once for all queries
// of the tile; scales come in afterwards: those of keys as factors of scores, those of values as factors of weights.

namespace {

using servekit::Attention;
using servekit::AttentionTask;
using servekit::KEY_TILE;
using servekit::PARTIAL_EXTRA;
using servekit::Scratch;

constexpr float NOTHING = -INFINITY;
constexpr float NEAR = 4.0f;  // a weight is e ** 4 at most
constexpr int FEW_ROWS = 16;  // of queries, for which memory is waited for
constexpr int TILE_ROWS = 6, TILE_VECTORS = LANES == 16 ? 4 : 2;

// Not inlined: the sums of a tile need all registers.
#define SK_APART __attribute__((noinline))

// Scores of `rows` queries and LANES * NV keys; a vector of keys begins at each of `keys`, `step` bytes a depth.
// `next`: as much of what is read afterwards stands there for each vector, and is asked for.
template <class D, int MR, int NV, bool asks>
SK_APART void score_tile(const typename D::Value* q, int width, const uint8_t* const* keys, const uint8_t* const* next,
                       size_t step, float* out) {
  vf sums[MR][NV] = {};
  for (int d = 0; d < width / D::DEPTH; ++d) {
    if (asks)
      for (int v = 0; v < NV; ++v) __builtin_prefetch(next[v] + d * VECTOR, 0, 2);
    typename D::Weights w[NV];
    for (int v = 0; v < NV; ++v) w[v] = D::load(keys[v] + d * step);
    for (int r = 0; r < MR; ++r)
      for (int v = 0; v < NV; ++v) sums[r][v] = D::add(sums[r][v], w[v], q + r * width + d * D::DEPTH);
  }
  for (int r = 0; r < MR; ++r)
    for (int v = 0; v < NV; ++v) store(out + r * KEY_TILE + v * LANES, sums[r][v]);
}

template <class D, int NV, bool asks>
void score_rows(const typename D::Value* q, int rows, int width, const uint8_t* const* keys, const uint8_t* const* next,
                size_t step, float* out) {
  switch (rows) {
    case 1: return score_tile<D, 1, NV, asks>(q, width, keys, next, step, out);
    case 2: return score_tile<D, 2, NV, asks>(q, width, keys, next, step, out);
    case 3: return score_tile<D, 3, NV, asks>(q, width, keys, next, step, out);
    case 4: return score_tile<D, 4, NV, asks>(q, width, keys, next, step, out);
    case 5: return score_tile<D, 5, NV, asks>(q, width, keys, next, step, out);
    default: return score_tile<D, 6, NV, asks>(q, width, keys, next, step, out);
  }
}

// Where blocks hold fewer keys than a vector has lanes.
template <class D>
void score_block_plainly(const typename D::Value* q, int rows, int width, const uint8_t* block, int size, float* out);

template <>
void score_block_plainly<F32>(const float* q, int rows, int width, const uint8_t* block, int size, float* out) {
  const auto* keys = reinterpret_cast<const float*>(block);
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < size; ++j) {
      float total = 0;
      for (int d = 0; d < width; ++d) total += q[r * width + d] * keys[d * size + j];
      out[r * KEY_TILE + j] = total;
    }
}

inline float number(float x) { return x; }
inline float number(uint16_t x) { return from_bf16(x); }

template <>
void score_block_plainly<BF16>(const BF16::Value* q, int rows, int width, const uint8_t* block, int size, float* out) {
  const auto* keys = reinterpret_cast<const uint16_t*>(block);
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < size; ++j) {
      float total = 0;
      for (int d = 0; d < width; ++d)
        total += number(q[r * width + d]) * from_bf16(keys[(static_cast<size_t>(d / 2) * size + j) * 2 + d % 2]);
      out[r * KEY_TILE + j] = total;
    }
}

// out[rows][width] += p[rows][keys] * values, block after block. `next`: blocks that are read afterwards, and are asked
// for.
template <class D, int MR, int NV, bool asks>
SK_APART void value_tile(const typename D::Value* p, const uint8_t* const* blocks, const uint8_t* const* next,
                       int num_keys, int size, int width, float* out) {
  const size_t row = static_cast<size_t>(width) * 4;
  vf sums[MR][NV];
  for (int r = 0; r < MR; ++r)
    for (int v = 0; v < NV; ++v) sums[r][v] = load(out + r * width + v * LANES);
  for (int first = 0, b = 0; first < num_keys; first += size, ++b) {
    const int keys = num_keys - first < size ? num_keys - first : size;
    const int steps = (keys + D::DEPTH - 1) / D::DEPTH;
    const auto* x = p + first;
    const uint8_t *w = blocks[b], *then = asks ? next[b] : nullptr;
    for (int s = 0; s < steps; ++s, w += row, x += D::DEPTH) {
      if (asks)
        for (int v = 0; v < NV; ++v) __builtin_prefetch(then + s * row + v * VECTOR, 0, 2);
      typename D::Weights weights[NV];
      for (int v = 0; v < NV; ++v) weights[v] = D::load(w + v * VECTOR);
      for (int r = 0; r < MR; ++r)
        for (int v = 0; v < NV; ++v) sums[r][v] = D::add(sums[r][v], weights[v], x + r * KEY_TILE);
    }
  }
  for (int r = 0; r < MR; ++r)
    for (int v = 0; v < NV; ++v) store(out + r * width + v * LANES, sums[r][v]);
}

template <class D, int NV, bool asks>
void value_rows(const typename D::Value* p, int rows, const uint8_t* const* blocks, const uint8_t* const* next,
                int num_keys, int size, int width, float* out) {
  switch (rows) {
    case 1: return value_tile<D, 1, NV, asks>(p, blocks, next, num_keys, size, width, out);
    case 2: return value_tile<D, 2, NV, asks>(p, blocks, next, num_keys, size, width, out);
    case 3: return value_tile<D, 3, NV, asks>(p, blocks, next, num_keys, size, width, out);
    case 4: return value_tile<D, 4, NV, asks>(p, blocks, next, num_keys, size, width, out);
    case 5: return value_tile<D, 5, NV, asks>(p, blocks, next, num_keys, size, width, out);
    default: return value_tile<D, 6, NV, asks>(p, blocks, next, num_keys, size, width, out);
  }
}

template <class D>
class QueryTile {
 public:
  using Value = typename D::Value;

  QueryTile(const Attention& op, const AttentionTask& task, const AttentionTask* next, Scratch scratch)
      : op_(op), task_(task), next_(next), groups_(op.heads / op.cache.kv_heads), rows_(groups_ * task.num_tokens),
        width_(op.cache.padded_dim), size_(op.cache.block_size) {
    uint8_t* at = scratch.data;
    auto take = [&](size_t bytes) {
      uint8_t* found = at;
      at += (bytes + 63) / 64 * 64;
      return found;
    };
    const size_t n = static_cast<size_t>(rows_);
    scores_ = reinterpret_cast<float*>(take(n * KEY_TILE * 4));
    out_ = reinterpret_cast<float*>(take(n * width_ * 4));
    highest_ = reinterpret_cast<float*>(take(n * 4));
    total_ = reinterpret_cast<float*>(take(n * 4));
    weights_ = reinterpret_cast<Value*>(take(n * KEY_TILE * sizeof(Value)));
    queries_ = reinterpret_cast<Value*>(take(n * width_ * sizeof(Value)));
    if (is_bytes()) spread_ = reinterpret_cast<uint16_t*>(take(static_cast<size_t>(KEY_TILE) * width_ * 2));
  }

  void run() {
    const Value* from = static_cast<const Value*>(op_.queries.data);
    for (int r = 0; r < rows_; ++r) {
      const size_t row = static_cast<size_t>(task_.first_token + r / groups_) * op_.queries.stride;
      const size_t head = static_cast<size_t>(task_.kv_head) * groups_ + r % groups_;
      std::memcpy(queries_ + static_cast<size_t>(r) * width_, from + row + head * width_, width_ * sizeof(Value));
      highest_[r] = NOTHING;
      total_[r] = 0;
    }
    std::memset(out_, 0, static_cast<size_t>(rows_) * width_ * 4);
    for (int64_t key = task_.first_key; key < task_.last_key; key += KEY_TILE) {
      const int64_t left = task_.last_key - key;
      turn(key, left < KEY_TILE ? static_cast<int>(left) : KEY_TILE);
    }
    if (task_.partial) leave_partial();
    else leave();
  }

 private:
  bool is_bytes() const { return op_.cache.format == SK_I8; }
  size_t head_bytes() const {
    return static_cast<size_t>(size_) * width_ * (is_bytes() ? 1 : D::DEPTH == 2 ? 2 : 4);
  }

  void turn(int64_t first, int num_keys) {
    const int num_blocks = (num_keys + size_ - 1) / size_;
    const uint8_t *keys[KEY_TILE / 8], *values[KEY_TILE / 8], *next_keys[KEY_TILE / 8], *next_values[KEY_TILE / 8];
    alignas(64) float key_scales[KEY_TILE], value_scales[KEY_TILE];
    const size_t halves = static_cast<size_t>(op_.cache.num_blocks) * op_.cache.kv_heads;  // from keys to values
    for (int b = 0; b < num_blocks; ++b) {
      const size_t place = place_of(task_, first / size_ + b);
      keys[b] = block_at(place);
      values[b] = block_at(halves + place);
      if (!is_bytes()) continue;
      const size_t bytes = static_cast<size_t>(size_) * 4;
      std::memcpy(key_scales + b * size_, op_.cache.scales + place * size_, bytes);
      std::memcpy(value_scales + b * size_, op_.cache.scales + (halves + place) * size_, bytes);
    }
    // With few rows memory is waited for: what the next tile reads is asked for while there is work, a line a vector.
    const bool is_short = rows_ <= FEW_ROWS, asks = is_short && !is_bytes();
    if (is_short) find_after(first + num_keys, num_blocks, halves, next_keys, next_values);
    if (is_bytes()) {
      if (is_short) ask(next_keys, num_blocks);
      spread(keys, num_blocks);
    }
    score(keys, num_blocks, asks ? next_keys : nullptr);
    for (int r = 0; r < rows_; r += TILE_ROWS) {  // a few together, so that one need not wait for the other
      const int rows = rows_ - r < TILE_ROWS ? rows_ - r : TILE_ROWS;
      float most[TILE_ROWS];
      for (int i = 0; i < rows; ++i)
        most[i] = is_bytes() ? look<true>(r + i, first, num_keys, key_scales)
                             : look<false>(r + i, first, num_keys, nullptr);
      for (int i = 0; i < rows; ++i) {
        if (is_bytes()) weigh<true>(r + i, most[i], num_keys, value_scales);
        else weigh<false>(r + i, most[i], num_keys, nullptr);
      }
    }
    if (is_bytes()) {
      if (is_short) ask(next_values, num_blocks);
      spread(values, num_blocks);
    }
    for (int r = 0; r < rows_; r += TILE_ROWS)
      use(r, rows_ - r < TILE_ROWS ? rows_ - r : TILE_ROWS, values, num_keys, asks && r == 0 ? next_values : nullptr);
  }

  size_t place_of(const AttentionTask& task, int64_t block) const {
    return static_cast<size_t>(task.table[block]) * op_.cache.kv_heads + task.kv_head;
  }
  const uint8_t* block_at(size_t place) const {
    return static_cast<const uint8_t*>(op_.cache.data) + place * head_bytes();
  }

  // Makes blocks of bytes ones of bf16, and `blocks` point to those.
  void spread(const uint8_t** blocks, int count) {
    const size_t numbers = static_cast<size_t>(size_) * width_;
    for (int b = 0; b < count; ++b) {
      bytes_to_bf16(reinterpret_cast<const int8_t*>(blocks[b]), numbers, spread_ + b * numbers);
      blocks[b] = reinterpret_cast<const uint8_t*>(spread_ + b * numbers);
    }
  }

  void ask(const uint8_t* const* blocks, int count) const {
    for (int i = 0; i < count; ++i)
      for (size_t at = 0; at < head_bytes(); at += LINE) __builtin_prefetch(blocks[i] + at, 0, 2);
  }

  // The `count` blocks that are looked at after this tile: of this task, or the first ones of the next; where there are
  // fewer the last of them again.
  void find_after(int64_t first, int count, size_t halves, const uint8_t** keys, const uint8_t** values) const {
    const bool is_same = first < task_.last_key || !next_;
    const AttentionTask& task = is_same ? task_ : *next_;
    const int64_t block = (is_same ? first : task.first_key) / size_, last = (task.last_key - 1) / size_;
    for (int b = 0; b < count; ++b) {
      const size_t place = place_of(task, block + b < last ? block + b : last);
      keys[b] = block_at(place);
      values[b] = block_at(halves + place);
    }
  }

  // `next`: blocks to ask for.
  void score(const uint8_t* const* blocks, int num_blocks, const uint8_t* const* next) {
    if (size_ < LANES) {
      for (int b = 0; b < num_blocks; ++b)
        score_block_plainly<D>(queries_, rows_, width_, blocks[b], size_, scores_ + b * size_);
      return;
    }
    const uint8_t *vectors[KEY_TILE / LANES], *after[KEY_TILE / LANES];
    int count = 0;
    for (int b = 0; b < num_blocks; ++b)
      for (int j = 0; j < size_; j += LANES, ++count) {
        vectors[count] = blocks[b] + static_cast<size_t>(j) * 4;
        after[count] = next ? next[b] + static_cast<size_t>(j) * 4 / D::DEPTH * width_ : nullptr;
      }
    constexpr int NV = TILE_VECTORS;
    int v = 0;
    for (; v + NV <= count; v += NV) score_all<NV>(vectors + v, next ? after + v : nullptr, scores_ + v * LANES);
    for (; v < count; ++v) score_all<1>(vectors + v, next ? after + v : nullptr, scores_ + v * LANES);
  }

  template <int NV>
  void score_all(const uint8_t* const* keys, const uint8_t* const* next, float* out) {
    const size_t step = static_cast<size_t>(size_) * 4;
    for (int r = 0; r < rows_; r += TILE_ROWS, next = nullptr) {
      const int rows = rows_ - r < TILE_ROWS ? rows_ - r : TILE_ROWS;
      const Value* queries = queries_ + static_cast<size_t>(r) * width_;
      float* scores = out + static_cast<size_t>(r) * KEY_TILE;
      if (next) score_rows<D, NV, true>(queries, rows, width_, keys, next, step, scores);
      else score_rows<D, NV, false>(queries, rows, width_, keys, next, step, scores);
    }
  }

  static int padded(int num_keys) { return (num_keys + 2 * LANES - 1) / (2 * LANES) * (2 * LANES); }
  float factor() const { return op_.soft_cap > 0 ? 1.0f : op_.scale; }  // of scores that have been looked at

  // Puts NOTHING where a row does not look, and bends its scores. The highest.
  template <bool scaled>
  float look(int r, int64_t first, int num_keys, const float* key_scales) const {
    float* s = scores_ + static_cast<size_t>(r) * KEY_TILE;
    const int64_t position = task_.start + r / groups_;
    const int64_t after = position + 1 - first;  // keys of this tile that are not behind the token
    const int64_t before = op_.window ? position + 1 - op_.window - first : 0;
    const int end = padded(num_keys), last = after < num_keys ? static_cast<int>(after < 0 ? 0 : after) : num_keys;
    const int begin = before <= 0 ? 0 : before < end ? static_cast<int>(before) : end;
    if (scaled)
      for (int c = 0; c < end; c += LANES) store(s + c, load(s + c) * load(key_scales + c));
    for (int c = 0; c < begin; ++c) s[c] = NOTHING;
    for (int c = last; c < end; ++c) s[c] = NOTHING;
    vf most = all(NOTHING);
    if (op_.soft_cap > 0) {
      const vf steep = all(2.0f * op_.scale / op_.soft_cap);
      for (int c = 0; c < end; c += LANES) {
        const vf x = load(s + c);
        const vf bent = op_.soft_cap * (1.0f - 2.0f / (exponential(x * steep) + 1.0f));
        const vf y = x == NOTHING ? all(NOTHING) : bent;
        store(s + c, y);
        most = larger(most, y);
      }
    } else {
      for (int c = 0; c < end; c += LANES) most = larger(most, load(s + c));
    }
    return highest(most) * factor();
  }

  // Scores become weights: the softmax so far. What they are relative to need not be the highest of all, only near it:
  // it moves where a row has a much higher one, for then what was summed up has to be multiplied.
  template <bool scaled>
  void weigh(int r, float most, int num_keys, const float* value_scales) {
    const float* s = scores_ + static_cast<size_t>(r) * KEY_TILE;
    Value* p = weights_ + static_cast<size_t>(r) * KEY_TILE;
    const float by = factor(), old = highest_[r], top = most > old + NEAR ? most : old;
    const float base = top == NOTHING ? 0.0f : top;
    vf sums = {};
    for (int c = 0; c < padded(num_keys); c += 2 * LANES) {
      vf a = D::weight(load(s + c), by, base), b = D::weight(load(s + c + LANES), by, base);
      sums += a + b;
      if (scaled) {  // where nobody looks is no scale
        a = a == 0.0f ? vf{} : a * load(value_scales + c);
        b = b == 0.0f ? vf{} : b * load(value_scales + c + LANES);
      }
      D::put_two(p + c, a, b);
    }
    const float fade = old == top ? 1.0f : old == NOTHING ? 0.0f : std::exp(old - top);
    highest_[r] = top;
    total_[r] = total_[r] * fade + sum(sums);
    if (fade != 1.0f) {
      float* out = out_ + static_cast<size_t>(r) * width_;
      for (int d = 0; d < width_; d += LANES) store(out + d, load(out + d) * fade);
    }
  }

  // `next`: blocks to ask for.
  void use(int row, int rows, const uint8_t* const* values, int num_keys, const uint8_t* const* next) {
    constexpr int NV = TILE_VECTORS;
    const int vectors = width_ / LANES;
    int v = 0;
    for (; v + NV <= vectors; v += NV) use_vectors<NV>(row, rows, values, num_keys, next, v);
    for (; v < vectors; ++v) use_vectors<1>(row, rows, values, num_keys, next, v);
  }

  template <int NV>
  void use_vectors(int row, int rows, const uint8_t* const* values, int num_keys, const uint8_t* const* next, int v) {
    const int num_blocks = (num_keys + size_ - 1) / size_;
    const Value* p = weights_ + static_cast<size_t>(row) * KEY_TILE;
    float* out = out_ + static_cast<size_t>(row) * width_ + v * LANES;
    const uint8_t *shifted[KEY_TILE / 8], *after[KEY_TILE / 8];
    for (int b = 0; b < num_blocks; ++b) {
      shifted[b] = values[b] + static_cast<size_t>(v) * VECTOR;
      after[b] = next ? next[b] + static_cast<size_t>(v) * VECTOR : nullptr;
    }
    if (next) value_rows<D, NV, true>(p, rows, shifted, after, num_keys, size_, width_, out);
    else value_rows<D, NV, false>(p, rows, shifted, after, num_keys, size_, width_, out);
  }

  void leave() {
    for (int r = 0; r < rows_; ++r) {
      const float by = total_[r] != 0 ? 1.0f / total_[r] : 0.0f;
      const size_t head = static_cast<size_t>(task_.kv_head) * groups_ + r % groups_;
      put_out(op_, task_.first_token + r / groups_, head, out_ + static_cast<size_t>(r) * width_, by);
    }
  }

  void leave_partial() {
    for (int r = 0; r < rows_; ++r) {
      float* target = task_.partial + static_cast<size_t>(r) * (width_ + PARTIAL_EXTRA);
      std::memcpy(target, out_ + static_cast<size_t>(r) * width_, width_ * 4);
      target[width_] = highest_[r];
      target[width_ + 1] = total_[r];
    }
  }

 public:
  static void put_out(const Attention& op, int64_t token, size_t head, const float* x, float by) {
    const int width = op.cache.head_dim;
    const size_t at = static_cast<size_t>(token) * op.out.stride + head * width;
    alignas(64) float ready[512];
    for (int d = 0; d < op.cache.padded_dim; d += LANES) store(ready + d, load(x + d) * by);
    if (op.out.format == SK_BF16) store_bf16(static_cast<uint16_t*>(op.out.data) + at, ready, width);
    else std::memcpy(static_cast<float*>(op.out.data) + at, ready, static_cast<size_t>(width) * 4);
  }

 private:
  const Attention& op_;
  const AttentionTask& task_;
  const AttentionTask* next_;
  const int groups_, rows_, width_, size_;
  float *scores_, *out_, *highest_, *total_;
  Value *weights_, *queries_;
  uint16_t* spread_ = nullptr;
};

void attention(const Attention& op, const AttentionTask& task, const AttentionTask* next, Scratch scratch) {
  if (op.cache.format == SK_F32) QueryTile<F32>(op, task, next, scratch).run();
  else QueryTile<BF16>(op, task, next, scratch).run();
}

// Puts the parts of one token's context together; the parts of a KV head stand one after the other.
void combine(const Attention& op, const float* partials, int splits, int64_t token, int kv_head) {
  const int groups = op.heads / op.cache.kv_heads, width = op.cache.padded_dim, stride = width + PARTIAL_EXTRA;
  alignas(64) float out[512];
  for (int g = 0; g < groups; ++g) {
    float top = NOTHING, total = 0;
    for (int s = 0; s < splits; ++s) {
      const float at = partials[(static_cast<size_t>(s) * groups + g) * stride + width];
      top = at > top ? at : top;
    }
    for (int d = 0; d < width; ++d) out[d] = 0;
    for (int s = 0; s < splits; ++s) {
      const float* part = partials + (static_cast<size_t>(s) * groups + g) * stride;
      const float by = part[width] == NOTHING ? 0.0f : std::exp(part[width] - top);
      total += by * part[width + 1];
      for (int d = 0; d < width; ++d) out[d] += by * part[d];
    }
    const size_t head = static_cast<size_t>(kv_head) * groups + g;
    QueryTile<F32>::put_out(op, token, head, out, total != 0 ? 1.0f / total : 0.0f);
  }
}

}  // namespace
