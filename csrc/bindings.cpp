// rlhf_core._C: addresses and strides in, nothing out. The only file that knows Python; no GIL is held while computing.
// A tensor arrives as its address (0 for None) followed by the strides that kernels.h asks for.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernels.h"

namespace py = pybind11;
using namespace rlhf;
using Address = uintptr_t;

namespace {

template <class T>
T* as(Address address) { return reinterpret_cast<T*>(address); }

void bind_token_logprobs(py::module_& m) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("token_logprobs_fwd", [](int dtype, double temperature, int threads, int64_t B, int64_t T, int64_t V,
                                 Address logits, int64_t logits_b, int64_t logits_t,
                                 Address targets, int64_t targets_b, int64_t targets_t,
                                 Address mask, int64_t mask_b, int64_t mask_t,
                                 Address logprobs, Address entropy, Address lse) {
    LogprobsArgs a = {};
    a.dtype = static_cast<Dtype>(dtype), a.temperature = temperature;
    a.B = B, a.T = T, a.V = V;
    a.logits = {as<char>(logits), logits_b, logits_t};
    a.targets = {as<int64_t>(targets), targets_b, targets_t};
    a.mask = {as<bool>(mask), mask_b, mask_t};
    a.logprobs = as<float>(logprobs), a.entropy = as<float>(entropy), a.lse = as<float>(lse);
    token_logprobs_fwd(a, threads);
  }, release);
  m.def("token_logprobs_bwd", [](int dtype, double temperature, int threads, int64_t B, int64_t T, int64_t V,
                                 Address logits, int64_t logits_b, int64_t logits_t,
                                 Address targets, int64_t targets_b, int64_t targets_t,
                                 Address mask, int64_t mask_b, int64_t mask_t,
                                 Address dlogprobs, int64_t dlogprobs_b, int64_t dlogprobs_t,
                                 Address dentropy, int64_t dentropy_b, int64_t dentropy_t,
                                 Address entropy, Address lse,
                                 Address dlogits, int64_t dlogits_b, int64_t dlogits_t) {
    LogprobsArgs a = {};
    a.dtype = static_cast<Dtype>(dtype), a.temperature = temperature;
    a.B = B, a.T = T, a.V = V;
    a.logits = {as<char>(logits), logits_b, logits_t};
    a.targets = {as<int64_t>(targets), targets_b, targets_t};
    a.mask = {as<bool>(mask), mask_b, mask_t};
    a.dlogprobs = {as<float>(dlogprobs), dlogprobs_b, dlogprobs_t};
    a.dentropy = {as<float>(dentropy), dentropy_b, dentropy_t};
    a.entropy = as<float>(entropy), a.lse = as<float>(lse);
    a.dlogits = {as<char>(dlogits), dlogits_b, dlogits_t};
    token_logprobs_bwd(a, threads);
  }, release);
}

void bind_kl_estimate(py::module_& m) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("kl_estimate_fwd", [](int estimator, int threads, int64_t n, Address logprobs, Address ref_logprobs,
                              Address mask, Address kl) {
    KlArgs a = {};
    a.estimator = static_cast<Estimator>(estimator);
    a.logprobs = as<float>(logprobs), a.ref_logprobs = as<float>(ref_logprobs), a.mask = as<bool>(mask);
    a.kl = as<float>(kl);
    kl_estimate_fwd(a, n, threads);
  }, release);
  m.def("kl_estimate_bwd", [](int estimator, int threads, int64_t n, Address dkl, Address logprobs,
                              Address ref_logprobs, Address mask, Address dlogprobs, Address dref_logprobs) {
    KlArgs a = {};
    a.estimator = static_cast<Estimator>(estimator);
    a.dkl = as<float>(dkl), a.mask = as<bool>(mask);
    a.logprobs = as<float>(logprobs), a.ref_logprobs = as<float>(ref_logprobs);
    a.dlogprobs = as<float>(dlogprobs), a.dref_logprobs = as<float>(dref_logprobs);
    kl_estimate_bwd(a, n, threads);
  }, release);
}

void bind_gae(py::module_& m) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("gae_fwd", [](double gamma, double lam, int threads, int64_t B, int64_t T, Address rewards, Address values,
                      Address mask, Address last_values, Address advantages, Address returns) {
    GaeArgs a = {};
    a.T = T, a.gamma = gamma, a.lam = lam;
    a.rewards = as<float>(rewards), a.values = as<float>(values), a.mask = as<bool>(mask);
    a.last_values = as<float>(last_values), a.advantages = as<float>(advantages), a.returns = as<float>(returns);
    gae_fwd(a, B, threads);
  }, release);
  m.def("gae_bwd", [](double gamma, double lam, int threads, int64_t B, int64_t T, Address dadvantages,
                      Address dreturns, Address mask, Address drewards, Address dvalues, Address dlast_values) {
    GaeArgs a = {};
    a.T = T, a.gamma = gamma, a.lam = lam;
    a.dadvantages = as<float>(dadvantages), a.dreturns = as<float>(dreturns), a.mask = as<bool>(mask);
    a.drewards = as<float>(drewards), a.dvalues = as<float>(dvalues), a.dlast_values = as<float>(dlast_values);
    gae_bwd(a, B, threads);
  }, release);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  bind_token_logprobs(m);
  bind_kl_estimate(m);
  bind_gae(m);
  m.def("isa", isa);
  m.def("available_isas", available_isas);
  m.def("threading", threading);
}
