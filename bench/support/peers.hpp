// Other code for attention, each where CMake finds it installed: softmax(β·Q·Kᵀ)·V for all heads and sequences of a problem.
#pragma once

#include <vector>

#include "case.hpp"
#include "timing.hpp"

namespace surfattn::bench {

/// Row-major arrays of one sequence, tokens by heads side by side.
struct Arrays {
  float *queries, *keys, *values, *out;
  float *grad_out, *grad_queries, *grad_keys, *grad_values;
};

struct PeerCall {
  Case shape;
  bool causal;
  int threads;
  std::vector<Arrays> sequences;
};

struct Peer {
  const char* name;
  Work (*forward)(const PeerCall&);
  Work (*both_passes)(const PeerCall&);  ///< forward and backward; null where there is no backward
};

/// Products of blocks by OpenBLAS, and a softmax by hand between; what a mask empties is left out.
Work openblas_forward(const PeerCall& call);
/// oneDNN: matrix product, softmax, matrix product, over a batch of heads.
Work onednn_forward(const PeerCall& call);
/// LibTorch: matmul, softmax, matmul.
Work torch_forward(const PeerCall& call);
Work torch_both_passes(const PeerCall& call);

inline std::vector<Peer> peers() {
  return {
#ifdef SURFATTN_BENCH_OPENBLAS
      {"OpenBLAS, blocked", openblas_forward, nullptr},
#endif
#ifdef SURFATTN_BENCH_ONEDNN
      {"oneDNN", onednn_forward, nullptr},
#endif
#ifdef SURFATTN_BENCH_TORCH
      {"LibTorch", torch_forward, torch_both_passes},
#endif
  };
}

}  // namespace surfattn::bench
