// Multi-scale deformable attention, forward and backward, for one instruction set.
// Included once per translation unit with SEMIDETR_ISA (a name) and SEMIDETR_VW (floats in a vector).
//
// A task is one head of one image. It owns its slice of the value and of the value's gradient, so that no two tasks add to
// the same number: no atomics, and the same bits for any number of threads. Each query goes through two phases: `locate`
// works on sixteen points at once (pixel, four bilinear weights, mask), `gather` and `scatter` on a vector of channels.
//
// With many queries the slice is first packed, in float, with a frame of zeros around every level. A tap outside the map then
// reads a zero and needs no test; the frame between two rows is one pixel that ends one row and begins the next. With few
// queries packing does not pay: taps are addressed one by one in the tensor itself, those outside go to a row of zeros.
#include "msda.h"

namespace semidetr {
namespace SEMIDETR_ISA {
namespace {

// ---- vectors ------------------------------------------------------------------------------------------------------------
#if SEMIDETR_VW > 1
#define SEMIDETR_INLINE inline __attribute__((always_inline))
#define SEMIDETR_NOINLINE __attribute__((noinline))
#define SEMIDETR_PREFETCH(p) __builtin_prefetch(p)
#define SEMIDETR_RESTRICT __restrict__
template <class A> struct Lanes;
template <> struct Lanes<float> {
  static constexpr int n = SEMIDETR_VW;
  typedef float V __attribute__((vector_size(SEMIDETR_VW * 4)));
  typedef int32_t I __attribute__((vector_size(SEMIDETR_VW * 4)));
  typedef uint32_t U __attribute__((vector_size(SEMIDETR_VW * 4)));
  typedef uint16_t H __attribute__((vector_size(SEMIDETR_VW * 2)));
};
template <> struct Lanes<double> {
  static constexpr int n = SEMIDETR_VW / 2;
  typedef double V __attribute__((vector_size(SEMIDETR_VW * 4)));
  typedef int64_t I __attribute__((vector_size(SEMIDETR_VW * 4)));
};
template <class A> using Vec = typename Lanes<A>::V;

template <class A> SEMIDETR_INLINE Vec<A> load(const A* p) { Vec<A> v; __builtin_memcpy(&v, p, sizeof v); return v; }
template <class A> SEMIDETR_INLINE void store(A* p, Vec<A> v) { __builtin_memcpy(p, &v, sizeof v); }
template <class A> SEMIDETR_INLINE Vec<A> load(const uint16_t* p) {   // bfloat16 -> float
  typename Lanes<float>::H h; __builtin_memcpy(&h, p, sizeof h);
  return (Vec<float>)(__builtin_convertvector(h, typename Lanes<float>::U) << 16);
}

// Step of a tree that sums each of N vectors and leaves sum i in lane i: segments of s lanes become segments of s/2.
template <int N, int S> constexpr int low_lane(int i) { return (i / (S / 2) & 1) * N + (i / (S / 2) >> 1) * S + i % (S / 2); }
template <int... I> struct Seq {};
template <int N, int... I> struct Count : Count<N - 1, N - 1, I...> {};
template <int... I> struct Count<0, I...> { typedef Seq<I...> type; };
template <class A, int S, int... I> SEMIDETR_INLINE Vec<A> fold(Vec<A> a, Vec<A> b, Seq<I...>) {
  constexpr int N = Lanes<A>::n;
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, low_lane<N, S>(I)...) + __builtin_shufflevector(a, b, (low_lane<N, S>(I) + S / 2)...);
#else
  typedef typename Lanes<A>::I M;
  return __builtin_shuffle(a, b, M{low_lane<N, S>(I)...}) + __builtin_shuffle(a, b, M{(low_lane<N, S>(I) + S / 2)...});
#endif
}
template <class A, int S> struct Tree {
  static SEMIDETR_INLINE void sum(Vec<A>* x) {
    for (int i = 0; i < S / 2; i++) x[i] = fold<A, S>(x[i], x[i + S / 2], typename Count<Lanes<A>::n>::type());
    Tree<A, S / 2>::sum(x);
  }
};
template <class A> struct Tree<A, 1> { static SEMIDETR_INLINE void sum(Vec<A>*) {} };
#else
#if defined(_MSC_VER)
#define SEMIDETR_INLINE __forceinline
#define SEMIDETR_NOINLINE __declspec(noinline)
#else
#define SEMIDETR_INLINE inline
#define SEMIDETR_NOINLINE __attribute__((noinline))
#endif
#define SEMIDETR_PREFETCH(p) ((void)(p))
#define SEMIDETR_RESTRICT
template <class A> struct Lanes { static constexpr int n = 1; };
template <class A> using Vec = A;
template <class A> SEMIDETR_INLINE A load(const A* p) { return *p; }
template <class A> SEMIDETR_INLINE void store(A* p, A v) { *p = v; }
template <class A> SEMIDETR_INLINE A load(const uint16_t* p) {
  union { uint32_t u; float f; } x; x.u = uint32_t(*p) << 16; return x.f;
}
#endif

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
SEMIDETR_INLINE float fma_(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
SEMIDETR_INLINE double fma_(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
template <class A> SEMIDETR_INLINE A fma_(A a, A b, A c) { return a * b + c; }
#endif

// ---- numbers ------------------------------------------------------------------------------------------------------------
SEMIDETR_INLINE float bits_to_float(uint32_t u) { union { uint32_t u; float f; } x; x.u = u; return x.f; }
SEMIDETR_INLINE uint32_t float_to_bits(float f) { union { uint32_t u; float f; } x; x.f = f; return x.u; }
SEMIDETR_INLINE uint16_t to_bfloat16(float f) {   // to nearest, ties to even; NaN stays NaN
  uint32_t u = float_to_bits(f), r = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  return uint16_t(f == f ? r : 0x7fc0);
}
SEMIDETR_INLINE void put(float* p, float v) { *p = v; }
SEMIDETR_INLINE void put(double* p, double v) { *p = v; }
SEMIDETR_INLINE void put(uint16_t* p, float v) { *p = to_bfloat16(v); }
SEMIDETR_INLINE float get(const float* p) { return *p; }
SEMIDETR_INLINE double get(const double* p) { return *p; }
SEMIDETR_INLINE float get(const uint16_t* p) { return bits_to_float(uint32_t(*p) << 16); }

// exp(x) for x <= 0, to about one unit in the last place; 0 below -87. No calls, no branches: the loops around it become vectors.
SEMIDETR_INLINE float exp_(float x) {
  float y = x > -87.f ? x : -87.f;
  float k = y * 1.44269504088896341f - .5f;
  int32_t n = int32_t(k);                                                  // k <= 0: towards zero is rounding to nearest of y*log2(e)
  float f = float(n), r = fma_(f, -.693359375f, y);
  r = fma_(f, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = fma_(p, r, 1.3981999507e-3f); p = fma_(p, r, 8.3334519073e-3f); p = fma_(p, r, 4.1665795894e-2f);
  p = fma_(p, r, 1.6666665459e-1f); p = fma_(p, r, 5.0000001201e-1f);
  p = fma_(p * r, r, r) + 1.f;
  p *= bits_to_float(uint32_t(n + 127) << 23);
  return x > -87.f ? p : (x == x ? 0.f : x);
}
SEMIDETR_INLINE double exp_(double x) { return __builtin_exp(x); }

// ---- one query's points -------------------------------------------------------------------------------------------------
constexpr int PB = 16;                        // points in a block
constexpr int kMaxBlocks = kMaxPoints / PB;

template <class A> struct alignas(64) Block {
  A W[PB], H[PB];                             // of the task: size of the point's level (-2 = no such point),
  int32_t w[PB], h[PB], base[PB], row[PB];    // the same as integers; where the level starts; what one step in y adds
  int32_t level[PB];                          // its number among the task's levels, times ref_dim
  A cx[PB], cy[PB], dx[PB], dy[PB], a[PB];    // of the query: centre in [0,1], displacement in pixels, attention
  A sx[PB], sy[PB], ox[PB], oy[PB];           // fused form with boxes: pixels per unit of offset, raw offsets
  A fx[PB], fy[PB], ain[PB];                  // fractions; attention, or 0 outside the map
  A wt[4][PB], d[4][PB];                      // weight of each tap; dot product of the output's gradient with its row
  A gx[PB], gy[PB], ga[PB];                   // gradients with respect to the pixel and to the attention
  int32_t at[4][PB];                          // packed: at[0] is the upper left tap's offset; else each tap's row or -1
  int32_t in[PB];
};

template <class A> struct Task {
  const Problem& p;
  int64_t b, m;
  int l0, l1, first, n, blocks;               // levels [l0,l1), first point, number of points, of blocks
  int64_t Dp;                                 // channels of a packed row
  Block<A>* block;
};

template <class A> SEMIDETR_INLINE int64_t padded_channels(const Problem& p) { constexpr int N = Lanes<A>::n; return (p.D + N - 1) / N * N; }
SEMIDETR_INLINE int64_t framed_rows(const Problem& p, int l) { return int64_t(p.h[l] + 2) * (p.w[l] + 1) + 1; }

template <class A, bool FRAMED> void describe(Task<A>& t) {
  const Problem& p = t.p;
  t.first = int(t.l0 * p.P); t.n = int((t.l1 - t.l0) * p.P); t.blocks = (t.n + PB - 1) / PB;
  int64_t start[kMaxLevels], s = 0;
  for (int l = t.l0; l < t.l1; l++) { start[l] = s; s += framed_rows(p, l); }
  for (int i = 0; i < t.blocks * PB; i++) {
    Block<A>& k = t.block[i / PB]; int j = i % PB, l = t.l0 + i / int(p.P);
    bool real = i < t.n;
    k.w[j] = real ? p.w[l] : -2; k.h[j] = real ? p.h[l] : -2;
    k.W[j] = A(k.w[j]); k.H[j] = A(k.h[j]);
    k.row[j] = !real ? 0 : FRAMED ? int32_t((p.w[l] + 1) * t.Dp) : p.w[l];
    k.base[j] = !real ? 0 : FRAMED ? int32_t((start[l] + p.w[l] + 2) * t.Dp) : p.start[l];
    k.level[j] = real ? int32_t((l - t.l0) * p.ref_dim) : 0;
    k.cx[j] = k.cy[j] = k.dx[j] = k.dy[j] = k.a[j] = k.sx[j] = k.sy[j] = k.ox[j] = k.oy[j] = 0;
  }
}

template <class A, bool FRAMED, bool PLAIN> SEMIDETR_INLINE void locate(Block<A>& k, int32_t Dp) {
  for (int i = 0; i < PB; i++) {
    A dx = PLAIN ? A(0) : k.dx[i], dy = PLAIN ? A(0) : k.dy[i];
    A x = fma_(k.cx[i], k.W[i], dx - A(.5)), y = fma_(k.cy[i], k.H[i], dy - A(.5));
    bool in = (x > A(-1)) & (x < k.W[i]) & (y > A(-1)) & (y < k.H[i]);     // false for NaN
    x = in ? x : A(0); y = in ? y : A(0);
    int32_t xi = int32_t(x), yi = int32_t(y);
    xi -= A(xi) > x; yi -= A(yi) > y;                                      // floor
    // the fraction from the exact product: a float location in a wide map keeps its last bits
    A fx = fma_(k.cx[i], k.W[i], -(A(xi) + A(.5))) + dx, fy = fma_(k.cy[i], k.H[i], -(A(yi) + A(.5))) + dy;
    fx = in ? fx : A(0); fy = in ? fy : A(0);
    A a = in ? k.a[i] : A(0);
    k.fx[i] = fx; k.fy[i] = fy; k.ain[i] = a; k.in[i] = in;
    A top = a * (A(1) - fy), low = a * fy;
    k.wt[0][i] = top * (A(1) - fx); k.wt[1][i] = top * fx; k.wt[2][i] = low * (A(1) - fx); k.wt[3][i] = low * fx;
    if (FRAMED) k.at[0][i] = k.base[i] + yi * k.row[i] + xi * Dp;
    else {
      int32_t r = k.base[i] + yi * k.w[i] + xi;
      bool x0 = in & (xi >= 0), x1 = in & (xi + 1 < k.w[i]), y0 = yi >= 0, y1 = yi + 1 < k.h[i];
      k.at[0][i] = x0 & y0 ? r : -1; k.at[1][i] = x1 & y0 ? r + 1 : -1;
      k.at[2][i] = x0 & y1 ? r + k.w[i] : -1; k.at[3][i] = x1 & y1 ? r + k.w[i] + 1 : -1;
    }
  }
}

// Sixteen rows of `width` numbers starting at point `first`; a short last block is copied, so that nothing behind the tensor is read.
template <class A, class T> SEMIDETR_INLINE const A* rows(const T* src, int width, int have, A* spare) {
  int n = have * width;
  for (int i = 0; i < n; i++) spare[i] = get(src + i);
  for (int i = n; i < PB * width; i++) spare[i] = 0;
  return spare;
}
template <class A> SEMIDETR_INLINE const A* whole_rows(const A* src, int width, int have, A* spare) { return have >= PB ? src : rows(src, width, have, spare); }
template <class A> SEMIDETR_INLINE const A* whole_rows(const uint16_t* src, int width, int have, A* spare) {
  if (have < PB) return rows(src, width, have, spare);
  for (int i = 0; i < PB * width; i++) spare[i] = get(src + i);
  return spare;
}

// Softmax over the logits of one head. Not inlined: the same instructions, hence the same bits, wherever it is called.
template <class A, class T> SEMIDETR_NOINLINE void softmax(const T* logit, int n, A* prob) {
  int nb = (n + PB - 1) / PB * PB;
  for (int i = 0; i < n; i++) prob[i] = get(logit + i);
  for (int i = n; i < nb; i++) prob[i] = A(-INFINITY);
  A top[PB];
  for (int i = 0; i < PB; i++) top[i] = prob[i];
  for (int k = PB; k < nb; k += PB) for (int i = 0; i < PB; i++) top[i] = prob[k + i] > top[i] ? prob[k + i] : top[i];
  for (int i = 0; i < 8; i++) top[i] = top[i + 8] > top[i] ? top[i + 8] : top[i];
  for (int i = 0; i < 4; i++) top[i] = top[i + 4] > top[i] ? top[i + 4] : top[i];
  for (int i = 0; i < 2; i++) top[i] = top[i + 2] > top[i] ? top[i + 2] : top[i];
  A m = top[1] > top[0] ? top[1] : top[0];
  A sum[PB] = {};
  for (int k = 0; k < nb; k += PB) for (int i = 0; i < PB; i++) { A e = exp_(prob[k + i] - m); prob[k + i] = e; sum[i] += e; }
  for (int i = 0; i < 8; i++) sum[i] += sum[i + 8];
  for (int i = 0; i < 4; i++) sum[i] += sum[i + 4];
  for (int i = 0; i < 2; i++) sum[i] += sum[i + 2];
  A scale = A(1) / (sum[0] + sum[1]);
  for (int i = 0; i < nb; i++) prob[i] *= scale;
}
// Its gradient: prob * (grad - sum(prob * grad)); prob and grad are padded with zeros to whole blocks.
template <class A> SEMIDETR_NOINLINE void softmax_grad(const A* prob, const A* grad, int n, A* out) {
  int nb = (n + PB - 1) / PB * PB;
  A sum[PB] = {};
  for (int k = 0; k < nb; k += PB) for (int i = 0; i < PB; i++) sum[i] = fma_(prob[k + i], grad[k + i], sum[i]);
  for (int i = 0; i < 8; i++) sum[i] += sum[i + 8];
  for (int i = 0; i < 4; i++) sum[i] += sum[i + 4];
  for (int i = 0; i < 2; i++) sum[i] += sum[i + 2];
  A s = sum[0] + sum[1];
  for (int i = 0; i < nb; i++) out[i] = prob[i] * (grad[i] - s);
}

// dst[i] = src[level of point i]
template <class A> SEMIDETR_INLINE void spread(const A* src, const int32_t* level, bool fours, A* SEMIDETR_RESTRICT dst) {
  if (fours) for (int i = 0; i < PB; i += 4) { A v = src[level[i]]; for (int j = 0; j < 4; j++) dst[i + j] = v; }
  else for (int i = 0; i < PB; i++) dst[i] = src[level[i]];
}

template <class A> struct Query { alignas(64) A prob[kMaxPoints], grad[kMaxPoints], spare[2 * PB]; };

template <class A, bool FRAMED> SEMIDETR_INLINE void points_plain(Task<A>& t, Query<A>& qs, int64_t q) {
  const Problem& p = t.p;
  int64_t at = ((t.b * p.Q + q) * p.M + t.m) * p.L * p.P + t.first;
  for (int k = 0; k < t.blocks; k++) {
    Block<A>& block = t.block[k];
    int have = t.n - k * PB;
    const A* xy = whole_rows((const A*)p.loc + 2 * (at + k * PB), 2, have, qs.spare);
    for (int i = 0; i < PB; i++) { block.cx[i] = xy[2 * i]; block.cy[i] = xy[2 * i + 1]; }
    const A* a = whole_rows((const A*)p.weight + at + k * PB, 1, have, qs.spare);
    for (int i = 0; i < PB; i++) block.a[i] = a[i];
    locate<A, FRAMED, true>(block, int32_t(t.Dp));
  }
}

template <class A, class R, bool FRAMED> SEMIDETR_INLINE void points_fused(Task<A>& t, Query<A>& qs, int64_t q) {
  const Problem& p = t.p;
  int64_t N = p.L * p.P, head = ((t.b * p.Q + q) * p.M + t.m) * N;
  const A* ref = (const A*)p.ref + ((t.b * p.Q + q) * p.L + t.l0) * p.ref_dim;
  softmax((const R*)p.logit + head, int(N), qs.prob);
  bool fours = p.P % 4 == 0;
  for (int k = 0; k < t.blocks; k++) {
    Block<A>& block = t.block[k];
    int have = t.n - k * PB;
    spread(ref, block.level, fours, block.cx); spread(ref + 1, block.level, fours, block.cy);
    const A* xy = whole_rows((const R*)p.off + 2 * (head + t.first + k * PB), 2, have, qs.spare);
    if (p.ref_dim == 2) for (int i = 0; i < PB; i++) { block.dx[i] = xy[2 * i]; block.dy[i] = xy[2 * i + 1]; }
    else {
      A half = A(.5) / A(p.P);
      spread(ref + 2, block.level, fours, block.sx); spread(ref + 3, block.level, fours, block.sy);
      for (int i = 0; i < PB; i++) {
        A sx = block.sx[i] * half * block.W[i], sy = block.sy[i] * half * block.H[i];
        A ox = xy[2 * i], oy = xy[2 * i + 1];
        block.sx[i] = sx; block.sy[i] = sy; block.ox[i] = ox; block.oy[i] = oy;
        block.dx[i] = ox * sx; block.dy[i] = oy * sy;
      }
    }
    if (have >= PB) for (int i = 0; i < PB; i++) block.a[i] = qs.prob[t.first + k * PB + i];
    else for (int i = 0; i < have; i++) block.a[i] = qs.prob[t.first + k * PB + i];
    locate<A, FRAMED, false>(block, int32_t(t.Dp));
  }
}

template <class A> void mask_rows(Task<A>& t) {                            // padded pixels of an unpacked map read as zero
  const uint8_t* mask = t.p.mask + t.b * t.p.S;
  for (int i = 0; i < t.n; i++) for (int c = 0; c < 4; c++) {
    int32_t& r = t.block[i / PB].at[c][i % PB];
    if (r >= 0 && mask[r]) r = -1;
  }
}

template <class A, bool FRAMED> SEMIDETR_INLINE void points(Task<A>& t, Query<A>& qs, int64_t q) {
  if (!t.p.ref_dim) points_plain<A, FRAMED>(t, qs, q);
  else if (t.p.raw == kBFloat16) points_fused<A, uint16_t, FRAMED>(t, qs, q);
  else points_fused<A, A, FRAMED>(t, qs, q);
  if (!FRAMED && t.p.mask) mask_rows(t);
}

// ---- channels -----------------------------------------------------------------------------------------------------------
// Rows of the four taps of point i. `step` is the distance of neighbours in x.
template <class A, class T, bool FRAMED> SEMIDETR_INLINE void taps(const Block<A>& k, int i, T* v, int64_t step, T* outside, T** r) {
  if (FRAMED) { r[0] = v + k.at[0][i]; r[1] = r[0] + step; r[2] = r[0] + k.row[i]; r[3] = r[2] + step; }
  else for (int c = 0; c < 4; c++) { int32_t at = k.at[c][i]; r[c] = at < 0 ? outside : v + at * step; }
}

template <class A, class T, bool FRAMED, int NV>
SEMIDETR_INLINE void gather_channels(const Task<A>& t, const T* v, int64_t step, const T* zeros, A* out) {
  constexpr int N = Lanes<A>::n, NA = NV >= 4 ? 2 : 4;
  Vec<A> acc[NA][NV] = {};
  for (int k = 0; k < t.blocks; k++) {
    const Block<A>& block = t.block[k];
    int n = t.n - k * PB < PB ? t.n - k * PB : PB;
    for (int i = 0; i < n; i++) {
      const T* r[4];
      taps<A, const T, FRAMED>(block, i, v, step, zeros, r);
      for (int c = 0; c < 4; c++) {
        A w = block.wt[c][i];
        for (int j = 0; j < NV; j++) acc[c % NA][j] += w * load<A>(r[c] + j * N);
      }
    }
  }
  for (int j = 0; j < NV; j++) store(out + j * N, NA == 2 ? acc[0][j] + acc[1][j] : (acc[0][j] + acc[1][j]) + (acc[NA - 2][j] + acc[NA - 1][j]));
}

template <class A, class T, bool FRAMED> SEMIDETR_INLINE void gather(const Task<A>& t, const T* v, int64_t step, const T* zeros, A* out) {
  constexpr int N = Lanes<A>::n;
  int64_t c = 0, D = t.Dp;
  for (; c + 4 * N <= D; c += 4 * N) gather_channels<A, T, FRAMED, 4>(t, v + c, step, zeros, out + c);
  if (c + 2 * N <= D) { gather_channels<A, T, FRAMED, 2>(t, v + c, step, zeros, out + c); c += 2 * N; }
  if (c + N <= D) gather_channels<A, T, FRAMED, 1>(t, v + c, step, zeros, out + c);
}

// Adds weight * grad to the gradient's rows, and leaves in block.d the dot products of grad with the value's rows.
template <class A, class T, bool FRAMED, int NV>
SEMIDETR_INLINE void scatter_channels(Task<A>& t, const T* v, int64_t step, const T* zeros, A* g, int64_t gstep, A* trash, const A* grad, bool add) {
  constexpr int N = Lanes<A>::n, G = N >= 4 ? N / 4 : 1;                   // points whose dot products fill one vector
  Vec<A> go[NV];
  for (int j = 0; j < NV; j++) go[j] = load<A>(grad + j * N);
  for (int k = 0; k < t.blocks; k++) {
    Block<A>& block = t.block[k];
    int n = t.n - k * PB < PB ? t.n - k * PB : PB;
    for (int i = 0; i < n; i += G) {
      Vec<A> x[4 * G];
      for (int u = 0; u < G; u++) {
        const T* r[4]; A* s[4];
        taps<A, const T, FRAMED>(block, i + u, v, step, zeros, r);
        taps<A, A, FRAMED>(block, i + u, g, gstep, trash, s);
        for (int c = 0; c < 4; c++) {
          Vec<A> dot = go[0] * load<A>(r[c]);
          for (int j = 1; j < NV; j++) dot += go[j] * load<A>(r[c] + j * N);
          x[c * G + u] = dot;
          A w = block.wt[c][i + u];
          for (int j = 0; j < NV; j++) store(s[c] + j * N, load<A>(s[c] + j * N) + w * go[j]);
        }
      }
#if SEMIDETR_VW > 1
      if (N >= 4) {
        Tree<A, N>::sum(x);
        A y[N]; store(y, x[0]);
        for (int c = 0; c < 4; c++) for (int u = 0; u < G; u++) block.d[c][i + u] = add ? block.d[c][i + u] + y[c * G + u] : y[c * G + u];
      } else
        for (int c = 0; c < 4; c++) { A y = x[c][0]; for (int j = 1; j < N; j++) y += x[c][j]; block.d[c][i] = add ? block.d[c][i] + y : y; }
#else
      for (int c = 0; c < 4; c++) block.d[c][i] = add ? block.d[c][i] + x[c] : x[c];
#endif
    }
  }
}

template <class A, class T, bool FRAMED>
SEMIDETR_INLINE void scatter(Task<A>& t, const T* v, int64_t step, const T* zeros, A* g, int64_t gstep, A* trash, const A* grad) {
  constexpr int N = Lanes<A>::n;
  int64_t c = 0, D = t.Dp;
  for (; c + 4 * N <= D; c += 4 * N) scatter_channels<A, T, FRAMED, 4>(t, v + c, step, zeros, g + c, gstep, trash, grad + c, c > 0);
  if (c + 2 * N <= D) { scatter_channels<A, T, FRAMED, 2>(t, v + c, step, zeros, g + c, gstep, trash, grad + c, c > 0); c += 2 * N; }
  if (c + N <= D) scatter_channels<A, T, FRAMED, 1>(t, v + c, step, zeros, g + c, gstep, trash, grad + c, c > 0);
  for (int k = 0; k < t.blocks; k++) {
    Block<A>& b = t.block[k];
    for (int i = 0; i < PB; i++) {
      A fx = b.fx[i], fy = b.fy[i], d0 = b.d[0][i], d1 = b.d[1][i], d2 = b.d[2][i], d3 = b.d[3][i];
      bool in = b.in[i];
      A top = fma_(fx, d1 - d0, d0), low = fma_(fx, d3 - d2, d2);
      A gx = b.ain[i] * fma_(fy, (d3 - d2) - (d1 - d0), d1 - d0), gy = b.ain[i] * (low - top);
      b.ga[i] = in ? fma_(fy, low - top, top) : A(0); b.gx[i] = in ? gx : A(0); b.gy[i] = in ? gy : A(0);
    }
  }
}

// ---- packing ------------------------------------------------------------------------------------------------------------
template <class A> SEMIDETR_INLINE void clear(A* p, int64_t n) { for (int64_t i = 0; i < n; i++) p[i] = 0; }
template <class A, class T> SEMIDETR_INLINE void copy_row(const T* src, int64_t D, int64_t Dp, A* dst) {
  constexpr int N = Lanes<A>::n;
  int64_t c = 0;
  for (; c + N <= D; c += N) store(dst + c, load<A>(src + c));
  for (; c < D; c++) dst[c] = get(src + c);
  for (; c < Dp; c++) dst[c] = 0;
}
SEMIDETR_INLINE void write_row(const float* src, int64_t D, float* dst) {
  constexpr int N = Lanes<float>::n;
  int64_t c = 0;
  for (; c + N <= D; c += N) store(dst + c, load<float>(src + c));
  for (; c < D; c++) dst[c] = src[c];
}
SEMIDETR_INLINE void write_row(const double* src, int64_t D, double* dst) { for (int64_t c = 0; c < D; c++) dst[c] = src[c]; }
SEMIDETR_INLINE void write_row(const float* src, int64_t D, uint16_t* dst) { for (int64_t c = 0; c < D; c++) dst[c] = to_bfloat16(src[c]); }

template <class A, class T> void pack(const Task<A>& t, A* dst) {
  const Problem& p = t.p;
  int64_t step = p.M * p.D, Dp = t.Dp;
  for (int l = t.l0; l < t.l1; l++) {
    const T* v = (const T*)p.value + ((t.b * p.S + p.start[l]) * p.M + t.m) * p.D;
    const uint8_t* mask = p.mask ? p.mask + t.b * p.S + p.start[l] : nullptr;
    int64_t w = p.w[l], h = p.h[l];
    clear(dst, (w + 2) * Dp); dst += (w + 2) * Dp;                         // row -1 and the first pixel of row 0
    for (int64_t y = 0; y < h; y++) {
      for (int64_t x = 0; x < w; x++, dst += Dp, v += step)
        if (mask && mask[y * w + x]) clear(dst, Dp); else { copy_row(v, p.D, Dp, dst); SEMIDETR_PREFETCH(v + 16 * step); }
      clear(dst, Dp); dst += Dp;
    }
    clear(dst, (w + 1) * Dp); dst += (w + 1) * Dp;                         // row h
  }
}

template <class A, class T> void unpack(const Task<A>& t, const A* src) {
  const Problem& p = t.p;
  int64_t step = p.M * p.D, Dp = t.Dp;
  for (int l = t.l0; l < t.l1; l++) {
    T* g = (T*)p.grad_value + ((t.b * p.S + p.start[l]) * p.M + t.m) * p.D;
    const uint8_t* mask = p.mask ? p.mask + t.b * p.S + p.start[l] : nullptr;
    int64_t w = p.w[l], h = p.h[l];
    src += (w + 2) * Dp;
    for (int64_t y = 0; y < h; y++, src += Dp)
      for (int64_t x = 0; x < w; x++, src += Dp, g += step)
        if (mask && mask[y * w + x]) for (int64_t c = 0; c < p.D; c++) put(g + c, A(0)); else write_row(src, p.D, g);
    src += (w + 1) * Dp;
  }
}

template <class A> int64_t packed_size(const Problem& p, int l0, int l1) {
  int64_t n = 0;
  for (int l = l0; l < l1; l++) n += framed_rows(p, l);
  return (n * padded_channels<A>(p) + 15) / 16 * 16;
}

// Packing costs about as much per pixel as a few taps; rows shorter than a vector can only be read from a packed map.
template <class A> SEMIDETR_INLINE bool framed(const Problem& p, bool backward) {
  return p.D % Lanes<A>::n || p.Q * p.L * p.P * 4 > (backward ? 2 : 6) * p.S;
}

// ---- tasks --------------------------------------------------------------------------------------------------------------
constexpr int kAhead = 4;                                                  // queries to prefetch: their rows are M apart
template <class A> SEMIDETR_INLINE void prefetch(const Task<A>& t, int64_t q, const char* grad, int64_t size) {
  const Problem& p = t.p;
  int64_t head = (t.b * p.Q + q + kAhead) * p.M + t.m, at = head * p.L * p.P + t.first;
  int64_t r = p.ref_dim ? (p.raw == kBFloat16 ? 2 : int64_t(sizeof(A))) : int64_t(sizeof(A));
  const char* xy = (const char*)(p.ref_dim ? p.off : p.loc) + at * 2 * r;
  for (int64_t i = 0; i < t.n * 2 * r; i += 64) SEMIDETR_PREFETCH(xy + i);
  const char* a = (const char*)(p.ref_dim ? p.logit : p.weight) + at * r;
  for (int64_t i = 0; i < t.n * r; i += 64) SEMIDETR_PREFETCH(a + i);
  if (grad) for (int64_t i = 0; i < p.D * size; i += 64) SEMIDETR_PREFETCH(grad + head * p.D * size + i);
}

template <class A, class T, bool FRAMED> void forward_queries(Task<A>& t, int64_t q0, int64_t q1, const void* value, int64_t step, const A* zeros) {
  typedef typename Lanes<A>::V* Unused; (void)sizeof(Unused);
  const Problem& p = t.p;
  Query<A> qs;
  alignas(64) A spare[1024];
  (void)spare; (void)q0; (void)q1; (void)value; (void)step; (void)zeros; (void)qs;
}

}  // namespace
}  // namespace SEMIDETR_ISA
}  // namespace semidetr
