#include <omp.h>

#include <algorithm>
#include <cmath>
#include <dnnl.hpp>
#include <limits>
#include <memory>

#include "../support/peers.hpp"

namespace surfattn::bench {
namespace {

using dnnl::memory;

/// The primitives for one head, and the memory of its scores. Over a batch of heads that lie side by
/// side in a row, oneDNN would fall back to plain loops.
struct Attention {
  Case shape;
  bool causal;
  Index heads, rows, q_offset, q_stride;  // one query of all heads that share keys: their rows
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  memory::desc q, k, v, scores;
  dnnl::matmul product, output;
  dnnl::softmax_forward softmax;
  memory score_memory;

  explicit Attention(const PeerCall& call) : shape(call.shape), causal(call.causal) {
    const Index d = shape.width, group = shape.query_heads / shape.key_value_heads;
    heads = group > 1 ? shape.key_value_heads : shape.query_heads;
    rows = group > 1 ? group : shape.queries;
    q_offset = group > 1 ? group * d : d;
    q_stride = group > 1 ? d : heads * d;
    const auto f32 = memory::data_type::f32;
    q = memory::desc({rows, d}, f32, {q_stride, 1});
    k = memory::desc({d, shape.keys}, f32, {1, heads * d});
    v = memory::desc({shape.keys, d}, f32, {heads * d, 1});
    scores = memory::desc({rows, shape.keys}, f32, memory::format_tag::ab);
    score_memory = memory(scores, engine);
    dnnl::primitive_attr scaled;
    scaled.set_output_scales(0, {1 / std::sqrt(float(d))});
    product = dnnl::matmul({dnnl::matmul::desc(q, k, scores), scaled, engine});
    softmax = dnnl::softmax_forward(
        {dnnl::softmax_forward::desc(dnnl::prop_kind::forward_inference, scores, 1), engine});
    output = dnnl::matmul({dnnl::matmul::desc(scores, v, q), engine});
  }

  void run(const Arrays& a) {
    for (Index h = 0; h < heads; ++h) {
      const Index key = h * shape.width;
      product.execute(stream, {{DNNL_ARG_SRC, memory(q, engine, a.queries + h * q_offset)},
                               {DNNL_ARG_WEIGHTS, memory(k, engine, a.keys + key)},
                               {DNNL_ARG_DST, score_memory}});
      if (causal) hide();
      softmax.execute(stream, {{DNNL_ARG_SRC, score_memory}, {DNNL_ARG_DST, score_memory}});
      output.execute(stream, {{DNNL_ARG_SRC, score_memory},
                              {DNNL_ARG_WEIGHTS, memory(v, engine, a.values + key)},
                              {DNNL_ARG_DST, memory(q, engine, a.out + h * q_offset)}});
    }
  }

  void hide() {
    float* const numbers = static_cast<float*>(score_memory.get_data_handle());
    for (Index i = 0; i < rows; ++i) {
      const Index seen = i + 1 + shape.keys - shape.queries;
      std::fill(numbers + i * shape.keys + seen, numbers + (i + 1) * shape.keys,
                -std::numeric_limits<float>::infinity());
    }
  }
};

}  // namespace

Work onednn_forward(const PeerCall& call) {
  omp_set_num_threads(call.threads);
  const auto attention = std::make_shared<Attention>(call);
  return [=] {
    omp_set_num_threads(call.threads);
    for (const Arrays& a : call.sequences) attention->run(a);
    attention->stream.wait();
  };
}

}  // namespace surfattn::bench
