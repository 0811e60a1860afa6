// See engine.h. Between two barriers a phase makes its inputs and multiplies: for a few rows every thread makes all inputs
// for itself, which costs less than a barrier; for more rows they share the work and meet once more.
#include "engine.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace qat {

namespace {

constexpr int64_t OWN_ROWS = 2;      // up to here every thread prepares all rows itself

// Memory has a first answer on its way while the threads meet: the start of a stream that is read next.
void fetch(const uint8_t* at, int64_t bytes) {
  for (int64_t i = 0; i < std::min<int64_t>(bytes, 4096); i += 64) __builtin_prefetch(at + i, 0, 2);
}

void fetch_share(const Linear& next, const Team& team, int member) {
  int64_t begin = next.panels * member / team.size();
  for (const Part& part : next.parts) {
    if (begin < part.weight.panels) return fetch(part.weight.data + begin * part.weight.panel_bytes, 4096);
    begin -= part.weight.panels;
  }
}

}  // namespace

struct Engine::Call {
  const int64_t *ids, *slot, *position;
  int64_t m;
  const int64_t* scored;
  int64_t scored_count, k;
  float* values;
  int64_t* tokens;
  bool one_each;                   // no two rows of one slot: a row's keys are needed by that row alone
  bool own;                        // every thread prepares all rows itself
  int64_t splits;                  // partial attentions of a row and kv head, at most
  Top top;
};

void Engine::allocate() {
  const Shape& s = shape;
  width_ = (s.positions + 15) / 16 * 16;
  const int64_t entries = static_cast<int64_t>(layers.size()) * s.slots * s.kv_heads * width_;
  const int64_t bytes = entries * s.head_dim * (s.int8_cache ? 1 : 2);
  keys_.assign(bytes, 0), values_.assign(bytes, 0);
  bytes_ = head.bytes;
  for (const Layer& l : layers) bytes_ += l.qkv.bytes + l.out.bytes + l.gate_up.bytes + l.down.bytes;
  if (s.int8_cache) key_scales_.assign(entries, 0.f), value_scales_.assign(entries, 0.f);
}

Cache Engine::cache(int64_t layer, int64_t slot, int64_t kv_head) {
  const int64_t at = ((layer * shape.slots + slot) * shape.kv_heads + kv_head) * width_;
  const int64_t bytes = at * shape.head_dim * (shape.int8_cache ? 1 : 2);
  const bool is_int8 = shape.int8_cache;
  return {keys_.data() + bytes, is_int8 ? key_scales_.data() + at : nullptr, values_.data() + bytes,
          is_int8 ? value_scales_.data() + at : nullptr};
}

template <class Row, class After>
void Engine::multiply(Call& call, Team& team, int member, const Linear& w, int64_t rows, const Row& make, float* y,
                      const After& after) {
  Scratch& mine = mine_[member];
  grow(mine.rest, w.k), grow(mine.row, w.k);
  if (call.own) fit(mine.rounded, w, rows);
  qat::multiply(team, member, w, rows, call.own, call.own ? mine.rounded : shared_.rounded, mine.row.data(),
                mine.rest.data(), make, y, after);
}

void Engine::rotate(float* head, int64_t position, const float* own_norm) const {
  const int64_t half = shape.head_dim / 2;
  if (own_norm) kernels().norm(head, own_norm, shape.head_dim, shape.eps, head);
  const float *c = cos + position * half, *s = sin + position * half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = head[i], b = head[i + half];
    head[i] = a * c[i] - b * s[i];
    head[i + half] = b * c[i] + a * s[i];
  }
}

void Engine::append(const Call& call, Scratch& mine, int64_t l, int64_t row, int64_t kv_head) {
  const Shape& s = shape;
  const Layer& layer = layers[l];
  const int64_t d = s.head_dim, at = row * (s.heads + 2 * s.kv_heads) * d;
  const int64_t key_column = (s.heads + kv_head) * d, value_column = key_column + s.kv_heads * d;
  grow(mine.key, 2 * d);
  float *key = mine.key.data(), *value = key + d;
  for (int64_t c = 0; c < d; ++c) {
    key[c] = qkv_[at + key_column + c] + (layer.qkv_bias ? layer.qkv_bias[key_column + c] : 0.f);
    value[c] = qkv_[at + value_column + c] + (layer.qkv_bias ? layer.qkv_bias[value_column + c] : 0.f);
  }
  rotate(key, call.position[row], layer.k_norm);
  kernels().append(cache(l, call.slot[row], kv_head), key, value, call.position[row], d);
}

