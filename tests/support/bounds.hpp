// First-order bounds on the rounding errors of both forms, entry by entry.
//
// Let u be the unit roundoff. n rounding errors of relative size u that add up are bounded by n·u; being independent, they
// add like a random walk, and g(n) = 4·√n·u bounds them but for one case in thousands (Higham and Mary 2019, SIAM J. Sci.
// Comput. 41(5)). With E_x the bound on the error of x, absolute values taken entry by entry:
//
//     S = β·q·k + a + b        E_S  = g(d + 4)·(β|q|·|k| + |a| + |b|)
//     L = log Σ exp S          E_L  = Σ_j W·E_S + g(Tk) + 16u + 4u|L|
//     W = exp(S − L)           E_W  = W∘(E_S + E_L + 16u)
//     O = W·V                  E_O  = E_W·|V| + g(Tk)·W·|V| + 4u|O|
//     dP = dO·Vᵀ, D = dO·O − dL   E_dP = g(dv)·|dO|·|V|ᵀ,   E_D = |dO|·E_O + g(dv)·|dO|·|O| + u|dL|
//     dS = W∘(dP − D)          E_dS = E_W∘|dP − D| + W∘(E_dP + E_D + u(|dP| + |D|)) + 4u|dS|
//     c = Σ_i dS               E_c  = Σ_i E_dS + g(Tq)·Σ_i |dS|
//     dQ = β·dS·K              E_dQ = β·(E_dS·|K| + g(Tk)·|dS|·|K|) + 4u|dQ|
//     dK = β·dSᵀ·Q, dV = Wᵀ·dO likewise; the surface form's dK has both, and β·c∘k with β·(E_c + 4u|c|)·|k|
//     the surface form's dQ also has −β·dL∘q, with 4u·β|dL∘q|
//     dβ = Σ q∘dQ/β − ½Σ c‖k‖² E_dβ = Σ (|q|∘E_dQ + g(Tq·d)|q∘dQ|)/β + ½Σ (E_c + g(Tk + d)|c|)‖k‖²
#pragma once

#include <Eigen/Core>
#include <cmath>
#include <limits>

#include "support/random.hpp"

namespace surfattn::test {

using Doubles = Eigen::MatrixXd;

/// One head's problem, exact to the precision of double.
struct ExactHead {
  Doubles queries, keys, values, grad_out;
  Doubles weights, out, log_sum_exp;       // log_sum_exp: Tq × 1
  Doubles query_bias, key_bias_magnitude;  // |a| (Tq × 1) and a bound on the terms of |b| (Tk × 1)
  double scale = 1;
  Doubles grad_log_sum_exp = {};  // Tq × 1, or none
  bool has_query_norm = false;    // in the log-sum-exp
};

struct Bounds {
  Doubles out, log_sum_exp, grad_queries, grad_keys, grad_values, grad_key_bias;
  Doubles grad_keys_of_surface;  // both parts and the norm's
  double grad_scale = 0;
};

template <class Scalar>
class ErrorModel {
 public:
  explicit ErrorModel(const ExactHead& head) : head_(head) {}

