// Which warp changed which byte of shared memory since the last barrier, and what was read
// meanwhile.
#pragma once

#include <cstring>
#include <vector>

namespace emulation {

class Races {
 public:
  explicit Races(int warps) : reads_(warps) {}

  // A barrier: from here on, everyone sees what everyone wrote.
  void pass_barrier(const unsigned char* shared, int bytes) {
    shared_ = shared;
    writers_.assign(bytes, kNobody);
    before_.assign(shared, shared + bytes);
    for (auto& each : reads_) each.clear();
  }

  // A warp reads the 16 bytes from here on.
  void note_read(int warp, const unsigned char* row) {
    reads_[warp].push_back(static_cast<int>(row - shared_));
  }

  // To be asked when a warp stops: what changed since another one stopped is its doing. False where
  // another had changed the same byte since the barrier.
  bool note_writes(int warp) {
    const int bytes = static_cast<int>(writers_.size());
    bool alone = true;
    for (int chunk = 0; chunk < bytes; chunk += 16) {
      const int size = bytes - chunk < 16 ? bytes - chunk : 16;
      if (std::memcmp(shared_ + chunk, before_.data() + chunk, size) == 0) continue;
      for (int i = chunk; i < chunk + size; ++i) {
        if (shared_[i] == before_[i]) continue;
        if (writers_[i] != kNobody) alone = false;
        writers_[i] = static_cast<signed char>(warp);
        before_[i] = shared_[i];
      }
    }
    return alone;
  }

  // Whether something was read that another warp changed between the same barriers.
  bool read_changes() const {
    for (int warp = 0; warp < static_cast<int>(reads_.size()); ++warp) {
      for (const int row : reads_[warp]) {
        for (int i = row; i < row + 16 && i < static_cast<int>(writers_.size()); ++i) {
          if (writers_[i] != kNobody && writers_[i] != warp) return true;
        }
      }
    }
    return false;
  }

 private:
  static constexpr signed char kNobody = -1;

  const unsigned char* shared_ = nullptr;
  std::vector<signed char> writers_;
  std::vector<unsigned char> before_;
  std::vector<std::vector<int>> reads_;
};

}  // namespace emulation
