// The Python module rlhf_core._C, called by rlhf_core/cpp.py. Only this file knows about Python.
// Each function takes a launcher's arguments, then allocated outputs, then the number of threads.
// None stands for an absent argument or an output not requested. Kernels run without the GIL.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <type_traits>
#include <variant>

#include "kernels.h"

namespace py = pybind11;
using namespace rlhf;

namespace {

// DLPack's C API reads a tensor's address, shape and strides in 40 ns, without torch's headers. Its
// major version 1 fixes both structs: https://dmlc.github.io/dlpack/latest/c_api.html
struct DLTensor {
  void* data;
  int32_t device_type, device_id, ndim;
  uint8_t dtype_code, dtype_bits;
  uint16_t dtype_lanes;
  int64_t *shape, *strides;  // strides count elements
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  uint32_t major, minor;
  void *older_api, *allocate, *managed_tensor_from_py_object, *managed_tensor_to_py_object;
  int (*dltensor_from_py_object_no_sync)(void* object, DLTensor* out);  // borrows; -1 on error
  void* current_stream;
};

const DLPackExchangeAPI* exchange = nullptr;  // torch.Tensor's; set by `use` before any launch

void use(const py::object& capsule) {
  void* const pointer = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  exchange = static_cast<const DLPackExchangeAPI*>(pointer);
  PyErr_Clear();  // any other object gives null and sets an error
  if (!exchange || exchange->major != 1 || !exchange->dltensor_from_py_object_no_sync)
    throw py::import_error(
        "torch.Tensor.__dlpack_c_exchange_api__ of DLPack 1 is missing: install torch >= 2.11");
}

[[noreturn]] void refuse(const std::string& found) {
  throw py::type_error("rlhf_core's C++ kernels read dense CPU tensors, got " + found);
}

// Converts to the type of any field of kernels.h that it is assigned to. None becomes null. A char*
// stands for a tensor of any dtype in `dtype`, any other pointer for a contiguous one of its type.
struct Tensor : DLTensor {
  template <class T> operator T*() const {
    if (!std::is_same_v<std::remove_const_t<T>, char>) expect_contiguous();
    return at<T>();
  }
  template <class T> operator Grid<T>() const {
    return data ? Grid<T>{at<T>(), strides[0], strides[1]} : Grid<T>{};
  }
  operator Rows() const {
    if (size() && shape[ndim - 1] > 1 && strides[ndim - 1] != 1) refuse("a strided last axis");
    return {at<char>(), strides[0], strides[1]};
  }
  Dtype dtype() const {
    if (is(2, 32)) return kFloat32;
    if (is(4, 16)) return kBFloat16;
    if (!is(2, 16)) refuse("another dtype than float32, bfloat16 or float16");
    return kFloat16;
  }
  int64_t size() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }

 private:
  bool is(int code, int bits) const { return dtype_code == code && dtype_bits == bits; }
  template <class T> T* at() const {
    using E = std::remove_const_t<T>;
    constexpr int code = std::is_same_v<E, bool> ? 6 : std::is_floating_point_v<E> ? 2 : 0;
    if (data && !std::is_same_v<E, char> && !is(code, 8 * sizeof(E)))
      refuse("another dtype than this argument's");
    return reinterpret_cast<T*>(static_cast<char*>(data) + byte_offset);
  }
  void expect_contiguous() const {
    int64_t stride = 1;
    for (int i = size() ? ndim - 1 : -1; i >= 0; --i) {
      if (shape[i] != 1 && strides[i] != stride) refuse("one that is not contiguous");
      stride *= shape[i];
    }
  }
};

using Temperature = std::variant<double, Tensor>;  // one for all rows, or one per row

}  // namespace

template <> struct py::detail::type_caster<Tensor> {
  PYBIND11_TYPE_CASTER(Tensor, const_name("Tensor | None"));
  bool load(handle object, bool) {
    value = {};
    if (object.is_none()) return true;
    const auto type = [&] { return std::string("a ") + Py_TYPE(object.ptr())->tp_name; };
    if (exchange->dltensor_from_py_object_no_sync(object.ptr(), &value)) {
      const std::string why = error_already_set().what();
      refuse(type() + ": " + why.substr(0, why.find('\n')));
    }
    if (value.device_type != 1) refuse(type() + " on another device");
    if (!value.data && value.size()) refuse(type() + " without memory");
    return true;
  }
};

