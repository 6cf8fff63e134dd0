// The GPU kernels as operators of torch, through its stable ABI. Schemas, gradient and autocast rule: semidetr/native.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "msda_cuda.cuh"

#ifdef SEMIDETR_CUDA_ON_CPU
#define SEMIDETR_NS semidetr_shim
#define SEMIDETR_KEY CPU
#else
#include <torch/csrc/stable/accelerator.h>
#define SEMIDETR_NS semidetr
#define SEMIDETR_KEY CUDA
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace semidetr_cuda;

namespace {

#ifdef SEMIDETR_CUDA_ON_CPU
struct OnDevice { explicit OnDevice(const Tensor&) {} Stream stream = nullptr; };
void check_launch() {}
bool right_device(const Tensor& t) { return t.is_cpu(); }
#else
struct OnDevice {                          // the tensor's GPU and torch's stream there
  torch::stable::accelerator::DeviceGuard guard;
  Stream stream;
  explicit OnDevice(const Tensor& t) : guard(t.get_device_index()) {
    void* s = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &s));
    stream = static_cast<Stream>(s);
  }
};
void check_launch() {
  cudaError_t e = cudaGetLastError();
  STD_TORCH_CHECK(e == cudaSuccess, "ms_deform_attn: CUDA error: ", std::string(cudaGetErrorString(e)));
}
bool right_device(const Tensor& t) { return t.is_cuda(); }
#endif

void expect(const Tensor& t, std::initializer_list<int64_t> shape, const char* name) {
  bool ok = right_device(t) && t.dim() == int64_t(shape.size());
  int64_t i = 0;
  for (int64_t n : shape) { ok = ok && t.size(i) == n; i++; }
  STD_TORCH_CHECK(ok, "ms_deform_attn: `", name, "` has the wrong shape or is on another device");
}
template <class X> X* data(const Tensor& t) { return t.numel() ? static_cast<X*>(t.mutable_data_ptr()) : nullptr; }

struct Inputs {
  Geometry g{};
  Tensor value, xy, a, ref, grad;
  std::optional<Tensor> mask;

  Inputs(const Tensor& value_, const std::vector<int64_t>& shapes, const Tensor& xy_, const Tensor& a_,
         const Tensor* ref_, const std::optional<Tensor>& mask_, const Tensor* grad_)
      : value(torch::stable::contiguous(value_)), xy(torch::stable::contiguous(xy_)), a(torch::stable::contiguous(a_)),
        ref(ref_ ? torch::stable::contiguous(*ref_) : value), grad(grad_ ? torch::stable::contiguous(*grad_) : value) {
    STD_TORCH_CHECK(right_device(value) && value.dim() == 4 && xy.dim() == 6, "ms_deform_attn: value must be (B,S,M,D), locations or offsets (B,Q,M,L,P,2)");
    g.B = value.size(0); g.S = value.size(1); g.M = value.size(2); g.D = value.size(3); g.Q = xy.size(1);
    const int64_t L = xy.size(3), P = xy.size(4);
    STD_TORCH_CHECK(L >= 1 && P >= 1 && L <= kMaxLevels && L * P <= kMaxPoints && g.D >= 1, "ms_deform_attn: 1..16 levels, at most 128 points a head");
    STD_TORCH_CHECK(int64_t(shapes.size()) == 2 * L, "ms_deform_attn: spatial_shapes must hold the height and the width of each level");
    STD_TORCH_CHECK(g.S < (int64_t(1) << 31) && g.B * g.Q * g.M < (int64_t(1) << 31), "ms_deform_attn: too large");
    g.L = int(L); g.P = int(P);
    int64_t s = 0;
    for (int l = 0; l < g.L; l++) {
      STD_TORCH_CHECK(shapes[2 * l] >= 1 && shapes[2 * l + 1] >= 1, "ms_deform_attn: empty level");
      g.h[l] = int(shapes[2 * l]); g.w[l] = int(shapes[2 * l + 1]); g.start[l] = int(s);
      s += shapes[2 * l] * shapes[2 * l + 1];
    }
    STD_TORCH_CHECK(s == g.S, "ms_deform_attn: spatial_shapes hold ", s, " pixels, value has ", g.S);
    expect(xy, {g.B, g.Q, g.M, L, P, 2}, "locations");
    if (ref_) expect(a, {g.B, g.Q, g.M, L * P}, "logits"); else expect(a, {g.B, g.Q, g.M, L, P}, "weights");
    STD_TORCH_CHECK(xy.scalar_type() == a.scalar_type() && (xy.scalar_type() == ScalarType::Float || (ref_ && xy.scalar_type() == value.scalar_type())),
                    "ms_deform_attn: locations and weights must be float32");
    if (ref_) {
      g.ref_dim = int(ref.dim() == 4 ? ref.size(3) : 0);
      STD_TORCH_CHECK(g.ref_dim == 2 || g.ref_dim == 4, "ms_deform_attn: reference points must be (B,Q,L,2) or (B,Q,L,4)");
      expect(ref, {g.B, g.Q, L, int64_t(g.ref_dim)}, "reference_points");
      STD_TORCH_CHECK(ref.scalar_type() == ScalarType::Float, "ms_deform_attn: reference points must be float32");
    }
    if (mask_.has_value()) {
      mask = torch::stable::contiguous(*mask_);
      STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "ms_deform_attn: padding_mask must be bool, True = padding");
      expect(*mask, {g.B, g.S}, "padding_mask");
    }
    if (grad_) {
      expect(grad, {g.B, g.Q, g.M * g.D}, "grad");
      STD_TORCH_CHECK(grad.scalar_type() == value.scalar_type(), "ms_deform_attn: the gradient must have the value's dtype");
    }
  }

  template <class T, class R> Arrays<T, R> arrays() const {
    Arrays<T, R> p{};
    p.value = data<T>(value); p.xy = data<R>(xy); p.a = data<R>(a);
    if (g.ref_dim) p.ref = data<float>(ref);
    if (mask.has_value()) p.mask = data<bool>(*mask);
    return p;
  }
};

