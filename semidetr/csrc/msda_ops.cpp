// The CPU kernels as operators of torch, through its stable ABI: one library serves every torch from 2.10 on.
// The schemas, the fake kernels, the autograd formula and the autocast rule are in Python (semidetr/native.py).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <cstring>
#include <functional>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "msda.h"

#ifndef SEMIDETR_NS
#define SEMIDETR_NS semidetr
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using semidetr::Kernels;
using semidetr::Problem;

namespace {

constexpr int64_t kStreamFrom = 1 << 20;   // bytes of gradients: more than the cache of a core keeps

bool supported(const char* name) {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#ifdef SEMIDETR_HAVE_V4
  if (!strcmp(name, "v4"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
#endif
#ifdef SEMIDETR_HAVE_V3
  if (!strcmp(name, "v3")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#endif
#endif
#ifdef SEMIDETR_HAVE_BASE
  return !strcmp(name, "base");
#else
  return false;
#endif
}

const Kernels& named(const char* name) {
#ifdef SEMIDETR_HAVE_V4
  if (!strcmp(name, "v4")) return semidetr::kernels_v4();
#endif
#ifdef SEMIDETR_HAVE_V3
  if (!strcmp(name, "v3")) return semidetr::kernels_v3();
#endif
#ifdef SEMIDETR_HAVE_BASE
  if (!strcmp(name, "base")) return semidetr::kernels_base();
#endif
  STD_TORCH_CHECK(false, "semidetr: this library was built for another CPU; run `semidetr build-ops`");
}

// The widest instruction set that this CPU has and this library was built for; SEMIDETR_ISA names a narrower one.
const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const char* want = std::getenv("SEMIDETR_ISA");
    for (const char* name : {"v4", "v3", "base"})
      if (supported(name) && (!want || !*want || !strcmp(want, name))) return named(name);
    return named("base");
  }();
  return chosen;
}

#ifdef __SANITIZE_ADDRESS__                       // what lies behind the memory of a call has to be noticed
constexpr bool kKeep = false; constexpr uintptr_t kPage = 64;
#else
constexpr bool kKeep = true; constexpr uintptr_t kPage = uintptr_t(1) << 21;  // a large page
#endif
void ask_for_large_pages(uintptr_t begin, uintptr_t end) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  begin = (begin + kPage - 1) & ~(kPage - 1); end &= ~(kPage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)begin; (void)end;
#endif
}

// A thread's own memory, kept for its next call, so that the system clears its pages once; on large pages, since rows are read
// and written all over it.
void* scratch(size_t n) {
  struct Kept {
    void* raw = nullptr; size_t size = 0;
    ~Kept() { std::free(raw); }
  };
  static thread_local Kept kept;
  if (!kKeep || n > kept.size) {
    std::free(kept.raw); kept.size = 0;
    n = (n + kPage - 1) & ~(kPage - 1);
    kept.raw = std::malloc(n + kPage);
    if (!kept.raw) throw std::bad_alloc();
    kept.size = n;
    ask_for_large_pages(reinterpret_cast<uintptr_t>(kept.raw), reinterpret_cast<uintptr_t>(kept.raw) + n + kPage);
  }
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(kept.raw) + kPage - 1) & ~(kPage - 1));
}

semidetr::Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return semidetr::kFloat;
    case ScalarType::Double: return semidetr::kDouble;
    case ScalarType::BFloat16: return semidetr::kBFloat16;
    default: STD_TORCH_CHECK(false, "ms_deform_attn on the CPU takes float32, float64 and bfloat16"); return semidetr::kFloat;
  }
}

void expect(const Tensor& t, std::initializer_list<int64_t> shape, const char* name) {
  bool ok = t.is_cpu() && t.dim() == int64_t(shape.size());
  int64_t i = 0;
  for (int64_t n : shape) { ok = ok && t.size(i) == n; i++; }
  STD_TORCH_CHECK(ok, "ms_deform_attn: `", name, "` has the wrong shape or is not on the CPU");
}

void* data(const Tensor& t) { return t.numel() ? t.mutable_data_ptr() : nullptr; }

// A new tensor. A large one gets large pages where the system lends them (Linux, transparent huge pages not switched off):
// a first write to each of its many small pages would cost more than the op.
Tensor fresh(const Tensor& like, const std::vector<int64_t>& size) {
  Tensor t = torch::stable::new_empty(like, size);
  uintptr_t begin = reinterpret_cast<uintptr_t>(data(t));
  ask_for_large_pages(begin, begin + uintptr_t(t.numel()) * t.element_size());
  return t;
}

struct Inputs {                    // contiguous tensors of one call and their description
  Problem p{};
  Tensor value, a, b, ref, grad;   // a, b: locations and weights, or offsets and logits
  std::optional<Tensor> mask;

