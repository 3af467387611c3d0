// A package of native code that AOTInductor made, *.pt2.
//
// It takes tensors as one list, those of a dictionary one after another, and returns a list. Which is which its call
// specification tells, JSON of Python's nested arguments: a node's type is null for a tensor and "builtins.dict" for a
// dictionary, whose keys, JSON again, are its context.
#pragma once

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <memory>
#include <string>
#include <vector>

#include "failure.h"
#include "json.h"
#include "network.h"

// The keys of a dictionary of a call specification, in the order of its children.
inline std::vector<std::string> keys_of(const Json& node, const std::string& path) {
  const auto& text = node["context"].as<std::string>(path + ": context of a dictionary");
  const Json context = JsonParser(text, path).parse();
  std::vector<std::string> keys;
  for (const Json& key : context.as<Json::Array>(path + ": keys")) keys.push_back(key.as<std::string>(path + ": key"));
  return keys;
}

inline bool is_dictionary(const Json& node) {
  const auto* type = std::get_if<std::string>(&node["type"].value);
  return type != nullptr && *type == "builtins.dict";
}

// A specification's tree, which stands behind its version.
inline Json tree_of(const std::string& specification, const std::string& path) {
  const Json parsed = JsonParser(specification, path).parse();
  const auto& parts = parsed.as<Json::Array>(path + ": call specification");
  if (parts.size() != 2) throw Failure(Exit::kModel, path + ": a call specification of an unknown form");
  return parts[1];
}

inline Network packaged(const std::string& path) {
  std::shared_ptr<torch::inductor::AOTIModelPackageLoader> loader;
  try {
    loader = std::make_shared<torch::inductor::AOTIModelPackageLoader>(path);
  } catch (const std::exception& error) {
    throw Failure(Exit::kModel, path + ": does not load: " + told(error));
  }
  const std::vector<std::string> specifications = loader->get_call_spec();
  const Json inputs = tree_of(specifications.at(0), path), outputs = tree_of(specifications.at(1), path);
  const auto& by_place_and_name = inputs["children_spec"].as<Json::Array>(path + ": inputs");
  const Json& by_name = by_place_and_name.at(1);  // an export gives all its inputs by name
  const std::vector<std::string> names = keys_of(by_name, path);

  Network network;
  for (size_t i = 0; i < names.size(); ++i) {
    const Json& node = by_name["children_spec"].as<Json::Array>(path + ": inputs by name").at(i);
    const bool dictionary = is_dictionary(node);
    network.arguments.push_back({names[i], dictionary, dictionary ? keys_of(node, path) : std::vector<std::string>()});
  }
  const bool records = is_dictionary(outputs);
  const std::vector<std::string> returned = records ? keys_of(outputs, path) : std::vector<std::string>();

  network.forward = [=, arguments = network.arguments](const std::vector<at::IValue>& values) -> at::IValue {
    std::vector<at::Tensor> list;
    for (size_t i = 0; i < values.size(); ++i) {
      if (values[i].isTensor()) {
        list.push_back(values[i].toTensor());
        continue;
      }
      const auto entries = values[i].toGenericDict();
      for (const std::string& key : arguments[i].keys) {
        if (!entries.contains(key)) throw Failure(Exit::kScoring, arguments[i].name + "/" + key + ": missing");
        list.push_back(entries.at(key).toTensor());
      }
    }
    const std::vector<at::Tensor> found = loader->run(list);
    if (!records) return found.at(0);
    c10::Dict<std::string, at::Tensor> named;
    for (size_t i = 0; i < returned.size(); ++i) named.insert(returned[i], found.at(i));
    return named;
  };
  return network;
}
