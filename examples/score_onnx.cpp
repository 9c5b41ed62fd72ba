// Scores with a file of fastalps-export (uint8 pixels, no gate), by the C++ API of ONNX Runtime.
//   g++ -std=c++17 score_onnx.cpp -I ONNXRUNTIME/include -L ONNXRUNTIME/lib -lonnxruntime
//   ./a.out FILE.onnx PIXELS        PIXELS: raw bytes, one image or frame after the other
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <vector>

int main(int argc, char** argv) try {
  if (argc != 3) return std::fprintf(stderr, "usage: %s FILE.onnx PIXELS\n", argv[0]), 2;
  Ort::Env env;
  Ort::Session session(env, argv[1], Ort::SessionOptions{});
  Ort::AllocatorWithDefaultOptions allocator;
  auto input = session.GetInputNameAllocated(0, allocator);    // images or frames
  auto output = session.GetOutputNameAllocated(0, allocator);  // scores or patch_scores
  auto facts = session.GetModelMetadata();
  auto threshold = facts.LookupCustomMetadataMapAllocated("threshold", allocator);
  const double limit = threshold ? std::atof(threshold.get()) : HUGE_VAL;

  std::ifstream file(argv[2], std::ios::binary);
  std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
  auto shape = session.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();
  size_t size = 1;  // of an item; the first length is the batch, which is dynamic
  for (size_t i = 1; i < shape.size(); ++i) size *= shape[i];
  const size_t count = shape[0] = bytes.size() / size;
  if (count == 0) return std::fprintf(stderr, "%s: fewer than %zu bytes\n", argv[2], size), 2;

  auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  auto* data = reinterpret_cast<uint8_t*>(bytes.data());
  auto pixels = Ort::Value::CreateTensor(memory, data, count * size, shape.data(), shape.size());
  const char *inputs[] = {input.get()}, *outputs[] = {output.get()};
  auto result = session.Run(Ort::RunOptions{}, inputs, &pixels, 1, outputs, 1);
  const size_t patches = result[0].GetTensorTypeAndShapeInfo().GetElementCount() / count;
  const float* scores = result[0].GetTensorData<float>();
  for (size_t item = 0; item < count; ++item, scores += patches) {
    const float score = *std::max_element(scores, scores + patches);
    std::printf("%zu,%.9g,%d\n", item, score, score > limit);
  }
} catch (const Ort::Exception& error) {
  return std::fprintf(stderr, "%s\n", error.what()), 2;
}
