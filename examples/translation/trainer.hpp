#pragma once
// Training: one batch after the other, in an order that the seed decides, from a checkpoint on as if
// there had been no interruption.

#include <time.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "history.hpp"
#include "settings.hpp"

namespace translation {

/// Why training cannot go on.
class TrainingError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Seconds that this thread has had a processor, whoever else uses the machine.
inline double processor_seconds() {
  timespec now;
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

inline std::uint64_t fingerprint(const DataSet& data) {
  Checksum checksum;
  for (const auto* part : {&data.training, &data.validation}) {
    for (const Example& example : *part) {
      for (const auto* tokens : {&example.source, &example.input, &example.label}) {
        const std::uint64_t size = tokens->size();
        checksum.add(&size, sizeof size);
        checksum.add(tokens->data(), sizeof(Token) * tokens->size());
      }
    }
  }
  return checksum.value();
}

/// The settings with the vocabularies' true sizes, which are smaller where there are few words.
inline Settings fitted(Settings settings, const DataSet& data) {
  settings.size.source_vocabulary = data.source.size();
  settings.size.target_vocabulary = data.target.size();
  return settings;
}

template <class Layer>
class Trainer {
 public:
  using Scalar = typename Model<Layer>::Scalar;

  /// Starts anew.
  Trainer(const Settings& settings, DataSet data)
      : settings_(settings),
        data_(std::move(data)),
        model_(first_model<Layer>(fitted(settings, data_))),
        optimizer_(model_, settings.optimizer),
        gradients_(gradients_for(model_)) {
    order_epoch();
  }

  const Settings& settings() const { return settings_; }
  const DataSet& data() const { return data_; }
  const Model<Layer>& model() const { return model_; }
  const std::vector<Record>& history() const { return history_; }
  Index epoch() const { return epoch_; }
  Index batches_per_epoch() const {
    const Index count = static_cast<Index>(data_.training.size());
    return (count + settings_.batch - 1) / settings_.batch;
  }
  Index batches_done() const { return epoch_ * batches_per_epoch() + batch_; }
  Index sentences_done() const {
    return epoch_ * static_cast<Index>(data_.training.size()) + batch_ * settings_.batch;
  }
  const LossSums& sums_since_record() const { return sums_; }
  double seconds() const { return seconds_; }

  /// Learns from the next batch; true where a record is due.
  bool step() {
    const double before = processor_seconds();
    sums_ += learn(next_batch());
    seconds_ += processor_seconds() - before;
    const Index batches = batches_per_epoch(), records = settings_.records_per_epoch;
    const Index place = ++batch_;
    const bool is_due = place * records / batches > (place - 1) * records / batches;
    if (batch_ == batches) {
      ++epoch_, batch_ = 0;
      order_epoch();
    }
    return is_due;
  }

  /// Judges the model by the validation pairs and writes the record down.
  const Record& record() {
    const LossSums validation = validate();
    const double epochs =
        static_cast<double>(batches_done()) / static_cast<double>(batches_per_epoch());
    history_.push_back({epochs, static_cast<double>(batches_done()), seconds_, sums_.mean(),
                        sums_.accuracy(), validation.mean(), validation.accuracy()});
    sums_ = {};
    return history_.back();
  }

  LossSums validate() {
    LossSums sums;
    const std::size_t count = data_.validation.size();
    const auto size = static_cast<std::size_t>(settings_.batch);
    for (std::size_t first = 0; first < count; first += size) {
      std::vector<const Example*> examples;
      for (std::size_t i = first; i < std::min(count, first + size); ++i)
        examples.push_back(&data_.validation[i]);
      sums += loss_of(model_, batch_of(examples), scratch_);
    }
    return sums;
  }

  void save(const std::string& file) {
    CheckpointWriter writer(file);
    writer.write(static_cast<std::uint32_t>(sizeof(Scalar)));
    write_settings(writer, settings_);
    write_vocabulary(writer, data_.source);
    write_vocabulary(writer, data_.target);
    visit_parameters<Layer>([&](Part, const auto& matrix) { writer.write_matrix(matrix); }, model_);
    writer.write(fingerprint(data_));
    visit_progress([&](const auto& number) { writer.write(number); });
    writer.write(static_cast<std::uint64_t>(history_.size()));
    for (const Record& record : history_)
      visit_record([&](double number) { writer.write(number); }, record);
    visit_moments([&](const auto& matrix) { writer.write_matrix(matrix); });
    writer.finish();
  }

  /// Goes on where that checkpoint was written. `reader` stands behind the model, which is given.
  void restore(CheckpointReader& reader, Model<Layer> model) {
    if (reader.read<std::uint64_t>() != fingerprint(data_))
      reader.fail("was made from other sentence pairs");
    model_ = std::move(model);
    visit_progress([&](auto& number) { number = reader.read<std::decay_t<decltype(number)>>(); });
    history_.resize(static_cast<std::size_t>(reader.read<std::uint64_t>()));
    for (Record& record : history_)
      visit_record([&](double& number) { number = reader.read<double>(); }, record);
    visit_moments([&](auto& matrix) { reader.read_matrix(matrix); });
    order_epoch();
  }

 private:
  template <class Visit>
  void visit_progress(const Visit& visit) {
    visit(epoch_);
    visit(batch_);
    visit(seconds_);
    visit(sums_.loss);
    visit(sums_.tokens);
    visit(sums_.correct);
    visit(optimizer_.steps());
  }
  template <class Visit>
  void visit_moments(const Visit& visit) {
    const auto visit_one = [&](Part, auto& matrix) { visit(matrix); };
    visit_parameters<Layer>(visit_one, optimizer_.first_moments());
    visit_parameters<Layer>(visit_one, optimizer_.second_moments());
  }

  void order_epoch() {
    order_.resize(data_.training.size());
    std::iota(order_.begin(), order_.end(), std::size_t(0));
    Random(settings_.seed, /*purpose=*/3, static_cast<std::uint64_t>(epoch_)).shuffle(order_);
  }

  Batch batch_of(const std::vector<const Example*>& examples) const {
    return make_batch(examples, settings_.padding, settings_.size.length);
  }

  Batch next_batch() const {
    const auto first = static_cast<std::size_t>(batch_ * settings_.batch);
    const std::size_t end =
        std::min(order_.size(), first + static_cast<std::size_t>(settings_.batch));
    std::vector<const Example*> examples;
    for (std::size_t i = first; i < end; ++i) examples.push_back(&data_.training[order_[i]]);
    return batch_of(examples);
  }

  LossSums learn(const Batch& batch) {
    Random random(settings_.seed, /*purpose=*/4, static_cast<std::uint64_t>(optimizer_.steps()));
    const Matrix<Scalar> dropout = dropout_factors<Scalar>(
        static_cast<Index>(batch.labels.size()), settings_.size.width, settings_.dropout, random);
    const LossSums sums = loss_and_gradients(model_, batch, dropout, scratch_, gradients_);
    if (!std::isfinite(sums.loss)) {
      throw TrainingError("the loss is not finite after " + std::to_string(optimizer_.steps()) +
                          " steps; try a smaller --learning-rate or --clip 1");
    }
    optimizer_.step(model_, gradients_);
    return sums;
  }

  Settings settings_;
  DataSet data_;
  Model<Layer> model_;
  Optimizer<Layer> optimizer_;
  ModelGradients<Layer> gradients_;
  OutputScratch<Scalar> scratch_;
  std::vector<std::size_t> order_;
  Index epoch_ = 0, batch_ = 0;
  double seconds_ = 0;
  LossSums sums_;
  std::vector<Record> history_;
};

/// What a checkpoint begins with: all that translating needs.
struct SavedModel {
  Settings settings;
  Vocabulary source, target;
};

inline SavedModel read_saved_model(CheckpointReader& reader, std::size_t scalar_size) {
  if (reader.read<std::uint32_t>() != scalar_size)
    reader.fail("holds numbers of another size than this program's");
  SavedModel saved;
  saved.settings = read_settings(reader);
  saved.source = read_vocabulary(reader);
  saved.target = read_vocabulary(reader);
  return saved;
}

/// The model that follows.
template <class Layer>
Model<Layer> read_model(CheckpointReader& reader, const SavedModel& saved) {
  Settings settings = saved.settings;
  settings.size.source_vocabulary = saved.source.size();
  settings.size.target_vocabulary = saved.target.size();
  Model<Layer> model = first_model<Layer>(settings);
  visit_parameters<Layer>([&](Part, auto& matrix) { reader.read_matrix(matrix); }, model);
  return model;
}

}  // namespace translation