  Inputs(const Tensor& value_, const std::vector<int64_t>& shapes, const Tensor& a_, const Tensor& b_,
         const Tensor* ref_, const std::optional<Tensor>& mask_, const Tensor* grad_)
      : value(torch::stable::contiguous(value_)), a(torch::stable::contiguous(a_)), b(torch::stable::contiguous(b_)),
        ref(ref_ ? torch::stable::contiguous(*ref_) : value), grad(grad_ ? torch::stable::contiguous(*grad_) : value) {
    STD_TORCH_CHECK(value.dim() == 4 && a.dim() == 6, "ms_deform_attn: value must be (B,S,M,D), locations or offsets (B,Q,M,L,P,2)");
    p.type = type_of(value);
    p.B = value.size(0); p.S = value.size(1); p.M = value.size(2); p.D = value.size(3);
    p.Q = a.size(1); p.L = a.size(3); p.P = a.size(4);
    STD_TORCH_CHECK(p.L >= 1 && p.P >= 1 && p.L <= semidetr::kMaxLevels && p.L * p.P <= semidetr::kMaxPoints && p.D >= 1,
                    "ms_deform_attn: 1..16 levels, at most 128 points a head");
    STD_TORCH_CHECK(int64_t(shapes.size()) == 2 * p.L, "ms_deform_attn: spatial_shapes must hold the height and the width of each level");
    int64_t s = 0, framed = 0;
    for (int64_t l = 0; l < p.L; l++) {
      int64_t h = shapes[2 * l], w = shapes[2 * l + 1];
      STD_TORCH_CHECK(h >= 1 && w >= 1, "ms_deform_attn: empty level");
      s += h * w; framed += (h + 2) * (w + 1) + 1;
      STD_TORCH_CHECK(framed < (int64_t(1) << 24) && framed * (p.D + 16) < (int64_t(1) << 31), "ms_deform_attn: the map is too large");
      p.h[l] = int32_t(h); p.w[l] = int32_t(w); p.start[l] = int32_t(s - h * w);
    }
    STD_TORCH_CHECK(s == p.S, "ms_deform_attn: spatial_shapes hold ", s, " pixels, value has ", p.S);
    expect(a, {p.B, p.Q, p.M, p.L, p.P, 2}, "locations");
    if (ref_) expect(b, {p.B, p.Q, p.M, p.L * p.P}, "logits"); else expect(b, {p.B, p.Q, p.M, p.L, p.P}, "weights");
    semidetr::Type real = p.type == semidetr::kDouble ? semidetr::kDouble : semidetr::kFloat;
    p.raw = real;
    if (ref_) {
      p.ref_dim = int(ref.dim() == 4 ? ref.size(3) : 0);
      STD_TORCH_CHECK(p.ref_dim == 2 || p.ref_dim == 4, "ms_deform_attn: reference points must be (B,Q,L,2) or (B,Q,L,4)");
      expect(ref, {p.B, p.Q, p.L, int64_t(p.ref_dim)}, "reference_points");
      STD_TORCH_CHECK(type_of(ref) == real, "ms_deform_attn: reference points must be float32 (float64 with a float64 value)");
      if (p.type == semidetr::kBFloat16) p.raw = type_of(a);
      p.ref = data(ref); p.off = data(a); p.logit = data(b);
    } else { p.loc = data(a); p.weight = data(b); }
    STD_TORCH_CHECK(type_of(a) == p.raw && type_of(b) == p.raw && p.raw != (p.type == semidetr::kBFloat16 ? semidetr::kDouble : semidetr::kBFloat16),
                    "ms_deform_attn: locations and weights must be float32 (float64 with a float64 value)");
    if (mask_.has_value()) {
      mask = torch::stable::contiguous(*mask_);
      STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "ms_deform_attn: padding_mask must be bool, True = padding");
      expect(*mask, {p.B, p.S}, "padding_mask");
      p.mask = static_cast<const uint8_t*>(data(*mask));
    }
    if (grad_) {
      expect(grad, {p.B, p.Q, p.M * p.D}, "grad");
      STD_TORCH_CHECK(grad.scalar_type() == value.scalar_type(), "ms_deform_attn: the gradient must have the value's dtype");
      p.grad_out = data(grad);
    }
    p.value = data(value);
    p.chunks = 1;
  }
};

void spread(int64_t n, const std::function<void(int64_t, int64_t)>& f) {
  if (n > 0) torch::stable::parallel_for(0, n, 1, f);
}

Tensor run_forward(Inputs& in) {
  Problem& p = in.p;
  const Kernels& k = kernels();
  Tensor out = fresh(in.value, {p.B, p.Q, p.M * p.D});
  if (!p.B || !p.Q || !p.M) return out;
  p.out = data(out);
  int64_t threads = torch::stable::get_num_threads(), heads = p.B * p.M;
  if (threads > 1 && heads < 2 * threads) {
    int64_t want = (2 * threads + heads - 1) / heads, most = (p.Q + 63) / 64;
    p.chunks = int(want < most ? want : most);
  }
  size_t bytes = k.scratch(p, false);
  spread(heads * p.chunks, [&](int64_t begin, int64_t end) { k.forward(p, begin, end, scratch(bytes)); });
  return out;
}