namespace {

template <class Args>
Args rows_of(Tensor logits, Tensor mask, const Temperature& temperature) {
  Args a = {};
  a.dtype = logits.dtype(), a.B = logits.shape[0], a.T = logits.shape[1], a.V = logits.shape[2];
  a.logits = logits, a.mask = mask;
  if (const double* all = std::get_if<double>(&temperature)) return a.temperature = *all, a;
  a.temperatures = std::get<Tensor>(temperature);
  for (int64_t b = 0; b < a.B; ++b)  // torch.compile skips this check in Python
    for (int64_t t = 0; t < a.T; ++t) {
      const float found = a.temperatures.at(b, t);
      if ((found > 0 && found < INFINITY) || (a.mask && !a.mask.at(b, t))) continue;
      throw std::invalid_argument("temperature must be finite and > 0, got " +
                                  std::to_string(found) + " at (" + std::to_string(b) + ", " +
                                  std::to_string(t) + ")");
    }
  return a;
}

// The sequences are x's rows or, if cu_seqlens is given, consecutive pieces of a packed x (N,).
GaeArgs sequences_of(Tensor x, Tensor mask, double gamma, double lam, Tensor cu_seqlens) {
  GaeArgs a = {};
  const bool packed = cu_seqlens.data;
  a.B = packed ? cu_seqlens.shape[0] - 1 : x.shape[0];
  a.T = packed ? x.shape[0] / std::max<int64_t>(a.B, 1) : x.shape[1];
  a.mask = mask, a.gamma = gamma, a.lam = lam, a.cu_seqlens = cu_seqlens;
  for (int64_t b = 0, start = 0; packed && b <= a.B; start = a.cu_seqlens[b++])
    if (a.cu_seqlens[b] < start || a.cu_seqlens[b] > x.shape[0])  // torch.compile skips this check
      throw std::invalid_argument(
          "cu_seqlens must rise from >= 0 to <= " + std::to_string(x.shape[0]) + ", got " +
          std::to_string(a.cu_seqlens[b]) + " at " + std::to_string(b));
  return a;
}

// Tokens that rows share, in keys and values (N / samples, Hkv, P, K) after `axes` others.
void share(DecodeAttentionArgs& a, Tensor keys, Tensor values, Tensor lengths, int axes) {
  a.shared_keys = keys, a.shared_values = values, a.shared_lengths = lengths;
  a.samples = keys.data ? a.N / std::max<int64_t>(keys.shape[axes], 1) : 1;
  a.P = keys.data ? keys.shape[axes + 2] : 0;
}

KlArgs estimate_of(Tensor logprobs, Tensor ref_logprobs, Tensor mask, int estimator) {
  KlArgs a = {};
  a.estimator = static_cast<Estimator>(estimator);
  a.logprobs = logprobs, a.ref_logprobs = ref_logprobs, a.mask = mask;
  return a;
}

RmsNormArgs norm_of(Tensor x, Tensor weight, double eps, Dtype y_dtype) {
  RmsNormArgs a = {};
  a.dtype = x.dtype(), a.y_dtype = y_dtype, a.B = x.shape[0], a.T = x.shape[1], a.D = x.shape[2];
  if (a.dtype != a.y_dtype && a.dtype != kFloat32)
    refuse("two dtypes of 16 bits, or a wider result");
  a.x = x, a.weight = weight, a.eps = static_cast<float>(eps);
  return a;
}

GatedActivationArgs gated_of(Tensor gate_up, int activation) {
  GatedActivationArgs a = {};
  a.dtype = gate_up.dtype(), a.activation = static_cast<Activation>(activation);
  a.B = gate_up.shape[0], a.T = gate_up.shape[1], a.I = gate_up.shape[2] / 2;
  a.gate_up = gate_up;
  return a;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("use", use);
  m.def("isa", isa);
  m.def("available_isas", available_isas);
  m.def("threading", threading);

  const auto def = [&m](const char* name, auto launcher) {
    m.def(name, launcher, py::call_guard<py::gil_scoped_release>());
  };
  def("token_logprobs_fwd", [](Tensor logits, Tensor targets, Tensor mask, Temperature temperature,
                               Tensor logprobs, Tensor entropy, Tensor lse, int threads) {
    auto a = rows_of<LogprobsArgs>(logits, mask, temperature);
    a.targets = targets, a.logprobs = logprobs, a.entropy = entropy, a.lse = lse;
    token_logprobs_fwd(a, threads);
  });
  def("token_logprobs_bwd",
      [](Tensor dlogprobs, Tensor dentropy, Tensor logits, Tensor targets, Tensor mask,
         Temperature temperature, Tensor entropy, Tensor lse, Tensor dlogits, int threads) {
    auto a = rows_of<LogprobsArgs>(logits, mask, temperature);
    a.dlogprobs = dlogprobs, a.dentropy = dentropy, a.targets = targets;
    a.entropy = entropy, a.lse = lse, a.dlogits = dlogits;
    token_logprobs_bwd(a, threads);
  });
  def("full_kl_fwd", [](Tensor logits, Tensor ref_logits, Tensor mask, Temperature temperature,
                        Tensor kl, Tensor lse, int threads) {
    auto a = rows_of<FullKlArgs>(logits, mask, temperature);
    a.ref_logits = ref_logits, a.kl = kl, a.lse = lse;
    full_kl_fwd(a, threads);
  });
  def("full_kl_bwd",
      [](Tensor dkl, Tensor logits, Tensor ref_logits, Tensor mask, Temperature temperature,
         Tensor kl, Tensor lse, Tensor dlogits, Tensor dref_logits, int threads) {
    auto a = rows_of<FullKlArgs>(logits, mask, temperature);
    a.dkl = dkl, a.ref_logits = ref_logits, a.kl = kl, a.lse = lse;
    a.dlogits = dlogits, a.dref_logits = dref_logits;
    full_kl_bwd(a, threads);
  });
  def("kl_estimate_fwd",
      [](Tensor logprobs, Tensor ref_logprobs, Tensor mask, int estimator, Tensor kl, int threads) {
    auto a = estimate_of(logprobs, ref_logprobs, mask, estimator);
    a.kl = kl;
    kl_estimate_fwd(a, logprobs.size(), threads);
  });
  def("kl_estimate_bwd", [](Tensor dkl, Tensor logprobs, Tensor ref_logprobs, Tensor mask,
                            int estimator, Tensor dlogprobs, Tensor dref_logprobs, int threads) {
    auto a = estimate_of(logprobs, ref_logprobs, mask, estimator);
    a.dkl = dkl, a.dlogprobs = dlogprobs, a.dref_logprobs = dref_logprobs;
    kl_estimate_bwd(a, logprobs.size(), threads);
  });
  def("gae_fwd",
      [](Tensor rewards, Tensor values, Tensor mask, double gamma, double lam, Tensor last_values,
         Tensor cu_seqlens, Tensor advantages, Tensor returns, int threads) {
    auto a = sequences_of(rewards, mask, gamma, lam, cu_seqlens);
    a.rewards = rewards, a.values = values, a.last_values = last_values;
    a.advantages = advantages, a.returns = returns;
    gae_fwd(a, threads);
  });
  def("gae_bwd",
      [](Tensor dadvantages, Tensor dreturns, Tensor mask, double gamma, double lam,
         Tensor cu_seqlens, Tensor drewards, Tensor dvalues, Tensor dlast_values, int threads) {
    auto a = sequences_of(dreturns, mask, gamma, lam, cu_seqlens);
    a.dadvantages = dadvantages, a.dreturns = dreturns;
    a.drewards = drewards, a.dvalues = dvalues, a.dlast_values = dlast_values;
    gae_bwd(a, threads);
  });
  def("ppo_advantages_fwd",
      [](Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor values, Tensor mask,
         double kl_coef, int estimator, double gamma, double lam, bool whiten, Tensor cu_seqlens,
         Tensor advantages, Tensor returns, Tensor rewards, Tensor kl, int threads) {
    AdvantagesArgs a = {};
    a.gae = sequences_of(logprobs, mask, gamma, lam, cu_seqlens);
    a.kl = estimate_of(logprobs, ref_logprobs, mask, estimator);
    a.scores = scores, a.kl_coef = kl_coef, a.kl.kl = kl, a.gae.values = values;
    a.gae.advantages = advantages, a.gae.returns = returns, a.gae.rewards = a.rewards = rewards;
    ppo_advantages_fwd(a, whiten, threads);
  });
  def("ppo_loss_fwd",
      [](Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor values, Tensor old_values,
         Tensor returns, Tensor entropy, Tensor mask, Tensor weights, bool sequence_mean,
         double clip_low, double clip_high, std::optional<double> value_clip_range, double vf_coef,
         double entropy_coef, std::optional<double> dual_clip, Tensor loss, Tensor scale,
         Tensor stats, Tensor dlogprobs, Tensor dvalues, Tensor dentropy, int threads) {
    PpoLossArgs a = {};
    a.B = logprobs.shape[0], a.T = logprobs.shape[1];
    a.logprobs = logprobs, a.old_logprobs = old_logprobs, a.advantages = advantages;
    a.values = values, a.old_values = old_values, a.returns = returns, a.entropy = entropy;
    a.mask = mask, a.weights = weights, a.sequence_mean = sequence_mean;
    a.clip_low = clip_low, a.clip_high = clip_high, a.dual_clip = dual_clip.value_or(INFINITY);
    a.value_clip_range = value_clip_range.value_or(INFINITY), a.vf_coef = vf_coef;
    a.entropy_coef = entropy_coef, a.loss = loss, a.scale = scale, a.stats = stats;
    a.dlogprobs = dlogprobs, a.dvalues = dvalues, a.dentropy = dentropy;
    ppo_loss_fwd(a, threads);
  });
  def("decode_attention_fwd",
      [](Tensor q, Tensor k, Tensor v, Tensor keys, Tensor values, Tensor lengths, Tensor slots,
         Tensor cos, Tensor sin, std::optional<int64_t> window, int64_t limit, Tensor shared_keys,
         Tensor shared_values, Tensor shared_lengths, Tensor out, int threads) {
    DecodeAttentionArgs a = {};
    a.dtype = q.dtype(), a.B = q.shape[0], a.H = q.shape[1], a.K = q.shape[2];
    a.cache_dtype = keys.dtype(), a.N = keys.shape[0], a.Hkv = keys.shape[1];
    a.S = keys.shape[2], a.window = window.value_or(a.S), a.limit = limit;
    a.q = q, a.k = k, a.v = v, a.keys = keys, a.values = values;
    a.lengths = lengths, a.slots = slots, a.cos = cos, a.sin = sin, a.out = out;
    share(a, shared_keys, shared_values, shared_lengths, 0);
    decode_attention_fwd(a, threads);
  });
  def("packed_decode_fwd",
      [](Tensor tokens, Tensor counts, Tensor embedding, Tensor weights, Tensor keys, Tensor values,
         Tensor lengths, Tensor slots, Tensor cos, Tensor sin, std::optional<int64_t> window,
         int64_t limit, Tensor shared_keys, Tensor shared_values, Tensor shared_lengths,
         int64_t heads, int64_t intermediate, int64_t rank, int activation, bool gated, double eps,
         int64_t packed_size, Tensor logits, int threads) {
    PackedDecodeArgs a = {};
    DecodeAttentionArgs& d = a.attention;
    d.B = tokens.shape[0], a.T = tokens.ndim == 2 ? tokens.shape[1] : 1, d.H = heads;
    a.layers = keys.shape[0], d.N = keys.shape[1], d.Hkv = keys.shape[2];
    d.S = keys.shape[3], d.window = window.value_or(d.S), d.limit = limit, d.K = keys.shape[4];
    d.cache_dtype = keys.dtype();
    d.keys = keys, d.values = values, d.lengths = a.lengths = lengths, d.slots = slots;
    d.cos = cos, d.sin = sin, a.eps = static_cast<float>(eps);
    share(d, shared_keys, shared_values, shared_lengths, 1);
    a.dtype = embedding.dtype(), a.V = embedding.shape[0], a.D = embedding.shape[1];
    a.I = intermediate, a.rank = rank, a.activation = static_cast<Activation>(activation);
    a.gated = gated, a.packed = packed_size > 0, a.size = packed_size;
    a.tokens = tokens, a.counts = counts, a.logits = logits;
    const int64_t* const addresses = weights;
    a.model = reinterpret_cast<const ModelWeights*>(addresses);
    a.weights = reinterpret_cast<const LayerWeights*>(a.model + 1);
    packed_decode_fwd(a, threads);
  });
  def("rms_norm_fwd", [](Tensor x, Tensor weight, double eps, Tensor y, int threads) {
    auto a = norm_of(x, weight, eps, y.dtype());
    a.y = y;
    rms_norm_fwd(a, threads);
  });
  def("rms_norm_bwd",
      [](Tensor dy, Tensor x, Tensor weight, double eps, Tensor dx, Tensor dweight, int threads) {
    auto a = norm_of(x, weight, eps, dy.dtype());
    a.dy = dy, a.dx = dx, a.dweight = dweight;
    rms_norm_bwd(a, threads);
  });
  def("gated_activation_fwd", [](Tensor gate_up, int activation, Tensor y, int threads) {
    auto a = gated_of(gate_up, activation);
    a.y = y;
    gated_activation_fwd(a, threads);
  });
  def("gated_activation_bwd",
      [](Tensor dy, Tensor gate_up, int activation, Tensor dgate_up, int threads) {
    auto a = gated_of(gate_up, activation);
    a.dy = dy, a.dgate_up = dgate_up;
    gated_activation_bwd(a, threads);
  });
  def("rotary_fwd", [](Tensor x, Tensor cos, Tensor sin, int64_t head_dim, Tensor y, int threads) {
    RotaryArgs a = {};
    a.dtype = x.dtype(), a.B = x.shape[0], a.T = x.shape[1], a.K = head_dim;
    a.H = x.shape[2] / a.K, a.R = cos.shape[2];
    if (cos.dtype() != kFloat32 || sin.dtype() != kFloat32) refuse("factors of 16 bits");
    a.x = x, a.cos = cos, a.sin = sin, a.y = y;
    rotary_fwd(a, threads);
  });
  def("linear_rows_fwd",
      [](Tensor x, Tensor weight, Tensor scales, Tensor bias, Tensor y, int threads) {
    LinearRowsArgs a = {};
    a.dtype = x.dtype(), a.n = x.shape[0], a.in = x.shape[1], a.out = weight.shape[0];
    a.rows = {x, x.strides[0], 0}, a.weight = weight, a.bias = bias;
    a.scales = scales, a.wide = scales.data, a.y = y, a.y_stride = a.out;
    linear_rows_fwd(a, threads);
  });
  def("quantize_rows_fwd", [](Tensor weight, Tensor rows, Tensor scales, int threads) {
    QuantizeArgs a = {};
    a.dtype = weight.dtype(), a.out = weight.shape[0], a.in = weight.shape[1];
    a.weight = weight, a.rows = rows, a.scales = scales;
    quantize_rows_fwd(a, threads);
  });
  def("sample_tokens_fwd",
      [](Tensor logits, Tensor seeds, Tensor counters, double temperature,
         std::optional<int64_t> top_k, std::optional<double> top_p, std::optional<double> min_p,
         Tensor tokens, Tensor logprobs, Tensor full_logprobs, int threads) {
    SamplingArgs a = {};
    a.dtype = logits.dtype(), a.B = logits.shape[0], a.V = logits.shape[1], a.logits = logits;
    a.seeds = seeds, a.counters = counters, a.temperature = temperature;
    a.top_k = top_k.value_or(0), a.top_p = top_p.value_or(0), a.min_p = min_p.value_or(0);
    a.tokens = tokens, a.logprobs = logprobs, a.full_logprobs = full_logprobs;
    sample_tokens_fwd(a, threads);
  });
}
