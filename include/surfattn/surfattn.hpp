// surfattn layer 9: all that a user includes

#pragma once

#include <surfattn/adaptive.hpp>
#include <surfattn/attention.hpp>
#include <surfattn/blocks.hpp>
#include <surfattn/cached_layers.hpp>
#include <surfattn/cost.hpp>
#include <surfattn/error.hpp>
#include <surfattn/executor.hpp>
#include <surfattn/inspect.hpp>
#include <surfattn/iterated.hpp>
#include <surfattn/layers.hpp>
#include <surfattn/local_linear.hpp>
#include <surfattn/norms.hpp>
#include <surfattn/options.hpp>
#include <surfattn/partials.hpp>
#include <surfattn/rotary.hpp>
#include <surfattn/sequences.hpp>
#include <surfattn/surface.hpp>
#include <surfattn/surface_cache.hpp>
#include <surfattn/terms.hpp>
#include <surfattn/types.hpp>
#include <surfattn/version.hpp>
#include <surfattn/weights.hpp>
#include <surfattn/workspace.hpp>
