// The main of Catch2 2 where no package brings it compiled.
#define CATCH_CONFIG_MAIN
#include <catch2/catch.hpp>
