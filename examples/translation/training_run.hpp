#pragma once
// A run of training from the user's side: progress, log, checkpoints, interruption.

#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <string>

#include "trainer.hpp"

namespace translation {

struct RunOptions {
  Index epochs = 1;
  std::string checkpoint, log;     ///< files; empty: none
  double checkpoint_seconds = 60;  ///< between checkpoints
  std::FILE* report = stdout;      ///< where records are printed; null: nowhere
};

namespace run_detail {

inline volatile std::sig_atomic_t stop_requested = 0;
extern "C" inline void request_stop(int) { stop_requested = 1; }

inline double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// "1:05:09" or "3:07"
inline std::string clock_words(double seconds) {
  const long whole = std::lround(seconds);
  char text[32];
  if (whole >= 3600) {
    std::snprintf(text, sizeof text, "%ld:%02ld:%02ld", whole / 3600, whole / 60 % 60, whole % 60);
  } else {
    std::snprintf(text, sizeof text, "%ld:%02ld", whole / 60, whole % 60);
  }
  return text;
}

/// One line on a terminal, written over now and then; silent elsewhere.
template <class Layer>
class ProgressLine {
 public:
  ProgressLine(const Trainer<Layer>& trainer, Index epochs)
      : trainer_(trainer), epochs_(epochs), first_sentence_(trainer.sentences_done()) {}
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;
  ~ProgressLine() { clear(); }

  void clear() const {
    if (is_terminal_) std::fprintf(stderr, "\r\033[K");
  }
  void update() {
    const double now = seconds_now();
    if (!is_terminal_ || now - last_ < 0.5) return;
    last_ = now;
    const double done = static_cast<double>(trainer_.sentences_done() - first_sentence_);
    const double rate = done / (now - started_);
    const double all =
        static_cast<double>(epochs_) * static_cast<double>(trainer_.data().training.size());
    const double left = (all - static_cast<double>(trainer_.sentences_done())) / rate;
    clear();
    std::fprintf(stderr, "epoch %ld of %ld, %.1f %%, %.0f sentences a second, %s left",
                 static_cast<long>(trainer_.epoch() + 1), static_cast<long>(epochs_),
                 100 * static_cast<double>(trainer_.sentences_done()) / all, rate,
                 clock_words(left).c_str());
    if (trainer_.sums_since_record().tokens > 0)
      std::fprintf(stderr, ", loss %.4f", trainer_.sums_since_record().mean());
    std::fflush(stderr);
  }

 private:
  const Trainer<Layer>& trainer_;
  Index epochs_, first_sentence_;
  bool is_terminal_ = ::isatty(STDERR_FILENO) == 1;
  double started_ = seconds_now(), last_ = started_;
};

inline void print(const Record& record, std::FILE* report) {
  if (!report) return;
  std::fprintf(report,
               "epoch %6.2f  %8s  training: loss %.4f, accuracy %.4f  validation: loss %.4f, "
               "accuracy %.4f\n",
               record.epoch, clock_words(record.seconds).c_str(), record.training_loss,
               record.training_accuracy, record.validation_loss, record.validation_accuracy);
  std::fflush(report);
}

template <class Layer>
void save(Trainer<Layer>& trainer, const RunOptions& options) {
  if (!options.checkpoint.empty()) trainer.save(options.checkpoint);
  if (!options.log.empty()) write_history(options.log, trainer.history());
}

}  // namespace run_detail

/// Trains until so many epochs are done or SIGINT or SIGTERM comes; false in the latter case. Saves
/// with every record, every so many seconds, and at the end.
template <class Layer>
bool run_training(Trainer<Layer>& trainer, const RunOptions& options) {
  using namespace run_detail;
  const auto before_int = std::signal(SIGINT, request_stop);
  const auto before_term = std::signal(SIGTERM, request_stop);
  stop_requested = 0;
  {
    ProgressLine progress(trainer, options.epochs);
    double last_save = seconds_now();
    while (trainer.epoch() < options.epochs && !stop_requested) {
      const bool is_due = trainer.step();
      if (is_due) {
        const Record& record = trainer.record();
        progress.clear();
        print(record, options.report);
      }
      if (is_due || seconds_now() - last_save >= options.checkpoint_seconds) {
        save(trainer, options);
        last_save = seconds_now();
      }
      progress.update();
    }
    save(trainer, options);
  }
  std::signal(SIGINT, before_int);
  std::signal(SIGTERM, before_term);
  return trainer.epoch() >= options.epochs;
}

}  // namespace translation
