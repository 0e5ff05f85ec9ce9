// Programs, and the C interface.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace servekit {

int32_t padded_k(int32_t format, int32_t k);
int64_t panel_size(int32_t format, int32_t k);
void pack(Pool& pool, int32_t format, int32_t n, int32_t k, const void* const* rows, int32_t row_format,
          uint8_t* target, float* scales);

size_t attention_scratch(const Attention& op) {
  const size_t groups = op.heads / op.cache.kv_heads, rows = std::max<size_t>(groups, QUERY_ROWS) + groups;
  const size_t spread = op.cache.format == SK_I8 ? static_cast<size_t>(KEY_TILE) * op.cache.padded_dim * 2 : 0;
  return rows * (KEY_TILE * 8 + static_cast<size_t>(op.cache.padded_dim) * 8 + 8) + spread + 1024;
}

namespace {

const Kernels* selected = nullptr;

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (vnni && __builtin_cpu_supports("avx512bf16")) found.push_back(&avx512_bf16_kernels);
  if (vnni) found.push_back(&avx512_vnni_kernels);
  if (avx512) found.push_back(&avx512_kernels);
  if (avx2) found.push_back(&avx2_kernels);
#endif
#if defined(__aarch64__)
  found.push_back(&neon_kernels);
#else
  found.push_back(&scalar_kernels);
#endif
  return found;
}

}  // namespace

const Kernels& kernels() {
  if (!selected) selected = supported().front();
  return *selected;
}

namespace {

struct Context {
  const sk_step* step;
  std::vector<int32_t> sequence_of;                  // of each token
  std::vector<int64_t> first_of;                     // first token of each sequence
};

// Which tasks a thread begins with: neighbours, so that it reads one long piece of memory.
struct alignas(64) Share {
  std::atomic<int> next{0};
  int last = 0;
  Share() = default;
  Share(const Share&) {}  // only made, never copied with tasks in it
};

// An operation is cut into tasks. Each thread takes its own share of them one by one, then what others have left.
struct Operation {
  virtual ~Operation() = default;
  int rows(const Context& c) const { return of_picks ? c.step->num_picks : c.step->tokens; }
  virtual int tasks(const Context&) const = 0;
  virtual int first_task(const Context& c, int thread) const {  // of a thread's share; of `threads`: behind the last
    return static_cast<int>(static_cast<int64_t>(tasks(c)) * thread / static_cast<int64_t>(shares.size()));
  }
  virtual void run(const Context&, int task, int thread, Scratch scratch) const = 0;
  virtual size_t scratch() const { return 0; }
  virtual const uint8_t* first_weights(const Context&, int /*thread*/) const { return nullptr; }  // that it will read
  bool of_picks = false;  // its rows are the picked ones, not the step's tokens
  const Operation* reader = nullptr;  // the next one that reads weights
  std::vector<Share> shares;
  std::atomic<int> done{0};
  int64_t nanoseconds = 0;
};

constexpr int PEAK_PARTS = 64;
constexpr int FEW_TOKENS = 12;  // of a step that takes as long as reading the weights does
constexpr int64_t READ_PART = 1 << 18;   // words
constexpr int64_t SMALL_STEP = 1 << 19;  // multiplications, or numbers read: less is done before another thread wakes

int share(int64_t count, int part) { return static_cast<int>((count + part - 1) / part); }

// Work on one token at a time; a task is a few tokens.
template <int PART>
struct RowOperation : Operation {
  virtual void row(const Context&, int token) const = 0;
  int tasks(const Context& c) const final { return share(rows(c), PART); }
  void run(const Context& c, int task, int, Scratch) const final {
    const int last = std::min(rows(c), (task + 1) * PART);
    for (int token = task * PART; token < last; ++token) row(c, token);
  }
};

struct Embed final : RowOperation<16> {
  const void* table;
  int32_t format, width;
  sk_rows out;
  void row(const Context& c, int token) const override {
    float* target = static_cast<float*>(out.data) + static_cast<size_t>(token) * out.stride;
    const size_t from = static_cast<size_t>(c.step->token_ids[token]) * width;
    if (format == SK_F32) {
      std::memcpy(target, static_cast<const float*>(table) + from, static_cast<size_t>(width) * 4);
      return;
    }
    const auto* source = static_cast<const uint16_t*>(table) + from;
    for (int d = 0; d < width; ++d) {
      const uint32_t bits = static_cast<uint32_t>(source[d]) << 16;
      std::memcpy(target + d, &bits, 4);
    }
  }
};

struct Norm final : RowOperation<4> {
  sk_rows x, out;
  const float* weight;
  float eps;
  void row(const Context&, int token) const override {
    kernels().norm(static_cast<const float*>(x.data) + static_cast<size_t>(token) * x.stride, weight, eps, out, token);
  }
};

struct Convert final : RowOperation<4> {
  sk_rows x, out;  // x without data: the step's input
  int32_t width;
  void row(const Context& c, int token) const override {
    const float* from = x.data ? static_cast<const float*>(x.data) : c.step->input;
    kernels().convert(from + token * (x.data ? x.stride : c.step->input_stride), width, out, token);
  }
};

// The rows that logits are wanted of, one after the other.
struct Pick final : RowOperation<4> {
  sk_rows x, out;
  int32_t width;
  void row(const Context& c, int index) const override {
    const auto token = static_cast<size_t>(c.step->picks[index]);
    kernels().convert(static_cast<const float*>(x.data) + token * x.stride, width, out, index);
  }
};

struct Sum final : RowOperation<16> {
  sk_rows y, x;
  void row(const Context&, int token) const override {
    const float* from = static_cast<const float*>(y.data) + static_cast<size_t>(token) * y.stride;
    float* to = static_cast<float*>(x.data) + static_cast<size_t>(token) * x.stride;
    for (int d = 0; d < x.cols; ++d) to[d] += from[d];
  }
};

struct Linear final : Operation {
  static constexpr int FEW_ROWS = 96, FEWEST_ROWS = 48, ROW_UNIT = 12;  // the last: rows of a tile
  static constexpr int NEAR_BYTES = 512 << 10;                          // of rows, that stay in a core's cache
  sk_rows x, out;
  sk_matrix weight;
  int32_t epilogue, threads;
  int panels() const { return weight.n / PANEL; }
  // Each thread's columns, those of one thread after those of another: whole panels, but a half of one where threads
  // would not end together otherwise. Gates stand in a half of their own: their panels are not halved.
  std::vector<Slice> slices;
  std::vector<int> firsts;  // of each thread's slices

