#pragma once

/// Reads test cases of attention operators from text, one item a line:
///
///     case NAME
///     op NAME
///     opset NUMBER
///     attribute NAME VALUE
///     input|output SLOT NAME TYPE DIMENSION...
///     input|output SLOT - absent
///
/// A tensor's line is followed by one line of its values in row-major order; an optional tensor
/// that is not given is absent. TYPE is one of f16, bf16, f32, f64, bool (values 0 and 1), i32,
/// i64. A text that breaks the format throws ParseError, whose message says where and what.

#include <Eigen/Core>
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <istream>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace golden {

using Index = Eigen::Index;

struct Tensor {
  std::string name;
  std::string type;
  std::vector<Index> shape;
  std::vector<double> values;  // row-major, each exactly a value of `type`
};

struct Case {
  std::string name;
  std::string op;
  Index opset = 0;
  std::map<std::string, std::string> attributes;
  std::map<Index, Tensor> inputs;  // by slot; an absent tensor has no entry
  std::map<Index, Tensor> outputs;
};

struct ParseError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline std::string shape_text(const std::vector<Index>& shape) {
  std::string text;
  for (const Index dimension : shape) {
    text += (text.empty() ? "" : "x") + std::to_string(dimension);
  }
  return shape.empty() ? "a single value" : text;
}

inline std::optional<double> to_number(const std::string& word) {
  char* end = nullptr;
  const double value = std::strtod(word.c_str(), &end);
  if (word.empty() || *end != '\0') return std::nullopt;
  return value;
}

inline std::optional<Index> to_index(const std::string& word) {
  const std::optional<double> value = to_number(word);
  constexpr double largest_exact = 9007199254740992.0;  // 2^53
  if (!value || !(std::abs(*value) <= largest_exact) || *value != std::floor(*value)) {
    return std::nullopt;
  }
  return static_cast<Index>(*value);
}

namespace detail {

// The nearest value of a storage type, or nothing where a finite number lies beyond its range.
template <class Stored>
std::optional<double> round_to(double value) {
  if (std::isfinite(value) && std::abs(value) > std::numeric_limits<float>::max()) {
    return std::nullopt;
  }
  const auto rounded = static_cast<double>(static_cast<Stored>(static_cast<float>(value)));
  if (std::isfinite(value) && !std::isfinite(rounded)) return std::nullopt;
  return rounded;
}

template <>
inline std::optional<double> round_to<double>(double value) {
  return value;
}

template <class Integer>
std::optional<double> exact_integer(double value) {
  const bool in_range = value >= static_cast<double>(std::numeric_limits<Integer>::min()) &&
                        value <= static_cast<double>(std::numeric_limits<Integer>::max());
  if (!in_range || value != std::floor(value)) return std::nullopt;
  return value;
}

inline std::optional<double> exact_bool(double value) {
  if (value != 0 && value != 1) return std::nullopt;
  return value;
}

// What a number in the text becomes as a value of the named type; nothing if it is none.
using Conversion = std::optional<double> (*)(double);

inline const std::map<std::string, Conversion>& conversions() {
  static const std::map<std::string, Conversion> table{
      {"f16", round_to<Eigen::half>},
      {"bf16", round_to<Eigen::bfloat16>},
      {"f32", round_to<float>},
      {"f64", round_to<double>},
      {"bool", exact_bool},
      {"i32", exact_integer<std::int32_t>},
      {"i64", exact_integer<std::int64_t>},
  };
  return table;
}

inline std::vector<std::string> split(const std::string& line) {
  std::istringstream stream(line);
  std::vector<std::string> words;
  for (std::string word; stream >> word;) words.push_back(word);
  return words;
}

class Parser {
 public:
  Parser(std::istream& stream, std::string source) : stream_(stream), source_(std::move(source)) {}

  Case parse() {
    std::string line;
    while (next_line(line)) {
      const std::vector<std::string> words = split(line);
      if (!words.empty()) parse_item(words);
    }
    if (case_.name.empty()) fail("there is no line 'case NAME'");
    if (case_.op.empty()) fail("there is no line 'op NAME'");
    return std::move(case_);
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw ParseError(source_ + ":" + std::to_string(line_number_) + ": " + what);
  }

  bool next_line(std::string& line) {
    if (!std::getline(stream_, line)) return false;
    ++line_number_;
    return true;
  }

  void parse_item(const std::vector<std::string>& words) {
    const std::string& keyword = words.front();
    if (keyword == "case") {
      set_once(case_.name, words);
    } else if (keyword == "op") {
      set_once(case_.op, words);
    } else if (keyword == "opset") {
      case_.opset = index(only_value(words), "the opset");
    } else if (keyword == "attribute") {
      parse_attribute(words);
    } else if (keyword == "input") {
      parse_tensor(words, case_.inputs);
    } else if (keyword == "output") {
      parse_tensor(words, case_.outputs);
    } else {
      fail("unknown keyword '" + keyword + "'");
    }
  }

  std::string only_value(const std::vector<std::string>& words) const {
    if (words.size() != 2) fail("'" + words.front() + "' takes exactly one value");
    return words[1];
  }

  void set_once(std::string& target, const std::vector<std::string>& words) const {
    if (!target.empty()) fail("'" + words.front() + "' is given twice");
    target = only_value(words);
  }

  Index index(const std::string& word, const std::string& what) const {
    const std::optional<Index> value = to_index(word);
    if (!value || *value < 0) fail(what + " must be a whole number, not '" + word + "'");
    return *value;
  }

  void parse_attribute(const std::vector<std::string>& words) {
    if (words.size() < 3) fail("an attribute needs a name and a value");
    std::string value = words[2];
    for (std::size_t i = 3; i < words.size(); ++i) value += " " + words[i];
    if (!case_.attributes.emplace(words[1], value).second) {
      fail("attribute " + words[1] + " is given twice");
    }
  }

  void parse_tensor(const std::vector<std::string>& words, std::map<Index, Tensor>& tensors) {
    if (words.size() < 4) fail("a tensor needs a slot, a name and a type");
    const Index slot = index(words[1], "the slot");
    if (words[2] == "-" && words[3] == "absent" && words.size() == 4) return;
    Tensor tensor{words[2], words[3], {}, {}};
    for (std::size_t i = 4; i < words.size(); ++i) {
      tensor.shape.push_back(index(words[i], "a dimension of tensor " + tensor.name));
    }
    parse_values(tensor);
    const std::string title = words[0] + " slot " + words[1];
    if (!tensors.emplace(slot, std::move(tensor)).second) fail(title + " is given twice");
  }

  void parse_values(Tensor& tensor) {
    const auto conversion = conversions().find(tensor.type);
    if (conversion == conversions().end()) {
      fail("tensor " + tensor.name + " has the unknown type '" + tensor.type + "'");
    }
    const std::size_t expected = value_count(tensor);
    std::string line;
    if (!next_line(line)) fail("the text ends before the values of tensor " + tensor.name);
    const std::vector<std::string> words = split(line);
    if (words.size() != expected) {
      fail("tensor " + tensor.name + " of shape " + shape_text(tensor.shape) + " needs " +
           std::to_string(expected) + " values, its line has " + std::to_string(words.size()));
    }
    for (const std::string& word : words) {
      const std::optional<double> number = to_number(word);
      const std::optional<double> value = number ? conversion->second(*number) : number;
      if (!value) fail("tensor " + tensor.name + ": '" + word + "' is no " + tensor.type);
      tensor.values.push_back(*value);
    }
  }

  std::size_t value_count(const Tensor& tensor) const {
    Index count = 1;
    for (const Index dimension : tensor.shape) {
      if (dimension != 0 && count > std::numeric_limits<Index>::max() / dimension) {
        fail("tensor " + tensor.name + " is too large: " + shape_text(tensor.shape));
      }
      count *= dimension;
    }
    return static_cast<std::size_t>(count);
  }

  std::istream& stream_;
  std::string source_;
  Index line_number_ = 0;
  Case case_;
};

}  // namespace detail

/// Parses one case; `source` (a file's name, say) begins every error message.
inline Case parse(std::istream& stream, const std::string& source) {
  return detail::Parser(stream, source).parse();
}

/// All cases of a folder: its files *.txt in the order of their names. A folder that is missing or
/// holds no such file gives none.
inline std::vector<Case> read_folder(const std::filesystem::path& folder) {
  std::vector<std::filesystem::path> files;
  if (std::filesystem::is_directory(folder)) {
    for (const auto& entry : std::filesystem::directory_iterator(folder)) {
      if (entry.path().extension() == ".txt") files.push_back(entry.path());
    }
  }
  std::sort(files.begin(), files.end());
  std::vector<Case> cases;
  for (const std::filesystem::path& file : files) {
    std::ifstream stream(file);
    if (!stream) throw ParseError(file.string() + ": cannot be opened");
    cases.push_back(parse(stream, file.filename().string()));
  }
  return cases;
}

using BoolMatrix = Eigen::Matrix<bool, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

inline constexpr double infinity = std::numeric_limits<double>::infinity();

// ---- The operators' slots and attributes -------------------------------------------------------

enum Input : Index {
  queries_in,
  keys_in,
  values_in,
  mask_in,
  past_key_in,
  past_value_in,
  lengths_in
};
enum Output : Index { result_out, present_key_out, present_value_out, scores_out };

/// What the operator's fourth output holds.
enum class ScoresMode : Index { raw = 0, capped = 1, masked = 2, weights = 3 };

inline const Tensor* find(const std::map<Index, Tensor>& tensors, Index slot) {
  const auto found = tensors.find(slot);
  return found == tensors.end() ? nullptr : &found->second;
}

inline const Tensor& require(const std::map<Index, Tensor>& tensors, Index slot) {
  const Tensor* tensor = find(tensors, slot);
  if (!tensor) throw std::runtime_error("slot " + std::to_string(slot) + " is required");
  return *tensor;
}

inline void require(bool holds, const std::string& sentence) {
  if (!holds) throw std::runtime_error(sentence);
}

inline std::optional<double> number_attribute(const Case& test, const std::string& name) {
  const auto found = test.attributes.find(name);
  if (found == test.attributes.end()) return std::nullopt;
  const std::optional<double> value = golden::to_number(found->second);
  require(value.has_value(), "attribute " + name + " is no number: " + found->second);
  return value;
}

inline Index index_attribute(const Case& test, const std::string& name, Index absent) {
  return static_cast<Index>(number_attribute(test, name).value_or(static_cast<double>(absent)));
}

inline ScoresMode scores_mode(const Case& test) {
  const Index mode = index_attribute(test, "qk_matmul_output_mode", 0);
  require(0 <= mode && mode <= 3, "qk_matmul_output_mode must be 0, 1, 2 or 3");
  return static_cast<ScoresMode>(mode);
}

inline bool is_additive(const Tensor& mask) { return mask.type != "bool"; }

/// An attribute or slot that nobody has thought about must not pass unnoticed.
inline void require_known(const Case& test) {
  static const std::map<std::string, std::set<std::string>> known{
      {"Attention",
       {"is_causal", "kv_num_heads", "q_num_heads", "qk_matmul_output_mode", "scale", "softcap",
        "softmax_precision"}},
      {"FlexAttention", {"prob_mod", "scale", "score_mod", "softmax_precision"}},
  };
  const auto op = known.find(test.op);
  require(op != known.end(), "unknown operator " + test.op);
  for (const auto& [name, value] : test.attributes) {
    require(op->second.count(name) == 1, "unknown attribute " + name + " of " + test.op);
  }
  for (const auto& [slot, tensor] : test.inputs) {
    require(slot <= lengths_in, "unknown input " + tensor.name);
  }
  for (const auto& [slot, tensor] : test.outputs) {
    require(slot <= scores_out, "unknown output " + tensor.name);
  }
}

// ---- Tensors of three and of four dimensions ---------------------------------------------------

/// Where the element (batch, head, token, column) of a tensor lies.
struct Layout {
  Index batches, heads, length, width;
  Index batch_stride, head_stride, row_stride;

  Index offset(Index batch, Index head, Index token, Index column) const {
    return batch * batch_stride + head * head_stride + token * row_stride + column;
  }
};

/// Three dimensions are (batch, length, heads·width), four are (batch, heads, length, width).
inline Layout layout_of(const Tensor& tensor, Index heads) {
  const std::vector<Index>& shape = tensor.shape;
  if (shape.size() == 4) {
    const Index plane = shape[2] * shape[3];
    return {shape[0], shape[1], shape[2], shape[3], shape[1] * plane, plane, shape[3]};
  }
  require(shape.size() == 3, tensor.name + " must have three or four dimensions");
  require(heads > 0 && shape[2] % heads == 0, tensor.name + " does not divide into heads");
  const Index width = shape[2] / heads;
  return {shape[0], heads, shape[1], width, shape[1] * shape[2], width, shape[2]};
}

struct Operand {
  Tensor tensor;
  Layout layout;

  double at(Index batch, Index head, Index token, Index column) const {
    return tensor.values[static_cast<std::size_t>(layout.offset(batch, head, token, column))];
  }
};

inline Operand operand(const Tensor& tensor, Index heads) {
  return {tensor, layout_of(tensor, heads)};
}

/// The tokens of `past` followed by those of `recent`, in four dimensions.
inline Operand append(const Operand& past, const Operand& recent) {
  const Layout& layout = recent.layout;
  require(past.layout.batches == layout.batches && past.layout.heads == layout.heads &&
              past.layout.width == layout.width,
          past.tensor.name + " does not fit " + recent.tensor.name);
  const Index length = past.layout.length + layout.length;
  Tensor all{recent.tensor.name,
             recent.tensor.type,
             {layout.batches, layout.heads, length, layout.width},
             {}};
  for (Index batch = 0; batch < layout.batches; ++batch)
    for (Index head = 0; head < layout.heads; ++head)
      for (Index token = 0; token < length; ++token)
        for (Index column = 0; column < layout.width; ++column) {
          const Index since = token - past.layout.length;
          all.values.push_back(since < 0 ? past.at(batch, head, token, column)
                                         : recent.at(batch, head, since, column));
        }
  return operand(all, layout.heads);
}

// ---- One case in the terms of the library ------------------------------------------------------

struct Problem {
  Operand queries, keys, values;  // keys and values with the past
  Operand result;                 // expected
  const Tensor* mask = nullptr;
  double scale = 1;
  double cap = 0;  // of the scores; 0 is none
  bool causal = false;
  bool has_lengths = false;
  std::optional<Index> past = std::nullopt;  // number of past tokens, where some come with the case
  std::vector<Index> lengths = {};           // keys that are not padding, for each batch

  Index query_heads() const { return queries.layout.heads; }
  Index query_count() const { return queries.layout.length; }
  Index key_count() const { return keys.layout.length; }
  Index group() const { return queries.layout.heads / keys.layout.heads; }

  Index length(Index batch) const { return lengths[static_cast<std::size_t>(batch)]; }

  /// Query i of a causal case sees the keys up to i + offset.
  Index causal_offset(Index batch) const {
    if (past) return *past;
    return has_lengths ? length(batch) - query_count() : 0;
  }

  /// The mask's value for one score; none where its rows are shorter than the keys.
  std::optional<double> mask_value(Index batch, Index head, Index query, Index key) const {
    const std::array<Index, 4> position{batch, head, query, key};
    if (key >= mask->shape.back()) return std::nullopt;
    Index offset = 0;
    for (std::size_t axis = 0; axis < mask->shape.size(); ++axis) {
      const Index dimension = mask->shape[axis];
      const Index along = position[position.size() - mask->shape.size() + axis];
      offset = offset * dimension + (dimension == 1 ? 0 : along);
    }
    return mask->values[static_cast<std::size_t>(offset)];
  }

  bool mask_allows(Index batch, Index head, Index query, Index key) const {
    if (!mask) return true;
    const std::optional<double> value = mask_value(batch, head, query, key);
    return value && *value != (is_additive(*mask) ? -infinity : 0.0);
  }

  bool sees(Index batch, Index head, Index query, Index key) const {
    return mask_allows(batch, head, query, key) && key < length(batch) &&
           (!causal || key <= query + causal_offset(batch));
  }

  double bias(Index batch, Index head, Index query, Index key) const {
    return mask_allows(batch, head, query, key) ? *mask_value(batch, head, query, key) : 0.0;
  }

  /// Whether the mask is more than a choice of keys.
  bool has_bias() const {
    return mask && is_additive(*mask) &&
           std::any_of(mask->values.begin(), mask->values.end(),
                       [](double value) { return value != 0 && value != -infinity; });
  }

  bool heads_share_mask() const {
    if (!mask) return true;
    for (Index batch = 0; batch < queries.layout.batches; ++batch)
      for (Index head = 1; head < query_heads(); ++head)
        if (allowed_by_mask(batch, head) != allowed_by_mask(batch, 0)) return false;
    return true;
  }

  BoolMatrix allowed_by_mask(Index batch, Index head) const {
    return BoolMatrix::NullaryExpr(query_count(), key_count(), [&](Index query, Index key) {
      return mask_allows(batch, head, query, key);
    });
  }

  BoolMatrix all_seen(Index batch, Index head) const {
    return BoolMatrix::NullaryExpr(query_count(), key_count(), [&](Index query, Index key) {
      return sees(batch, head, query, key);
    });
  }
};

/// A result has a row of `width` numbers for each query of each head.
inline void require_extents(const Operand& result, Index width, const Problem& problem) {
  const Layout& queries = problem.queries.layout;
  const Layout& actual = result.layout;
  require(actual.batches == queries.batches && actual.heads == queries.heads &&
              actual.length == queries.length && actual.width == width,
          result.tensor.name + " does not fit the queries");
}

inline void require_mask_fits(const Problem& problem) {
  if (!problem.mask) return;
  const Layout& queries = problem.queries.layout;
  const std::array<Index, 4> full{queries.batches, queries.heads, queries.length,
                                  problem.key_count()};
  const std::vector<Index>& shape = problem.mask->shape;
  require(!shape.empty() && shape.size() <= full.size(), "the mask needs one to four dimensions");
  require(shape.back() <= problem.key_count(), "the mask is wider than the keys");
  for (std::size_t axis = 0; axis + 1 < shape.size(); ++axis) {
    const Index extent = full[full.size() - shape.size() + axis];
    require(shape[axis] == 1 || shape[axis] == extent, "the mask does not broadcast");
  }
}

inline void require_consistent(const Problem& problem) {
  const Layout& queries = problem.queries.layout;
  const Layout& keys = problem.keys.layout;
  const Layout& values = problem.values.layout;
  require(queries.batches == keys.batches && keys.batches == values.batches, "batches differ");
  require(keys.heads > 0 && keys.heads == values.heads && queries.heads % keys.heads == 0,
          "heads do not fit");
  require(queries.width == keys.width && keys.length == values.length, "keys do not fit");
  for (const Index length : problem.lengths) {
    require(length >= 0 && length <= keys.length, "a length passes the number of keys");
  }
  require_extents(problem.result, values.width, problem);
  require_mask_fits(problem);
}

inline void read_past(const Case& test, Problem& problem) {
  const Tensor* past_key = find(test.inputs, past_key_in);
  const Tensor* past_value = find(test.inputs, past_value_in);
  require(!past_key == !past_value, "past keys and past values come together");
  if (!past_key) return;
  const Index heads = problem.keys.layout.heads;
  problem.past = operand(*past_key, heads).layout.length;
  problem.keys = append(operand(*past_key, heads), problem.keys);
  problem.values = append(operand(*past_value, heads), problem.values);
}

inline void read_lengths(const Case& test, Problem& problem) {
  const auto batches = static_cast<std::size_t>(problem.queries.layout.batches);
  problem.lengths.assign(batches, problem.key_count());
  const Tensor* lengths = find(test.inputs, lengths_in);
  if (!lengths) return;
  require(lengths->values.size() == batches, "one length for each batch is required");
  problem.has_lengths = true;
  for (std::size_t batch = 0; batch < batches; ++batch) {
    problem.lengths[batch] = static_cast<Index>(lengths->values[batch]);
  }
}

inline Problem read_problem(const Case& test) {
  const Index query_heads = index_attribute(test, "q_num_heads", 0);
  const Index key_heads = index_attribute(test, "kv_num_heads", 0);
  Problem problem{operand(require(test.inputs, queries_in), query_heads),
                  operand(require(test.inputs, keys_in), key_heads),
                  operand(require(test.inputs, values_in), key_heads),
                  operand(require(test.outputs, result_out), query_heads)};
  read_past(test, problem);
  read_lengths(test, problem);
  problem.mask = find(test.inputs, mask_in);
  problem.causal = index_attribute(test, "is_causal", 0) != 0;
  const auto width = static_cast<double>(problem.queries.layout.width);
  problem.cap = number_attribute(test, "softcap").value_or(0);
  problem.scale = number_attribute(test, "scale").value_or(1 / std::sqrt(width));
  require_consistent(problem);
  return problem;
}

}  // namespace golden
