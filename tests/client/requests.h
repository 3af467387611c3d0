// Requests as `ranker requests` writes them: tensors named REQUEST/MODEL/INPUT, or REQUEST/MODEL/INPUT/KEY where an
// input is a dictionary, and REQUEST/expected.
//
// Why safetensors and not torch.save, which torch::pickle_load reads: those who make requests are not those who score
// them. Any language writes this format without PyTorch, it cannot run code, and its reader is a page.
#pragma once

#include <ATen/ATen.h>

#include <charconv>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "failure.h"
#include "safetensors.h"

using Named = std::map<std::string, at::Tensor>;

// What one model is given of one request.
struct Inputs {
  Named tensors;
  std::map<std::string, Named> dictionaries;
};

struct Request {
  std::map<std::string, Inputs> models;  // by file name without its ending: ranker, user_encoder, candidate_ranker
  std::optional<at::Tensor> expected;    // [N, tasks]
};

inline std::vector<std::string> split_name(const std::string& name) {
  std::vector<std::string> parts;
  for (size_t begin = 0; begin <= name.size();) {
    const size_t end = std::min(name.find('/', begin), name.size());
    parts.push_back(name.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

inline std::vector<Request> read_requests(const std::string& path) {
  static const std::string kFormat = "ranker requests 1";
  TensorFile file = read_safetensors(path);
  const auto* format = std::get_if<std::string>(&file.metadata["format"].value);
  if (format == nullptr || *format != kFormat) {
    throw Failure(Exit::kFile, path + ": not a request file: its metadata's format is not \"" + kFormat + "\"");
  }
  std::map<int64_t, Request> requests;  // names are sorted as text, requests as numbers
  for (auto& [name, tensor] : file.tensors) {
    const std::vector<std::string> parts = split_name(name);
    int64_t number = -1;
    const char* end = parts[0].data() + parts[0].size();
    const bool numbered = std::from_chars(parts[0].data(), end, number).ptr == end && number >= 0;
    Request& request = requests[number];
    if (numbered && parts.size() == 2 && parts[1] == "expected") {
      request.expected = tensor;
    } else if (numbered && parts.size() == 3) {
      request.models[parts[1]].tensors[parts[2]] = tensor;
    } else if (numbered && parts.size() == 4) {
      request.models[parts[1]].dictionaries[parts[2]][parts[3]] = tensor;
    } else {
      throw Failure(Exit::kFile, path + ": " + name + ": names are REQUEST/MODEL/INPUT, with /KEY in a dictionary");
    }
  }
  if (requests.empty()) throw Failure(Exit::kFile, path + ": no requests");
  if (requests.rbegin()->first + 1 != static_cast<int64_t>(requests.size())) {
    throw Failure(Exit::kFile, path + ": requests are numbered from 0 without a gap; one is missing");
  }
  std::vector<Request> found;
  for (auto& [number, request] : requests) found.push_back(std::move(request));
  return found;
}
