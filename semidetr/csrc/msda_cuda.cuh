// Multi-scale deformable attention on a GPU, forward and backward, plain and fused form.
//
// A group of G lanes (a power of two, at most 32, always inside one warp) does one head of one query; a lane holds VEC
// neighbouring channels, and more of them at a distance of G*VEC for wide heads. In the backward pass the lanes' dot products
// are summed by shuffles, the value's gradient is added to with atomics in float. All lanes of a warp stay together up to the
// last shuffle: lanes of groups behind the end work with `live` = false, which reads and writes nothing.
//
// The same text is compiled by nvcc and, with SEMIDETR_CUDA_ON_CPU, by a C++ compiler against a small header that runs a
// block's threads as fibers (tests/csrc/cuda_on_cpu.h): what the tests run on a machine without a GPU is this file.
#pragma once
#include <cstdint>

#ifdef SEMIDETR_CUDA_ON_CPU
#include "cuda_on_cpu.h"
#else
#include <cuda_runtime.h>
#define SEMIDETR_LAUNCH(kernel, blocks, threads, shared, stream, ...) kernel<<<blocks, threads, shared, stream>>>(__VA_ARGS__)
#define SEMIDETR_SHARED(T, name) extern __shared__ T name[]
#endif

namespace semidetr_cuda {

constexpr int kMaxLevels = 16;
constexpr int kMaxPoints = 128;
constexpr int kThreads = 128;
constexpr unsigned kAll = 0xffffffffu;

struct Geometry {
  int64_t B, S, M, D, Q;
  int L, P, ref_dim;                     // ref_dim: 0 = plain form, 2, 4
  int h[kMaxLevels], w[kMaxLevels], start[kMaxLevels];
};

template <class T, class R> struct Arrays {   // T: of the value; R: of offsets and logits (float in the plain form)
  const T* value;                        // (B,S,M,D)
  const R* xy;                           // (B,Q,M,L,P,2) locations or offsets
  const R* a;                            // (B,Q,M,L*P) weights or logits
  const float* ref;                      // (B,Q,L,ref_dim)
  const bool* mask;                      // (B,S) or null
  T* out;                                // (B,Q,M,D)
  const T* grad_out;
  float* grad_value;                     // (B,S,M,D), zeroed
  R* grad_xy;
  R* grad_a;
  float* grad_ref;                       // (B,Q,L,ref_dim), zeroed, or null
};

template <class T, int VEC> struct alignas(sizeof(T) * VEC) Pack { T v[VEC]; };

template <int G> __device__ __forceinline__ float group_sum(float x) {
#pragma unroll
  for (int d = G / 2; d; d /= 2) x += __shfl_xor_sync(kAll, x, d);
  return x;
}
template <int G> __device__ __forceinline__ float group_max(float x) {
#pragma unroll
  for (int d = G / 2; d; d /= 2) { float y = __shfl_xor_sync(kAll, x, d); x = y > x || y != y ? y : x; }
  return x;
}

struct Point {                           // one point: the four taps and their bilinear fractions
  int row[4];                            // pixel of the whole value, or -1
  float fx, fy;
  bool in;
};

// x, y: pixel coordinates, the centre of the first pixel at 0
__device__ __forceinline__ Point make_point(const Geometry& g, int l, float cx, float cy, float dx, float dy, const bool* mask) {
  Point p;
  const int w = g.w[l], h = g.h[l];
  float x = fmaf(cx, float(w), dx - .5f), y = fmaf(cy, float(h), dy - .5f);
  p.in = x > -1.f && x < float(w) && y > -1.f && y < float(h);      // false for NaN
  if (!p.in) x = y = 0.f;
  float xf = floorf(x), yf = floorf(y);
  int xi = int(xf), yi = int(yf);
  p.fx = p.in ? fmaf(cx, float(w), -(xf + .5f)) + dx : 0.f;
  p.fy = p.in ? fmaf(cy, float(h), -(yf + .5f)) + dy : 0.f;
#pragma unroll
  for (int c = 0; c < 4; c++) {
    int u = xi + (c & 1), v = yi + (c >> 1);
    bool ok = p.in && u >= 0 && u < w && v >= 0 && v < h;
    int row = g.start[l] + v * w + u;
    if (ok && mask && mask[row]) ok = false;
    p.row[c] = ok ? row : -1;
  }
  return p;
}

// Where point k of a head lies: centre, displacement and pixels per unit of offset.
template <class R, bool FUSED>
__device__ __forceinline__ Point read_point(const Geometry& g, const R* xy, const float* ref, const bool* mask, int k, float& sx, float& sy) {
  const int l = k / g.P;
  const float ox = float(xy[2 * k]), oy = float(xy[2 * k + 1]);
  if (!FUSED) { sx = float(g.w[l]); sy = float(g.h[l]); return make_point(g, l, ox, oy, 0.f, 0.f, nullptr); }
  const float* r = ref + l * g.ref_dim;
  sx = sy = 1.f;
  if (g.ref_dim == 4) { sx = r[2] * (.5f / float(g.P)) * float(g.w[l]); sy = r[3] * (.5f / float(g.P)) * float(g.h[l]); }
  return make_point(g, l, r[0], r[1], ox * sx, oy * sy, mask);
}

// Softmax statistics over a head's logits: every lane gets the maximum and one over the sum.
template <class R, int G> __device__ __forceinline__ void softmax_of(const R* a, int n, int lane, bool live, float& top, float& scale) {
  top = -INFINITY;
  for (int k = lane; k < n; k += G) { float z = live ? float(a[k]) : 0.f; top = z > top || z != z ? z : top; }
  top = group_max<G>(top);
  float sum = 0.f;
  for (int k = lane; k < n; k += G) sum += live ? expf(float(a[k]) - top) : 0.f;
  scale = 1.f / group_sum<G>(sum);
}

template <class T, class R, int VEC, int G, bool FUSED>
__global__ void forward_kernel(const __grid_constant__ Geometry g, const __grid_constant__ Arrays<T, R> p) {
  const int lane = threadIdx.x % G;
  const int64_t item = int64_t(blockIdx.x) * (kThreads / G) + threadIdx.x / G, items = g.B * g.Q * g.M;
  const bool live = item < items;
  const int64_t at = live ? item : 0, m = at % g.M, bq = at / g.M, b = bq / g.Q;
  const int n = g.L * g.P;
  const R *xy = p.xy + at * n * 2, *a = p.a + at * n;
  const float* ref = FUSED ? p.ref + bq * g.L * g.ref_dim : nullptr;
  const bool* mask = FUSED && p.mask ? p.mask + b * g.S : nullptr;
  float top = 0.f, scale = 1.f;
  if (FUSED) softmax_of<R, G>(a, n, lane, live, top, scale);
  if (!live) return;                     // no shuffle below
  const T* value = p.value + (b * g.S * g.M + m) * g.D;
  for (int64_t c0 = int64_t(lane) * VEC; c0 < g.D; c0 += G * VEC) {
    float acc[VEC] = {};
    for (int k = 0; k < n; k++) {
      float sx, sy;
      const Point q = read_point<R, FUSED>(g, xy, ref, mask, k, sx, sy);
      if (!q.in) continue;
      const float w = FUSED ? expf(float(a[k]) - top) * scale : float(a[k]);
#pragma unroll
      for (int c = 0; c < 4; c++) {
        if (q.row[c] < 0) continue;
        const float wc = w * (c & 1 ? q.fx : 1.f - q.fx) * (c >> 1 ? q.fy : 1.f - q.fy);
        const Pack<T, VEC> v = *reinterpret_cast<const Pack<T, VEC>*>(value + int64_t(q.row[c]) * g.M * g.D + c0);
#pragma unroll
        for (int i = 0; i < VEC; i++) acc[i] = fmaf(wc, float(v.v[i]), acc[i]);
      }
    }
    Pack<T, VEC> o;
#pragma unroll
    for (int i = 0; i < VEC; i++) o.v[i] = T(acc[i]);
    *reinterpret_cast<Pack<T, VEC>*>(p.out + at * g.D + c0) = o;
  }
}

template <class T, class R, int VEC, int G, bool FUSED>
__global__ void backward_kernel(const __grid_constant__ Geometry g, const __grid_constant__ Arrays<T, R> p) {
  SEMIDETR_SHARED(float, shared);        // fused form: gradient of each weight of the block's heads
  const int lane = threadIdx.x % G, group = threadIdx.x / G;
  const int64_t item = int64_t(blockIdx.x) * (kThreads / G) + group, items = g.B * g.Q * g.M;
  const bool live = item < items;
  const int64_t at = live ? item : 0, m = at % g.M, bq = at / g.M, b = bq / g.Q;
  const int n = g.L * g.P;
  const R *xy = p.xy + at * n * 2, *a = p.a + at * n;
  const float* ref = FUSED ? p.ref + bq * g.L * g.ref_dim : nullptr;
  const bool* mask = FUSED && p.mask ? p.mask + b * g.S : nullptr;
  float top = 0.f, scale = 1.f;
  if (FUSED) softmax_of<R, G>(a, n, lane, live, top, scale);
  const int64_t slice = (b * g.S * g.M + m) * g.D, step = g.M * g.D;
  const T* grad = p.grad_out + at * g.D;
  float* kept = FUSED ? shared + group * n : nullptr;
  float dot = 0.f;                       // sum over the points of weight * its gradient
  float rx = 0.f, ry = 0.f, rw = 0.f, rh = 0.f;
  for (int k = 0; k < n; k++) {
    float sx, sy;
    const Point q = read_point<R, FUSED>(g, xy, ref, mask, k, sx, sy);
    const float w = FUSED ? expf(float(a[k]) - top) * scale : float(a[k]);
    float ga = 0.f, gx = 0.f, gy = 0.f;
    if (live && q.in)
      for (int64_t c0 = int64_t(lane) * VEC; c0 < g.D; c0 += G * VEC) {
        const Pack<T, VEC> go = *reinterpret_cast<const Pack<T, VEC>*>(grad + c0);
#pragma unroll
        for (int c = 0; c < 4; c++) {
          if (q.row[c] < 0) continue;
          const float ux = c & 1 ? q.fx : 1.f - q.fx, uy = c >> 1 ? q.fy : 1.f - q.fy;
          const int64_t row = slice + int64_t(q.row[c]) * step + c0;
          const Pack<T, VEC> v = *reinterpret_cast<const Pack<T, VEC>*>(p.value + row);
          float d = 0.f;
#pragma unroll
          for (int i = 0; i < VEC; i++) {
            const float o = float(go.v[i]);
            d = fmaf(o, float(v.v[i]), d);
            atomicAdd(p.grad_value + row + i, w * ux * uy * o);
          }
          ga = fmaf(ux * uy, d, ga);
          gx += (c & 1 ? uy : -uy) * d;
          gy += (c >> 1 ? ux : -ux) * d;
        }
      }
    ga = group_sum<G>(ga); gx = w * group_sum<G>(gx); gy = w * group_sum<G>(gy);
    dot = fmaf(w, ga, dot);
    if (live && lane == k % G) {
      p.grad_xy[(at * n + k) * 2] = R(gx * sx);
      p.grad_xy[(at * n + k) * 2 + 1] = R(gy * sy);
      if (FUSED) kept[k] = ga; else p.grad_a[at * n + k] = R(ga);
    }
    if (FUSED && p.grad_ref) {           // every lane has the sums; the level's last point writes them
      const int l = k / g.P;
      const float px = gx * float(g.w[l]), py = gy * float(g.h[l]), half = .5f / float(g.P);
      rx += px; ry += py;
      rw = fmaf(px, float(xy[2 * k]) * half, rw); rh = fmaf(py, float(xy[2 * k + 1]) * half, rh);
      if (k % g.P == g.P - 1) {
        float* r = p.grad_ref + (bq * g.L + l) * g.ref_dim;
        if (live && lane == 0) {
          atomicAdd(r, rx); atomicAdd(r + 1, ry);
          if (g.ref_dim == 4) { atomicAdd(r + 2, rw); atomicAdd(r + 3, rh); }
        }
        rx = ry = rw = rh = 0.f;
      }
    }
  }
  if (FUSED) {
    __syncwarp();
    if (live)
      for (int k = lane; k < n; k += G) p.grad_a[at * n + k] = R(expf(float(a[k]) - top) * scale * (kept[k] - dot));
  }
}

// ---- launchers ----------------------------------------------------------------------------------------------------------
#ifndef SEMIDETR_CUDA_ON_CPU
typedef cudaStream_t Stream;
#else
typedef void* Stream;
#endif

template <class T, class R, int VEC, int G, bool FUSED>
void launch(const Geometry& g, const Arrays<T, R>& p, bool backward, Stream stream) {
  const int64_t items = g.B * g.Q * g.M, per = kThreads / G, blocks = (items + per - 1) / per;
  if (!blocks) return;
  if (!backward) { SEMIDETR_LAUNCH((forward_kernel<T, R, VEC, G, FUSED>), unsigned(blocks), kThreads, 0, stream, g, p); }
  else {
    const size_t bytes = FUSED ? size_t(per) * g.L * g.P * sizeof(float) : 0;
    SEMIDETR_LAUNCH((backward_kernel<T, R, VEC, G, FUSED>), unsigned(blocks), kThreads, bytes, stream, g, p);
  }
}

// Four channels a lane where the width allows it: heads of 16, 32 and 64 channels then fill 4, 8 and 16 lanes.
template <class T, class R, bool FUSED>
void pick_vector(const Geometry& g, const Arrays<T, R>& p, bool backward, Stream stream) {
  const auto fits = [&](size_t n) {
    return g.D % n == 0 && reinterpret_cast<uintptr_t>(p.value) % (n * sizeof(T)) == 0 &&
           reinterpret_cast<uintptr_t>(backward ? p.grad_out : p.out) % (n * sizeof(T)) == 0;
  };
  if (fits(4) && g.D <= 16) launch<T, R, 4, 4, FUSED>(g, p, backward, stream);
  else if (fits(4) && g.D <= 32) launch<T, R, 4, 8, FUSED>(g, p, backward, stream);
  else if (fits(4)) launch<T, R, 4, 16, FUSED>(g, p, backward, stream);
  else if (fits(2)) launch<T, R, 2, 8, FUSED>(g, p, backward, stream);
  else launch<T, R, 1, 32, FUSED>(g, p, backward, stream);
}

}  // namespace semidetr_cuda
