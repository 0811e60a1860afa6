// A few threads of torch's own pool that walk through the phases of one call together: one parallel region, with barriers
// inside instead of a region per matmul.
//
// A region gives no guarantee that its parts run at the same time (nested regions are serial, a busy core is late), so a
// team is closed after a short wait with those that arrived; the others return at once. Waiting spins briefly, then
// yields: a thread whose partner was descheduled gives its core away.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <chrono>
#include <thread>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace qat {

class Team {
 public:
  int size() const { return size_; }

  // Wait for all members; what they wrote is visible after.
  void barrier() {
    if (size_ == 1) {
      next_[0].store(0, std::memory_order_relaxed);
      next_[1].store(0, std::memory_order_relaxed);
      return;
    }
    const uint32_t now = generation_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      next_[(now + 1) & 1].store(0, std::memory_order_relaxed);
      generation_.store(now + 1, std::memory_order_release);
      return;
    }
    wait([&] { return generation_.load(std::memory_order_acquire) != now; });
  }

  // fn(begin, end) over [0, count) among the members: equal shares, or pieces taken as members get free.
  template <class Fn>
  void each(int member, int64_t count, int64_t piece, const Fn& fn) {
    if (size_ == 1 || piece == 0) {
      const int64_t begin = count * member / size_, end = count * (member + 1) / size_;
      if (begin < end) fn(begin, end);
      return;
    }
    std::atomic<int64_t>& next = next_[generation_.load(std::memory_order_relaxed) & 1];
    for (int64_t at; (at = next.fetch_add(piece, std::memory_order_relaxed)) < count;)
      fn(at, std::min(at + piece, count));
  }

  // work(team, member) on up to `threads` threads at the same time; on one when the others do not come.
  template <class Work>
  static void run(int threads, const Work& work) {
    Team team;
    if (threads <= 1) {
      work(team, 0);
      return;
    }
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      const int member = team.join(static_cast<int>(end - begin), threads);
      if (member >= 0) work(team, member);
    });
  }

 private:
  static constexpr int CLOSED = 1 << 16;

  int join(int width, int wanted) {
    const int member = members_.fetch_add(1, std::memory_order_acq_rel);
    if (member >= CLOSED) return -1;  // too late: the others work without this thread
    covered_.fetch_add(width, std::memory_order_acq_rel);
    if (member == 0) {
      const auto started = std::chrono::steady_clock::now();
      while (covered_.load(std::memory_order_acquire) < wanted &&
             std::chrono::steady_clock::now() - started < std::chrono::microseconds(100))
        pause();
      size_ = members_.fetch_add(CLOSED, std::memory_order_acq_rel);
      open_.store(false, std::memory_order_release);
    } else {
      wait([&] { return !open_.load(std::memory_order_acquire); });
    }
    return member;
  }

  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  template <class Ready>
  static void wait(const Ready& ready) {
    for (int spins = 0; !ready(); ++spins) {
      if (spins < 1000)
        pause();
      else
        std::this_thread::yield();
    }
  }

  int size_ = 1;
  std::atomic<int> members_{0}, covered_{0};
  std::atomic<bool> open_{true};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<int64_t> next_[2] = {{0}, {0}};
};

// How many threads a decode step should use: the fastest seen lately. Another process on one of the cores makes two
// threads slower than one, so the steps themselves decide; the others are tried again from time to time.
class Pace {
 public:
  int choose(int most) {
    if (most != most_) *this = Pace(most);
    if (most_ <= 1) return 1;
    if (tried_ < count_ * WARM) return level(tried_ / WARM);
    if (probes_ == 0 && ++since_ >= interval_) {
      since_ = 0;
      probes_ = WARM;
      other_ = (other_ + 1) % count_;
      if (other_ == best_) other_ = (other_ + 1) % count_;
    }
    return level(probes_ > 0 ? other_ : best_);
  }

  // `seconds` of a step for each unit of its work
  void record(double seconds) {
    if (most_ <= 1) return;
    if (tried_ < count_ * WARM) {
      const int at = tried_++ / WARM;
      cost_[at] = cost_[at] == 0 ? seconds : std::min(cost_[at], seconds);
      if (tried_ == count_ * WARM) pick();
      return;
    }
    if (probes_ > 0) {  // the first of them may only wake a thread that sleeps
      cost_[other_] = probes_ == WARM ? seconds : std::min(cost_[other_], seconds);
      if (--probes_ > 0) return;
      const int before = best_;
      pick();
      interval_ = best_ != before ? FIRST : std::min(2 * interval_, LONGEST);
      return;
    }
    cost_[best_] += 0.25 * (seconds - cost_[best_]);
    const int before = best_;
    pick();
    if (best_ != before) interval_ = FIRST, since_ = 0;
  }

 private:
  static constexpr int WARM = 3, FIRST = 16, LONGEST = 256, LEVELS = 8;

  explicit Pace(int most) : most_(most) {
    while (count_ < LEVELS && (1 << count_) < most) ++count_;
    ++count_;
  }
  int level(int at) const { return at == count_ - 1 ? most_ : 1 << at; }
  void pick() {
    for (int i = 0; i < count_; ++i)
      if (cost_[i] < cost_[best_]) best_ = i;
  }

 public:
  Pace() = default;

 private:
  int most_ = 0, count_ = 0, tried_ = 0, best_ = 0, other_ = 0;
  int since_ = 0, interval_ = FIRST, probes_ = 0;
  double cost_[LEVELS + 1] = {};
};

}  // namespace qat
