// surfattn layer 3: all terms

#pragma once

#include <surfattn/terms/masks.hpp>
#include <surfattn/terms/term.hpp>
