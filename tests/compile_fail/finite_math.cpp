// expect: surfattn needs infinities and NaN
// flags: -ffast-math

#include <surfattn/surfattn.hpp>

int main() { return 0; }
