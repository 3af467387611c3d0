// Tensors of a safetensors file: 8 bytes of header length (little endian), a JSON header, the numbers.
// https://github.com/huggingface/safetensors#format
#pragma once

#include <ATen/ATen.h>

#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "failure.h"
#include "json.h"

struct TensorFile {
  std::map<std::string, at::Tensor> tensors;
  Json metadata;
};

inline std::string read_bytes(const std::string& path) {
  if (!std::filesystem::is_regular_file(path)) throw Failure(Exit::kFile, path + ": no such file");
  std::string bytes(std::filesystem::file_size(path), '\0');
  std::ifstream file(path, std::ios::binary);
  if (!file.read(bytes.data(), static_cast<std::streamsize>(bytes.size()))) {
    throw Failure(Exit::kFile, path + ": cannot be read: " + std::strerror(errno));
  }
  return bytes;
}

inline at::ScalarType dtype_of(const std::string& name, const std::string& what) {
  static const std::map<std::string, at::ScalarType> kinds = {
      {"I64", at::kLong},   {"I32", at::kInt},   {"I16", at::kShort}, {"I8", at::kChar},       {"U8", at::kByte},
      {"F64", at::kDouble}, {"F32", at::kFloat}, {"F16", at::kHalf},  {"BF16", at::kBFloat16}, {"BOOL", at::kBool}};
  const auto found = kinds.find(name);
  if (found == kinds.end()) throw Failure(Exit::kFile, what + ": dtype " + name + " is not read here");
  return found->second;
}

inline int64_t count_of(const Json& number, const std::string& what) {
  const double found = number.as<double>(what);
  if (!(found >= 0 && found <= 9e15 && found == std::floor(found))) {
    throw Failure(Exit::kFile, what + ": a count is expected");
  }
  return static_cast<int64_t>(found);
}

// A tensor with a copy of its bytes: the file's buffer need not outlive it, nor be aligned.
inline at::Tensor tensor_of(const Json& entry, std::string_view data, const std::string& what) {
  const at::ScalarType dtype = dtype_of(entry["dtype"].as<std::string>(what + ": dtype"), what);
  std::vector<int64_t> shape;
  double bytes = static_cast<double>(c10::elementSize(dtype));  // cannot wrap around as an integer could
  for (const Json& size : entry["shape"].as<Json::Array>(what + ": shape")) {
    shape.push_back(count_of(size, what + ": shape"));
    bytes *= static_cast<double>(shape.back());
  }
  const auto& offsets = entry["data_offsets"].as<Json::Array>(what + ": data_offsets");
  if (offsets.size() != 2) throw Failure(Exit::kFile, what + ": data_offsets are two");
  const int64_t begin = count_of(offsets[0], what + ": data_offsets");
  const int64_t end = count_of(offsets[1], what + ": data_offsets");
  if (begin > end || end > static_cast<int64_t>(data.size()) || bytes != static_cast<double>(end - begin)) {
    throw Failure(Exit::kFile, what + ": the file does not have the bytes that its header tells: cut off");
  }
  at::Tensor tensor = at::empty(shape, dtype);
  // an empty tensor may have no memory at all
  if (end > begin) std::memcpy(tensor.mutable_data_ptr(), data.data() + begin, static_cast<size_t>(end - begin));
  return tensor;
}

inline TensorFile read_safetensors(const std::string& path) {
  const std::string bytes = read_bytes(path);
  uint64_t length = 0;
  for (size_t i = 0; i < 8 && i < bytes.size(); ++i) {
    length |= static_cast<uint64_t>(static_cast<unsigned char>(bytes[i])) << 8 * i;
  }
  if (bytes.size() < 8 || length > bytes.size() - 8) throw Failure(Exit::kFile, path + ": not a safetensors file");
  const std::string_view all(bytes);
  const Json header = JsonParser(all.substr(8, length), path).parse();
  TensorFile file;
  for (const auto& [name, entry] : header.as<Json::Object>(path + ": header")) {
    if (name == "__metadata__") {
      file.metadata = entry;
    } else {
      file.tensors.emplace(name, tensor_of(entry, all.substr(8 + length), path + ": " + name));
    }
  }
  return file;
}
