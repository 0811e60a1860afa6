// See linear.h.
#include "linear.h"

#include <cmath>
#include <cstring>

namespace qat {

void grow(std::vector<float>& v, int64_t size) {
  if (static_cast<int64_t>(v.size()) < size) v.resize(size);
}

void fit(std::vector<Rounded>& rounded, const Linear& w, int64_t rows) {
  if (rounded.size() < w.wanted.size()) rounded.resize(w.wanted.size());
  for (size_t j = 0; j < w.wanted.size(); ++j) {
    const Wanted& want = w.wanted[j];
    Rounded& r = rounded[j];
    const size_t padded = want.group * want.groups, n = rows * want.planes;
    if (want.floats) {
      grow(r.floats, rows * padded);
      continue;
    }
    r.codes.resize(std::max(r.codes.size(), n * padded));
    r.sums.resize(std::max(r.sums.size(), n * want.groups));
    r.scales.resize(std::max(r.scales.size(), n));
  }
}

void round_row(const float* x, const Linear& w, int64_t row, std::vector<Rounded>& rounded, float* rest) {
  for (size_t j = 0; j < w.wanted.size(); ++j) {
    const Wanted& want = w.wanted[j];
    Rounded& r = rounded[j];
    const int64_t padded = want.group * want.groups;
    if (want.floats) {
      std::memcpy(r.floats.data() + row * padded, x, w.k * sizeof(float));
      std::fill(r.floats.begin() + row * padded + w.k, r.floats.begin() + (row + 1) * padded, 0.f);
      continue;
    }
    if (want.scale > 0) {
      const float stored[] = {want.scale, 0.f};
      kernels().quantize(x, w.k, padded, want.group, stored, r.codes.data() + row * padded, r.sums.data() + row * want.groups,
                         r.scales.data() + row);
      continue;
    }
    Packed like{};
    like.k = w.k, like.group = want.group, like.groups = want.groups;
    quantize_planes(x, like, want.planes, r.codes.data() + row * want.planes * padded,
                    r.sums.data() + row * want.planes * want.groups, r.scales.data() + row * want.planes, rest);
  }
}

Inputs inputs_of(const Rounded& r, const Wanted& w) {
  return {r.codes.data(), r.sums.data(), r.scales.data(), r.floats.data(), w.group * w.groups, w.planes};
}

void Linear::add(const Packed& weight, int planes, float scale) {
  const Wanted want{weight.container == 16 ? 1 : planes, weight.group, weight.groups, weight.container == 16, scale};
  size_t at = std::find(wanted.begin(), wanted.end(), want) - wanted.begin();
  if (at == wanted.size()) wanted.push_back(want);
  parts.push_back({weight, n, at});
  k = weight.k, n += weight.n, panels += weight.panels, bytes += weight.panels * weight.panel_bytes;
}

Top::Top(int threads, int64_t rows, int64_t k)
    : rows_(rows), k_(k),
      best_(k > 0 ? threads : 0, std::vector<Best>(rows, {std::vector<float>(k, -INFINITY), std::vector<int64_t>(k, -1)})) {}

void Top::Best::offer(float value, int64_t column) {
  const auto before = [&](size_t i) {
    return value > values[i] || (value == values[i] && column < columns[i]) || columns[i] < 0;
  };
  size_t at = values.size() - 1;
  if (!(value == value) || !before(at)) return;
  for (; at > 0 && before(at - 1); --at) values[at] = values[at - 1], columns[at] = columns[at - 1];
  values[at] = value, columns[at] = column;
}

void Top::offer(int member, const float* y, int64_t ldy, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < rows_; ++i)
    for (int64_t column = begin; column < end; ++column) best_[member][i].offer(y[i * ldy + column], column);
}

void Top::finish(int members, float* values, int64_t* columns) {
  for (int64_t i = 0; i < rows_; ++i) {
    Best& first = best_[0][i];
    for (int other = 1; other < members; ++other)
      for (int64_t j = 0; j < k_; ++j)
        if (best_[other][i].columns[j] >= 0) first.offer(best_[other][i].values[j], best_[other][i].columns[j]);
    std::copy(first.values.begin(), first.values.end(), values + i * k_);
    std::copy(first.columns.begin(), first.columns.end(), columns + i * k_);
  }
}

}  // namespace qat
