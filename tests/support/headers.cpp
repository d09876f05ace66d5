// Compiled for the headers that the tests have in common: see target_precompile_headers.
