#pragma once
// A file that is whole or not there: written beside its place, forced to the disk and renamed, with
// a checksum that is compared before anything is read from it.

#include <fcntl.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "random.hpp"

namespace translation {

/// What is wrong with a checkpoint.
class CheckpointError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The hash FNV-1a (Fowler, Noll and Vo 1991) of bytes taken eight at a time, the last filled up
/// with zeros.
class Checksum {
 public:
  void add(const void* data, std::size_t size) {
    const auto* bytes = static_cast<const unsigned char*>(data);
    for (; filled_ > 0 && size > 0; --size) add_byte(*bytes++);
    for (; size >= 8; size -= 8, bytes += 8) {
      std::memcpy(&word_, bytes, 8);
      take_word();
    }
    for (; size > 0; --size) add_byte(*bytes++);
  }
  std::uint64_t value() const {
    Checksum copy = *this;
    if (copy.filled_ > 0) copy.take_word();
    return copy.hash_;
  }

 private:
  void add_byte(unsigned char byte) {
    word_ |= std::uint64_t(byte) << (8 * filled_);
    if (++filled_ == 8) take_word();
  }
  void take_word() {
    hash_ = (hash_ ^ word_) * 0x100000001b3u;
    hash_ ^= hash_ >> 32;  // carries the high bits down, which a product alone does not
    word_ = 0, filled_ = 0;
  }

  std::uint64_t hash_ = 0xcbf29ce484222325u, word_ = 0;
  int filled_ = 0;
};

/// What a file of this kind begins with.
struct CheckpointHeader {
  char magic[8] = {'s', 'u', 'r', 'f', 't', 'r', 'a', 'n'};
  std::uint32_t version = 1;
  std::uint32_t byte_order = 0x01020304;
};

class CheckpointWriter {
 public:
  explicit CheckpointWriter(const std::string& file) : file_(file), temporary_(file + ".part") {
    stream_ = std::fopen(temporary_.c_str(), "wb");
    if (!stream_) fail("cannot be written");
    write(CheckpointHeader());
  }
  CheckpointWriter(const CheckpointWriter&) = delete;
  CheckpointWriter& operator=(const CheckpointWriter&) = delete;
  ~CheckpointWriter() {
    if (stream_) std::fclose(stream_);
  }

  template <class T>
  void write(const T& value) {
    static_assert(std::is_trivially_copyable_v<T>);
    write_bytes(&value, sizeof value);
  }
  void write(const std::string& text) {
    write(static_cast<std::uint64_t>(text.size()));
    write_bytes(text.data(), text.size());
  }
  template <class Derived>
  void write_matrix(const Eigen::PlainObjectBase<Derived>& matrix) {
    write(static_cast<std::int64_t>(matrix.rows()));
    write(static_cast<std::int64_t>(matrix.cols()));
    write_bytes(matrix.data(),
                sizeof(typename Derived::Scalar) * static_cast<std::size_t>(matrix.size()));
  }

  /// Puts the file in its place. Until then an older one stands there, untouched.
  void finish() {
    const std::uint64_t checksum = checksum_.value();
    write_bytes(&checksum, sizeof checksum);
    if (std::fflush(stream_) != 0 || ::fsync(::fileno(stream_)) != 0) fail("cannot be written");
    std::fclose(std::exchange(stream_, nullptr));
    if (std::rename(temporary_.c_str(), file_.c_str()) != 0) fail("cannot be put in its place");
    force_directory();
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw CheckpointError(file_ + ": " + what + ": " + std::strerror(errno));
  }

  void write_bytes(const void* data, std::size_t size) {
    checksum_.add(data, size);
    if (size > 0 && std::fwrite(data, 1, size, stream_) != size) fail("cannot be written");
  }

  /// Makes the new name last as well.
  void force_directory() const {
    const std::string directory = std::filesystem::absolute(file_).parent_path().string();
    const int descriptor = ::open(directory.c_str(), O_RDONLY);
    if (descriptor < 0) return;
    ::fsync(descriptor);
    ::close(descriptor);
  }

  std::string file_, temporary_;
  std::FILE* stream_ = nullptr;
  Checksum checksum_;
};

/// Reads what was written, in the same order. A file that is no checkpoint, of another version, cut
/// off or changed is refused at once.
class CheckpointReader {
 public:
  explicit CheckpointReader(const std::string& file) : file_(file) {
    load();
    const auto found = read<CheckpointHeader>();
    const CheckpointHeader expected;
    if (std::memcmp(found.magic, expected.magic, sizeof expected.magic) != 0)
      fail("is no checkpoint of this program");
    if (found.byte_order != expected.byte_order)
      fail("was written on a machine of another byte order");
    if (found.version != expected.version) {
      fail("is of version " + std::to_string(found.version) + ", but this program reads version " +
           std::to_string(expected.version));
    }
    check_sum();
  }

  template <class T>
  T read() {
    static_assert(std::is_trivially_copyable_v<T>);
    T value;
    read_bytes(&value, sizeof value);
    return value;
  }
  std::string read_string() {
    const auto size = read<std::uint64_t>();
    require(size);
    std::string text(bytes_.data() + position_, static_cast<std::size_t>(size));
    position_ += text.size();
    return text;
  }
  /// Into a matrix that has the size that was written.
  template <class Derived>
  void read_matrix(Eigen::PlainObjectBase<Derived>& matrix) {
    const auto rows = read<std::int64_t>(), cols = read<std::int64_t>();
    if (rows != matrix.rows() || cols != matrix.cols()) {
      fail("holds a matrix of " + std::to_string(rows) + "×" + std::to_string(cols) +
           " where the model has one of " + std::to_string(matrix.rows()) + "×" +
           std::to_string(matrix.cols()));
    }
    read_bytes(matrix.data(),
               sizeof(typename Derived::Scalar) * static_cast<std::size_t>(matrix.size()));
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw CheckpointError(file_ + ": " + what);
  }

 private:
  void load() {
    std::FILE* stream = std::fopen(file_.c_str(), "rb");
    if (!stream) fail("no such checkpoint, or it cannot be opened");
    std::error_code error;
    bytes_.resize(static_cast<std::size_t>(std::filesystem::file_size(file_, error)));
    const std::size_t got = error ? 0 : std::fread(bytes_.data(), 1, bytes_.size(), stream);
    std::fclose(stream);
    if (error || got != bytes_.size()) fail("cannot be read");
  }

  void check_sum() {
    std::uint64_t expected;
    require(sizeof expected);
    bytes_.resize(bytes_.size() - sizeof expected);
    std::memcpy(&expected, bytes_.data() + bytes_.size(), sizeof expected);
    Checksum checksum;
    checksum.add(bytes_.data(), bytes_.size());
    if (checksum.value() != expected) fail("is damaged: its checksum is wrong");
  }

  void require(std::uint64_t size) const {
    if (size > bytes_.size() - position_) fail("is damaged: it ends too early");
  }
  void read_bytes(void* to, std::size_t size) {
    require(size);
    if (size > 0) std::memcpy(to, bytes_.data() + position_, size);
    position_ += size;
  }

  std::string file_;
  std::vector<char> bytes_;
  std::size_t position_ = 0;
};

}  // namespace translation
