#pragma once
// All that decides the numbers of a run; a checkpoint keeps it.

#include <cstdint>
#include <string>

#include "checkpoint.hpp"
#include "optimizer.hpp"

namespace translation {

enum class Form : std::uint32_t {
  standard,     ///< attention with four matrices
  surface,      ///< the surface form with two, drawn at random
  merged_init,  ///< the surface form, starting as the same function as the standard form
};

inline const char* name_of(Form form) {
  switch (form) {
    case Form::standard:
      return "standard";
    case Form::surface:
      return "surface";
    case Form::merged_init:
      break;
  }
  return "merged-init";
}

struct Settings {
  Form form = Form::standard;
  std::uint64_t seed = 1;
  ModelSize size = {};
  OptimizerOptions optimizer = {};
  double dropout = 0.5;  ///< before the output layer
  Index batch = 64;      ///< sentence pairs of a step
  Padding padding = Padding::dropped;
  Index records_per_epoch = 1;
  std::uint64_t limit = 0;         ///< as in DataOptions
  double validation_share = 0.15;  ///< as in DataOptions

  DataOptions data_options() const {
    return {static_cast<std::size_t>(limit), validation_share,
            static_cast<std::size_t>(size.target_vocabulary), size.length, seed};
  }
};

/// Calls visit(number) for each number of the settings.
template <class Visit, class SettingsType>
void visit_settings(const Visit& visit, SettingsType& settings) {
  visit(settings.form);
  visit(settings.seed);
  visit(settings.size.width);
  visit(settings.size.heads);
  visit(settings.size.head_width);
  visit(settings.size.feed_forward);
  visit(settings.size.source_vocabulary);
  visit(settings.size.target_vocabulary);
  visit(settings.size.length);
  visit(settings.optimizer.method);
  visit(settings.optimizer.learning_rate);
  visit(settings.optimizer.clip_norm);
  visit(settings.optimizer.frozen_attention);
  visit(settings.dropout);
  visit(settings.batch);
  visit(settings.padding);
  visit(settings.records_per_epoch);
  visit(settings.limit);
  visit(settings.validation_share);
}

inline void write_settings(CheckpointWriter& writer, const Settings& settings) {
  visit_settings([&](const auto& number) { writer.write(number); }, settings);
}

inline Settings read_settings(CheckpointReader& reader) {
  Settings settings;
  visit_settings([&](auto& number) { number = reader.read<std::decay_t<decltype(number)>>(); },
                 settings);
  return settings;
}

inline void write_vocabulary(CheckpointWriter& writer, const Vocabulary& vocabulary) {
  const std::vector<std::string> words = vocabulary.words();
  writer.write(static_cast<std::uint64_t>(words.size()));
  for (const std::string& word : words) writer.write(word);
}

inline Vocabulary read_vocabulary(CheckpointReader& reader) {
  std::vector<std::string> words;
  for (auto count = reader.read<std::uint64_t>(); count > 0; --count)
    words.push_back(reader.read_string());
  return Vocabulary(words);
}

/// A model of this form to start from.
template <class Layer>
Model<Layer> first_model(const Settings& settings) {
  if constexpr (requires(Layer layer) { layer.metric; }) {
    if (settings.form == Form::merged_init) {
      using Scalar = typename Model<Layer>::Scalar;
      return merged(draw_model<StandardWeights<Scalar>>(settings.size, settings.seed));
    }
  }
  return draw_model<Layer>(settings.size, settings.seed);
}

}  // namespace translation
