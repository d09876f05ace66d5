// surfattn layer 1: memory that a caller owns and lends to the functions that allocate nothing

#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

namespace surfattn {

/// Which pass a workspace is for.
enum class Pass { forward, backward };

/// Scratch memory for the `…_into` functions. `workspace_size(...)` says how many bytes a call
/// needs; the same workspace serves any number of calls one after the other, but never two at the
/// same time.
class Workspace {
 public:
  Workspace() = default;

  /// Allocates `bytes` bytes.
  explicit Workspace(std::size_t bytes)
      : owned_(new std::byte[bytes]), data_(owned_.get()), size_(bytes) {}

  /// Uses memory of the caller's, of any alignment, which must outlive the workspace.
  Workspace(void* memory, std::size_t bytes)
      : data_(static_cast<std::byte*>(memory)), size_(bytes) {}

  Workspace(Workspace&& other) noexcept { swap(other); }
  Workspace& operator=(Workspace&& other) noexcept {
    Workspace(std::move(other)).swap(*this);
    return *this;
  }

  std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  void swap(Workspace& other) noexcept {
    owned_.swap(other.owned_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }

  std::unique_ptr<std::byte[]> owned_;
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

namespace detail {

/// Hands out aligned arrays from a workspace, one after the other. Over no memory at all it only
/// counts, so that the code that lays out the buffers of a pass is also the code that says how
/// large they are.
class Arena {
 public:
  static constexpr std::size_t alignment = 64;  // a cache line, and the widest packet

  Arena() = default;

  /// The part of a workspace from `offset` bytes after its first aligned address on.
  explicit Arena(const Workspace& workspace, std::size_t offset = 0) : data_(workspace.data()) {
    const auto address = reinterpret_cast<std::uintptr_t>(data_);
    used_ = (alignment - address % alignment) % alignment + offset;
  }

  template <class T>
  T* take(std::ptrdiff_t count) {
    const std::size_t offset = used_;
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + alignment - 1) / alignment * alignment;
    return data_ ? reinterpret_cast<T*>(data_ + offset) : nullptr;
  }

  /// Leaves out `bytes` bytes, as many as arrays took before.
  void skip(std::size_t bytes) { used_ += bytes; }

  /// Goes back to what lies `bytes` bytes before.
  void go_back(std::size_t bytes) { used_ -= bytes; }

  /// Bytes taken, each array rounded up to whole lines.
  std::size_t used() const { return used_; }

 private:
  std::byte* data_ = nullptr;
  std::size_t used_ = 0;
};

}  // namespace detail
}  // namespace surfattn
