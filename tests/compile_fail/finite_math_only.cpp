// expect: surfattn needs infinities and NaN
// flags: -ffinite-math-only

#include <surfattn/surfattn.hpp>

int main() { return 0; }