// Keys and values that this thread's share of the attention begins with.
void Engine::fetch_cache(const Call& call, const Team& team, int member, int64_t l) {
  const int64_t jobs = call.m * shape.kv_heads * call.splits, end = jobs * (member + 1) / team.size();
  const int64_t bytes = shape.head_dim * (shape.int8_cache ? 1 : 2);
  for (int64_t job = jobs * member / team.size(); job < end; ++job) {
    const int64_t row = job / call.splits / shape.kv_heads, first = job % call.splits * SPLIT;
    const int64_t count = call.position[row] + 1 - first;
    const Cache c = cache(l, call.slot[row], job / call.splits % shape.kv_heads);
    fetch(c.keys + first * bytes, count * bytes);
    fetch(c.values + first * bytes, count * bytes);
  }
}

void Engine::attention(Call& call, Team& team, int member, int64_t l) {
  const Shape& s = shape;
  const Layer& layer = layers[l];
  Scratch& mine = mine_[member];
  const int64_t d = s.head_dim, shared = s.heads / s.kv_heads, width = (s.heads + 2 * s.kv_heads) * d;
  const int64_t piece = call.m >= DYNAMIC_ROWS ? 4 : 0;
  if (!call.one_each) {
    team.each(member, call.m * s.kv_heads, piece, [&](int64_t begin, int64_t end) {
      for (int64_t job = begin; job < end; ++job) append(call, mine, l, job / s.kv_heads, job % s.kv_heads);
    });
    team.barrier();
  }
  grow(mine.query, shared * d);
  team.each(member, call.m * s.kv_heads * call.splits, piece, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t split = job % call.splits, kv_head = job / call.splits % s.kv_heads;
      const int64_t row = job / call.splits / s.kv_heads, position = call.position[row];
      const int64_t from = layer.window ? std::max<int64_t>(0, position + 1 - layer.window) : 0;
      const int64_t start = split * SPLIT, stop = std::min(start + SPLIT, position + 1);
      if (start > position || stop <= from) continue;
      if (call.one_each && stop == position + 1) append(call, mine, l, row, kv_head);
      float* query = mine.query.data();
      const int64_t column = kv_head * shared * d;
      for (int64_t c = 0; c < shared * d; ++c)
        query[c] = qkv_[row * width + column + c] + (layer.qkv_bias ? layer.qkv_bias[column + c] : 0.f);
      for (int64_t h = 0; h < shared; ++h) rotate(query + h * d, position, layer.q_norm);
      float* partial = partial_.data() + ((row * call.splits + split) * s.heads + kv_head * shared) * (d + 2);
      kernels().attend(query, shared, cache(l, call.slot[row], kv_head), std::max(start, from), stop, d,
                       1.f / std::sqrt(static_cast<float>(d)), partial);
    }
  });
  if (call.own) fetch_share(layer.out, team, member);
  team.barrier();
}

