// Trains the sequence-to-sequence transformer of the Keras example "English-to-Spanish translation"
// with its attention in the standard form or in the surface form, and translates with it.

#include <cstdio>
#include <exception>
#include <filesystem>
#include <iostream>
#include <string>
#include <vector>

#include "benchmark.hpp"
#include "built_in_pairs.hpp"
#include "cached_decoder.hpp"
#include "command_line.hpp"
#include "memory.hpp"
#include "plot.hpp"
#include "training_run.hpp"

namespace {

using namespace translation;

/// Calls use(type) with the weights of a form's attention layers.
template <class Use>
void with_form(Form form, const Use& use) {
  if (form == Form::standard) {
    use(std::type_identity<StandardWeights<float>>());
  } else {
    use(std::type_identity<SurfaceWeights<float>>());
  }
}

DataSet load_data(const CommandLine& line, const Settings& settings) {
  auto pairs = line.pairs.empty() ? built_in_pairs() : read_pairs(line.pairs);
  return make_data_set(std::move(pairs), settings.data_options());
}

template <class Layer>
void show_translations(const Trainer<Layer>& trainer) {
  std::printf("\nsentences that were held out, their translations, and the model's:\n");
  const DataSet& data = trainer.data();
  for (std::size_t i = 0; i < std::min<std::size_t>(8, data.validation.size()); ++i) {
    const Example& example = data.validation[i];
    const auto tokens = translate_greedily(CachedDecoder<Layer>(trainer.model(), example.source));
    std::printf("  %-44s | %-44s | %s\n", data.source.sentence(example.source).c_str(),
                data.target.sentence(example.label).c_str(), data.target.sentence(tokens).c_str());
  }
}

template <class Layer>
void run(Trainer<Layer>& trainer, const CommandLine& line) {
  std::printf("%s form; %zu sentence pairs to learn from, %zu to judge by; %d and %d words\n",
              name_of(trainer.settings().form), trainer.data().training.size(),
              trainer.data().validation.size(), trainer.data().source.size(),
              trainer.data().target.size());
  const std::string checkpoint = line.checkpoint.empty() ? line.resume : line.checkpoint;
  if (!run_training(trainer,
                    {line.epochs, checkpoint, line.log, line.checkpoint_seconds, stdout})) {
    std::printf("interrupted%s%s\n", checkpoint.empty() ? "" : "; go on with --resume ",
                checkpoint.c_str());
    return;
  }
  if (!line.svg.empty())
    plot_runs({{name_of(trainer.settings().form), trainer.history()}}, line.svg);
  show_translations(trainer);
}

void train(const CommandLine& line) {
  if (line.resume.empty()) {
    with_form(line.settings.form, [&](auto type) {
      using Layer = typename decltype(type)::type;
      Trainer<Layer> trainer(line.settings, load_data(line, line.settings));
      run(trainer, line);
    });
    return;
  }
  CheckpointReader reader(line.resume);
  const SavedModel saved = read_saved_model(reader, sizeof(float));
  with_form(saved.settings.form, [&](auto type) {
    using Layer = typename decltype(type)::type;
    Model<Layer> model = read_model<Layer>(reader, saved);
    Trainer<Layer> trainer(saved.settings, load_data(line, saved.settings));
    trainer.restore(reader, std::move(model));
    run(trainer, line);
  });
}

template <class Decoder>
void print_translations(const Decoder& decoder, const Vocabulary& target, std::size_t beam) {
  if (beam == 1) {
    std::cout << target.sentence(translate_greedily(decoder)) << std::endl;
    return;
  }
  for (const Translation& translation : translate_by_beam(decoder, beam))
    std::printf("%8.3f  %s\n", translation.score, target.sentence(translation.tokens).c_str());
  std::printf("\n");
}

void translate(const CommandLine& line) {
  CheckpointReader reader(line.resume);
  const SavedModel saved = read_saved_model(reader, sizeof(float));
  with_form(saved.settings.form, [&](auto type) {
    using Layer = typename decltype(type)::type;
    const Model<Layer> model = read_model<Layer>(reader, saved);
    for (std::string sentence; std::getline(std::cin, sentence);) {
      const auto words = words_of(sentence);
      if (words.empty()) continue;
      const auto source = source_tokens(saved.source, words, model.length());
      if (line.recompute) {
        print_translations(RecomputingDecoder<Layer>(model, source), saved.target, line.beam);
      } else {
        print_translations(CachedDecoder<Layer>(model, source), saved.target, line.beam);
      }
    }
  });
}

void plot(const CommandLine& line) {
  std::vector<Run> runs;
  for (std::size_t i = 0; i + 1 < line.files.size(); ++i) {
    const std::string& file = line.files[i];
    runs.push_back({std::filesystem::path(file).stem().string(), read_history(file)});
  }
  plot_runs(runs, line.files.back());
  std::printf("%s", table_of(runs).c_str());
}

void perform(const CommandLine& line) {
  switch (line.task) {
    case Task::train:
      return train(line);
    case Task::translate:
      return translate(line);
    case Task::plot:
      return plot(line);
    case Task::benchmark:
      return run_benchmark(line.settings, line.seconds);
    case Task::help:
      std::printf("%s", usage().c_str());
  }
}

}  // namespace

int main(int count, char** words) {
  try {
    keep_freed_memory();
    perform(parse_command_line({words + 1, words + count}));
    return 0;
  } catch (const UsageError& error) {
    std::fprintf(stderr, "surfattn_translation: %s\n\n%s", error.what(), usage().c_str());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "surfattn_translation: %s\n", error.what());
    return 1;
  }
}