// Calls f with a null pointer of the value's type.
template <class F> void by_type(const Tensor& t, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float: f(static_cast<float*>(nullptr)); break;
#ifndef SEMIDETR_FLOAT_ONLY
    case ScalarType::Half: f(static_cast<torch::headeronly::Half*>(nullptr)); break;
    case ScalarType::BFloat16: f(static_cast<torch::headeronly::BFloat16*>(nullptr)); break;
#endif
    default: STD_TORCH_CHECK(false, "ms_deform_attn on a GPU takes float32, float16 and bfloat16");
  }
}

struct Grads { Tensor value, xy, a, ref; };

// `fill` completes the arrays for one direction; R is float or the value's own type.
template <class F> void run(const Inputs& in, bool backward, const F& fill) {
  const OnDevice on(in.value);
  by_type(in.value, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    if (!in.g.ref_dim) { auto p = in.arrays<T, float>(); fill(p); pick_vector<T, float, false>(in.g, p, backward, on.stream); }
    else if (in.xy.scalar_type() == ScalarType::Float) { auto p = in.arrays<T, float>(); fill(p); pick_vector<T, float, true>(in.g, p, backward, on.stream); }
    else { auto p = in.arrays<T, T>(); fill(p); pick_vector<T, T, true>(in.g, p, backward, on.stream); }
  });
  check_launch();
}

Tensor run_forward(const Inputs& in) {
  std::vector<int64_t> size = {in.g.B, in.g.Q, in.g.M * in.g.D};
  Tensor out = torch::stable::new_empty(in.value, size);
  if (out.numel()) run(in, false, [&](auto& p) { p.out = data<std::remove_pointer_t<decltype(p.out)>>(out); });
  return out;
}

Grads run_backward(const Inputs& in, bool need_ref) {
  std::vector<int64_t> size = {in.g.B, in.g.S, in.g.M, in.g.D}, ref_size = {0};
  Tensor gv = torch::stable::new_zeros(in.value, size, ScalarType::Float);
  Tensor gxy = torch::stable::empty_like(in.xy), ga = torch::stable::empty_like(in.a);
  if (need_ref) ref_size = {in.g.B, in.g.Q, in.g.L, in.g.ref_dim};
  Tensor gr = torch::stable::new_zeros(in.g.ref_dim ? in.ref : in.value, ref_size);
  if (in.grad.numel() && in.xy.numel())
    run(in, true, [&](auto& p) {
      using T = std::remove_pointer_t<decltype(p.out)>;
      using R = std::remove_pointer_t<decltype(p.grad_xy)>;
      p.grad_out = data<T>(in.grad); p.grad_value = data<float>(gv); p.grad_xy = data<R>(gxy); p.grad_a = data<R>(ga);
      if (need_ref) p.grad_ref = data<float>(gr);
    });
  if (in.value.scalar_type() != ScalarType::Float) gv = torch::stable::to(gv, in.value.scalar_type());
  return {gv, gxy, ga, gr};
}

Tensor ms_deform_attn(const Tensor& value, std::vector<int64_t> shapes, const Tensor& locations, const Tensor& weights) {
  return run_forward(Inputs(value, shapes, locations, weights, nullptr, std::nullopt, nullptr));
}
std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(const Tensor& grad, const Tensor& value, std::vector<int64_t> shapes,
                                                           const Tensor& locations, const Tensor& weights) {
  Grads r = run_backward(Inputs(value, shapes, locations, weights, nullptr, std::nullopt, &grad), false);
  return {r.value, r.xy, r.a};
}
Tensor fused_ms_deform_attn(const Tensor& value, std::vector<int64_t> shapes, const Tensor& reference, const Tensor& offsets,
                            const Tensor& logits, std::optional<Tensor> mask) {
  return run_forward(Inputs(value, shapes, offsets, logits, &reference, mask, nullptr));
}
std::tuple<Tensor, Tensor, Tensor, Tensor> fused_ms_deform_attn_backward(
    const Tensor& grad, const Tensor& value, std::vector<int64_t> shapes, const Tensor& reference, const Tensor& offsets,
    const Tensor& logits, std::optional<Tensor> mask, bool reference_grad) {
  Grads r = run_backward(Inputs(value, shapes, offsets, logits, &reference, mask, &grad), reference_grad);
  return {r.value, r.ref, r.xy, r.a};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SEMIDETR_NS, SEMIDETR_KEY, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&ms_deform_attn));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&ms_deform_attn_backward));
  m.impl("fused_ms_deform_attn", TORCH_BOX(&fused_ms_deform_attn));
  m.impl("fused_ms_deform_attn_backward", TORCH_BOX(&fused_ms_deform_attn_backward));
}
