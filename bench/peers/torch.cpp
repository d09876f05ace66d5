#include <torch/torch.h>

#include <cmath>
#include <limits>

#include "../support/peers.hpp"

namespace surfattn::bench {
namespace {

/// tokens × (heads·d) as heads × tokens × d, where it lies.
torch::Tensor heads_of(float* data, Index tokens, Index heads, Index width) {
  return torch::from_blob(data, {tokens, heads, width}).transpose(0, 1);
}

struct Sequence {
  torch::Tensor queries, keys, values, out;
};

std::vector<Sequence> sequences_of(const PeerCall& call) {
  const Case& c = call.shape;
  std::vector<Sequence> result;
  for (const Arrays& a : call.sequences) {
    result.push_back({heads_of(a.queries, c.queries, c.query_heads, c.width),
                      heads_of(a.keys, c.keys, c.key_value_heads, c.width),
                      heads_of(a.values, c.keys, c.key_value_heads, c.width),
                      heads_of(a.out, c.queries, c.query_heads, c.width)});
  }
  return result;
}

/// softmax(β·Q·Kᵀ)·V; query heads that share a key head are rows of one product.
torch::Tensor attention(const Sequence& s, const torch::Tensor& hidden) {
  const auto heads = s.keys.size(0), rows = s.queries.size(0) / heads * s.queries.size(1);
  const auto d = s.queries.size(2);
  const auto q = s.queries.reshape({heads, rows, d});
  auto scores = torch::matmul(q, s.keys.transpose(1, 2)) * (1 / std::sqrt(double(d)));
  if (hidden.defined())
    scores = scores.masked_fill(hidden, -std::numeric_limits<float>::infinity());
  return torch::matmul(torch::softmax(scores, -1), s.values).reshape(s.queries.sizes());
}

torch::Tensor hidden_pairs(const PeerCall& call) {
  if (!call.causal) return {};
  const Case& c = call.shape;
  return torch::ones({c.queries, c.keys}, torch::kBool).triu(1 + c.keys - c.queries);
}

}  // namespace

Work torch_forward(const PeerCall& call) {
  return [=, sequences = sequences_of(call), hidden = hidden_pairs(call)]() mutable {
    const torch::NoGradGuard no_gradients;
    at::set_num_threads(call.threads);
    for (Sequence& s : sequences) s.out.copy_(attention(s, hidden));
  };
}

Work torch_both_passes(const PeerCall& call) {
  return [=, sequences = sequences_of(call), hidden = hidden_pairs(call)]() mutable {
    at::set_num_threads(call.threads);
    const Case& c = call.shape;
    for (std::size_t i = 0; i < sequences.size(); ++i) {
      const Arrays& a = call.sequences[i];
      Sequence& s = sequences[i];
      for (torch::Tensor* input : {&s.queries, &s.keys, &s.values})
        *input = input->detach().requires_grad_();
      const auto out = attention(s, hidden);
      out.backward(heads_of(a.grad_out, c.queries, c.query_heads, c.width));
      s.out.copy_(out.detach());
      heads_of(a.grad_queries, c.queries, c.query_heads, c.width).copy_(s.queries.grad());
      heads_of(a.grad_keys, c.keys, c.key_value_heads, c.width).copy_(s.keys.grad());
      heads_of(a.grad_values, c.keys, c.key_value_heads, c.width).copy_(s.values.grad());
    }
  };
}

}  // namespace surfattn::bench
