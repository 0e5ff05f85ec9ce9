// Products of rows with a packed panel of 64 columns, or a half of one.
//
// A tile of MR rows and NV vectors of columns stays in registers over all of K; what it sums up goes to a small buffer,
// and from there through the epilogue. All tiles of rows pass over the same columns before the next ones are read, and
// each asks memory for its share of those: so that reading and multiplying go on at the same time.

namespace {

using servekit::I4_GROUP;
using servekit::PANEL;
using servekit::Slice;

constexpr int VECTORS = PANEL / LANES;  // of a panel
constexpr size_t ROW = PANEL * 4;       // bytes of a panel's step: 1 float, 2 bf16 or 4 bytes a column
constexpr int LINE = 64;                // bytes
constexpr size_t SOON = 4096;           // bytes ahead that a tile asks for of what it reads itself
constexpr size_t FAR = 384 << 10;       // bytes of a pass: what is asked for that early would push out what is in use
#if defined(__AVX512F__)
constexpr int MOST_ROWS = 12, MOST_SUMS = 24;  // of a tile
#elif defined(__AVX2__)
constexpr int MOST_ROWS = 6, MOST_SUMS = 12;
#else
constexpr int MOST_ROWS = 4, MOST_SUMS = 8;
#endif
constexpr int BYTE_ROWS = MOST_ROWS < 6 ? MOST_ROWS : 6;  // beside weights of 8 or 4 bits: 408 GFLOP/s, and not 385
constexpr int CHUNK_ROWS = 4 * MOST_ROWS;                 // that pass over the same columns

// Vectors of columns of a tile with that many rows: as many as registers hold sums of.
constexpr int float_vectors(int rows) {
  if (LANES == 16) return rows > 6 ? 2 : 4;
  return rows > 1 ? 2 : LANES == 8 ? 8 : 4;
}
constexpr int i8_vectors(int rows) { return LANES == 16 || rows == 1 ? 4 : 1; }
constexpr int i4_vectors(int rows) {  // sums of whole numbers and of floats
  if (LANES == 16) return rows > 3 ? 2 : 4;
  return rows > 1 ? 1 : 4;
}

// What a tile asks memory for while it multiplies: `lines` of each step of the columns that are read next, and the rows
// of the next tile, which follow one another: a line a step is more than there is.
struct Ahead {
  const uint8_t* at;
  int lines;
  const uint8_t* rows;
  void ask(size_t step) const {
    for (int i = 0; i < lines; ++i) __builtin_prefetch(at + step * ROW + i * LINE, 0, 2);
    __builtin_prefetch(rows + step * LINE, 0, 2);
  }
};

// The same where one tile alone reads whole panels, which follow one another: what it reads itself soon, from step
// `turn` on in the next one. No cache needs to keep that.
struct Soon {
  const uint8_t* at;
  size_t turn;
  const uint8_t* next;
  void ask(size_t step) const {
    const uint8_t* from = step < turn ? at + step * ROW : next + (step - turn) * ROW;
    for (size_t i = 0; i < ROW; i += LINE) __builtin_prefetch(from + i, 0, 0);
  }
};

template <class D, int MR, int NV, class Ask>
inline void sum_tile(const typename D::Value* x, size_t stride, const uint8_t* w, size_t row, int steps,
                     vf (&sums)[MR][NV], const Ask& ahead) {
  for (int s = 0; s < steps; ++s, w += row, x += D::DEPTH) {
    ahead.ask(static_cast<size_t>(s));
    typename D::Weights weights[NV];
    for (int v = 0; v < NV; ++v) weights[v] = D::load(w + v * VECTOR);
    for (int r = 0; r < MR; ++r)
      for (int v = 0; v < NV; ++v) sums[r][v] = D::add(sums[r][v], weights[v], x + r * stride);
  }
}

// `at` is the first of the tile's columns, `out` where its sums go: [MR][PANEL].
template <class D, int MR, int NV, class Ask>
void float_tile(const sk_matrix& w, const uint8_t* at, const sk_rows& x, int first, float* out, Ask ahead) {
  const auto* values = static_cast<const typename D::Value*>(x.data) + static_cast<size_t>(first) * x.stride;
  vf sums[MR][NV] = {};
  sum_tile<D, MR, NV>(values, x.stride, at, ROW, w.k / D::DEPTH, sums, ahead);
  for (int r = 0; r < MR; ++r)
    for (int u = 0; u < NV; ++u) store(out + r * PANEL + u * LANES, sums[r][u]);
}

template <int MR, int NV, class Ask>
void i8_tile(const sk_matrix& w, const uint8_t* at, const sk_rows& x, int first, float* out, Ask ahead) {
  const int groups = x.stride / x.group, used = w.k / x.group, quads = x.group / 4;
  const int8_t* values = static_cast<const int8_t*>(x.data) + static_cast<size_t>(first) * x.stride;
  const float* scales = x.scales + static_cast<size_t>(first) * groups;
  const int32_t* offsets = x.offsets + static_cast<size_t>(first) * groups;
  size_t step = 0;
  for (int g = 0; g < used; ++g) {
    vi dots[MR][NV];
    for (int r = 0; r < MR; ++r)  // weights are stored with 128 added: taken off here
      for (int u = 0; u < NV; ++u) dots[r][u] = all_int(offsets[r * groups + g]);
    for (int q = 0; q < quads; ++q, at += ROW, values += 4) {
      ahead.ask(step++);
      vu weights[NV];
      for (int u = 0; u < NV; ++u) weights[u] = load_words(at + u * VECTOR);
      for (int r = 0; r < MR; ++r)
        for (int u = 0; u < NV; ++u)
          dots[r][u] = dot4<false>(dots[r][u], weights[u], values + static_cast<size_t>(r) * x.stride);
    }
    for (int r = 0; r < MR; ++r)
      for (int u = 0; u < NV; ++u) {
        const vf sum = to_float(dots[r][u]) * scales[r * groups + g];
        float* target = out + r * PANEL + u * LANES;
        store(target, g ? load(target) + sum : sum);
      }
  }
}

// A group of 32 is 4 rows of bytes, each of two quads of 4-bit weights, and a row of its scales and lowest values.
template <int MR, int NV, class Ask>
void i4_tile(const sk_matrix& w, const uint8_t* at, const sk_rows& x, int first, float* out, Ask ahead) {
  const int groups = x.stride / I4_GROUP, used = w.k / I4_GROUP;
  const int8_t* values = static_cast<const int8_t*>(x.data) + static_cast<size_t>(first) * x.stride;
  const float* scales = x.scales + static_cast<size_t>(first) * groups;
  const float* totals = x.sums + static_cast<size_t>(first) * groups;
  vf sums[MR][NV] = {};
  size_t step = 0;
  for (int g = 0; g < used; ++g) {
    vi dots[MR][NV] = {};
    const int8_t* from = values + g * I4_GROUP;
    for (int q = 0; q < 4; ++q, at += ROW) {
      ahead.ask(step++);
      for (int u = 0; u < NV; ++u) {
        const vu both = load_words(at + u * VECTOR);
        const vu low = both & 0x0f0f0f0fu, high = (both >> 4) & 0x0f0f0f0fu;
        for (int r = 0; r < MR; ++r) {
          const int8_t* row = from + static_cast<size_t>(r) * x.stride + 4 * q;
          dots[r][u] = dot4<true>(dot4<true>(dots[r][u], low, row), high, row + 16);
        }
      }
    }
    ahead.ask(step++);
    for (int u = 0; u < NV; ++u) {
      const vu both = load_words(at + u * VECTOR);
      const vf scale = low_halves(both), lowest = high_halves(both);
      for (int r = 0; r < MR; ++r)
        sums[r][u] = to_float(dots[r][u]) * scale * scales[r * groups + g] +
                     (lowest * totals[r * groups + g] + sums[r][u]);
    }
    at += ROW;
  }
  for (int r = 0; r < MR; ++r)
    for (int u = 0; u < NV; ++u) store(out + r * PANEL + u * LANES, sums[r][u]);
}

template <class Ask>
using Tile = void (*)(const sk_matrix&, const uint8_t*, const sk_rows&, int, float*, Ask);

template <class Ask, int MR, int NV>
Tile<Ask> tile_of(int format) {
  if constexpr (MR * NV > MOST_SUMS) return nullptr;
  else switch (format) {
    case SK_F32: return float_tile<F32, MR, NV, Ask>;
    case SK_BF16: return float_tile<BF16, MR, NV, Ask>;
    case SK_I8: return i8_tile<MR, NV, Ask>;
    default: return i4_tile<MR, NV, Ask>;
  }
}

template <class Ask, int NV>
Tile<Ask> tile_of(int rows, int format) {
  switch (rows) {
    case 1: return tile_of<Ask, 1, NV>(format);
    case 2: return tile_of<Ask, 2, NV>(format);
    case 3: return tile_of<Ask, 3, NV>(format);
    case 4: return tile_of<Ask, 4, NV>(format);
#if defined(__AVX2__)
    case 5: return tile_of<Ask, 5, NV>(format);
    case 6: return tile_of<Ask, 6, NV>(format);
#endif
#if defined(__AVX512F__)
    case 7: return tile_of<Ask, 7, NV>(format);
    case 8: return tile_of<Ask, 8, NV>(format);
    case 9: return tile_of<Ask, 9, NV>(format);
    case 10: return tile_of<Ask, 10, NV>(format);
    case 11: return tile_of<Ask, 11, NV>(format);
    case 12: return tile_of<Ask, 12, NV>(format);
#endif
    default: return nullptr;
  }
}

Tile<Ahead> tile_of(int rows, int vectors, int format) {
  switch (vectors) {
    case 1: return tile_of<Ahead, 1>(rows, format);
    case 2: return tile_of<Ahead, 2>(rows, format);
#if defined(__AVX2__) && !defined(__AVX512F__)
    case 8: return tile_of<Ahead, 8>(rows, format);
#endif
    default: return tile_of<Ahead, 4>(rows, format);
  }
}

// Of all columns of a panel at once; null where no tile is as wide.
Tile<Soon> whole_tile_of(int rows, int format) {
  if constexpr (VECTORS <= MOST_SUMS) return tile_of<Soon, VECTORS>(rows, format);
  else return nullptr;
}

int most_rows_of(int format) { return format == SK_I8 || format == SK_I4 ? BYTE_ROWS : MOST_ROWS; }

int vectors_of(int rows, int format) {
  return format == SK_I4 ? i4_vectors(rows) : format == SK_I8 ? i8_vectors(rows) : float_vectors(rows);
}

void finish(const sk_matrix& w, Slice slice, float* tile, int rows, int first, int epilogue, const sk_rows& out) {
  const int column = slice.panel * PANEL + slice.first, columns = slice.columns;
  for (int r = 0; r < rows; ++r) {
    float* sums = tile + r * PANEL;
    if (w.scales)
      for (int c = 0; c < columns; c += LANES) store(sums + c, load(sums + c) * load(w.scales + column + c));
    if (w.bias)
      for (int c = 0; c < columns; c += LANES) store(sums + c, load(sums + c) + load(w.bias + column + c));
    const size_t row = static_cast<size_t>(first + r) * out.stride;
    if (epilogue == SK_SWIGLU) {  // 32 gates, and the 32 that they let through
      for (int c = 0; c < PANEL / 2; c += LANES) {
        const vf gate = load(sums + c), up = load(sums + PANEL / 2 + c);
        const vf open = out.format == SK_BF16 ? near_quotient(gate, BF16::weight(gate, -1.0f, 0.0f) + 1.0f)
                                              : quotient(gate, exponential(-gate) + 1.0f);
        store(sums + c, open * up);
      }
    }
    const int from = epilogue == SK_SWIGLU ? column / 2 : column, width = epilogue == SK_SWIGLU ? PANEL / 2 : columns;
    if (out.format == SK_BF16) {
      auto* target = static_cast<uint16_t*>(out.data) + row + from;
      for (int c = 0; c < width; c += LANES) store_bf16(target + c, load(sums + c));
    } else {
      auto* target = static_cast<float*>(out.data) + row + from;
      for (int c = 0; c < width; c += LANES)
        store(target + c, epilogue == SK_ADD ? load(target + c) + load(sums + c) : load(sums + c));
    }
  }
}

size_t panel_bytes(const sk_matrix& w) {
  switch (w.format) {
    case SK_F32: return static_cast<size_t>(w.k) * PANEL * 4;
    case SK_BF16: return static_cast<size_t>(w.k) * PANEL * 2;
    case SK_I8: return static_cast<size_t>(w.k) * PANEL;
    default: return static_cast<size_t>(w.k) / I4_GROUP * 5 * ROW;
  }
}

const uint8_t* weights_of(const sk_matrix& w, Slice slice) {
  return static_cast<const uint8_t*>(w.data) + static_cast<size_t>(slice.panel) * panel_bytes(w) + slice.first * 4;
}

const uint8_t* row_of(const sk_rows& x, int row) {
  const size_t item = x.format == SK_F32 ? 4 : x.format == SK_BF16 ? 2 : 1;
  return static_cast<const uint8_t*>(x.data) + static_cast<size_t>(row) * x.stride * item;
}

// Where all rows fit in one tile of whole panels: weights are read once, in their order.
bool linear_at_once(const sk_matrix& w, const sk_rows& x, Slice slice, int first, int last, float* buffer,
                    const uint8_t* next) {
  const int rows = last - first;
  if (rows > most_rows_of(w.format) || vectors_of(rows, w.format) != VECTORS || slice.columns != PANEL) return false;
  const size_t bytes = panel_bytes(w), soon = bytes < SOON ? bytes : SOON;
  const uint8_t* weights = weights_of(w, slice);
  const Soon ahead = {weights + soon, (bytes - soon) / ROW, next ? next : weights};
  whole_tile_of(rows, w.format)(w, weights, x, first, buffer, ahead);
  return true;
}

void linear(const sk_matrix& w, const sk_rows& x, Slice slice, int first, int last, int epilogue, const sk_rows& out,
            const uint8_t* next) {
  alignas(64) float buffer[CHUNK_ROWS * PANEL];
  if (linear_at_once(w, x, slice, first, last, buffer, next))
    return finish(w, slice, buffer, last - first, first, epilogue, out);
  const uint8_t* weights = weights_of(w, slice);
  const int slice_vectors = slice.columns / LANES;
  for (int row = first; row < last;) {
    const int left = last - row, rows = left < CHUNK_ROWS ? left : CHUNK_ROWS;
    const int limit = most_rows_of(w.format);
    const int tiles = (rows + limit - 1) / limit, most = (rows + tiles - 1) / tiles;
    const int wide = vectors_of(most, w.format), vectors = wide < slice_vectors ? wide : slice_vectors;
    const int lines = vectors * VECTOR < LINE ? 1 : vectors * VECTOR / LINE;
    const bool is_first = row == first, is_last = row + rows == last;
    const bool is_far = panel_bytes(w) / VECTORS * vectors > FAR;
    for (int v = 0; v < slice_vectors; v += vectors) {
      const bool more = v + vectors < slice_vectors;
      const uint8_t* then = more ? weights + (v + vectors) * VECTOR : next;
      const bool asks = then && !is_far && (more ? is_first : is_last);
      for (int t = 0; t < tiles; ++t) {
        const int from = rows * t / tiles, count = rows * (t + 1) / tiles - from;
        Ahead ahead = {nullptr, 0, row_of(x, row + from + count)};
        const int begin = lines * t / tiles, end = lines * (t + 1) / tiles;
        if (asks && begin < end) ahead.at = then + begin * LINE, ahead.lines = end - begin;
        tile_of(count, vectors, w.format)(w, weights + v * VECTOR, x, row + from, buffer + from * PANEL + v * LANES,
                                          ahead);
      }
    }
    finish(w, slice, buffer, rows, row, epilogue, out);
    row += rows;
  }
}

}  // namespace

