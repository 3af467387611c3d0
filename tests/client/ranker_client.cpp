// Scores requests with an exported ranker, without Python: what a C++ server does, as a program.
//
//   ranker_client MODEL.pt REQUESTS [options]                   the whole ranker
//   ranker_client --pair ENCODER.pt RANKER.pt REQUESTS [options]  user_encoder, then candidate_ranker on its memory
//
// Each of these files may be a compiled package, *.pt2, instead.
//
//   --fbgemm LIB      a library with FBGEMM's operators (repeatable)
//   --threads N       threads of an operator (default 1)
//   --repeat N        score all requests N times more, and say on stderr how long one takes
//   --tolerance X     fail where a score differs by more than X from the file's expected one
//
// REQUESTS is what `ranker requests` writes. On stdout comes a line a candidate: the request's number, the candidate's,
// and its scores (the manifest's "outputs"), tab-separated, with nine digits: enough to tell any two floats apart.
// Exit codes are those of failure.h. docs/serving.md tells the rest.

#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <malloc.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <exception>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "failure.h"
#include "model.h"
#include "requests.h"

namespace {

// TorchScript watches the first calls of a method and compiles it anew for the types it saw
constexpr int kWarmUpPasses = 3;

struct Options {
  std::string model, encoder, ranker, requests;  // model, or the pair
  std::vector<std::string> libraries;
  int threads = 1, repeat = 0;
  std::optional<double> tolerance;
};

template <typename Number>
Number number_of(const std::string& option, const std::string& text, Number least) {
  Number found{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), found);
  if (error != std::errc() || end != text.data() + text.size() || !(found >= least)) {
    const std::string allowed = "a number, at least " + std::to_string(least) + ", is expected";
    throw Failure(Exit::kUsage, option + " " + text + ": " + allowed);
  }
  return found;
}

Options parse(const std::vector<std::string>& arguments) {
  Options options;
  std::vector<std::string> files;
  for (size_t i = 0; i < arguments.size();) {
    const std::string argument = arguments[i++];
    const auto next = [&]() -> const std::string& {
      if (i == arguments.size()) throw Failure(Exit::kUsage, argument + ": a value is missing");
      return arguments[i++];
    };
    if (argument == "--pair") {
      options.encoder = next();
      options.ranker = next();
    } else if (argument == "--fbgemm") {
      options.libraries.push_back(next());
    } else if (argument == "--threads") {
      options.threads = number_of(argument, next(), 1);
    } else if (argument == "--repeat") {
      options.repeat = number_of(argument, next(), 1);
    } else if (argument == "--tolerance") {
      options.tolerance = number_of(argument, next(), 0.0);
    } else if (argument.starts_with("-")) {
      throw Failure(Exit::kUsage, argument + ": no such option");
    } else {
      files.push_back(argument);
    }
  }
  const bool pair = !options.encoder.empty();
  if (files.size() != (pair ? 1 : 2)) {
    throw Failure(Exit::kUsage,
                  "usage: ranker_client MODEL.pt|.pt2 REQUESTS | --pair ENCODER.pt|.pt2 RANKER.pt|.pt2 REQUESTS "
                  "[--fbgemm LIB]... [--threads N] [--repeat N] [--tolerance X]");
  }
  if (!pair) options.model = files[0];
  options.requests = files.back();
  return options;
}

// Milliseconds of each call; told as percentiles.
class Stopwatch {
 public:
  explicit Stopwatch(std::string what) : what_(std::move(what)) {}

  template <typename Call>
  auto time(Call call) {
    const auto begin = std::chrono::steady_clock::now();
    auto result = call();
    ms_.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count());
    return result;
  }

  void restart() { ms_.clear(); }

  void tell() {
    std::sort(ms_.begin(), ms_.end());
    const char* line = "latency %s calls %zu p50_ms %.4f p99_ms %.4f\n";
    std::fprintf(stderr, line, what_.c_str(), ms_.size(), at(0.5), at(0.99));
  }

 private:
  // the smallest that at least this share of the calls does not exceed
  double at(double share) const {
    return ms_[static_cast<size_t>(std::ceil(share * static_cast<double>(ms_.size()))) - 1];
  }

  std::string what_;
  std::vector<double> ms_;
};

// The whole ranker, or the pair of it.
class Scorer {
 public:
  explicit Scorer(const Options& options) {
    if (options.encoder.empty()) {
      models_.emplace_back(options.model, "ranker");
    } else {
      models_.emplace_back(options.encoder, "user_encoder");
      models_.emplace_back(options.ranker, "candidate_ranker");
    }
    for (const Model& model : models_) {
      watches_.emplace_back(model.name());
      if (!model.has_manifest()) {
        std::fprintf(stderr, "no manifest.json beside %s describes it: dtypes are not checked\n", model.path().c_str());
      }
    }
  }

  void check(const std::vector<Request>& requests, const std::string& file) const {
    for (size_t i = 0; i < requests.size(); ++i) {
      std::set<std::string> added;
      for (const Model& model : models_) {
        model.check(requests[i], file + ": request " + std::to_string(i), added);
        added = model.returned();
      }
    }
  }

