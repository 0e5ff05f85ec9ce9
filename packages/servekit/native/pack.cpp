// Weights in the order in which the kernels read them: panels of 64 columns, see linear.inc.h.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "pool.h"

namespace servekit {

namespace {

float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Numbers of a row as floats, zeros behind them.
void read_row(const void* from, int32_t format, int32_t k, std::vector<float>& out) {
  std::fill(out.begin(), out.end(), 0.0f);
  if (!from) return;
  if (format == SK_F32) {
    std::memcpy(out.data(), from, static_cast<size_t>(k) * 4);
    return;
  }
  const auto* numbers = static_cast<const uint16_t*>(from);
  for (int32_t i = 0; i < k; ++i) out[i] = from_bf16(numbers[i]);
}

void pack_i8(const std::vector<float>& row, int column, uint8_t* panel, float* scale) {
  float most = 0;
  for (const float x : row) most = std::max(most, std::fabs(x));
  *scale = most / 127.0f;
  const float inverse = most > 0 ? 127.0f / most : 0.0f;
  for (size_t k = 0; k < row.size(); ++k)
    panel[(k / 4 * PANEL + column) * 4 + k % 4] = static_cast<uint8_t>(std::nearbyintf(row[k] * inverse) + 128.0f);
}

// The scale and lowest value of 16 levels: those of the range, or a slightly smaller range where that is nearer.
void levels_of(const float* x, float* scale, float* lowest) {
  const auto range = std::minmax_element(x, x + I4_GROUP);
  const float low = *range.first, high = *range.second;
  float best = INFINITY;
  for (int shrink = 0; shrink < 8; ++shrink) {
    const float cut = (high - low) * 0.02f * static_cast<float>(shrink);
    const float s = from_bf16(to_bf16((high - low - 2 * cut) / 15.0f)), m = from_bf16(to_bf16(low + cut));
    float error = 0;
    for (int i = 0; i < I4_GROUP; ++i) {
      const float level = s > 0 ? std::min(15.0f, std::max(0.0f, std::nearbyintf((x[i] - m) / s))) : 0.0f;
      const float off = x[i] - (m + s * level);
      error += off * off;
    }
    if (error < best) {
      best = error;
      *scale = s;
      *lowest = m;
    }
  }
}

void pack_i4(const std::vector<float>& row, int column, uint8_t* panel) {
  constexpr size_t line = PANEL * 4;
  for (size_t g = 0; g < row.size() / I4_GROUP; ++g) {
    uint8_t* group = panel + g * 5 * line;
    float scale = 0, lowest = 0;
    const float* x = row.data() + g * I4_GROUP;
    levels_of(x, &scale, &lowest);
    auto level = [&](int k) {
      const float at = scale > 0 ? std::nearbyintf((x[k] - lowest) / scale) : 0.0f;
      return static_cast<uint8_t>(std::min(15.0f, std::max(0.0f, at)));
    };
    for (int quad = 0; quad < 4; ++quad)
      for (int i = 0; i < 4; ++i)
        group[quad * line + static_cast<size_t>(column) * 4 + i] =
            static_cast<uint8_t>(level(4 * quad + i) | level(16 + 4 * quad + i) << 4);
    const uint32_t both = to_bf16(scale) | static_cast<uint32_t>(to_bf16(lowest)) << 16;
    std::memcpy(group + 4 * line + static_cast<size_t>(column) * 4, &both, 4);
  }
}

void pack_bf16_pairs(const void* const* rows, int32_t k, int32_t padded, uint8_t* panel) {
  auto* target = reinterpret_cast<uint32_t*>(panel);
  for (int c = 0; c < PANEL; ++c) {
    const auto* from = static_cast<const uint16_t*>(rows[c]);
    for (int32_t i = 0; i < padded; i += 2) {
      const uint32_t low = from ? from[i] : 0, high = from && i + 1 < k ? from[i + 1] : 0;
      target[static_cast<size_t>(i / 2) * PANEL + c] = low | high << 16;
    }
  }
}

}  // namespace

int32_t padded_k(int32_t format, int32_t k) {
  const int32_t unit = format == SK_F32 ? 1 : format == SK_BF16 ? 2 : format == SK_I8 ? I8_GROUP : I4_GROUP;
  return (k + unit - 1) / unit * unit;
}

int64_t panel_size(int32_t format, int32_t k) {
  const int64_t padded = padded_k(format, k);
  switch (format) {
    case SK_F32: return padded * PANEL * 4;
    case SK_BF16: return padded * PANEL * 2;
    case SK_I8: return padded * PANEL;
    default: return padded / I4_GROUP * 5 * PANEL * 4;
  }
}

void pack(Pool& pool, int32_t format, int32_t n, int32_t k, const void* const* rows, int32_t row_format,
          uint8_t* target, float* scales) {
  const int32_t padded = padded_k(format, k), panels = n / PANEL;
  const int64_t size = panel_size(format, k);
  std::atomic<int> next{0};
  pool.run([&](int) {
    std::vector<float> row(padded);
    for (int p = next++; p < panels; p = next++) {
      uint8_t* panel = target + p * size;
      if (format == SK_BF16 && row_format == SK_BF16) {
        pack_bf16_pairs(rows + p * PANEL, k, padded, panel);
        continue;
      }
      for (int c = 0; c < PANEL; ++c) {
        read_row(rows[p * PANEL + c], row_format, k, row);
        if (format == SK_F32)
          for (int32_t i = 0; i < padded; ++i) reinterpret_cast<float*>(panel)[static_cast<size_t>(i) * PANEL + c] = row[i];
        else if (format == SK_BF16)
          for (int32_t i = 0; i < padded; ++i)
            reinterpret_cast<uint16_t*>(panel)[(static_cast<size_t>(i / 2) * PANEL + c) * 2 + i % 2] = to_bf16(row[i]);
        else if (format == SK_I8)
          pack_i8(row, c, panel, scales + p * PANEL + c);
        else
          pack_i4(row, c, panel);
      }
    }
  });
}

}  // namespace servekit
