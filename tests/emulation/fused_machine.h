// The device of csrc/cuda/fused_machine.cuh on a host: kernels run unchanged, thread by thread.
//
// Every thread of a block is a fiber. A warp's lanes run one after the other up to the next
// instruction of the whole warp (mma, ldmatrix, shuffle), which is then done for all of them from
// its definition in the PTX ISA; a warp runs up to the next barrier before the next warp starts.
// What a kernel may not do ends the run with a message: lanes that meet different instructions, a
// barrier that some threads miss, an unaligned or foreign address, a write outside shared memory,
// two warps that change the same place between barriers, or a matrix that is read meanwhile.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "cuda/cuda_bf16.h"
#include "fibers.h"
#include "races.h"

#define FASTALPS_DEVICE inline

struct uint2 {
  uint32_t x, y;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace fastalps::cuda::fused {

struct Operand {
  uint32_t word[4];
};

}  // namespace fastalps::cuda::fused

namespace emulation {

using fastalps::cuda::fused::Operand;

enum class State { kReady, kMultiply, kLoad, kStore, kShuffle, kBarrier, kDone };

struct Thread {
  State state = State::kReady;
  // Operands and results of the instruction that it waits for.
  float* sums;
  const Operand* a;
  uint2 b;
  const unsigned char* address;
  int matrices;
  Operand loaded;
  unsigned char* target;
  uint32_t stored[4];
  float value;
  int distance;
  // Copies that were started: done as late as they may be, when they are waited for.
  std::vector<std::pair<unsigned char*, const void*>> copies;
};

struct Counts {
  int64_t multiplies = 0, loads = 0, load_cycles = 0, stores = 0, store_cycles = 0;
};

inline float widen(uint32_t half) { return __bfloat162float({static_cast<uint16_t>(half)}); }
inline uint32_t narrow(float value) { return __float2bfloat16_rn(value).bits; }

class Machine {
 public:
  static constexpr int kThreads = 256, kGuard = 4096;
  static constexpr unsigned char kPoison = 0xff;  // NaN as bf16 and as float32.

  int block = 0, blocks = 1;
  Counts counts;

  const int architecture;  // As in sm_90.

  Machine(bool descending, int architecture_)
      : architecture(architecture_),
        descending_(descending),
        fibers_(kThreads),
        races_(kThreads / 32) {}

  // Runs one block; the empty string where nothing was wrong.
  std::string run(int block_number, int block_total, int shared_bytes,
                  const std::function<void(unsigned char*)>& kernel) {
    block = block_number;
    blocks = block_total;
    shared_bytes_ = shared_bytes;
    memory_.assign(shared_bytes + 2 * kGuard + 16, kPoison);
    shared_ = memory_.data() + kGuard;
    shared_ += (16 - reinterpret_cast<uintptr_t>(shared_) % 16) % 16;
    error_.clear();
    threads_ = std::vector<Thread>(kThreads);
    current = this;
    fibers_.begin([&] { kernel(shared_); });
    while (error_.empty()) {
      int done = 0, waiting = 0;
      races_.pass_barrier(shared_, shared_bytes);
      for (int i = 0; i < kThreads / 32 && error_.empty(); ++i) {
        warp_ = descending_ ? kThreads / 32 - 1 - i : i;
        const State state = run_warp(warp_);
        ++(state == State::kDone ? done : waiting);
        if (!races_.note_writes(warp_)) fail("two warps write the same place");
      }
      if (races_.read_changes()) fail("a matrix is read while another warp writes it");
      if (done == kThreads / 32) break;
      if (done > 0) fail("some warps ended, others wait at a barrier");
      for (Thread& each : threads_) each.state = State::kReady;
    }
    for (const Thread& each : threads_) {
      if (!each.copies.empty()) fail("a copy that nobody waits for");
    }
    for (const unsigned char* p = memory_.data(); p < memory_.data() + memory_.size(); ++p) {
      const bool inside = p >= shared_ && p < shared_ + shared_bytes_;
      if (!inside && *p != kPoison) fail("a write outside shared memory");
    }
    return error_;
  }

  int thread() const { return fibers_.running(); }
  Thread& self() { return threads_[thread()]; }