  void cut() {
    const bool uneven = panels() < 16 * threads && panels() % threads != 0 && epilogue != SK_SWIGLU;
    const int part = uneven ? PANEL / 2 : PANEL, parts = weight.n / part;
    for (int t = 0; t < threads; ++t) {
      firsts.push_back(static_cast<int>(slices.size()));
      const int last = parts * (t + 1) / threads * part;
      for (int column = parts * t / threads * part, columns; column < last; column += columns) {
        columns = std::min(PANEL - column % PANEL, last - column);
        slices.push_back({column / PANEL, column % PANEL, columns});
      }
    }
    firsts.push_back(static_cast<int>(slices.size()));
  }
  // Many rows are cut into parts that stay in the cache of a core, as many for each thread: a thread goes over all
  // panels with one part, then with the next. Few rows are not: each thread reads panels of its own.
  int parts(int count) const {
    const int most = count / FEWEST_ROWS / threads * threads;
    if (count <= FEW_ROWS || most == 0) return 1;
    const int64_t bytes = static_cast<int64_t>(x.stride) * (x.format == SK_F32 ? 4 : x.format == SK_BF16 ? 2 : 1);
    const int64_t wanted = share(count * bytes, NEAR_BYTES);
    return static_cast<int>(std::min<int64_t>(most, share(wanted, threads) * threads));
  }

  int tasks(const Context& c) const override { return static_cast<int>(slices.size()) * parts(rows(c)); }
  int first_task(const Context& c, int thread) const override {
    const int count = parts(rows(c));
    return count == 1 ? firsts[thread] : count / threads * thread * static_cast<int>(slices.size());
  }

  const uint8_t* weights(int index) const {
    const Slice at = slices[index];
    return static_cast<const uint8_t*>(weight.data) + at.panel * panel_size(weight.format, weight.k) + at.first * 4;
  }

  const uint8_t* first_weights(const Context& c, int thread) const override {
    if (rows(c) == 0) return nullptr;
    if (parts(rows(c)) > 1) return weights(0);
    return firsts[thread] < firsts[thread + 1] ? weights(firsts[thread]) : nullptr;
  }

