// Weights in the order in which the kernels read them: panels of 64 columns, see linear.inc.h.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace servekit {

int32_t padded_k(int32_t format, int32_t k);
int64_t panel_size(int32_t format, int32_t k);

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

constexpr int64_t WORD = 4, LINE_WORDS = 16;

// The words of a panel's columns next to each other: word w of column c at (w * PANEL + c). A line of each column is
// read at a time, so that what is written to stays in the nearest cache.
void interleave(const uint8_t* const* columns, int64_t words, uint8_t* panel) {
  for (int64_t first = 0; first < words; first += LINE_WORDS) {
    const int64_t last = std::min(words, first + LINE_WORDS);
    for (int c = 0; c < PANEL; ++c)
      for (int64_t w = first; w < last; ++w) std::memcpy(panel + (w * PANEL + c) * WORD, columns[c] + w * WORD, WORD);
  }
}

// The rows of one panel in the format wanted, one after the other, before they are interleaved.
class Panel {
 public:
  Panel(int32_t format, int32_t k)
      : format_(format), k_(k), numbers_(padded_k(format, k)), size_(panel_size(format, k) / PANEL),
        bytes_(size_ * PANEL) {}

  void pack(const void* const* rows, int32_t row_format, uint8_t* panel, float* scales) {
    const uint8_t* columns[PANEL];
    for (int c = 0; c < PANEL; ++c) {
      uint8_t* mine = bytes_.data() + c * size_;
      const bool is_as_it_stands = row_format == format_ && rows[c] && k_ * item() == size_;
      columns[c] = is_as_it_stands ? static_cast<const uint8_t*>(rows[c]) : mine;
      if (!is_as_it_stands) write(rows[c], row_format, mine, scales ? scales + c : nullptr);
    }
    interleave(columns, size_ / WORD, panel);
  }

 private:
  int64_t item() const { return format_ == SK_F32 ? 4 : format_ == SK_BF16 ? 2 : 1; }

  void write(const void* row, int32_t row_format, uint8_t* words, float* scale) {
    const auto padded = static_cast<int32_t>(numbers_.size());
    read_row(row, row_format, k_, numbers_);
    if (format_ == SK_F32) std::memcpy(words, numbers_.data(), static_cast<size_t>(padded) * 4);
    else if (format_ == SK_I8) kernels().pack_i8(numbers_.data(), padded, words, scale);
    else if (format_ == SK_I4) kernels().pack_i4(numbers_.data(), padded, words);
    else
      for (int32_t i = 0; i < padded; ++i) {
        const uint16_t number = to_bf16(numbers_[i]);
        std::memcpy(words + 2 * i, &number, 2);
      }
  }

  const int32_t format_, k_;
  std::vector<float> numbers_;
  const int64_t size_;  // bytes of a column
  std::vector<uint8_t> bytes_;
};

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
  const int panels = n / PANEL;
  const int64_t size = panel_size(format, k);
  std::atomic<int> next{0};
  pool.run([&](int) {
    Panel panel(format, k);
    for (int p = next++; p < panels; p = next++)
      panel.pack(rows + p * PANEL, row_format, target + p * size, scales ? scales + p * PANEL : nullptr);
  });
}

}  // namespace servekit
