// expect: deleted
#include <surfattn/surfattn.hpp>
#include <vector>

int main() {
  const surfattn::Sequences sequences(std::vector<int>{0, 4});
  return static_cast<int>(sequences.count());
}
