// Weights of 8 and 4 bits: one row of a matrix as the words that its packed column is made of, one after the other.

namespace {

// Symmetric, one scale a column; 128 is added.
void pack_i8(const float* row, int k, uint8_t* words, float* scale) {
  float most = 0;
  for (int i = 0; i < k; ++i) most = std::fabs(row[i]) > most ? std::fabs(row[i]) : most;
  *scale = most / 127.0f;
  const float inverse = most > 0 ? 127.0f / most : 0.0f;
  for (int i = 0; i < k; ++i) words[i] = static_cast<uint8_t>(std::nearbyint(row[i] * inverse) + 128.0f);
}

struct Levels {
  float scale, lowest;
};

// Which of 16 levels each number of a group is nearest to, and the square of what is lost.
inline float nearest(const float* x, Levels levels, float* out) {
  const float inverse = levels.scale > 0 ? 1.0f / levels.scale : 0.0f;
  vf lost = {};
  for (int i = 0; i < I4_GROUP; i += LANES) {
    constexpr float magic = 12582912.0f;  // what is added to it is rounded to a whole number
    vf at = (load(x + i) - levels.lowest) * inverse;
    at = (larger(at < 15.0f ? at : all(15.0f), vf{}) + magic) - magic;
    const vf off = load(x + i) - (at * levels.scale + levels.lowest);
    store(out + i, at);
    lost += off * off;
  }
  return sum(lost);
}

// A scale and a lowest value for each group: of its whole range, or of a little less where more is nearer then.
void pack_i4(const float* row, int k, uint8_t* words) {
  for (int g = 0; g < k / I4_GROUP; ++g) {
    const float* x = row + g * I4_GROUP;
    vf least = load(x), most = least;
    for (int i = LANES; i < I4_GROUP; i += LANES) {
      least = -larger(-least, -load(x + i));
      most = larger(most, load(x + i));
    }
    const float low = -highest(-least), range = highest(most) - low;
    Levels best = {0, 0};
    float least_lost = INFINITY;
    alignas(64) float levels[I4_GROUP];
    for (int cut = 0; cut < 8; ++cut) {
      const float off = range * 0.02f * static_cast<float>(cut);
      const Levels tried = {from_bf16(to_bf16((range - 2 * off) / 15.0f)), from_bf16(to_bf16(low + off))};
      const float lost = nearest(x, tried, levels);
      if (lost < least_lost) {
        least_lost = lost;
        best = tried;
      }
    }
    nearest(x, best, levels);
    for (int i = 0; i < I4_GROUP / 2; ++i)
      *words++ = static_cast<uint8_t>(static_cast<int>(levels[i]) | static_cast<int>(levels[I4_GROUP / 2 + i]) << 4);
    const uint32_t both = to_bf16(best.scale) | static_cast<uint32_t>(to_bf16(best.lowest)) << 16;
    std::memcpy(words, &both, 4);
    words += 4;
  }
}

}  // namespace
