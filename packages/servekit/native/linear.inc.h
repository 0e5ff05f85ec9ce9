// Products of a few rows with a packed panel of 64 columns.
//
// A tile of MR rows and NV vectors of columns stays in registers over all of K; what it sums up goes to a small buffer,
// and from there through the epilogue. A panel is read from memory once and from the L2 cache for further tiles.

namespace {

using servekit::I4_GROUP;
using servekit::PANEL;

constexpr int VECTORS = PANEL / LANES;  // of a panel
constexpr size_t ROW = PANEL * 4;       // bytes of a panel's step: 1 float, 2 bf16 or 4 bytes a column
#if defined(__AVX512F__)
constexpr int TILE_ROWS = 6, TILE_VECTORS = 4, INT_VECTORS = 2;
#elif defined(__AVX2__)
constexpr int TILE_ROWS = 6, TILE_VECTORS = 2, INT_VECTORS = 1;
#else
constexpr int TILE_ROWS = 4, TILE_VECTORS = 2, INT_VECTORS = 1;
#endif

template <class D, int MR, int NV>
inline void sum_tile(const typename D::Value* x, size_t stride, const uint8_t* w, size_t row, int steps,
                     vf (&sums)[MR][NV]) {
  for (int s = 0; s < steps; ++s, w += row, x += D::DEPTH) {
    typename D::Weights weights[NV];
    for (int v = 0; v < NV; ++v) weights[v] = D::load(w + v * VECTOR);
    for (int r = 0; r < MR; ++r)
      for (int v = 0; v < NV; ++v) sums[r][v] = D::add(sums[r][v], weights[v], x + r * stride);
  }
}

template <class D, int MR, int NV>
void float_tile(const sk_matrix& w, const uint8_t* panel, const sk_rows& x, int first, float* out) {
  const auto* values = static_cast<const typename D::Value*>(x.data) + static_cast<size_t>(first) * x.stride;
  for (int v = 0; v < VECTORS; v += NV) {
    vf sums[MR][NV] = {};
    sum_tile<D, MR, NV>(values, x.stride, panel + v * VECTOR, ROW, w.k / D::DEPTH, sums);
    for (int r = 0; r < MR; ++r)
      for (int u = 0; u < NV; ++u) store(out + r * PANEL + (v + u) * LANES, sums[r][u]);
  }
}

template <int MR, int NV>
void i8_tile(const sk_matrix& w, const uint8_t* panel, const sk_rows& x, int first, float* out) {
  const int groups = x.stride / x.group, used = w.k / x.group, quads = x.group / 4;
  const int8_t* values = static_cast<const int8_t*>(x.data) + static_cast<size_t>(first) * x.stride;
  const float* scales = x.scales + static_cast<size_t>(first) * groups;
  const int32_t* totals = x.sums + static_cast<size_t>(first) * groups;
  for (int v = 0; v < VECTORS; v += NV) {
    vf sums[MR][NV] = {};
    const uint8_t* at = panel + v * VECTOR;
    for (int g = 0; g < used; ++g) {
      vi dots[MR][NV];
      for (int r = 0; r < MR; ++r)  // weights are stored with 128 added: taken off here
        for (int u = 0; u < NV; ++u) dots[r][u] = all_int(-128 * totals[r * groups + g]);
      const int8_t* from = values + g * x.group;
      for (int q = 0; q < quads; ++q, at += ROW) {
        vu weights[NV];
        for (int u = 0; u < NV; ++u) weights[u] = load_words(at + u * VECTOR);
        for (int r = 0; r < MR; ++r)
          for (int u = 0; u < NV; ++u)
            dots[r][u] = dot4<false>(dots[r][u], weights[u], from + static_cast<size_t>(r) * x.stride + 4 * q);
      }
      for (int r = 0; r < MR; ++r)
        for (int u = 0; u < NV; ++u) sums[r][u] += to_float(dots[r][u]) * scales[r * groups + g];
    }
    for (int r = 0; r < MR; ++r)
      for (int u = 0; u < NV; ++u) store(out + r * PANEL + (v + u) * LANES, sums[r][u]);
  }
}

// A group of 32 is 4 rows of bytes, each of two quads of 4-bit weights, and a row of its scales and lowest values.
template <int MR, int NV>
void i4_tile(const sk_matrix& w, const uint8_t* panel, const sk_rows& x, int first, float* out) {
  const int groups = x.stride / I4_GROUP, used = w.k / I4_GROUP;
  const int8_t* values = static_cast<const int8_t*>(x.data) + static_cast<size_t>(first) * x.stride;
  const float* scales = x.scales + static_cast<size_t>(first) * groups;
  const int32_t* totals = x.sums + static_cast<size_t>(first) * groups;
  for (int v = 0; v < VECTORS; v += NV) {
    vf sums[MR][NV] = {};
    const uint8_t* at = panel + v * VECTOR;
    for (int g = 0; g < used; ++g) {
      vi dots[MR][NV] = {};
      const int8_t* from = values + g * I4_GROUP;
      for (int q = 0; q < 4; ++q, at += ROW) {
        for (int u = 0; u < NV; ++u) {
          const vu both = load_words(at + u * VECTOR);
          const vu low = both & 0x0f0f0f0fu, high = (both >> 4) & 0x0f0f0f0fu;
          for (int r = 0; r < MR; ++r) {
            const int8_t* row = from + static_cast<size_t>(r) * x.stride + 4 * q;
            dots[r][u] = dot4<true>(dot4<true>(dots[r][u], low, row), high, row + 16);
          }
        }
      }
      for (int u = 0; u < NV; ++u) {
        const vu both = load_words(at + u * VECTOR);
        const vf scale = low_halves(both), lowest = high_halves(both);
        for (int r = 0; r < MR; ++r) {
          const float by = scales[r * groups + g], total = by * static_cast<float>(totals[r * groups + g]);
          sums[r][u] = to_float(dots[r][u]) * by * scale + (lowest * total + sums[r][u]);
        }
      }
      at += ROW;
    }
    for (int r = 0; r < MR; ++r)
      for (int u = 0; u < NV; ++u) store(out + r * PANEL + (v + u) * LANES, sums[r][u]);
  }
}

using Tile = void (*)(const sk_matrix&, const uint8_t*, const sk_rows&, int, float*);

template <int MR>
Tile tile_of(int format) {
  constexpr int one = MR == 1 ? VECTORS : 1;  // a single row leaves registers for the whole panel
  constexpr int NV = one > TILE_VECTORS ? one : TILE_VECTORS, IV = MR == 1 ? (VECTORS < 4 ? VECTORS : 4) : INT_VECTORS;
  switch (format) {
    case SK_F32: return float_tile<F32, MR, NV>;
    case SK_BF16: return float_tile<BF16, MR, NV>;
    case SK_I8: return i8_tile<MR, IV>;
    default: return i4_tile<MR, IV>;
  }
}

Tile tile_of(int rows, int format) {
  switch (rows) {
    case 1: return tile_of<1>(format);
    case 2: return tile_of<2>(format);
    case 3: return tile_of<3>(format);
    case 4: return tile_of<4>(format);
    case 5: return tile_of<5>(format);
    default: return tile_of<6>(format);
  }
}

void finish(const sk_matrix& w, int panel, float* tile, int rows, int first, int epilogue, const sk_rows& out) {
  const int column = panel * PANEL;
  for (int r = 0; r < rows; ++r) {
    float* sums = tile + r * PANEL;
    if (w.scales)
      for (int c = 0; c < PANEL; c += LANES) store(sums + c, load(sums + c) * load(w.scales + column + c));
    if (w.bias)
      for (int c = 0; c < PANEL; c += LANES) store(sums + c, load(sums + c) + load(w.bias + column + c));
    const size_t row = static_cast<size_t>(first + r) * out.stride;
    if (epilogue == SK_SWIGLU) {  // 32 gates, and the 32 that they let through
      for (int c = 0; c < PANEL / 2; c += LANES) {
        const vf gate = load(sums + c), up = load(sums + PANEL / 2 + c);
        store(sums + c, gate / (exponential(-gate) + 1.0f) * up);
      }
    }
    const int from = epilogue == SK_SWIGLU ? column / 2 : column, width = epilogue == SK_SWIGLU ? PANEL / 2 : PANEL;
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

void linear(const sk_matrix& w, const sk_rows& x, int panel, int first, int last, int epilogue, const sk_rows& out) {
  alignas(64) float tile[6 * PANEL];
  const uint8_t* weights = static_cast<const uint8_t*>(w.data) + static_cast<size_t>(panel) * panel_bytes(w);
  const int most = TILE_ROWS;
  for (int row = first; row < last;) {
    int rows = last - row;
    if (rows > most) rows = rows < 2 * most ? (rows + 1) / 2 : most;  // the last two tiles share what is left
    tile_of(rows, w.format)(w, weights, x, row, tile);
    finish(w, panel, tile, rows, row, epilogue, out);
    row += rows;
  }
}

}  // namespace
