// surfattn layer 3: all terms

#pragma once

#include <surfattn/terms/additive_bias.hpp>
#include <surfattn/terms/combined_masks.hpp>
#include <surfattn/terms/decay.hpp>
#include <surfattn/terms/distance_bias.hpp>
#include <surfattn/terms/dropout.hpp>
#include <surfattn/terms/kernels.hpp>
#include <surfattn/terms/mask_function.hpp>
#include <surfattn/terms/masks.hpp>
#include <surfattn/terms/modifiers.hpp>
#include <surfattn/terms/patterns.hpp>
#include <surfattn/terms/sink.hpp>
#include <surfattn/terms/term.hpp>
