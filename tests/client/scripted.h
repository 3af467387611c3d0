// TorchScript, *.pt.
#pragma once

#include <torch/script.h>

#include <string>

#include "failure.h"
#include "network.h"

inline torch::jit::Module loaded_script(const std::string& path) {
  try {
    torch::jit::Module module = torch::jit::load(path, c10::kCPU);
    module.eval();
    return module;
  } catch (const std::exception& error) {
    const std::string what = error.what();
    for (const std::string mark : {"Unknown builtin op: ", "Unknown type name '__torch__.torch.classes."}) {
      const size_t at = what.find(mark);
      if (at == std::string::npos) continue;
      const size_t begin = at + mark.size();
      const std::string missing = what.substr(begin, what.find_first_of(".'\n", begin) - begin);
      throw Failure(Exit::kModel, path + ": needs " + missing +
                                      ", which no library has brought: give FBGEMM's by --fbgemm LIB");
    }
    throw Failure(Exit::kModel, path + ": does not load: " + told(error));
  }
}

inline Network scripted(const std::string& path) {
  torch::jit::Module module = loaded_script(path);
  Network network;
  const auto& schema = module.get_method("forward").function().getSchema();
  for (size_t i = 1; i < schema.arguments().size(); ++i) {  // 0 is the module
    const auto& argument = schema.arguments()[i];
    const bool dictionary = argument.type()->kind() == c10::TypeKind::DictType;
    if (!dictionary && argument.type()->kind() != c10::TypeKind::TensorType) {
      throw Failure(Exit::kModel, path + ": input " + argument.name() + " is a " + argument.type()->str() +
                                      ": neither a tensor nor a dictionary of tensors");
    }
    network.arguments.push_back({argument.name(), dictionary});
  }
  network.forward = [module](std::vector<at::IValue> values) mutable { return module.forward(std::move(values)); };
  return network;
}