  void run(const Context& c, int task, int thread, Scratch) const override {
    const int count = static_cast<int>(slices.size()), index = task % count, part = task / count;
    const int tokens = rows(c), num_parts = parts(tokens);
    const auto begin = [&](int p) {
      const auto row = static_cast<int>(static_cast<int64_t>(tokens) * p / num_parts);
      return p == num_parts ? tokens : row / ROW_UNIT * ROW_UNIT;
    };
    const uint8_t* next = nullptr;
    if (task + 1 < shares[thread].last) next = weights((task + 1) % count);
    else if (reader) next = reader->first_weights(c, thread);
    kernels().linear(weight, x, slices[index], begin(part), begin(part + 1), epilogue, out, next);
  }
};

// The highest logit of each row, of which nothing else is kept. A task is a part of the vocabulary: it makes logits for
// some rows and columns at a time, and looks at them while they lie in the cache of its core.
struct Highest final : Operation {
  static constexpr int NEAR_ROWS = 64, NEAR_PANELS = 16;
  static constexpr int64_t NEAR_WEIGHTS = 1 << 18;  // bytes that stay in the cache for all rows
  sk_rows x;
  sk_matrix weight;
  int64_t columns, capacity;  // of the vocabulary, of rows
  int parts, near_panels;
  mutable std::vector<float> highest;  // [parts][capacity]
  mutable std::vector<int64_t> ids;

  int tasks(const Context& c) const override { return rows(c) ? parts : 0; }
  size_t scratch() const override { return sizeof(float) * NEAR_ROWS * near_columns(); }
  int near_columns() const { return near_panels * PANEL + 16; }  // a line more, so that rows share no places of a cache
  const uint8_t* weights(int panel) const {
    return static_cast<const uint8_t*>(weight.data) + panel * panel_size(weight.format, weight.k);
  }
  const uint8_t* first_weights(const Context& c, int thread) const override {
    return rows(c) ? weights(weight.n / PANEL * first_task(c, thread) / parts) : nullptr;
  }

  void run(const Context& c, int task, int, Scratch scratch) const override {
    const int tokens = rows(c), panels = weight.n / PANEL, last = panels * (task + 1) / parts;
    float* top = highest.data() + task * capacity;
    int64_t* id = ids.data() + task * capacity;
    std::fill_n(top, tokens, -INFINITY);
    std::fill_n(id, tokens, 0);
    for (int panel = panels * task / parts; panel < last; panel += near_panels)
      for (int row = 0; row < tokens; row += NEAR_ROWS)
        look(panel, std::min(last, panel + near_panels), row, std::min(tokens, row + NEAR_ROWS),
             reinterpret_cast<float*>(scratch.data), top, id);
  }

  void look(int panel, int last_panel, int row, int last_row, float* near, float* top, int64_t* id) const {
    const int64_t first = static_cast<int64_t>(panel) * PANEL, count = std::min<int64_t>(last_panel * PANEL, columns) - first;
    sk_rows out{};
    out.format = SK_F32, out.cols = weight.n, out.stride = near_columns();
    out.data = near - (static_cast<int64_t>(row) * out.stride + first);  // so that what is asked for begins at `near`
    for (int p = panel; p < last_panel; ++p) {
      const uint8_t* next = p + 1 < weight.n / PANEL ? weights(p + 1) : nullptr;
      kernels().linear(weight, x, {p, 0, PANEL}, row, last_row, SK_STORE, out, next);
    }
    for (int r = row; r < last_row; ++r) {
      if (top[r] != top[r]) continue;
      if (kernels().argmax(near + static_cast<int64_t>(r - row) * out.stride, count, top[r], id + r, top + r)) id[r] += first;
    }
  }
};

// Of each row the first of what the parts of a vocabulary have found.
struct First final : RowOperation<16> {
  const Highest* of;
  float* highest;
  int64_t* ids;
  void row(const Context&, int token) const override {
    float top = -INFINITY;
    int64_t id = 0;
    for (int part = 0; part < of->parts && top == top; ++part) {
      const float found = of->highest[part * of->capacity + token];
      if (found > top || found != found) top = found, id = of->ids[part * of->capacity + token];
    }
    highest[token] = top;
    ids[token] = id;
  }
};

struct RotaryOperation final : RowOperation<4> {
  Rotary op;
  void row(const Context& c, int token) const override {
    const sk_step& s = *c.step;
    const int32_t sequence = c.sequence_of[token], group = op.cache.group;
    const int32_t* table = s.tables[group] + sequence * s.table_strides[group];
    const bool is_last = token + 1 == s.tokens || c.sequence_of[token + 1] != sequence;
    kernels().rotary(op, token, s.positions[token], table, is_last);
  }
};

// How a step's attention is cut, which all layers with the same heads, blocks and window have in common. Layers run one
// after the other, so that they share the room for partial results too.
struct AttentionPlan {
  Attention like;  // one of the layers
  int threads;
  std::vector<AttentionTask> work;
  struct Split {
    int64_t token;
    size_t first;  // of the partial results
    int splits;
  };
  std::vector<Split> split;  // the tokens whose context is cut
  std::vector<float> partials;

