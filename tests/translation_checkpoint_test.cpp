// Training as examples/translation does it: the same losses with interruptions as without.

#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <thread>

#include "../examples/translation/built_in_pairs.hpp"
#include "../examples/translation/training_run.hpp"
#include "support/catch.hpp"

namespace {

using namespace translation;
using Layer = SurfaceWeights<float>;

Settings small(std::uint64_t seed = 1) {
  Settings settings;
  settings.seed = seed;
  settings.form = Form::merged_init;
  settings.size = {.width = 16, .heads = 2, .head_width = 8, .feed_forward = 24};
  settings.optimizer = {.method = Method::adam, .clip_norm = 1};
  settings.dropout = 0.2;
  settings.batch = 16;
  settings.limit = 120;
  settings.records_per_epoch = 2;
  return settings;
}

DataSet small_data(const Settings& settings) {
  return make_data_set(built_in_pairs(), settings.data_options());
}

Trainer<Layer> new_trainer(const Settings& settings = small()) {
  return {settings, small_data(settings)};
}

Trainer<Layer> restored_trainer(const std::string& file) {
  CheckpointReader reader(file);
  const SavedModel saved = read_saved_model(reader, sizeof(float));
  Model<Layer> model = read_model<Layer>(reader, saved);
  Trainer<Layer> trainer(saved.settings, small_data(saved.settings));
  trainer.restore(reader, std::move(model));
  return trainer;
}

/// A directory that is removed when the test ends.
class TemporaryDirectory {
 public:
  TemporaryDirectory()
      : path_(std::filesystem::temp_directory_path() /
              ("surfattn_translation_test_" + std::to_string(::getpid()))) {
    std::filesystem::create_directories(path_);
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  ~TemporaryDirectory() { std::filesystem::remove_all(path_); }
  std::string file(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

std::string bytes_of(const std::string& file) {
  std::ifstream stream(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}
void write_bytes(const std::string& file, const std::string& bytes) {
  std::ofstream(file, std::ios::binary) << bytes;
}

/// The losses and accuracies of a run: all but the seconds.
void check_same(const std::vector<Record>& found, const std::vector<Record>& expected) {
  REQUIRE(found.size() == expected.size());
  for (std::size_t i = 0; i < found.size(); ++i) {
    CHECK(found[i].epoch == expected[i].epoch);
    CHECK(found[i].steps == expected[i].steps);
    CHECK(found[i].training_loss == expected[i].training_loss);
    CHECK(found[i].training_accuracy == expected[i].training_accuracy);
    CHECK(found[i].validation_loss == expected[i].validation_loss);
    CHECK(found[i].validation_accuracy == expected[i].validation_accuracy);
  }
}

/// Steps and records up to so many steps in all.
void advance(Trainer<Layer>& trainer, Index steps) {
  while (trainer.batches_done() < steps) {
    if (trainer.step()) trainer.record();
  }
}

template <class Work>
pid_t in_child(const Work& work) {
  const pid_t child = ::fork();
  if (child != 0) return child;
  work();
  ::_exit(0);
}

int signal_that_ended(pid_t child) {
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFSIGNALED(status) ? WTERMSIG(status) : 0;
}

std::string complaint(const std::string& file) {
  try {
    restored_trainer(file);
    return "";
  } catch (const CheckpointError& error) {
    return error.what();
  }
}

}  // namespace

TEST_CASE("the same seed gives the same losses, another seed others", "[translation]") {
  auto one = new_trainer(), same = new_trainer(), other = new_trainer(small(2));
  for (auto* trainer : {&one, &same, &other}) advance(*trainer, 14);
  REQUIRE(one.history().size() == 4);
  check_same(same.history(), one.history());
  CHECK(other.history()[0].training_loss != one.history()[0].training_loss);
  CHECK(one.history()[3].training_loss < one.history()[0].training_loss);
}

TEST_CASE("a run that is resumed from any step gives the losses of one that was not interrupted",
          "[translation]") {
  const TemporaryDirectory directory;
  auto whole = new_trainer();
  advance(whole, 21);
  REQUIRE(whole.batches_per_epoch() == 7);
  for (const Index step : {0, 1, 4, 7, 13, 20}) {
    auto first = new_trainer();
    advance(first, step);
    first.save(directory.file("state"));
    auto second = restored_trainer(directory.file("state"));
    CHECK(second.batches_done() == step);
    CHECK(second.seconds() == first.seconds());
    advance(second, 21);
    check_same(second.history(), whole.history());
  }
}

TEST_CASE("who is killed while a checkpoint is written goes on from the one before",
          "[translation]") {
  const TemporaryDirectory directory;
  const std::string file = directory.file("state");
  auto trainer = new_trainer();
  advance(trainer, 5);
  trainer.save(file);
  const std::string before = bytes_of(file);
  const auto child = in_child([&] {
    CheckpointWriter writer(file);
    writer.write(before.substr(0, before.size() / 2));
    ::raise(SIGKILL);
  });
  CHECK(signal_that_ended(child) == SIGKILL);
  CHECK((bytes_of(file) == before));  // not to be printed
  CHECK(restored_trainer(file).batches_done() == 5);
  // what the other left behind is no obstacle
  advance(trainer, 6);
  trainer.save(file);
  CHECK(restored_trainer(file).batches_done() == 6);
}

TEST_CASE("who is killed at any time and resumes gives the losses of one that was not",
          "[translation]") {
  const TemporaryDirectory directory;
  const std::string file = directory.file("state");
  constexpr Index steps = 400;
  auto whole = new_trainer();
  advance(whole, steps);
  new_trainer().save(file);
  int killed = 0;
  for (int attempt = 0; attempt < 5; ++attempt) {
    const auto child = in_child([&] {
      auto trainer = restored_trainer(file);
      while (trainer.batches_done() < steps) {
        if (trainer.step()) trainer.record();
        trainer.save(file);
      }
    });
    std::this_thread::sleep_for(std::chrono::milliseconds(23 + 17 * attempt));
    ::kill(child, SIGKILL);
    killed += signal_that_ended(child) == SIGKILL;
  }
  CHECK(killed > 0);
  auto last = restored_trainer(file);
  advance(last, steps);
  check_same(last.history(), whole.history());
}

TEST_CASE("an interrupted run stops after its step, saves, and goes on when it is resumed",
          "[translation]") {
  const TemporaryDirectory directory;
  RunOptions options{.epochs = 1000000,
                     .checkpoint = directory.file("state"),
                     .log = directory.file("log.csv"),
                     .checkpoint_seconds = 1e9,
                     .report = nullptr};
  const auto child = in_child([&] {
    auto trainer = new_trainer();
    if (run_training(trainer, options)) ::raise(SIGKILL);  // it has not reached its end
  });
  while (!std::filesystem::exists(options.checkpoint))
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  ::kill(child, SIGTERM);
  CHECK(signal_that_ended(child) == 0);
  auto resumed = restored_trainer(options.checkpoint);
  options.epochs = resumed.epoch() + 2;
  CHECK(run_training(resumed, options));
  auto whole = new_trainer();
  advance(whole, options.epochs * whole.batches_per_epoch());
  check_same(resumed.history(), whole.history());
  const auto log = read_history(options.log);
  REQUIRE(log.size() == whole.history().size());
  CHECK(log.back().training_loss == Approx(whole.history().back().training_loss).epsilon(1e-8));
}

TEST_CASE("a damaged checkpoint is refused", "[translation]") {
  using surfattn::test::contains_text;
  const TemporaryDirectory directory;
  const std::string file = directory.file("state"), damaged = directory.file("damaged");
  new_trainer().save(file);
  const std::string bytes = bytes_of(file);
  CHECK(complaint(file).empty());
  SECTION("cut off anywhere") {
    for (std::size_t size = 0; size < bytes.size(); size += 1 + bytes.size() / 61) {
      write_bytes(damaged, bytes.substr(0, size));
      CHECK_THAT(complaint(damaged), contains_text(damaged + ": is damaged"));
    }
  }
  SECTION("a bit changed anywhere") {
    for (std::size_t place = sizeof(CheckpointHeader); place < bytes.size();
         place += 1 + bytes.size() / 97) {
      std::string changed = bytes;
      changed[place] = static_cast<char>(changed[place] ^ (1 << (place % 8)));
      write_bytes(damaged, changed);
      CHECK_THAT(complaint(damaged), contains_text("its checksum is wrong"));
    }
  }
  SECTION("no checkpoint at all") {
    write_bytes(damaged, "epoch,steps,seconds,and more words than a header has\n");
    CHECK_THAT(complaint(damaged), contains_text("is no checkpoint"));
    CHECK_THAT(complaint(directory.file("missing")), contains_text("no such checkpoint"));
  }
  SECTION("of another version") {
    std::string changed = bytes;
    changed[8] = 9;
    write_bytes(damaged, changed);
    CHECK_THAT(complaint(damaged), contains_text("is of version 9, but this program reads"));
  }
  SECTION("of other sentences") {
    Settings other = small();
    other.limit = 60;
    CheckpointReader reader(file);
    const SavedModel saved = read_saved_model(reader, sizeof(float));
    Model<Layer> model = read_model<Layer>(reader, saved);
    Trainer<Layer> trainer(small(), small_data(other));
    CHECK_THROWS_WITH(trainer.restore(reader, std::move(model)),
                      contains_text("was made from other sentence pairs"));
  }
}

TEST_CASE("a checkpoint that cannot be written is an error", "[translation]") {
  CHECK_THROWS_AS(new_trainer().save("/nonexistent/state"), CheckpointError);
}

TEST_CASE("a loss that is not finite ends the training", "[translation]") {
  Settings settings = small();
  settings.optimizer = {.method = Method::rmsprop, .learning_rate = 1e30};
  auto trainer = new_trainer(settings);
  CHECK_THROWS_AS(advance(trainer, 7), TrainingError);
}
