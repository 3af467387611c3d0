// An exported model: loaded, compared with what a request gives it, run.
#pragma once

#include <dlfcn.h>

#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <variant>
#include <vector>

#include "failure.h"
#include "json.h"
#include "network.h"
#include "package.h"
#include "requests.h"
#include "scripted.h"

// Bring FBGEMM's operators: a library registers them with libtorch as it loads. What it needs besides is found beside
// it. RTLD_LOCAL, as Python loads it: its names are not for others.
inline void load_operators(const std::string& library) {
  if (dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL) == nullptr) {
    throw Failure(Exit::kModel, "--fbgemm " + library + ": does not load: " + dlerror() +
                                    " (FBGEMM must be built for this libtorch: 1.8 for 2.13)");
  }
}

// What an export's manifest says of a file, which TorchScript does not know: of each input and of each record type and
// dimensions; a dictionary's stand one level deeper. Null where no manifest.json beside the file describes it.
inline Json described(const std::string& path) {
  const std::filesystem::path model(path);
  const std::string manifest = (model.parent_path() / "manifest.json").string();
  if (!std::filesystem::exists(manifest)) return {};
  const std::string text = read_bytes(manifest);
  return JsonParser(text, manifest).parse()["files"][model.filename().string()];
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
  // `name`: what the request file calls it. A file whose name ends in .pt2 is a package, others are TorchScript.
  Model(const std::string& path, std::string name) : path_(path), name_(std::move(name)) {
    if (!std::filesystem::is_regular_file(path)) throw Failure(Exit::kFile, path + ": no such file");
    described_ = described(path);
    const bool package = path.ends_with(".pt2");
    if (package && std::get_if<Json::Object>(&described_.value) == nullptr) {
      throw Failure(Exit::kFile, path + ": no manifest.json beside it describes it: native code does not look at what "
                                        "it is given, and must not be given what nobody has looked at");
    }
    network_ = package ? packaged(path) : scripted(path);
    if (package) require_descriptions();
  }

  const std::string& path() const { return path_; }
  const std::string& name() const { return name_; }
  bool has_manifest() const { return !std::holds_alternative<std::nullptr_t>(described_.value); }

  // Names of what it returns, if that is a dictionary.
  std::set<std::string> returned() const {
    std::set<std::string> names;
    if (const auto* outputs = std::get_if<Json::Object>(&described_["outputs"].value)) {
      for (const auto& [name, _] : *outputs) names.insert(name);
    }
    return names;
  }

  // Fails, with all that is wrong in one message, unless a request gives what the model reads. `added`: entries that
  // dictionaries get besides.
  void check(const Request& request, const std::string& where, const std::set<std::string>& added) const {
    const auto given = request.models.find(name_);
    if (given == request.models.end()) {
      throw Failure(Exit::kInputs, where + ": nothing for " + name_ + " (" + path_ + ")");
    }
    std::string wrong;
    const auto& [tensors, dictionaries] = given->second;
    std::set<std::string> read;
    for (const auto& [name, dictionary, _] : network_.arguments) {
      read.insert(name);
      if (tensors.contains(name) && dictionary) {
        wrong += "\n  " + name + ": a tensor, and the model reads a dictionary of tensors";
      } else if (dictionaries.contains(name) && !dictionary) {
        wrong += "\n  " + name + ": a dictionary, and the model reads a tensor";
      } else if (dictionary) {
        static const Named kNone;  // a file has no trace of a dictionary without entries
        const auto found = dictionaries.find(name);
        wrong += misfits(name, found == dictionaries.end() ? kNone : found->second, added);
      } else {
        const auto found = tensors.find(name);
        wrong += found == tensors.end() ? missing(name) : misfit(name, found->second, described_["inputs"][name]);
      }
    }
    for (const auto& [name, _] : tensors) wrong += read.contains(name) ? "" : unknown(name);
    for (const auto& [name, _] : dictionaries) wrong += read.contains(name) ? "" : unknown(name);
    if (!wrong.empty()) throw Failure(Exit::kInputs, where + " does not fit " + path_ + ":" + wrong);
  }

  // Runs on checked inputs. `added`: entries that a dictionary gets besides, by its name.
  at::IValue run(const Inputs& inputs, const std::map<std::string, Named>& added = {}) {
    std::vector<at::IValue> values;
    values.reserve(network_.arguments.size());
    for (const auto& [name, dictionary, _] : network_.arguments) {
      if (!dictionary) {
        values.emplace_back(inputs.tensors.at(name));
        continue;
      }
      c10::Dict<std::string, at::Tensor> entries;
      for (const auto* source : {&inputs.dictionaries, &added}) {
        const auto found = source->find(name);
        if (found == source->end()) continue;
        for (const auto& [key, tensor] : found->second) entries.insert(key, tensor);
      }
      for (const auto& entry : entries) {  // `check` has not seen those that are added
        const Json& wanted = described_["inputs"][name][entry.key()];
        const std::string wrong = misfit(name + "/" + entry.key(), entry.value(), wanted);
        if (!wrong.empty()) throw Failure(Exit::kScoring, path_ + ":" + wrong);
      }
      values.emplace_back(std::move(entries));
    }
    try {
      return network_.forward(std::move(values));
    } catch (const std::exception& error) {
      throw Failure(Exit::kScoring, path_ + ": " + told(error));
    }
  }

 private:
  // Fails unless the manifest tells dtype and dimensions of each input and of each entry of a dictionary: `check` lets
  // pass what is not described.
  void require_descriptions() const {
    for (const auto& [name, dictionary, keys] : network_.arguments) {
      const Json& input = described_["inputs"][name];
      const std::string what = path_ + ": input " + name;
      if (!dictionary) {
        require_description(input, what);
      } else if (std::get_if<Json::Object>(&input.value) == nullptr) {
        undescribed(what);
      }
      for (const std::string& key : keys) require_description(input[key], what + "/" + key);
    }
  }

  static void require_description(const Json& input, const std::string& what) {
    const auto* dims = std::get_if<double>(&input["dims"].value);
    if (dims == nullptr || std::get_if<std::string>(&input["dtype"].value) == nullptr) undescribed(what);
  }

  [[noreturn]] static void undescribed(const std::string& what) {
    throw Failure(Exit::kFile, what + ": manifest.json does not tell its dtype and dims, and native code does not look "
                                      "at what it is given");
  }

  static std::string missing(const std::string& name) { return "\n  " + name + ": missing"; }
  static std::string unknown(const std::string& name) { return "\n  " + name + ": the model has no such input"; }

  // A line that tells of another dtype or number of dimensions than the manifest's; nothing if they are its.
  static std::string misfit(const std::string& name, const at::Tensor& tensor, const Json& described) {
    const auto* dtype = std::get_if<std::string>(&described["dtype"].value);
    const auto* dims = std::get_if<double>(&described["dims"].value);
    if (dtype == nullptr || dims == nullptr) return "";
    const std::string own = dtype_name(tensor.scalar_type());
    if (own == *dtype && static_cast<double>(tensor.dim()) == *dims) return "";
    return "\n  " + name + ": " + own + " of " + std::to_string(tensor.dim()) + " dimensions, and the model reads " +
           *dtype + " of " + std::to_string(static_cast<int64_t>(*dims));
  }

  // The same for each entry of a dictionary.
  std::string misfits(const std::string& name, const Named& entries, const std::set<std::string>& added) const {
    const auto* wanted = std::get_if<Json::Object>(&described_["inputs"][name].value);
    if (wanted == nullptr) return "";
    std::string wrong;
    for (const auto& [key, tensor] : entries) {
      const std::string entry = name + "/" + key;
      const auto found = wanted->find(key);
      wrong += found == wanted->end() ? unknown(entry) : misfit(entry, tensor, found->second);
    }
    for (const auto& [key, _] : *wanted) {
      if (!entries.contains(key) && !added.contains(key)) wrong += missing(name + "/" + key);
    }
    return wrong;
  }

  std::string path_, name_;
  Json described_;
  Network network_;
};
