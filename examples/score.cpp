// Scores the inputs in a file with a compiled package: score EXPORTED/model.pt2 inputs.pt
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <fstream>
#include <iostream>
#include <iterator>

int main(int, char** arguments) {
  torch::inductor::AOTIModelPackageLoader model(arguments[1]);
  std::ifstream file(arguments[2], std::ios::binary);
  std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
  const auto content = torch::jit::pickle_load(bytes);
  std::vector<at::Tensor> inputs;  // in the order of package.json
  for (const auto& input : content.toListRef()) {
    inputs.push_back(input.toTensor());  // or, say, at::tensor({3, 4}, at::kLong)
  }
  for (const auto& scores : model.run(inputs)) {  // pctr, pcvr, pctcvr
    for (int64_t row = 0; row < scores.numel(); ++row) {
      std::cout << scores[row].item<float>() << ' ';
    }
    std::cout << '\n';
  }
}