namespace {

// Products of numbers that stay in registers: what the instructions can do, in operations. They come from `out`, and
// go there, so that the compiler must do them all. Sums begin apart, or it would see that they are one.
template <class D, int SUMS>
double multiply_only(int rounds, float* out) {
  const auto* x = reinterpret_cast<const typename D::Value*>(out);
  vf sums[SUMS];
#pragma GCC unroll 32
  for (int s = 0; s < SUMS; ++s) sums[s] = all(out[s % 16] + static_cast<float>(s));
  const typename D::Weights weights = D::load(reinterpret_cast<const uint8_t*>(out));
  for (int i = 0; i < rounds; ++i)
#pragma GCC unroll 32
    for (int s = 0; s < SUMS; ++s) sums[s] = D::add(sums[s], weights, x);
  vf total = {};
  for (int s = 0; s < SUMS; ++s) total += sums[s];
  store(out, total);
  return 2.0 * rounds * SUMS * LANES * D::DEPTH;
}

template <int SUMS>
double multiply_bytes_only(int rounds, float* out) {
  const auto* x = reinterpret_cast<const int8_t*>(out);
  vi sums[SUMS];
#pragma GCC unroll 32
  for (int s = 0; s < SUMS; ++s) sums[s] = all_int(static_cast<int32_t>(out[s % 16]) + s);
  const vu weights = load_words(out);
  for (int i = 0; i < rounds; ++i)
#pragma GCC unroll 32
    for (int s = 0; s < SUMS; ++s) sums[s] = dot4<true>(sums[s], weights, x);
  vi total = {};
  for (int s = 0; s < SUMS; ++s) total += sums[s];
  store(out, to_float(total));
  return 2.0 * rounds * SUMS * LANES * 4;
}

double peak(int format, int rounds, float* out) {
  if (format == SK_F32) return multiply_only<F32, MOST_SUMS>(rounds, out);
  return format == SK_BF16 ? multiply_only<BF16, MOST_SUMS>(rounds, out) : multiply_bytes_only<MOST_SUMS>(rounds, out);
}

}  // namespace