// Gradients of value, locations/offsets, weights/logits, reference points (empty unless asked for).
std::tuple<Tensor, Tensor, Tensor, Tensor> run_backward(Inputs& in, bool need_ref) {
  Problem& p = in.p;
  const Kernels& k = kernels();
  std::vector<int64_t> size = {p.B, p.Q, p.M, p.L, p.P, 2}, size_b = {p.B, p.Q, p.M, p.L, p.P};
  if (p.ref_dim) size_b = {p.B, p.Q, p.M, p.L * p.P};
  Tensor gv = fresh(in.value, {p.B, p.S, p.M, p.D}), ga = fresh(in.a, size), gb = fresh(in.b, size_b);
  if (k.needs_zero(p) || !p.Q) torch::stable::zero_(gv);
  need_ref = need_ref && p.ref_dim;
  std::vector<int64_t> ref_size = {0};
  if (need_ref) ref_size = {p.B, p.Q, p.L, p.ref_dim};
  Tensor gr = torch::stable::new_empty(p.ref_dim ? in.ref : in.value, ref_size);
  if (!p.B || !p.Q || !p.M) return {gv, ga, gb, need_ref ? torch::stable::new_zeros(in.ref, ref_size) : gr};
  p.grad_value = data(gv); p.grad_loc = data(ga); p.grad_weight = data(gb);
  Tensor part_ref = gr, part_weight = gr;
  if (need_ref) {
    std::vector<int64_t> n = {p.B, p.M, p.Q, p.L * p.ref_dim};
    part_ref = torch::stable::new_empty(in.ref, n);
    p.grad_ref = data(gr); p.part_ref = data(part_ref);
  }
  int64_t threads = torch::stable::get_num_threads();
  p.by_level = threads > 1 && p.L > 1 && p.B * p.M < 2 * threads;
  if (p.by_level && p.ref_dim) {
    std::vector<int64_t> n = {p.B, p.Q, p.M, p.L * p.P};
    part_weight = torch::stable::new_empty(in.ref, n);
    p.part_weight = data(part_weight);
  }
  int64_t each = p.type == semidetr::kDouble ? 8 : p.type == semidetr::kFloat ? 4 : 2, points = p.B * p.Q * p.M * p.L * p.P;
  p.stream = each * (p.B * p.S * p.M * p.D + 3 * points) > kStreamFrom;
  size_t bytes = k.scratch(p, true);
  spread(p.B * p.M * (p.by_level ? p.L : 1), [&](int64_t begin, int64_t end) { k.backward(p, begin, end, scratch(bytes)); });
  if (p.ref_dim && (p.by_level || need_ref)) spread(p.B * p.Q, [&](int64_t begin, int64_t end) { k.finish(p, begin, end); });
  return {gv, ga, gb, gr};
}

Tensor ms_deform_attn(const Tensor& value, std::vector<int64_t> shapes, const Tensor& locations, const Tensor& weights) {
  Inputs in(value, shapes, locations, weights, nullptr, std::nullopt, nullptr);
  return run_forward(in);
}
std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(const Tensor& grad, const Tensor& value, std::vector<int64_t> shapes,
                                                           const Tensor& locations, const Tensor& weights) {
  Inputs in(value, shapes, locations, weights, nullptr, std::nullopt, &grad);
  auto [gv, gl, gw, gr] = run_backward(in, false);
  return {gv, gl, gw};
}
Tensor fused_ms_deform_attn(const Tensor& value, std::vector<int64_t> shapes, const Tensor& reference, const Tensor& offsets,
                            const Tensor& logits, std::optional<Tensor> mask) {
  Inputs in(value, shapes, offsets, logits, &reference, mask, nullptr);
  return run_forward(in);
}
std::tuple<Tensor, Tensor, Tensor, Tensor> fused_ms_deform_attn_backward(
    const Tensor& grad, const Tensor& value, std::vector<int64_t> shapes, const Tensor& reference, const Tensor& offsets,
    const Tensor& logits, std::optional<Tensor> mask, bool reference_grad) {
  Inputs in(value, shapes, offsets, logits, &reference, mask, &grad);
  auto [gv, go, gl, gr] = run_backward(in, reference_grad);
  return {gv, gr, go, gl};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SEMIDETR_NS, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&ms_deform_attn));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&ms_deform_attn_backward));
  m.impl("fused_ms_deform_attn", TORCH_BOX(&fused_ms_deform_attn));
  m.impl("fused_ms_deform_attn_backward", TORCH_BOX(&fused_ms_deform_attn_backward));
}

// For `ops_status`: the instruction set in use, read through ctypes.
extern "C"
#if defined(__GNUC__)
__attribute__((visibility("default")))
#endif
const char* semidetr_isa() { return kernels().name; }