void Engine::run(Call& call, Team& team, int member) {
  const Shape& s = shape;
  const int64_t m = call.m, h = s.hidden, d = s.head_dim, width = (s.heads + 2 * s.kv_heads) * d;
  Scratch& mine = mine_[member];
  grow(mine.x, call.own ? m * h : 0);
  float* x = call.own ? mine.x.data() : shared_.x.data();
  const auto nothing = [](int64_t, int64_t) {};
  const auto normed = [&](int64_t i, const float* weight, bool adds, float* out) {
    if (adds)
      for (int64_t c = 0; c < h; ++c) x[i * h + c] += y_[i * h + c];
    kernels().norm(x + i * h, weight, h, s.eps, out);
    return out;
  };
  for (size_t l = 0; l < layers.size(); ++l) {
    const Layer& layer = layers[l];
    multiply(call, team, member, layer.qkv, m, [&](int64_t i, float* out) {
      if (l == 0) kernels().row(table, call.ids[i], x + i * h);
      return normed(i, layer.norm1, l > 0, out);
    }, qkv_.data(), nothing);
    if (call.own) fetch_cache(call, team, member, static_cast<int64_t>(l));
    team.barrier();
    attention(call, team, member, static_cast<int64_t>(l));
    multiply(call, team, member, layer.out, m, [&](int64_t i, float* out) {
      const int64_t last = call.position[i] / SPLIT;
      const int64_t first = layer.window ? std::max<int64_t>(0, call.position[i] + 1 - layer.window) / SPLIT : 0;
      for (int64_t head = 0; head < s.heads; ++head)
        kernels().join(partial_.data() + ((i * call.splits + first) * s.heads + head) * (d + 2), last - first + 1,
                       s.heads * (d + 2), d, out + head * d);
      return out;
    }, y_.data(), nothing);
    if (call.own) fetch_share(layer.gate_up, team, member);
    team.barrier();
    multiply(call, team, member, layer.gate_up, m,
             [&](int64_t i, float* out) { return normed(i, layer.norm2, true, out); }, inner_.data(), nothing);
    if (call.own) fetch_share(layer.down, team, member);
    team.barrier();
    multiply(call, team, member, layer.down, m, [&](int64_t i, float* out) {
      const float* both = inner_.data() + i * 2 * s.inner;
      kernels().gate(both, both + s.inner, s.inner, out);
      return out;
    }, y_.data(), nothing);
    if (call.own) fetch_share(l + 1 < layers.size() ? layers[l + 1].qkv : head, team, member);
    team.barrier();
  }
  if (call.scored_count == 0) return;
  const auto last = [&](int64_t i, float* out) {
    const int64_t row = call.scored[i];
    for (int64_t c = 0; c < h; ++c) out[c] = x[row * h + c] + y_[row * h + c];
    kernels().norm(out, final_norm, h, s.eps, out);
    return out;
  };
  float* logits = call.k > 0 ? logits_.data() : call.values;
  multiply(call, team, member, head, call.scored_count, last, logits, [&](int64_t begin, int64_t end) {
    if (call.k > 0) call.top.offer(member, logits, s.vocabulary, begin, end);
  });
  if (call.k == 0) return;
  team.barrier();
  if (member == 0) call.top.finish(team.size(), call.values, call.tokens);
}

void Engine::forward(const int64_t* ids, const int64_t* slot, const int64_t* position, int64_t m, const int64_t* scored,
                     int64_t scored_count, int64_t k, float* values, int64_t* tokens) {
  if (m == 0) return;
  const Shape& s = shape;
  const int most = static_cast<int>(std::max<int64_t>(1, torch::stable::get_num_threads()));
  Call call{ids, slot, position, m, scored, scored_count, k, values, tokens, true, m <= OWN_ROWS, 0, {most, scored_count, k}};
  std::vector<char> seen(s.slots, 0);
  int64_t cached = 0;
  for (int64_t i = 0; i < m; ++i) {
    call.one_each = call.one_each && !seen[slot[i]];
    seen[slot[i]] = 1;
    call.splits = std::max(call.splits, position[i] / SPLIT + 1);
    cached += position[i] + 1;
  }
  const int64_t width = (s.heads + 2 * s.kv_heads) * s.head_dim;
  grow(y_, m * s.hidden), grow(qkv_, m * width), grow(inner_, m * 2 * s.inner);
  grow(partial_, m * call.splits * s.heads * (s.head_dim + 2));
  grow(logits_, k > 0 ? scored_count * s.vocabulary : 0);
  if (!call.own) {
    grow(shared_.x, m * s.hidden);
    for (const Layer& layer : layers)
      for (const Linear* w : {&layer.qkv, &layer.out, &layer.gate_up, &layer.down}) fit(shared_.rounded, *w, m);
    fit(shared_.rounded, head, scored_count);
  }
  if (mine_.size() < static_cast<size_t>(most)) mine_.resize(most);
  Pace& pace = pace_[std::min<int64_t>(m, DYNAMIC_ROWS)];
  const bool adapts = m < DYNAMIC_ROWS;  // longer calls share their work in small pieces
  threads_ = adapts ? pace.choose(most) : most;
  const auto started = std::chrono::steady_clock::now();
  Team::run(threads_, [&](Team& team, int member) { run(call, team, member); });
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - started;
  if (adapts) pace.record(seconds.count() / static_cast<double>(bytes_ + cached * s.kv_heads * s.head_dim * 2 * layers.size()));
}

}  // namespace qat
