#include <cblas.h>

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <memory>
#include <surfattn/executors/thread_pool.hpp>

#include "../support/peers.hpp"

extern "C" void openblas_set_num_threads(int threads);

namespace surfattn::bench {
namespace {

/// A block of queries of one head: of one query of all heads that share a key head, where there are
/// few queries, for then they make a product of matrices.
struct Block {
  const float *q, *k, *v;
  float* out;
  Index rows, keys, q_stride, k_stride;
  Index first_row_sees;  ///< keys; each further row one more, where the mask is causal
};

std::vector<Block> blocks(const PeerCall& call) {
  const Case& c = call.shape;
  const Index d = c.width, group = c.query_heads / c.key_value_heads;
  const bool folded = c.queries == 1 && group > 1;
  const Index heads = folded ? c.key_value_heads : c.query_heads;
  // scores of a block stay in the second-level cache
  const Index most = std::clamp<Index>(131072 / c.keys, 16, 256);
  std::vector<Block> result;
  for (const Arrays& a : call.sequences) {
    for (Index h = 0; h < heads; ++h) {
      const Index shared = folded ? h : h / group, first = folded ? h * group : h;
      for (Index row = 0; row < c.queries; row += most) {
        const Index rows = folded ? group : std::min(most, c.queries - row);
        const Index stride = folded ? d : c.query_heads * d;
        const Index seen = call.causal ? row + 1 + c.keys - c.queries : c.keys;
        result.push_back({a.queries + row * stride + first * d, a.keys + shared * d,
                          a.values + shared * d, a.out + row * stride + first * d, rows,
                          call.causal ? std::min(c.keys, seen + rows - 1) : c.keys, stride,
                          c.key_value_heads * d, seen});
      }
    }
  }
  return result;
}

void compute(const Block& b, Index d, bool causal, float* scores) {
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, int(b.rows), int(b.keys), int(d),
              1 / std::sqrt(float(d)), b.q, int(b.q_stride), b.k, int(b.k_stride), 0, scores,
              int(b.keys));
  for (Index i = 0; i < b.rows; ++i) {
    Eigen::Map<Eigen::ArrayXf> row(scores + i * b.keys, b.keys);
    const Index seen = causal ? std::min(b.keys, b.first_row_sees + i) : b.keys;
    auto visible = row.head(seen);
    visible = (visible - visible.maxCoeff()).exp();
    visible /= visible.sum();
    row.tail(b.keys - seen).setZero();
  }
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, int(b.rows), int(d), int(b.keys), 1,
              scores, int(b.keys), b.v, int(b.k_stride), 0, b.out, int(b.q_stride));
}

}  // namespace

Work openblas_forward(const PeerCall& call) {
  const auto work = blocks(call);
  Index most = 0;
  for (const Block& b : work) most = std::max(most, b.rows * b.keys);
  const auto scores = std::make_shared<std::vector<float>>(std::size_t(most * call.threads));
  const auto pool = std::make_shared<ThreadPool>(call.threads);
  const Index d = call.shape.width;
  return [=, causal = call.causal] {
    openblas_set_num_threads(1);  // each thread of the pool calls it for itself
    const Index count = Index(work.size());
    detail::share_items(
        pool.get(), detail::workers(pool.get(), count), [&](Index worker, const auto& take) {
          for (Index i; (i = take()) < count;)
            compute(work[std::size_t(i)], d, causal, scores->data() + worker * most);
        });
  };
}

}  // namespace surfattn::bench