  bool fits(const Attention& op) const {
    return op.heads == like.heads && op.window == like.window && op.cache.group == like.cache.group &&
           op.cache.kv_heads == like.cache.kv_heads && op.cache.block_size == like.cache.block_size &&
           op.cache.padded_dim == like.cache.padded_dim;
  }

  size_t partial_size() const {
    return static_cast<size_t>(like.heads / like.cache.kv_heads) * (like.cache.padded_dim + PARTIAL_EXTRA);
  }

  // Into how many parts the keys of a sequence with one new token are cut: so that every thread has some.
  int64_t parts_of(int64_t keys, int64_t pieces) const {
    if (threads == 1 || pieces >= 4 * threads) return 1;
    return std::max<int64_t>(1, std::min<int64_t>(keys / 256, share(4 * threads, static_cast<int>(pieces))));
  }

  void prepare(const Context& c) {
    const sk_step& s = *c.step;
    const int size = like.cache.block_size, kv_heads = like.cache.kv_heads;
    const int64_t tile = std::max(1, QUERY_ROWS / (like.heads / kv_heads));
    const int64_t pieces = static_cast<int64_t>(s.sequences) * kv_heads;
    work.clear();
    split.clear();
    std::vector<size_t> partial_of;  // each task's place among the partial results, one more than that; 0: none
    size_t used = 0;
    for (int32_t i = 0; i < s.sequences; ++i) {
      const int32_t* table = s.tables[like.cache.group] + i * s.table_strides[like.cache.group];
      for (int64_t t = 0; t < s.counts[i]; t += tile) {
        const int64_t tokens = std::min(tile, s.counts[i] - t), start = s.starts[i] + t, last = start + tokens;
        const int64_t oldest = like.window ? std::max<int64_t>(0, start + 1 - like.window) / size * size : 0;
        const int64_t keys = last - oldest;
        const int parts = static_cast<int>(s.counts[i] == 1 ? parts_of(keys, pieces) : 1);
        const int64_t span = share(share(keys, parts), size) * static_cast<int64_t>(size);
        const int splits = share(keys, static_cast<int>(span));
        if (splits > 1) split.push_back({c.first_of[i], used, splits});
        for (int32_t head = 0; head < kv_heads; ++head)
          for (int k = 0; k < splits; ++k) {
            const int64_t from = oldest + k * span;
            work.push_back({c.first_of[i] + t, table, start, from, std::min(last, from + span),
                            static_cast<int32_t>(tokens), head, nullptr});
            partial_of.push_back(splits > 1 ? ++used : 0);
          }
      }
    }
    if (partials.size() < used * partial_size()) partials.resize(used * partial_size());
    for (size_t i = 0; i < work.size(); ++i)
      if (partial_of[i]) work[i].partial = partials.data() + (partial_of[i] - 1) * partial_size();
    auto cost = [](const AttentionTask& a) { return (a.last_key - a.first_key) * a.num_tokens; };
    if (s.tokens > s.sequences)  // long ones first, so that threads end together
      std::stable_sort(work.begin(), work.end(), [&](const auto& a, const auto& b) { return cost(a) > cost(b); });
  }
};

struct AttentionOperation final : Operation {
  Attention op;
  const AttentionPlan* plan;
  int tasks(const Context&) const override { return static_cast<int>(plan->work.size()); }
  void run(const Context&, int task, int thread, Scratch scratch) const override {
    const AttentionTask* next = task + 1 < shares[thread].last ? &plan->work[task + 1] : nullptr;
    kernels().attention(op, plan->work[task], next, scratch);
  }
  size_t scratch() const override { return attention_scratch(op); }
};

struct Combine final : Operation {
  Attention op;
  const AttentionPlan* plan;
  int tasks(const Context&) const override { return static_cast<int>(plan->split.size()) * op.cache.kv_heads; }
  void run(const Context&, int task, int, Scratch) const override {
    const auto& split = plan->split[task / op.cache.kv_heads];
    const int head = task % op.cache.kv_heads;
    const size_t first = split.first + static_cast<size_t>(head) * split.splits;
    kernels().combine(op, plan->partials.data() + first * plan->partial_size(), split.splits, split.token, head);
  }
};

// What a thread does while it waits for others in a step of few tokens: it asks for weights that it will read, of which
// such a step takes as long as memory needs. So memory has work while a norm or a head is computed by one thread.
class Idle {
 public:
  explicit Idle(bool is_wanted) : is_wanted_(is_wanted) {}

