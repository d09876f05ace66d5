#include <omp.h>

#include <cmath>
#include <dnnl.hpp>
#include <limits>
#include <memory>
#include <unordered_map>

#include "../support/peers.hpp"

namespace surfattn::bench {
namespace {

using dnnl::memory;

memory::desc batch(Index heads, Index rows, Index cols, Index head_stride, Index row_stride,
                   bool transposed = false) {
  if (transposed)
    return {{heads, cols, rows}, memory::data_type::f32, {head_stride, 1, row_stride}};
  return {{heads, rows, cols}, memory::data_type::f32, {head_stride, row_stride, 1}};
}

/// The three primitives for one sequence, and the memory of scores that all sequences share.
struct Attention {
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  memory::desc q, k, v, out, scores, mask;
  dnnl::matmul product, output;
  dnnl::softmax_forward softmax;
  memory score_memory, mask_memory;

  explicit Attention(const PeerCall& call) {
    const Case& c = call.shape;
    const Index d = c.width, group = c.query_heads / c.key_value_heads;
    // with one query, the heads that share a key head are the rows of one matrix
    const Index heads = group > 1 ? c.key_value_heads : c.query_heads;
    const Index rows = group > 1 ? group : c.queries;
    const Index head_stride = group > 1 ? group * d : d, row_stride = group > 1 ? d : heads * d;
    q = out = batch(heads, rows, d, head_stride, row_stride);
    k = batch(heads, c.keys, d, d, heads * d, true);
    v = batch(heads, c.keys, d, d, heads * d);
    scores = batch(heads, rows, c.keys, rows * c.keys, c.keys);
    mask = {{1, rows, c.keys}, memory::data_type::f32, memory::format_tag::abc};
    score_memory = memory(scores, engine);
    mask_memory = memory(mask, engine);
    float* const hidden = static_cast<float*>(mask_memory.get_data_handle());
    for (Index i = 0; i < rows; ++i)
      for (Index j = 0; j < c.keys; ++j)
        hidden[i * c.keys + j] = call.causal && j > i + c.keys - c.queries
                                     ? -std::numeric_limits<float>::infinity()
                                     : 0.0f;
    dnnl::primitive_attr scaled;
    scaled.set_output_scales(0, {1 / std::sqrt(float(d))});
    if (call.causal) {
      dnnl::post_ops add_mask;
      add_mask.append_binary(dnnl::algorithm::binary_add, mask);
      scaled.set_post_ops(add_mask);
    }
    product = dnnl::matmul({dnnl::matmul::desc(q, k, scores), scaled, engine});
    softmax = dnnl::softmax_forward(
        {dnnl::softmax_forward::desc(dnnl::prop_kind::forward_inference, scores, 2), engine});
    output = dnnl::matmul({dnnl::matmul::desc(scores, v, out), engine});
  }

  void run(const Arrays& a) {
    std::unordered_map<int, memory> arguments{
        {DNNL_ARG_SRC, memory(q, engine, a.queries)},
        {DNNL_ARG_WEIGHTS, memory(k, engine, a.keys)},
        {DNNL_ARG_DST, score_memory},
        {DNNL_ARG_ATTR_MULTIPLE_POST_OP(0) | DNNL_ARG_SRC_1, mask_memory}};
    product.execute(stream, arguments);
    softmax.execute(stream, {{DNNL_ARG_SRC, score_memory}, {DNNL_ARG_DST, score_memory}});
    output.execute(stream, {{DNNL_ARG_SRC, score_memory},
                            {DNNL_ARG_WEIGHTS, memory(v, engine, a.values)},
                            {DNNL_ARG_DST, memory(out, engine, a.out)}});
    stream.wait();
  }
};

}  // namespace

Work onednn_forward(const PeerCall& call) {
  omp_set_num_threads(call.threads);
  const auto attention = std::make_shared<Attention>(call);
  return [=] {
    omp_set_num_threads(call.threads);
    for (const Arrays& a : call.sequences) attention->run(a);
  };
}

}  // namespace surfattn::bench
