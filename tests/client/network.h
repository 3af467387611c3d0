// What an exported file comes to, however it was made: its inputs in their order, and how to run on them.
#pragma once

#include <ATen/core/ivalue.h>

#include <functional>
#include <string>
#include <vector>

struct Network {
  struct Argument {
    std::string name;
    bool dictionary;                     // of tensors; else a tensor
    std::vector<std::string> keys = {};  // of a package's dictionary; TorchScript does not tell them
  };

  std::vector<Argument> arguments;
  std::function<at::IValue(std::vector<at::IValue>)> forward;  // a value an argument: a tensor or a dictionary
};