  void begin(const Operation* reader, const Context& context, int thread) {
    if (!is_wanted_ || reader == reader_) return;
    reader_ = reader;
    at_ = reader ? reader->first_weights(context, thread) : nullptr;
    asked_ = 0;
  }

  bool ask() {  // always false: it is asked for while something else is not true
    if (at_ && asked_ < MOST)
      for (int i = 0; i < LINES; ++i, asked_ += LINE) __builtin_prefetch(at_ + asked_, 0, 2);
    return false;
  }

 private:
  static constexpr size_t MOST = 192 << 10, LINE = 64;  // bytes
  static constexpr int LINES = 4;
  const bool is_wanted_;
  const Operation* reader_ = nullptr;
  const uint8_t* at_ = nullptr;
  size_t asked_ = 0;
};

}  // namespace
}  // namespace servekit

using namespace servekit;

struct sk_pool {
  Pool pool;
};

struct sk_program {
  sk_pool* pool;
  std::vector<std::unique_ptr<Operation>> operations;
  std::vector<std::unique_ptr<AttentionPlan>> plans;
  std::vector<std::vector<uint8_t>> scratch;  // one a thread
  Context context;
  Meeting barrier;        // between operations
  int64_t weights = 0;    // that a token is multiplied with
  bool of_picks = false;  // what is added works on the picked rows
  size_t num_served = 0;  // operations that know their reader

  template <class Op>
  Op& add() {
    auto made = std::make_unique<Op>();
    Op& op = *made;
    op.of_picks = of_picks;
    operations.push_back(std::move(made));
    return op;
  }

  void reads(const Operation& op, const sk_matrix& weight) {
    for (; num_served + 1 < operations.size(); ++num_served) operations[num_served]->reader = &op;
    weights += static_cast<int64_t>(weight.n) * weight.k;
  }

  const AttentionPlan* plan_of(const Attention& op) {
    for (auto& plan : plans)
      if (plan->fits(op)) return plan.get();
    plans.push_back(std::make_unique<AttentionPlan>());
    plans.back()->like = op;
    plans.back()->threads = pool->pool.threads();
    return plans.back().get();
  }

  void ready(const sk_step* step) {
    context.step = step;
    context.sequence_of.clear();
    context.first_of.clear();
    for (int32_t i = 0; i < step->sequences; ++i) {
      context.first_of.push_back(static_cast<int64_t>(context.sequence_of.size()));
      context.sequence_of.insert(context.sequence_of.end(), static_cast<size_t>(step->counts[i]), i);
    }
    for (auto& plan : plans) plan->prepare(context);
    size_t bytes = 0;
    for (auto& op : operations) {
      share_out(*op);
      op->done.store(0, std::memory_order_relaxed);
      bytes = std::max(bytes, op->scratch());
    }
    for (auto& mine : scratch)
      if (mine.size() < bytes + 64) mine.resize(bytes + 64);
  }

  void share_out(Operation& op) const {
    const int threads = pool->pool.threads();
    if (op.shares.empty()) op.shares.resize(static_cast<size_t>(threads));
    for (int t = 0; t < threads; ++t) {
      op.shares[t].next.store(op.first_task(context, t), std::memory_order_relaxed);
      op.shares[t].last = op.first_task(context, t + 1);
    }
  }

