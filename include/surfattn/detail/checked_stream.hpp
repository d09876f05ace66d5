// surfattn layer 1: numbers to and from a stream of bytes, with a checksum

#pragma once

#include <cstddef>
#include <cstdint>
#include <istream>
#include <ostream>
#include <surfattn/detail/require.hpp>
#include <type_traits>

namespace surfattn::detail {

/// FNV-1a of 64 bits (Fowler, Noll, Vo; RFC 9923): tells a damaged stream, not a forged one.
class Checksum {
 public:
  void add(const void* bytes, std::size_t count) {
    const auto* byte = static_cast<const unsigned char*>(bytes);
    for (std::size_t n = 0; n < count; ++n) hash_ = (hash_ ^ byte[n]) * 0x100000001b3u;
  }
  std::uint64_t value() const { return hash_; }

 private:
  std::uint64_t hash_ = 0xcbf29ce484222325u;
};

/// Writes numbers as they lie in memory.
class CheckedWriter {
 public:
  CheckedWriter(std::ostream& stream, const Require& require)
      : stream_(stream), require_(require) {}

  template <class T>
  void write(const T* numbers, Index count) {
    static_assert(std::is_trivially_copyable_v<T>);
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
    checksum_.add(numbers, bytes);
    put(numbers, bytes);
  }
  template <class T>
  void write(T number) {
    write(&number, 1);
  }

  /// The checksum of all so far.
  void write_checksum() {
    const std::uint64_t sum = checksum_.value();
    put(&sum, sizeof sum);
  }

 private:
  void put(const void* bytes, std::size_t count) {
    stream_.write(static_cast<const char*>(bytes), static_cast<std::streamsize>(count));
    if (!stream_) require_.fail("the stream does not take what is written");
  }

  std::ostream& stream_;
  const Require& require_;
  Checksum checksum_;
};

/// Reads what a CheckedWriter wrote.
class CheckedReader {
 public:
  CheckedReader(std::istream& stream, const Require& require)
      : stream_(stream), require_(require) {}

  template <class T>
  void read(T* numbers, Index count) {
    static_assert(std::is_trivially_copyable_v<T>);
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
    get(numbers, bytes);
    checksum_.add(numbers, bytes);
  }
  template <class T>
  T read() {
    T number{};
    read(&number, 1);
    return number;
  }

  void check_checksum() {
    std::uint64_t sum = 0;
    get(&sum, sizeof sum);
    if (sum != checksum_.value()) require_.fail("the stream is damaged: its checksum is wrong");
  }

 private:
  void get(void* bytes, std::size_t count) {
    stream_.read(static_cast<char*>(bytes), static_cast<std::streamsize>(count));
    if (!stream_) require_.fail("the stream ends too early");
  }

  std::istream& stream_;
  const Require& require_;
  Checksum checksum_;
};

}  // namespace surfattn::detail
