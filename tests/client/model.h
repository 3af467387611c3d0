// An exported model: loaded, compared with what a request gives it, run.
#pragma once

#include <dlfcn.h>
#include <torch/script.h>

#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "failure.h"
#include "json.h"
#include "requests.h"

// Bring FBGEMM's operators: a library registers them with libtorch as it loads. What it needs besides is found beside
// it. RTLD_LOCAL, as Python loads it: its names are not for others.
inline void load_operators(const std::string& library) {
  if (dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL) == nullptr) {
    throw Failure(Exit::kModel, "--fbgemm " + library + ": does not load: " + dlerror() +
                                    " (FBGEMM must be built for this libtorch: 1.8 for 2.13)");
  }
}

// What an export's manifest says of an input, which TorchScript does not know.
struct Expected {
  std::string dtype;
  int64_t dims;
};

// The inputs of `model` by name, from the manifest.json beside it; nothing where there is none.
inline std::map<std::string, Expected> expected_inputs(const std::string& path) {
  const auto manifest = std::filesystem::path(path).parent_path() / "manifest.json";
  if (!std::filesystem::exists(manifest)) return {};
  const std::string file = manifest.string(), text = read_bytes(file);
  const Json all = JsonParser(text, file).parse();
  std::map<std::string, Expected> inputs;
  for (const auto& [name, input] : all["inputs"].as<Json::Object>(file + ": inputs")) {
    const std::string what = file + ": inputs." + name;
    inputs[name] = {input["dtype"].as<std::string>(what), count_of(input["dims"], what)};
  }
  return inputs;
}

inline std::string dtype_name(at::ScalarType type) {
  static const std::map<at::ScalarType, std::string> names = {
      {at::kLong, "int64"},   {at::kInt, "int32"},     {at::kShort, "int16"},  {at::kChar, "int8"},
      {at::kByte, "uint8"},   {at::kDouble, "float64"}, {at::kFloat, "float32"}, {at::kHalf, "float16"},
      {at::kBool, "bool"},    {at::kBFloat16, "bfloat16"}};
  return names.at(type);
}

class Model {
 public:
  // `name`: what the request file calls it.
  Model(const std::string& path, std::string name) : path_(path), name_(std::move(name)), module_(loaded(path)) {
    expected_ = expected_inputs(path);
    const auto& schema = module_.get_method("forward").function().getSchema();
    for (size_t i = 1; i < schema.arguments().size(); ++i) {  // 0 is the module
      const auto& argument = schema.arguments()[i];
      const bool dictionary = argument.type()->kind() == c10::TypeKind::DictType;
      if (!dictionary && argument.type()->kind() != c10::TypeKind::TensorType) {
        throw Failure(Exit::kModel, path + ": input " + argument.name() + " is a " + argument.type()->str() +
                                        ": neither a tensor nor a dictionary of tensors");
      }
      arguments_.push_back({argument.name(), dictionary});
    }
  }

  const std::string& path() const { return path_; }
  const std::string& name() const { return name_; }
  bool knows_dtypes() const { return !expected_.empty(); }

  // Fails, with all that is wrong in one message, unless a request gives what the model reads.
  void check(const Request& request, const std::string& where) const {
    const auto given = request.models.find(name_);
    if (given == request.models.end()) {
      throw Failure(Exit::kInputs, where + ": nothing for " + name_ + " (" + path_ + ")");
    }
    std::string wrong;
    std::map<std::string, bool> read;  // and whether as a dictionary
    for (const auto& [name, dictionary] : arguments_) {
      read[name] = dictionary;
      const auto tensor = given->second.tensors.find(name);
      if (tensor == given->second.tensors.end()) {
        if (!dictionary) wrong += "\n  " + name + ": missing";
      } else if (dictionary) {
        wrong += "\n  " + name + ": a tensor, and the model reads a dictionary of tensors";
      } else {
        wrong += misfit(name, tensor->second);
      }
    }
    for (const auto& [name, tensor] : given->second.tensors) {
      if (!read.contains(name)) wrong += "\n  " + name + ": the model has no such input";
    }
    for (const auto& [name, entries] : given->second.dictionaries) {
      const auto found = read.find(name);
      if (found == read.end()) {
        wrong += "\n  " + name + ": the model has no such input";
      } else if (!found->second) {
        wrong += "\n  " + name + ": a dictionary, and the model reads a tensor";
      }
    }
    if (!wrong.empty()) throw Failure(Exit::kInputs, where + " does not fit " + path_ + ":" + wrong);
  }

  // Runs on checked inputs. `added`: entries that a dictionary gets besides, by its name.
  at::IValue run(const Inputs& inputs, const std::map<std::string, Named>& added = {}) {
    std::vector<at::IValue> values;
    values.reserve(arguments_.size());
    for (const auto& [name, dictionary] : arguments_) {
      if (!dictionary) {
        values.emplace_back(inputs.tensors.at(name));
        continue;
      }
      c10::Dict<std::string, at::Tensor> entries;
      for (const auto* source : {&inputs.dictionaries, &added}) {
        const auto found = source->find(name);
        if (found == source->end()) continue;  // a file has no trace of a dictionary without entries
        for (const auto& [key, tensor] : found->second) entries.insert(key, tensor);
      }
      values.emplace_back(std::move(entries));
    }
    return module_.forward(std::move(values));
  }

 private:
  struct Argument {
    std::string name;
    bool dictionary;
  };

  static torch::jit::Module loaded(const std::string& path) {
    if (!std::filesystem::is_regular_file(path)) throw Failure(Exit::kFile, path + ": no such file");
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
      throw Failure(Exit::kModel, path + ": does not load: " + what);
    }
  }

  // A line that tells of another dtype or number of dimensions than the manifest's; nothing if they are its.
  std::string misfit(const std::string& name, const at::Tensor& tensor) const {
    const auto found = expected_.find(name);
    if (found == expected_.end()) return "";
    const std::string dtype = dtype_name(tensor.scalar_type());
    if (dtype == found->second.dtype && tensor.dim() == found->second.dims) return "";
    return "\n  " + name + ": " + dtype + " of " + std::to_string(tensor.dim()) + " dimensions, and the model reads " +
           found->second.dtype + " of " + std::to_string(found->second.dims);
  }

  std::string path_, name_;
  torch::jit::Module module_;
  std::map<std::string, Expected> expected_;
  std::vector<Argument> arguments_;
};