  void run(const sk_step* step) {
    ready(step);
    const std::function<void(int)> part = [this, step](int thread) {
      auto* aligned = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(scratch[thread].data()) + 63) & ~uintptr_t{63});
      const Scratch mine{aligned, scratch[thread].size()};
      auto then = std::chrono::steady_clock::now();
      Idle idle{step->tokens <= FEW_TOKENS};
      for (auto& op : operations) {
        const int count = op->tasks(context);
        if (count == 0) continue;
        int finished = 0;
        for (size_t i = 0; i < op->shares.size(); ++i) {
          Share& from = op->shares[(thread + i) % op->shares.size()];
          if (from.next.load(std::memory_order_relaxed) >= from.last) continue;
          for (int task = from.next.fetch_add(1, std::memory_order_relaxed); task < from.last;
               task = from.next.fetch_add(1, std::memory_order_relaxed), ++finished)
            op->run(context, task, thread, mine);
        }
        if (op->done.fetch_add(finished) + finished == count) barrier.tell();
        idle.begin(op->reader, context, thread);
        barrier.wait([&] { return op->done.load() == count || idle.ask(); });
        if (thread == 0) {
          const auto now = std::chrono::steady_clock::now();
          op->nanoseconds += std::chrono::duration_cast<std::chrono::nanoseconds>(now - then).count();
          then = now;
        }
      }
    };
    if (step->tokens * weights < SMALL_STEP) part(0);
    else pool->pool.run(part);
  }
};