  // What a group of warps reads of shared memory.
  float widened(const unsigned char* place) {
    if (place < shared_ || place + 2 > shared_ + shared_bytes_) {
      fail("a matrix outside shared memory");
      return 0.0f;
    }
    note_read(place - (place - shared_) % 16);
    uint16_t half;
    std::memcpy(&half, place, 2);
    return widen(half);
  }

  void start_copy(unsigned char* target, const void* source) {
    if (target < shared_ || target + 16 > shared_ + shared_bytes_) {
      fail("a copy outside shared memory");
    } else if (((target - shared_) | reinterpret_cast<intptr_t>(source)) % 16 != 0) {
      fail("a copy from or to an unaligned address");
    } else {
      self().copies.emplace_back(target, source);
    }
  }

  void finish_copies() {
    for (const auto& [target, source] : self().copies) std::memcpy(target, source, 16);
    self().copies.clear();
  }

  void wait(State state) {
    self().state = state;
    fibers_.pause();
  }

 private:
  // The first thing that goes wrong is told.
  void fail(const char* what) {
    if (error_.empty()) error_ = what;
  }

  // A row of a matrix is read, by an instruction of this warp.
  void note_read(const unsigned char* row) { races_.note_read(warp_, row); }

  State run_warp(int warp) {
    Thread* const lanes = threads_.data() + warp * 32;
    while (true) {
      for (int lane = 0; lane < 32; ++lane) {
        if (lanes[lane].state != State::kReady) continue;
        if (fibers_.resume(warp * 32 + lane)) lanes[lane].state = State::kDone;
      }
      const State state = lanes[0].state;
      for (int lane = 1; lane < 32; ++lane) {
        if (lanes[lane].state != state) fail("lanes of a warp meet different instructions");
      }
      if (!error_.empty() || state == State::kBarrier || state == State::kDone) return state;
      if (state == State::kMultiply) multiply(lanes);
      if (state == State::kLoad) load(lanes);
      if (state == State::kStore) store(lanes);
      if (state == State::kShuffle) shuffle(lanes);
      if (!error_.empty()) return state;
      for (int lane = 0; lane < 32; ++lane) lanes[lane].state = State::kReady;
    }
  }

  // PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type", bf16:
  // A: row = groupID for a_i of 0 <= i < 2 or 4 <= i < 6, else groupID + 8;
  //    column = threadID_in_group * 2 + (i & 1), and + 8 for i >= 4.
  // B: row = threadID_in_group * 2 + (i & 1), and + 8 for i >= 2; column = groupID.
  // C: row = groupID for i < 2, else groupID + 8; column = threadID_in_group * 2 + (i & 1).
  void multiply(Thread* lanes) {
    ++counts.multiplies;
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group_id = lane >> 2, thread_in_group = lane % 4;
      for (int i = 0; i < 8; ++i) {
        const bool upper = i < 2 || (i >= 4 && i < 6);
        const int row = upper ? group_id : group_id + 8;
        const int column = thread_in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
        a[row][column] = widen(lanes[lane].a->word[i / 2] >> 16 * (i & 1) & 0xffff);
      }
      for (int i = 0; i < 4; ++i) {
        const int row = thread_in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0);
        const uint32_t word = i < 2 ? lanes[lane].b.x : lanes[lane].b.y;
        b[row][group_id] = widen(word >> 16 * (i & 1) & 0xffff);
      }
    }
    double c[16][8] = {};
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; ++k) {
        for (int column = 0; column < 8; ++column) {
          c[row][column] += static_cast<double>(a[row][k]) * b[k][column];
        }
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = (lane >> 2) + (i < 2 ? 0 : 8), column = lane % 4 * 2 + (i & 1);
        float& sum = lanes[lane].sums[i];
        sum = static_cast<float>(sum + c[row][column]);
      }
    }
  }

  // PTX ISA, ldmatrix .x4 or .x2: lanes 8j to 8j + 7 give the addresses of the 8 rows of matrix j;
  // lane l receives of each matrix elements 2 * (l % 4) and the next of row l / 4.
  void load(Thread* lanes) {
    ++counts.loads;
    const int matrices = lanes[0].matrices;
    const unsigned char* rows[32];
    for (int lane = 0; lane < 32; ++lane) rows[lane] = lanes[lane].address;
    if (!are_rows(rows, 8 * matrices)) return;
    for (int row = 0; row < 8 * matrices; ++row) note_read(rows[row]);
    counts.load_cycles += cycles(rows, matrices);
    for (int matrix = 0; matrix < matrices; ++matrix) {
      for (int lane = 0; lane < 32; ++lane) {
        std::memcpy(&lanes[lane].loaded.word[matrix], rows[8 * matrix + lane / 4] + lane % 4 * 4,
                    4);
      }
    }
  }

  // PTX ISA, stmatrix .x4: the same the other way. No two rows may be the same here.
  void store(Thread* lanes) {
    ++counts.stores;
    const unsigned char* rows[32];
    for (int lane = 0; lane < 32; ++lane) rows[lane] = lanes[lane].target;
    if (!are_rows(rows, 32)) return;
    for (int row = 0; row < 32; ++row) {
      for (int other = 0; other < row; ++other) {
        if (rows[row] == rows[other]) fail("stmatrix stores two rows at one address");
      }
    }
    counts.store_cycles += cycles(rows, 4);
    for (int matrix = 0; matrix < 4; ++matrix) {
      for (int lane = 0; lane < 32; ++lane) {
        std::memcpy(lanes[8 * matrix + lane / 4].target + lane % 4 * 4, &lanes[lane].stored[matrix],
                    4);
      }
    }
  }

  bool are_rows(const unsigned char* const* rows, int count) {
    for (int row = 0; row < count; ++row) {
      if (rows[row] < shared_ || rows[row] + 16 > shared_ + shared_bytes_) {
        fail("a matrix outside shared memory");
      } else if (reinterpret_cast<uintptr_t>(rows[row]) % 16 != 0) {
        fail("a matrix at an unaligned address");
      }
    }
    return error_.empty();
  }

  // Each 8 rows take a cycle, or as many as different rows share the same four banks.
  int cycles(const unsigned char* const* rows, int matrices) const {
    int total = 0;
    for (; matrices > 0; --matrices, rows += 8) {
      int most = 1;
      for (int row = 0; row < 8; ++row) {
        int same = 0;
        for (int other = 0; other < 8; ++other) {
          bool repeated = false;
          for (int before = 0; before < other; ++before) {
            repeated = repeated || rows[before] == rows[other];
          }
          same += !repeated && (rows[row] - shared_) % 128 == (rows[other] - shared_) % 128;
        }
        most = same > most ? same : most;
      }
      total += most;
    }
    return total;
  }

  // PTX ISA, shfl.sync.down: the value of lane + distance, or a lane's own past the end.
  void shuffle(Thread* lanes) {
    float values[32];
    for (int lane = 0; lane < 32; ++lane) values[lane] = lanes[lane].value;
    for (int lane = 0; lane < 32; ++lane) {
      const int other = lane + lanes[lane].distance;
      lanes[lane].value = values[other < 32 ? other : lane];
    }
  }

 public:
  static inline Machine* current = nullptr;

 private:
  bool descending_;
  Fibers fibers_;
  Races races_;
  std::vector<unsigned char> memory_;
  int warp_ = 0;
  unsigned char* shared_ = nullptr;
  int shared_bytes_ = 0;
  std::vector<Thread> threads_;
  std::string error_;
};

}  // namespace emulation

