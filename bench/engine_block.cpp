// Runs the engine's block kernel without torch or Python, to count its instructions:
// engine_block PLAN WEIGHTS WORDS PATCHES CALLS, see bench/instructions.py.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <vector>

#include "cpu/engine_plan.h"
#include "cpu/kernels.h"

template <typename T>
std::vector<T> contents(const char* path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const T* first = reinterpret_cast<const T*>(bytes.data());
  return std::vector<T>(first, first + bytes.size() / sizeof(T));
}

int main(int, char** arguments) {
  using namespace fastalps;
  const auto plan = contents<int64_t>(arguments[1]);
  const auto weights = contents<float>(arguments[2]);
  const auto words = contents<int32_t>(arguments[3]);
  const int64_t patches = std::atoll(arguments[4]), calls = std::atoll(arguments[5]);
  const EnginePlan engine(plan.data(), plan.size(), weights.data(), weights.size(), words.data(),
                          words.size());
  const Network& network = engine.network;

  std::vector<uint8_t> pixels(patches * network.pixels());
  for (uint8_t& pixel : pixels) pixel = static_cast<uint8_t>(std::rand());
  std::vector<int64_t> origins, positions;
  for (int64_t i = 0; i < patches; ++i) {
    origins.push_back(i * network.pixels());
    positions.push_back(i);
  }
  std::vector<float> errors(2 * patches);
  const EngineArguments a = {&network,
                             pixels.data(),
                             DType::kUInt8,
                             origins.data(),
                             positions.data(),
                             network.height * network.width,
                             network.width,
                             1,
                             nullptr,
                             true,
                             true,
                             errors.data(),
                             patches};
  const int64_t width = kBlockVectors * kernels().lanes;
  std::vector<float> scratch(width * network.scratch());
  const EngineBlock run_block = engine_block(network.precision);
  for (int64_t call = 0; call < calls; ++call) {
    for (int64_t first = 0; first < patches; first += width) {
      const int64_t count = std::min(width, patches - first);
      const int64_t vectors = (count + kernels().lanes - 1) / kernels().lanes;
      run_block(a, first, count, static_cast<int>(vectors), scratch.data());
    }
  }
  std::printf("%s %g\n", kernels().name, errors[0]);
}