extern "C" {

int32_t sk_api_version(void) { return SK_API_VERSION; }

const char* sk_supported(void) {
  static const std::string names = [] {
    std::string all;
    for (const Kernels* found : supported()) all += (all.empty() ? "" : " ") + std::string(found->name);
    return all;
  }();
  return names.c_str();
}

int32_t sk_select(const char* name) {
  for (const Kernels* found : supported())
    if (std::strcmp(found->name, name) == 0) {
      selected = found;
      return 1;
    }
  return 0;
}

const char* sk_selected(void) { return kernels().name; }

int32_t sk_input_format(int32_t weight_format) {
  if (weight_format == SK_BF16) return kernels().bf16_inputs ? SK_BF16 : SK_F32;
  return weight_format == SK_F32 ? SK_F32 : SK_I8;
}

sk_pool* sk_pool_new(int32_t threads, int32_t pinned) { return new sk_pool{Pool(threads, pinned != 0)}; }
void sk_pool_free(sk_pool* pool) { delete pool; }

int32_t sk_padded_k(int32_t format, int32_t k) { return padded_k(format, k); }
int64_t sk_packed_bytes(int32_t format, int32_t n, int32_t k) { return n / PANEL * panel_size(format, k); }

void sk_pack(sk_pool* pool, int32_t format, int32_t n, int32_t k, const void* const* rows, int32_t row_format,
             void* target, float* scales) {
  pack(pool->pool, format, n, k, rows, row_format, static_cast<uint8_t*>(target), scales);
}

sk_program* sk_program_new(sk_pool* pool) {
  auto* program = new sk_program;
  program->pool = pool;
  program->scratch.resize(pool->pool.threads());
  return program;
}
void sk_program_free(sk_program* program) { delete program; }
void sk_run(sk_program* program, const sk_step* step) { program->run(step); }

int32_t sk_num_operations(const sk_program* program) { return static_cast<int32_t>(program->operations.size()); }

void sk_profile(sk_program* program, int64_t* out) {
  for (auto& op : program->operations) {
    *out++ = op->nanoseconds;
    op->nanoseconds = 0;
  }
}

void sk_add_embed(sk_program* program, const void* table, int32_t format, int32_t width, const sk_rows* out) {
  auto& op = program->add<Embed>();
  op.table = table, op.format = format, op.width = width, op.out = *out;
}

void sk_add_norm(sk_program* program, const sk_rows* x, const float* weight, float eps, const sk_rows* out) {
  auto& op = program->add<Norm>();
  op.x = *x, op.weight = weight, op.eps = eps, op.out = *out;
}

void sk_add_convert(sk_program* program, const sk_rows* x, int32_t width, const sk_rows* out) {
  auto& op = program->add<Convert>();
  op.x = x ? *x : sk_rows{}, op.width = width, op.out = *out;
}

void sk_add_pick(sk_program* program, const sk_rows* x, int32_t width, const sk_rows* out) {
  program->of_picks = true;
  auto& op = program->add<Pick>();
  op.x = *x, op.width = width, op.out = *out;
}

void sk_add_sum(sk_program* program, const sk_rows* y, const sk_rows* x) {
  auto& op = program->add<Sum>();
  op.y = *y, op.x = *x;
}

void sk_add_linear(sk_program* program, const sk_rows* x, const sk_matrix* weight, int32_t epilogue,
                   const sk_rows* out) {
  auto& op = program->add<Linear>();
  op.x = *x, op.weight = *weight, op.epilogue = epilogue, op.out = *out, op.threads = program->pool->pool.threads();
  op.cut();
  program->reads(op, *weight);
}

void sk_add_highest(sk_program* program, const sk_rows* x, const sk_matrix* weight, int32_t columns, int32_t capacity,
                    int64_t* ids, float* highest) {
  auto& op = program->add<Highest>();
  op.x = *x, op.weight = *weight, op.columns = columns, op.capacity = capacity;
  op.parts = std::max(1, std::min(8 * program->pool->pool.threads(), share(weight->n / PANEL, Highest::NEAR_PANELS)));
  const int64_t fit = Highest::NEAR_WEIGHTS / panel_size(weight->format, weight->k);
  op.near_panels = static_cast<int>(std::clamp<int64_t>(fit, 1, Highest::NEAR_PANELS));
  op.highest.resize(static_cast<size_t>(op.parts) * capacity);
  op.ids.resize(static_cast<size_t>(op.parts) * capacity);
  program->reads(op, *weight);
  auto& first = program->add<First>();
  first.of = &op, first.ids = ids, first.highest = highest;
}

void sk_add_rotary(sk_program* program, const sk_rows* qkv, int32_t heads, const float* angles, const float* q_norm,
                   const float* k_norm, float eps, const sk_cache* cache, const sk_rows* queries) {
  program->add<RotaryOperation>().op = {*qkv, *queries, *cache, angles, q_norm, k_norm, heads, eps};
}

void sk_add_attention(sk_program* program, const sk_rows* queries, int32_t heads, const sk_cache* cache, float scale,
                      float soft_cap, int32_t window, const sk_rows* out) {
  const Attention op = {*queries, *out, *cache, heads, window, scale, soft_cap};
  const AttentionPlan* plan = program->plan_of(op);
  auto& attention = program->add<AttentionOperation>();
  attention.op = op, attention.plan = plan;
  auto& combine = program->add<Combine>();
  combine.op = op, combine.plan = plan;
}

void sk_argmax(sk_pool* pool, const float* logits, int64_t rows, int64_t cols, int64_t stride, int64_t* ids,
               float* highest) {
  std::atomic<int64_t> next{0};
  const auto part = [&](int) {
    for (int64_t row = next++; row < rows; row = next++) {
      ids[row] = 0, highest[row] = -INFINITY;
      kernels().argmax(logits + row * stride, cols, -INFINITY, ids + row, highest + row);
    }
  };
  if (rows * cols < SMALL_STEP) part(0);
  else pool->pool.run(part);
}

double sk_peak(sk_pool* pool, int32_t format, int32_t rounds) {
  std::atomic<int> next{0};
  std::atomic<double> all{0};
  const auto part = [&](int) {
    alignas(64) float out[16] = {};
    for (int i = next++; i < PEAK_PARTS; i = next++) {
      const double done = kernels().peak(format, rounds, out);
      for (double before = all; !all.compare_exchange_weak(before, before + done);) {
      }
    }
  };
  pool->pool.run(part);
  return all;
}

uint64_t sk_read(sk_pool* pool, const void* data, int64_t bytes) {
  const auto* words = static_cast<const uint64_t*>(data);
  const int64_t count = bytes / 8, parts = (count + READ_PART - 1) / READ_PART;
  std::atomic<int64_t> next{0};
  std::atomic<uint64_t> all{0};
  const auto part = [&](int) {
    for (int64_t i = next++; i < parts; i = next++) {
      const int64_t first = i * READ_PART, last = std::min(count, first + READ_PART);
      uint64_t sum = 0;
      for (int64_t at = first; at < last; ++at) sum += words[at];
      all += sum;
    }
  };
  pool->pool.run(part);
  return all;
}

}  // extern "C"