namespace fastalps::cuda::fused {

inline int thread_index() { return emulation::Machine::current->thread(); }
inline int thread_index_anew() { return thread_index(); }
inline int block_index() { return emulation::Machine::current->block; }
inline int block_count() { return emulation::Machine::current->blocks; }
inline void barrier() { emulation::Machine::current->wait(emulation::State::kBarrier); }

inline Operand load_matrices(const unsigned char* chunk, int matrices) {
  emulation::Machine* const machine = emulation::Machine::current;
  machine->self().address = chunk;
  machine->self().matrices = matrices;
  machine->self().loaded = {};
  machine->wait(emulation::State::kLoad);
  return machine->self().loaded;
}

inline Operand load_operand(const unsigned char* chunk) { return load_matrices(chunk, 4); }
inline Operand load_half_operand(const unsigned char* chunk) { return load_matrices(chunk, 2); }

inline void multiply_add(float (&sums)[4], const Operand& a, uint2 b, const float (&start)[4]) {
  emulation::Machine* const machine = emulation::Machine::current;
  emulation::Thread& self = machine->self();
  for (int i = 0; i < 4; ++i) sums[i] = start[i];
  self.sums = sums;
  self.a = &a;
  self.b = b;
  machine->wait(emulation::State::kMultiply);
}

// PTX ISA, "Matrix Fragments for mma.m16n8k8": the first two words of A and the first of B, at the
// same rows and columns as those of m16n8k16.
inline void multiply_add_half(float (&sums)[4], const Operand& a, uint2 b,
                              const float (&start)[4]) {
  multiply_add(sums, Operand{{a.word[0], a.word[1], 0, 0}}, uint2{b.x, 0}, start);
}

inline void allow_next() {}
inline void await_previous() {}

inline void copy_async(unsigned char* target, const void* source) {
  emulation::Machine::current->start_copy(target, source);
}
inline void await_copies() { emulation::Machine::current->finish_copies(); }

inline bool stores_matrices() { return emulation::Machine::current->architecture >= 90; }

inline bool multiplies_by_groups() { return emulation::Machine::current->architecture == 90; }

struct Matrix {
  const unsigned char* first;
  int across, down;

  Matrix(const unsigned char* first_, int across_, int down_)
      : first(first_), across(across_), down(down_) {}
  Matrix at(int bytes) const { return {first + bytes, across, down}; }

  float value(int row, int term) const {
    const unsigned char* const part = first + term / 8 * across + row / 8 * down;
    return emulation::Machine::current->widened(part + row % 8 * 16 + term % 8 * 2);
  }
};

inline void publish() {}
inline void start_group() {}
inline void finish_group() {}
template <int kTiles>
void hold(float (&)[kTiles][4]) {}

// PTX ISA, "Register Fragments and Shared Memory Matrix Layouts" of wgmma m64nNk16: a warp has 16
// rows of 64, in them a lane what it has of mma m16n8k16.
template <int kTiles>
void multiply_group(float (&sums)[kTiles][4], const Matrix& a, const Matrix& b) {
  const int thread = thread_index() % 128, lane = thread % 32;
  if (lane == 0) ++emulation::Machine::current->counts.multiplies;
  for (int tile = 0; tile < kTiles; ++tile) {
    for (int i = 0; i < 4; ++i) {
      const int row = thread / 32 * 16 + lane / 4 + (i < 2 ? 0 : 8);
      const int column = tile * 8 + lane % 4 * 2 + (i & 1);
      double sum = 0.0;
      for (int term = 0; term < 16; ++term) {
        sum += static_cast<double>(a.value(row, term)) * b.value(column, term);
      }
      sums[tile][i] = static_cast<float>(sums[tile][i] + sum);
    }
  }
}

inline void store_matrices(bool stored, unsigned char* row, const uint32_t (&words)[4]) {
  if (!stored) return;  // All lanes or none: others would meet different instructions.
  emulation::Machine* const machine = emulation::Machine::current;
  machine->self().target = row;
  std::memcpy(machine->self().stored, words, sizeof words);
  machine->wait(emulation::State::kStore);
}

inline uint32_t round_pair(float first, float second) {
  return emulation::narrow(first) | emulation::narrow(second) << 16;
}

inline uint32_t leaky_words(uint32_t pair, uint32_t slopes) {
  uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const float value = emulation::widen(pair >> shift & 0xffff);
    const float slope = emulation::widen(slopes >> shift & 0xffff);
    const float scaled = emulation::widen(emulation::narrow(value * slope));
    result |= emulation::narrow(std::fmax(value, scaled)) << shift;
  }
  return result;
}

template <typename T>
T read_only(const T* place) {
  return *place;
}

template <typename T>
T read_written(const T* place) {
  return *place;
}
inline float exponential(float value) { return std::exp(value); }
inline float hyperbolic_tangent(float value) { return std::tanh(value); }
inline float reciprocal(float value) { return 1.0f / value; }
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float inverse_root(float value) { return 1.0f / std::sqrt(value); }

inline float shuffle_down(float value, int distance) {
  emulation::Machine* const machine = emulation::Machine::current;
  machine->self().value = value;
  machine->self().distance = distance;
  machine->wait(emulation::State::kShuffle);
  return machine->self().value;
}

}  // namespace fastalps::cuda::fused
