// JSON: the header of a safetensors file and an export's manifest.json. Numbers are doubles: exact up to 2^53, more
// bytes than any file has. NaN and Infinity, which Python writes though JSON has none, are read.
#pragma once

#include <charconv>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "failure.h"

struct Json {
  using Array = std::vector<Json>;
  using Object = std::map<std::string, Json>;
  std::variant<std::nullptr_t, bool, double, std::string, Array, Object> value = nullptr;

  // The member of an object; null where it is none or has none of that name.
  const Json& operator[](const std::string& name) const {
    static const Json null;
    const auto* object = std::get_if<Object>(&value);
    if (object == nullptr) return null;
    const auto found = object->find(name);
    return found == object->end() ? null : found->second;
  }

  // The value as T; fails, naming `what`, where it is of another kind.
  template <typename T>
  const T& as(const std::string& what) const {
    if (const T* found = std::get_if<T>(&value)) return *found;
    throw Failure(Exit::kFile, what + ": missing, or of another type than it should be");
  }
};

class JsonParser {
 public:
  JsonParser(std::string_view text, std::string file) : text_(text), file_(std::move(file)) {}

  Json parse() {
    Json all = value(0);
    if (peek() != '\0') fail("something after the end");
    return all;
  }

 private:
  static constexpr int kDeepest = 64;  // a hostile file must not overflow the stack

  Json value(int depth) {
    if (depth > kDeepest) fail("nested too deeply");
    switch (peek()) {
      case '{': return {object(depth)};
      case '[': return {array(depth)};
      case '"': return {string()};
      case 't': return word("true", {true});
      case 'f': return word("false", {false});
      case 'n': return word("null", {nullptr});
      default: return {number()};
    }
  }

  Json::Object object(int depth) {
    Json::Object members;
    for (bool more = open('{', '}'); more; more = next('}')) {
      std::string name = string();
      take(':');
      members.insert_or_assign(std::move(name), value(depth + 1));
    }
    return members;
  }

  Json::Array array(int depth) {
    Json::Array items;
    for (bool more = open('[', ']'); more; more = next(']')) items.push_back(value(depth + 1));
    return items;
  }

  std::string string() {
    take('"');
    std::string found;
    for (; at_ < text_.size() && text_[at_] != '"'; ++at_) {
      if (text_[at_] == '\\') {
        ++at_;
        found += escaped();
      } else {
        found += text_[at_];
      }
    }
    take('"');
    return found;
  }

  // What stands after a backslash; ends on its last character.
  std::string escaped() {
    static constexpr std::string_view kEscapes = "\"\\/bfnrt", kMeanings = "\"\\/\b\f\n\r\t";
    if (at_ >= text_.size()) fail("an escape without an end");
    if (text_[at_] != 'u') {
      const size_t which = kEscapes.find(text_[at_]);
      if (which == std::string_view::npos) fail("no such escape");
      return {kMeanings[which]};
    }
    uint32_t point = hexadecimal();
    if (point >= 0xD800 && point < 0xDC00) {  // a surrogate pair: two escapes are one character
      if (text_.substr(at_ + 1, 2) != "\\u") fail("half a surrogate pair");
      at_ += 2;
      point = 0x10000 + ((point - 0xD800) << 10) + (hexadecimal() - 0xDC00);
    }
    return utf8(point);
  }

  // The four digits after `u`; ends on the last.
  uint32_t hexadecimal() {
    uint32_t found = 0;
    const char* first = text_.data() + at_ + 1;
    if (at_ + 4 >= text_.size() || std::from_chars(first, first + 4, found, 16).ptr != first + 4) {
      fail("no such escape");
    }
    at_ += 4;
    return found;
  }

  static std::string utf8(uint32_t point) {
    if (point < 0x80) return {static_cast<char>(point)};
    std::string bytes;
    int rest = point < 0x800 ? 1 : point < 0x10000 ? 2 : 3;
    bytes += static_cast<char>((0xFF00 >> (rest + 1) & 0xFF) | point >> 6 * rest);
    while (rest-- > 0) bytes += static_cast<char>(0x80 | (point >> 6 * rest & 0x3F));
    return bytes;
  }

  double number() {
    double found = 0;
    const auto [end, error] = std::from_chars(text_.data() + at_, text_.data() + text_.size(), found);
    if (error != std::errc()) fail("no value");
    at_ = static_cast<size_t>(end - text_.data());
    return found;
  }

  Json word(std::string_view name, Json meaning) {
    if (text_.substr(at_, name.size()) != name) fail("no value");
    at_ += name.size();
    return meaning;
  }

  // After an opening bracket, and after each member: is there another?
  bool open(char bracket, char closing) {
    take(bracket);
    if (peek() != closing) return true;
    take(closing);
    return false;
  }

  bool next(char closing) {
    if (peek() == ',') {
      take(',');
      return true;
    }
    take(closing);
    return false;
  }

  char peek() {
    while (at_ < text_.size() && std::string_view(" \t\r\n").find(text_[at_]) != std::string_view::npos) ++at_;
    return at_ < text_.size() ? text_[at_] : '\0';
  }

  void take(char expected) {
    if (peek() != expected) fail(std::string("expected ") + expected);
    ++at_;
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw Failure(Exit::kFile, file_ + ": not JSON at byte " + std::to_string(at_) + ": " + what);
  }

  std::string_view text_;
  std::string file_;
  size_t at_ = 0;
};
