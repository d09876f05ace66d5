// The rows of caches, compiled apart from those of whole calls.
#pragma once

#include "rows.hpp"

namespace surfattn::bench {

void add_cache_rows(std::vector<Row>& rows);

}  // namespace surfattn::bench
