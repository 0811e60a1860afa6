// A product that several threads of a team make together, and the k best of its columns: what the engine and the op
// `lm_head_top` share.
//
// Letters: M rows, K inputs, N columns (the vocabulary, for a head).
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "matmul.h"
#include "team.h"

namespace qat {

// What a weight wants of its inputs; parts that want the same share one rounding.
struct Wanted {
  int planes;                      // 1: int8 inputs; 2: float inputs as two int8 planes, error about 2^-15
  int64_t group, groups;
  bool floats;                     // container 16 reads floats
  float scale;                     // of a stored symmetric grid, 0: each row its own
  bool operator==(const Wanted& o) const {
    return planes == o.planes && group == o.group && groups == o.groups && floats == o.floats && scale == o.scale;
  }
};

struct Part {
  Packed weight;
  int64_t column;                  // of the output, where this part's rows begin
  size_t wanted;                   // index into Linear::wanted
};

// One matmul of a layer: several packed weights that read the same inputs, side by side in the output.
struct Linear {
  std::vector<Part> parts;
  std::vector<Wanted> wanted;
  int64_t k = 0, n = 0, panels = 0, bytes = 0;
  void add(const Packed& weight, int planes, float scale);
};

// Rows rounded for one kind of input that a Linear wants.
struct Rounded {
  std::vector<int8_t> codes;
  std::vector<int32_t> sums;
  std::vector<float> scales, floats;
};

constexpr int64_t AT_ONCE = 64;      // panels multiplied before their outputs are looked at
constexpr int64_t DYNAMIC_ROWS = 8;  // from here on pieces go to whoever is free
constexpr int64_t TOP_MOST = 1024;   // columns that Top keeps, at most

void grow(std::vector<float>& v, int64_t size);
// Room for `rows` rows in a buffer for each kind of input that `w` wants.
void fit(std::vector<Rounded>& rounded, const Linear& w, int64_t rows);
// x [K] rounded in every way that `w` wants, as row `row` of the buffers; `rest` is scratch [K].
void round_row(const float* x, const Linear& w, int64_t row, std::vector<Rounded>& rounded, float* rest);
Inputs inputs_of(const Rounded& r, const Wanted& w);

// y [rows, N] = made rows times w, by all members of a team. `make(i, row)` gives the floats of row i, for which `row` has
// room; `after(first column, one past the last)` sees each piece of y while it is in cache. With `own` every member
// rounds all rows into its own `rounded`; else they share the rows and meet once. `rounded` has room (`fit`).
template <class Row, class After>
void multiply(Team& team, int member, const Linear& w, int64_t rows, bool own, std::vector<Rounded>& rounded, float* row,
              float* rest, const Row& make, float* y, const After& after) {
  const auto prepare = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) round_row(make(i, row), w, i, rounded, rest);
  };
  if (own) {
    prepare(0, rows);
  } else {
    team.each(member, rows, rows >= DYNAMIC_ROWS ? 2 : 0, prepare);
    team.barrier();
  }
  const int64_t piece = rows >= DYNAMIC_ROWS ? std::max<int64_t>(1, w.panels / (team.size() * 8)) : 0;
  team.each(member, w.panels, piece, [&](int64_t begin, int64_t end) {
    for (const Part& part : w.parts) {
      const int64_t last = std::min(end, part.weight.panels);
      for (int64_t at = std::max<int64_t>(begin, 0); at < last; at += AT_ONCE) {
        const int64_t stop = std::min(at + AT_ONCE, last);
        kernels().matmul(part.weight, inputs_of(rounded[part.wanted], w.wanted[part.wanted]), rows, at, stop,
                         y + part.column, w.n);
        after(part.column + at * PANEL, part.column + std::min(stop * PANEL, part.weight.n));
      }
      begin -= part.weight.panels, end -= part.weight.panels;
    }
  });
}

// The k best columns of each row: every thread offers the pieces it made, then one joins them. Best first, the lower column
// first among equals; NaN is never among them, and places that nothing took hold -infinity and -1.
class Top {
 public:
  Top(int threads, int64_t rows, int64_t k);
  // columns [begin, end) of y [rows, ldy]
  void offer(int member, const float* y, int64_t ldy, int64_t begin, int64_t end);
  // after all have offered: values and columns [rows, k]
  void finish(int members, float* values, int64_t* columns);

 private:
  struct Best {
    std::vector<float> values;
    std::vector<int64_t> columns;
    void offer(float value, int64_t column);
  };
  int64_t rows_, k_;
  std::vector<std::vector<Best>> best_;  // [thread][row]
};

}  // namespace qat
