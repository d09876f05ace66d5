// surfattn layer 3: all terms

#pragma once

#include <surfattn/terms/additive_bias.hpp>
#include <surfattn/terms/masks.hpp>
#include <surfattn/terms/modifiers.hpp>
#include <surfattn/terms/term.hpp>
