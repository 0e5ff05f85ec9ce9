// Weights in the order in which the kernels read them: panels of 64 columns, see linear.inc.h.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

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
  const int32_t unit = format == SK_F32 ? 1 : format == SK_BF16 ? 2 : format == SK_I8 ? I8_UNIT : I4_GROUP;
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
          kernels().pack_i8(row.data(), padded, c, panel, scales + p * PANEL + c);
        else
          kernels().pack_i4(row.data(), padded, c, panel);
      }
    }
  });
}

}  // namespace servekit