  // Probabilities [N, tasks].
  at::Tensor score(const Request& request) {
    std::map<std::string, Named> added;
    for (size_t i = 0; i + 1 < models_.size(); ++i) added["memory"] = memory_of(run(i, request, {}));
    return run(models_.size() - 1, request, added).toTensor();
  }

  // Of the file whose scores these are.
  const std::string& path() const { return models_.back().path(); }

  void restart_watches() {
    for (Stopwatch& watch : watches_) watch.restart();
  }

  void tell_latency() {
    for (Stopwatch& watch : watches_) watch.tell();
  }

 private:
  at::IValue run(size_t i, const Request& request, const std::map<std::string, Named>& added) {
    const Inputs& inputs = request.models.at(models_[i].name());
    return watches_[i].time([&] { return models_[i].run(inputs, added); });
  }

  static Named memory_of(const at::IValue& found) {
    Named memory;
    for (const auto& entry : found.toGenericDict()) memory[entry.key().toStringRef()] = entry.value().toTensor();
    return memory;
  }

  std::vector<Model> models_;
  std::vector<Stopwatch> watches_;
};

// Let glibc hand freed memory out again instead of returning it to the system: a request's tensors are of the sizes of
// the request before, and pages that come anew can cost more than what is written to them. Other allocators do so anyway.
void keep_freed_memory() {
#ifdef __GLIBC__
  mallopt(M_MMAP_MAX, 0);
  mallopt(M_TRIM_THRESHOLD, -1);
  mallopt(M_TOP_PAD, 64 << 20);
#endif
}

at::Tensor scored(Scorer& scorer, const Request& request, size_t number) {
  try {
    const at::Tensor scores = scorer.score(request);
    if (scores.dim() != 2 || scores.scalar_type() != at::kFloat) {
      throw Failure(Exit::kScoring, scorer.path() + ": scores are not float32 [N, tasks]");
    }
    return scores.contiguous();
  } catch (const std::exception& error) {
    throw Failure(Exit::kScoring, "request " + std::to_string(number) + ": " + told(error));
  }
}

void print(const at::Tensor& scores, size_t request) {
  const auto rows = scores.accessor<float, 2>();
  for (int64_t n = 0; n < rows.size(0); ++n) {
    std::printf("%zu\t%lld", request, static_cast<long long>(n));
    for (int64_t task = 0; task < rows.size(1); ++task) std::printf("\t%.9g", rows[n][task]);
    std::printf("\n");
  }
}

// The greatest difference of a score from the expected one; NaN if a score is.
double difference(const at::Tensor& scores, const at::Tensor& expected, size_t request) {
  if (scores.sizes() != expected.sizes()) {
    throw Failure(Exit::kScores, "request " + std::to_string(request) + ": " + std::to_string(scores.size(0)) + " × " +
                                     std::to_string(scores.size(1)) + " scores are not as many as expected");
  }
  return scores.numel() == 0 ? 0 : (scores.to(at::kDouble) - expected.to(at::kDouble)).abs().max().item<double>();
}

void run(const Options& options) {
  at::set_num_threads(options.threads);
  at::set_num_interop_threads(1);
  const c10::InferenceMode no_gradients;
  const std::vector<Request> requests = read_requests(options.requests);
  for (const std::string& library : options.libraries) load_operators(library);
  Scorer scorer(options);
  scorer.check(requests, options.requests);

  double greatest = 0;
  size_t compared = 0;
  for (size_t i = 0; i < requests.size(); ++i) {
    const at::Tensor scores = scored(scorer, requests[i], i);
    print(scores, i);
    if (requests[i].expected) {
      const double found = difference(scores, *requests[i].expected, i);
      if (std::isnan(found) || found > greatest) greatest = found;  // nothing is greater than a NaN: it stays
      ++compared;
    }
  }
  if (compared > 0) {
    std::fprintf(stderr, "greatest difference from %zu requests' expected scores: %.3g\n", compared, greatest);
  }
  if (options.tolerance && compared < requests.size()) {
    const std::string without = std::to_string(requests.size() - compared);
    throw Failure(Exit::kScores, options.requests + ": " + without + " requests have no expected scores");
  }
  if (options.tolerance && !(greatest <= *options.tolerance)) {
    throw Failure(Exit::kScores, "scores differ from the expected ones by more than --tolerance");
  }

  for (int pass = 0; options.repeat > 0 && pass < kWarmUpPasses + options.repeat; ++pass) {
    if (pass == kWarmUpPasses) scorer.restart_watches();
    for (size_t i = 0; i < requests.size(); ++i) scored(scorer, requests[i], i);
  }
  if (options.repeat > 0) scorer.tell_latency();
}

}  // namespace

int main(int count, char** arguments) {
  keep_freed_memory();
  try {
    run(parse({arguments + 1, arguments + count}));
    return 0;
  } catch (const Failure& failure) {
    std::fprintf(stderr, "error: %s\n", failure.what());
    return static_cast<int>(failure.code);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", told(error).c_str());
    return 1;
  }
}