  Bounds bounds() const {
    const Doubles& w = head_.weights;
    const Doubles q = head_.queries.cwiseAbs(), k = head_.keys.cwiseAbs(),
                  v = head_.values.cwiseAbs();
    const Doubles go = head_.grad_out.cwiseAbs(), o = head_.out.cwiseAbs();
    const double beta = std::abs(head_.scale);
    const auto tq = q.rows(), tk = k.rows(), d = q.cols(), dv = v.cols();

    Doubles magnitude = beta * times(q, k.transpose());
    magnitude.colwise() += head_.query_bias.cwiseAbs().col(0);
    magnitude.rowwise() += head_.key_bias_magnitude.transpose().row(0);
    const Doubles e_s = g(d + 4) * magnitude;
    Bounds b;
    b.log_sum_exp = (w.cwiseProduct(e_s).rowwise().sum().array() + g(tk) + 16 * u).matrix() +
                    4 * u * finite_magnitude(head_.log_sum_exp);
    Doubles relative = e_s;
    relative.colwise() += b.log_sum_exp.col(0);
    const Doubles e_w = w.cwiseProduct((relative.array() + 16 * u).matrix());
    b.out = times(e_w, v) + g(tk) * times(w, v) + 4 * u * o;

    const Doubles dp = times(head_.grad_out, head_.values.transpose());
    Doubles delta = head_.grad_out.cwiseProduct(head_.out).rowwise().sum();
    const Doubles dl =
        head_.grad_log_sum_exp.size() > 0 ? head_.grad_log_sum_exp : Doubles(Doubles::Zero(tq, 1));
    delta -= dl;
    Doubles ds = dp, e_x = g(dv) * times(go, v.transpose()) + u * dp.cwiseAbs();
    ds.colwise() -= delta.col(0);
    e_x.colwise() += (go.cwiseProduct(b.out) + g(dv) * go.cwiseProduct(o)).rowwise().sum() +
                     u * delta.cwiseAbs().col(0) + u * dl.cwiseAbs().col(0);
    Doubles e_ds = e_w.cwiseProduct(ds.cwiseAbs()) + w.cwiseProduct(e_x);
    ds = w.cwiseProduct(ds).eval();
    e_ds += 4 * u * ds.cwiseAbs();
    const Doubles s = ds.cwiseAbs();

    b.grad_queries = beta * (times(e_ds, k) + (g(tk) + 4 * u) * times(s, k));
    b.grad_keys = beta * (times<Doubles>(e_ds.transpose(), q) +
                          (g(tq) + 4 * u) * times<Doubles>(s.transpose(), q));
    b.grad_values =
        times<Doubles>(e_w.transpose(), go) + (g(tq) + 4 * u) * times<Doubles>(w.transpose(), go);
    b.grad_key_bias = (e_ds + g(tq) * s).colwise().sum().transpose();
    if (head_.has_query_norm)
      b.grad_queries +=
          4 * u * beta * (q.array().colwise() * dl.cwiseAbs().col(0).array()).matrix();
    finish_surface(ds, dl.cwiseAbs(), q, k, beta, b);
    return b;
  }

 private:
  static constexpr double u = static_cast<double>(std::numeric_limits<Scalar>::epsilon()) / 2;

  static double g(Eigen::Index n) { return 4 * std::sqrt(static_cast<double>(n)) * u; }

  static Doubles finite_magnitude(const Doubles& x) {
    return x.unaryExpr([](double value) { return std::isfinite(value) ? std::abs(value) : 0; });
  }

  void finish_surface(const Doubles& ds, const Doubles& dl, const Doubles& q, const Doubles& k,
                      double beta, Bounds& b) const {
    const Doubles c = ds.colwise().sum().transpose();
    const Doubles e_c = b.grad_key_bias + 4 * u * c.cwiseAbs();
    if (head_.keys.cols() == head_.values.cols()) {
      const Doubles of_norms = (beta * k).array().colwise() * e_c.col(0).array();
      b.grad_keys_of_surface = b.grad_keys + b.grad_values + of_norms;
    }
    const Doubles dq = (head_.scale * times(ds, head_.keys)).cwiseAbs();
    const Doubles norms = k.rowwise().squaredNorm();
    b.grad_scale =
        (q.cwiseProduct(b.grad_queries).sum() + g(q.size()) * q.cwiseProduct(dq).sum()) / beta +
        (e_c + g(k.rows() + k.cols()) * c.cwiseAbs()).cwiseProduct(norms).sum() / 2;
    if (head_.has_query_norm)
      b.grad_scale += 2 * g(q.size()) * dl.cwiseProduct(q.rowwise().squaredNorm()).sum();
  }

  const ExactHead& head_;
};

}  // namespace surfattn::test
