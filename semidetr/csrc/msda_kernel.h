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
#include <math.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "msda.h"

namespace semidetr {
namespace SEMIDETR_ISA {
namespace {

template <class A> struct IntegerOf;
template <> struct IntegerOf<float> { typedef int32_t type; };
template <> struct IntegerOf<double> { typedef int64_t type; };
template <class A> using integer_of = typename IntegerOf<A>::type;
template <class A> struct HalfOf { typedef A type; };
template <> struct HalfOf<float> { typedef uint16_t type; };               // bfloat16 goes with float only
template <class A> using half_of = typename HalfOf<A>::type;

// ---- vectors ------------------------------------------------------------------------------------------------------------
#if SEMIDETR_VW > 1
#define SEMIDETR_INLINE inline __attribute__((always_inline))
#define SEMIDETR_NOINLINE __attribute__((noinline))
#define SEMIDETR_PREFETCH(p) __builtin_prefetch(p, 0, 2)           // into the second cache: rows that lie M apart share few sets of the first
#define SEMIDETR_PREFETCH_WRITE(p) __builtin_prefetch(p, 1, 2)
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
template <class A> using Int = typename Lanes<A>::I;                       // as wide as A; a comparison gives -1 or 0

template <class A> SEMIDETR_INLINE Vec<A> load(const A* p) { Vec<A> v; __builtin_memcpy(&v, p, sizeof v); return v; }
template <class A> SEMIDETR_INLINE void store(A* p, Vec<A> v) { __builtin_memcpy(p, &v, sizeof v); }
template <class A> SEMIDETR_INLINE Vec<A> load(const uint16_t* p) {   // bfloat16 -> float
  typename Lanes<float>::H h; __builtin_memcpy(&h, p, sizeof h);
  return (Vec<float>)(__builtin_convertvector(h, typename Lanes<float>::U) << 16);
}

template <class A> SEMIDETR_INLINE void store(integer_of<A>* p, Int<A> v) { __builtin_memcpy(p, &v, sizeof v); }
template <class A> SEMIDETR_INLINE Int<A> load(const integer_of<A>* p) { Int<A> v; __builtin_memcpy(&v, p, sizeof v); return v; }
template <class A> SEMIDETR_INLINE Vec<A> all(A a) { return a - Vec<A>{}; }
template <class A> SEMIDETR_INLINE Int<A> to_int(Vec<A> v) { return __builtin_convertvector(v, Int<A>); }
template <class A> SEMIDETR_INLINE Vec<A> to_real(Int<A> v) { return __builtin_convertvector(v, Vec<A>); }
SEMIDETR_INLINE Vec<float> power_of_two(Int<float> n) { return (Vec<float>)((n + 127) << 23); }
template <class A> SEMIDETR_INLINE Vec<A> floor_generic(Vec<A> v) { Vec<A> f = to_real<A>(to_int<A>(v)); return f > v ? f - A(1) : f; }
// `madd` is one multiplication and addition with one rounding where the CPU has it; left to the compiler that is not certain.
// `stream` writes past the caches to a place that is as aligned as a vector; `settle` makes such writes visible to other threads.
#if defined(__AVX512F__)
SEMIDETR_INLINE void stream(float* p, Vec<float> v) { _mm512_stream_ps(p, (__m512)v); }
SEMIDETR_INLINE void stream(double* p, Vec<double> v) { _mm512_stream_pd(p, (__m512d)v); }
SEMIDETR_INLINE void settle() { _mm_sfence(); }
constexpr bool kStreams = true;
SEMIDETR_INLINE Vec<float> floor_(Vec<float> v) { return (Vec<float>)_mm512_mask_roundscale_ps((__m512)v, 0xffff, (__m512)v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
SEMIDETR_INLINE Vec<double> floor_(Vec<double> v) { return (Vec<double>)_mm512_mask_roundscale_pd((__m512d)v, 0xff, (__m512d)v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
SEMIDETR_INLINE Vec<float> madd(Vec<float> a, Vec<float> b, Vec<float> c) { return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
SEMIDETR_INLINE Vec<double> madd(Vec<double> a, Vec<double> b, Vec<double> c) { return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
#elif defined(__AVX2__)
SEMIDETR_INLINE void stream(float* p, Vec<float> v) { _mm256_stream_ps(p, (__m256)v); }
SEMIDETR_INLINE void stream(double* p, Vec<double> v) { _mm256_stream_pd(p, (__m256d)v); }
SEMIDETR_INLINE void settle() { _mm_sfence(); }
constexpr bool kStreams = true;
SEMIDETR_INLINE Vec<float> floor_(Vec<float> v) { return (Vec<float>)_mm256_floor_ps((__m256)v); }
SEMIDETR_INLINE Vec<double> floor_(Vec<double> v) { return (Vec<double>)_mm256_floor_pd((__m256d)v); }
SEMIDETR_INLINE Vec<float> madd(Vec<float> a, Vec<float> b, Vec<float> c) { return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
SEMIDETR_INLINE Vec<double> madd(Vec<double> a, Vec<double> b, Vec<double> c) { return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
#else
template <class A> SEMIDETR_INLINE void stream(A* p, Vec<A> v) { store(p, v); }
SEMIDETR_INLINE void settle() {}
constexpr bool kStreams = false;
SEMIDETR_INLINE Vec<float> floor_(Vec<float> v) { return floor_generic<float>(v); }
SEMIDETR_INLINE Vec<double> floor_(Vec<double> v) { return floor_generic<double>(v); }
SEMIDETR_INLINE Vec<float> madd(Vec<float> a, Vec<float> b, Vec<float> c) { return a * b + c; }
SEMIDETR_INLINE Vec<double> madd(Vec<double> a, Vec<double> b, Vec<double> c) { return a * b + c; }
#endif

template <int... I> struct Seq {};
template <int N, int... I> struct Count : Count<N - 1, N - 1, I...> {};
template <int... I> struct Count<0, I...> { typedef Seq<I...> type; };
#if defined(__clang__) || __GNUC__ >= 12
#define SEMIDETR_SHUFFLE(A, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SEMIDETR_SHUFFLE(A, a, b, ...) __builtin_shuffle(a, b, Int<A>{__VA_ARGS__})
#endif
template <class A, int... I> SEMIDETR_INLINE Vec<A> evens(Vec<A> a, Vec<A> b, Seq<I...>) { return SEMIDETR_SHUFFLE(A, a, b, 2 * I...); }
template <class A, int... I> SEMIDETR_INLINE Vec<A> odds(Vec<A> a, Vec<A> b, Seq<I...>) { return SEMIDETR_SHUFFLE(A, a, b, (2 * I + 1)...); }
template <class A, int F, int... I> SEMIDETR_INLINE Vec<A> zip(Vec<A> a, Vec<A> b, Seq<I...>) {
  constexpr int N = Lanes<A>::n;
  return SEMIDETR_SHUFFLE(A, a, b, ((F + I) / 2 + (I & 1) * N)...);
}
template <class A, int H, int... I> SEMIDETR_INLINE Vec<A> swapped(Vec<A> a, Seq<I...>) { return SEMIDETR_SHUFFLE(A, a, a, (I ^ H)...); }
template <class A> SEMIDETR_INLINE void unzip(const A* p, Vec<A>& x, Vec<A>& y) {
  typedef typename Count<Lanes<A>::n>::type S;
  Vec<A> a = load(p), b = load(p + Lanes<A>::n);
  x = evens<A>(a, b, S()); y = odds<A>(a, b, S());
}
template <class A> SEMIDETR_INLINE void zip(Vec<A> x, Vec<A> y, A* p) {
  typedef typename Count<Lanes<A>::n>::type S;
  store(p, zip<A, 0>(x, y, S())); store(p + Lanes<A>::n, zip<A, Lanes<A>::n>(x, y, S()));
}
template <class A, int H> struct Across {
  typedef typename Count<Lanes<A>::n>::type S;
  static SEMIDETR_INLINE Vec<A> sum(Vec<A> v) { return Across<A, H / 2>::sum(v + swapped<A, H>(v, S())); }
  static SEMIDETR_INLINE Vec<A> max(Vec<A> v) { Vec<A> w = swapped<A, H>(v, S()); return Across<A, H / 2>::max(w > v ? w : v); }
};
template <class A> struct Across<A, 0> { static SEMIDETR_INLINE Vec<A> sum(Vec<A> v) { return v; } static SEMIDETR_INLINE Vec<A> max(Vec<A> v) { return v; } };

// Step of a tree that sums each of N vectors and leaves sum i in lane i: segments of S lanes become segments of S/2, in turns from
// a and from b. Each lane gets its own number in a blend, and the one S/2 further or nearer in a shuffle.
template <int N, int S> constexpr int lane_of(int i, int from) { return (i / (S / 2) & 1) * N + from; }
template <class A, int S, int... I> SEMIDETR_INLINE Vec<A> fold(Vec<A> a, Vec<A> b, Seq<I...>) {
  constexpr int N = Lanes<A>::n;
  return SEMIDETR_SHUFFLE(A, a, b, lane_of<N, S>(I, I)...) + SEMIDETR_SHUFFLE(A, a, b, lane_of<N, S>(I, I ^ S / 2)...);
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
#define SEMIDETR_PREFETCH_WRITE(p) ((void)(p))
#define SEMIDETR_RESTRICT
template <class A> struct Lanes { static constexpr int n = 1; };
template <class A> using Vec = A;
template <class A> using Int = integer_of<A>;
template <class A> SEMIDETR_INLINE A load(const A* p) { return *p; }
template <class A> SEMIDETR_INLINE void store(A* p, A v) { *p = v; }
template <class A> SEMIDETR_INLINE void stream(A* p, A v) { *p = v; }
SEMIDETR_INLINE void settle() {}
constexpr bool kStreams = false;
template <class A> SEMIDETR_INLINE void store(integer_of<A>* p, integer_of<A> v) { *p = v; }
template <class A> SEMIDETR_INLINE integer_of<A> load(const integer_of<A>* p) { return *p; }
template <class A> SEMIDETR_INLINE A all(A a) { return a; }
template <class A> SEMIDETR_INLINE integer_of<A> to_int(A v) { return integer_of<A>(v); }
template <class A> SEMIDETR_INLINE A to_real(integer_of<A> v) { return A(v); }
SEMIDETR_INLINE float floor_(float v) { float f = float(int32_t(v)); return f > v ? f - 1.f : f; }
SEMIDETR_INLINE double floor_(double v) { double f = double(int64_t(v)); return f > v ? f - 1. : f; }
SEMIDETR_INLINE float madd(float a, float b, float c) { return a * b + c; }
SEMIDETR_INLINE double madd(double a, double b, double c) { return a * b + c; }
SEMIDETR_INLINE float power_of_two(int32_t n) { union { int32_t i; float f; } x; x.i = (n + 127) << 23; return x.f; }
template <class A> SEMIDETR_INLINE void unzip(const A* p, A& x, A& y) { x = p[0]; y = p[1]; }
template <class A> SEMIDETR_INLINE void zip(A x, A y, A* p) { p[0] = x; p[1] = y; }
template <class A, int H> struct Across { static SEMIDETR_INLINE A sum(A v) { return v; } static SEMIDETR_INLINE A max(A v) { return v; } };
template <class A> SEMIDETR_INLINE A load(const uint16_t* p) {
  union { uint32_t u; float f; } x; x.u = uint32_t(*p) << 16; return x.f;
}
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

// exp(x) for x <= 0, to about one unit in the last place; 0 below -87; NaN stays NaN.
SEMIDETR_INLINE Vec<float> exp_(Vec<float> x) {
  Vec<float> y = x > -87.f ? x : all(-87.f);
  Int<float> n = to_int<float>(y * 1.44269504088896341f - .5f);            // negative: towards zero is to the nearest of y*log2(e)
  Vec<float> f = to_real<float>(n), r = y - f * .693359375f;
  r = r + f * 2.12194440e-4f;
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f; p = p * r + 4.1665795894e-2f; p = p * r + 1.6666665459e-1f; p = p * r + 5.0000001201e-1f;
  p = ((p * r) * r + r + 1.f) * power_of_two(n);
  return x > -87.f ? p : (x == x ? all(0.f) : x);
}
#if SEMIDETR_VW > 1
SEMIDETR_INLINE Vec<double> exp_(Vec<double> x) { for (int i = 0; i < Lanes<double>::n; i++) x[i] = exp(x[i]); return x; }
#else
SEMIDETR_INLINE double exp_(double x) { return exp(x); }
#endif

// ---- one query's points -------------------------------------------------------------------------------------------------
constexpr int PB = 16;                        // points in a block
constexpr int kMaxBlocks = kMaxPoints / PB;

template <class A> struct alignas(64) Maps {   // of the task: the map that each of sixteen points lies on
  typedef integer_of<A> I;
  A W[PB], H[PB], Wmax[PB], Hmax[PB];         // its size, and the largest number below
  A w1[PB], base[PB];                         // rows of the value in one step of y, number of the map's pixel (0,0)
  I row[PB], level[PB];                       // one step of y in the value's numbers; the level times ref_dim
};

template <class A> struct alignas(64) Block {  // of the query
  typedef integer_of<A> I;
  I at[4][PB];                                // packed: at[0] is the upper left tap's offset; else each tap's row or -1
  A wt[4][PB], d[4][PB];                      // weight of each tap; dot product of the output's gradient with its row
  A fx[PB], fy[PB], ax[PB], ay[PB];           // fractions; attention, or 0 where a step in x or y changes nothing
  A sx[PB], sy[PB], ox[PB], oy[PB];           // fused with boxes: pixels per unit of offset, raw offsets
  A gx[PB], gy[PB];                           // fused with gradients of the reference: gradients with respect to the pixel
};

// All points of one query and, in the fused form, its softmax and that one's gradient.
template <class A> struct alignas(64) Query {
  Block<A> block[kMaxBlocks];
  A prob[kMaxPoints], grad[kMaxPoints];
  char apart[1536];                           // the same place of two queries must not fall on the same lines of the first cache
};

constexpr int kBatch = 4;                     // queries
constexpr int kAhead = 8;                     // queries: as far ahead are inputs and results prefetched,
constexpr int kPixelsAhead = 32;              // and so many pixels ahead the value that is packed
constexpr int kLine = 64;                     // bytes of a cache line

template <class A> struct Task {
  const Problem& p;
  int64_t b, m;
  int l0, l1, first, n, blocks;               // levels [l0,l1), first point, number of points, of blocks
  int64_t Dp;                                 // channels of a packed row
  Maps<A> maps[kMaxBlocks];
  Query<A> query[kBatch];                     // several at a time: the steps of one hide the latency of another's
};

template <class A> SEMIDETR_INLINE int64_t padded_channels(const Problem& p) { constexpr int N = Lanes<A>::n; return (p.D + N - 1) / N * N; }
SEMIDETR_INLINE int64_t framed_rows(const Problem& p, int l) { return int64_t(p.h[l] + 2) * (p.w[l] + 1) + 1; }

SEMIDETR_INLINE float below(float x) { return nextafterf(x, 0.f); }
SEMIDETR_INLINE double below(double x) { return nextafter(x, 0.); }

template <class A, bool FRAMED> void describe(Task<A>& t) {
  const Problem& p = t.p;
  t.first = int(t.l0 * p.P); t.n = int((t.l1 - t.l0) * p.P); t.blocks = (t.n + PB - 1) / PB;
  int64_t start[kMaxLevels], s = 0;
  for (int l = t.l0; l < t.l1; l++) { start[l] = s; s += framed_rows(p, l); }
  for (int i = 0; i < t.blocks * PB; i++) {
    Maps<A>& k = t.maps[i / PB]; int j = i % PB, l = t.l0 + i / int(p.P);
    bool real = i < t.n;                      // the others lie on a map of one pixel, the task's first, with no attention
    k.W[j] = real ? A(p.w[l]) : A(1); k.H[j] = real ? A(p.h[l]) : A(1);
    k.Wmax[j] = below(k.W[j]); k.Hmax[j] = below(k.H[j]);
    k.w1[j] = real ? A(p.w[l] + FRAMED) : A(0);
    k.base[j] = !real ? A(FRAMED ? 1 : p.start[t.l0]) : FRAMED ? A(start[l] + p.w[l] + 2) : A(p.start[l]);
    k.row[j] = !real ? 0 : integer_of<A>(FRAMED ? (p.w[l] + 1) * t.Dp : p.w[l]);
    k.level[j] = real ? integer_of<A>((l - t.l0) * p.ref_dim) : 0;
  }
}

// Lanes j.. of a block: where the four taps are and what they weigh. A point outside the map (or NaN) is moved to the nearest
// place whose taps with a weight all lie on the frame: it adds nothing. Pixel numbers are computed as floats: exact below 2^24.
template <class A, bool FRAMED, bool GRAD>
SEMIDETR_INLINE void locate(const Maps<A>& m, Block<A>& k, int j, Vec<A> cx, Vec<A> cy, Vec<A> dx, Vec<A> dy, Vec<A> a, integer_of<A> Dp) {
  const Vec<A> W = load(m.W + j), H = load(m.H + j), Wmax = load(m.Wmax + j), Hmax = load(m.Hmax + j);
  const Vec<A> zero = all(A(0)), one = all(A(1)), low = all(A(-1));
  Vec<A> x = madd(cx, W, dx - A(.5)), y = madd(cy, H, dy - A(.5));
  Vec<A> xc = x > low ? x : low, yc = y > low ? y : low;                   // NaN becomes -1
  xc = xc < Wmax ? xc : Wmax; yc = yc < Hmax ? yc : Hmax;
  Vec<A> xf = floor_(xc), yf = floor_(yc);
  // The fraction from the exact product: in a map 160 pixels wide, a float pixel number would have lost five bits of it.
  Vec<A> fx = madd(cx, W, -A(.5) - xf) + dx, fy = madd(cy, H, -A(.5) - yf) + dy;
  fx = fx > zero ? fx : zero; fy = fy > zero ? fy : zero;
  fx = fx < one ? fx : one; fy = fy < one ? fy : one;
  Vec<A> row1 = a * fy, row0 = a - row1, w1 = row0 * fx, w3 = row1 * fx;
  store(k.wt[0] + j, row0 - w1); store(k.wt[1] + j, w1); store(k.wt[2] + j, row1 - w3); store(k.wt[3] + j, w3);
  if (GRAD) {
    store(k.fx + j, fx); store(k.fy + j, fy);
    store(k.ax + j, (x > low) & (x < W) ? a : zero); store(k.ay + j, (y > low) & (y < H) ? a : zero);
  }
  Int<A> r = to_int<A>(yf * load(m.w1 + j) + (xf + load(m.base + j)));
  if (FRAMED) store<A>(k.at[0] + j, r * Dp);
  else {
    Int<A> outside = -Int<A>{} - 1, w = load<A>(m.row + j);
    auto x0 = xf >= zero, x1 = xf + one < W, y0 = yf >= zero, y1 = yf + one < H;
    store<A>(k.at[0] + j, x0 & y0 ? r : outside); store<A>(k.at[1] + j, x1 & y0 ? r + 1 : outside);
    store<A>(k.at[2] + j, x0 & y1 ? r + w : outside); store<A>(k.at[3] + j, x1 & y1 ? r + w + 1 : outside);
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
  constexpr int N = Lanes<A>::n;
  int i = 0, nb = (n + PB - 1) / PB * PB;
  for (; i + N <= n; i += N) store(prob + i, load<A>(logit + i));
  for (; i < n; i++) prob[i] = get(logit + i);
  for (; i < nb; i++) prob[i] = A(-INFINITY);
  Vec<A> top = load(prob), sum = all(A(0));
  for (i = N; i < nb; i += N) { Vec<A> v = load(prob + i); top = v > top ? v : top; }
  top = Across<A, N / 2>::max(top);
  for (i = 0; i < nb; i += N) { Vec<A> e = exp_(load(prob + i) - top); store(prob + i, e); sum += e; }
  Vec<A> scale = A(1) / Across<A, N / 2>::sum(sum);
  for (i = 0; i < nb; i += N) store(prob + i, load(prob + i) * scale);
}
// Its gradient: prob * (grad - sum(prob * grad)); prob and grad are padded with zeros to whole blocks.
template <class A> SEMIDETR_NOINLINE void softmax_grad(const A* prob, const A* grad, int n, A* out) {
  constexpr int N = Lanes<A>::n;
  int nb = (n + PB - 1) / PB * PB;
  Vec<A> sum = all(A(0));
  for (int i = 0; i < nb; i += N) sum += load(prob + i) * load(grad + i);
  sum = Across<A, N / 2>::sum(sum);
  for (int i = 0; i < nb; i += N) store(out + i, load(prob + i) * (load(grad + i) - sum));
}

// src[level of each of the points j..]; `both` is a copy of the reference row, two vectors long, where it fits
template <class A> SEMIDETR_INLINE Vec<A> spread(const A* src, const A* both, const integer_of<A>* level, integer_of<A> add) {
#if SEMIDETR_VW > 1 && !defined(__clang__)
  if (both) return __builtin_shuffle(load(both), load(both + Lanes<A>::n), load<A>(level) + add);
#endif
#if SEMIDETR_VW > 1
  Vec<A> v;
  for (int i = 0; i < Lanes<A>::n; i++) v[i] = src[level[i] + add];
  return v;
#else
  return src[*level + add];
#endif
}

template <class A, bool FRAMED, bool GRAD> SEMIDETR_NOINLINE void points_plain(const Task<A>& t, Query<A>& qs, int64_t q) {
  constexpr int N = Lanes<A>::n;
  const Problem& p = t.p;
  int64_t at = ((t.b * p.Q + q) * p.M + t.m) * p.L * p.P + t.first;
  for (int k = 0; k < t.blocks; k++) {
    Block<A>& block = qs.block[k];
    int have = t.n - k * PB;
    alignas(64) A spare[3 * PB];
    const A* xy = whole_rows((const A*)p.loc + 2 * (at + k * PB), 2, have, spare);
    const A* a = whole_rows((const A*)p.weight + at + k * PB, 1, have, spare + 2 * PB);
    for (int j = 0; j < PB; j += N) {
      Vec<A> x, y, zero = all(A(0));
      unzip(xy + 2 * j, x, y);
      locate<A, FRAMED, GRAD>(t.maps[k], block, j, x, y, zero, zero, load(a + j), integer_of<A>(t.Dp));
    }
  }
}

template <class A, class R, bool FRAMED, bool GRAD> SEMIDETR_NOINLINE void points_fused(const Task<A>& t, Query<A>& qs, int64_t q) {
  constexpr int N = Lanes<A>::n;
  const Problem& p = t.p;
  int64_t head = ((t.b * p.Q + q) * p.M + t.m) * p.L * p.P, width = (t.l1 - t.l0) * p.ref_dim;
  const A* ref = (const A*)p.ref + ((t.b * p.Q + q) * p.L + t.l0) * p.ref_dim;
  alignas(64) A copy[2 * N];
  const A* both = width <= 2 * N ? ref : nullptr;
  if (both && ref + 2 * N > (const A*)p.ref + p.B * p.Q * p.L * p.ref_dim) {   // near the tensor's end
    for (int i = 0; i < width; i++) copy[i] = ref[i];
    both = copy;
  }
  Vec<A> half = all(A(.5) / A(p.P));
  for (int k = 0; k < t.blocks; k++) {
    Block<A>& block = qs.block[k];
    int have = t.n - k * PB;
    alignas(64) A spare[3 * PB];
    const A* xy = whole_rows((const R*)p.off + 2 * (head + t.first + k * PB), 2, have, spare);
    const A* a = whole_rows(qs.prob + t.first + k * PB, 1, have, spare + 2 * PB);
    for (int j = 0; j < PB; j += N) {
      const auto* level = t.maps[k].level + j;
      Vec<A> x, y, cx = spread(ref, both, level, 0), cy = spread(ref, both, level, 1);
      unzip(xy + 2 * j, x, y);
      if (p.ref_dim == 4) {
        Vec<A> sx = spread(ref, both, level, 2) * half * load(t.maps[k].W + j), sy = spread(ref, both, level, 3) * half * load(t.maps[k].H + j);
        store(block.sx + j, sx); store(block.sy + j, sy); store(block.ox + j, x); store(block.oy + j, y);
        x *= sx; y *= sy;
      }
      locate<A, FRAMED, GRAD>(t.maps[k], block, j, cx, cy, x, y, load(a + j), integer_of<A>(t.Dp));
    }
  }
}

template <class A> void mask_rows(const Task<A>& t, Query<A>& qs) {        // padded pixels of an unpacked map read as zero
  const uint8_t* mask = t.p.mask + t.b * t.p.S;
  for (int i = 0; i < t.n; i++) for (int c = 0; c < 4; c++) {
    integer_of<A>& r = qs.block[i / PB].at[c][i % PB];
    if (r >= 0 && mask[r]) r = -1;
  }
}

// The softmax of n queries first, then their points: the chains of dependent steps of several queries run side by side.
template <class A> SEMIDETR_INLINE void weights(Task<A>& t, int64_t q, int n) {
  const Problem& p = t.p;
  int N = int(p.L * p.P);
  if (p.ref_dim) for (int u = 0; u < n; u++) {
    int64_t head = ((t.b * p.Q + q + u) * p.M + t.m) * N;
    if (p.raw == kBFloat16) softmax((const half_of<A>*)p.logit + head, N, t.query[u].prob);
    else softmax((const A*)p.logit + head, N, t.query[u].prob);
  }
}

template <class A, bool FRAMED, bool GRAD> SEMIDETR_INLINE void points(const Task<A>& t, Query<A>& qs, int64_t q) {
  if (!t.p.ref_dim) points_plain<A, FRAMED, GRAD>(t, qs, q);
  else if (t.p.raw == kBFloat16) points_fused<A, half_of<A>, FRAMED, GRAD>(t, qs, q);
  else points_fused<A, A, FRAMED, GRAD>(t, qs, q);
  if (!FRAMED && t.p.mask) mask_rows(t, qs);
}

// ---- channels -----------------------------------------------------------------------------------------------------------
// Rows of the four taps of point i. `step` is the distance of neighbours in x.
template <class A, class T, bool FRAMED> SEMIDETR_INLINE void taps(const Maps<A>& m, const Block<A>& k, int i, T* v, int64_t step, T* outside, T** r) {
  if (FRAMED) { r[0] = v + k.at[0][i]; r[1] = r[0] + step; r[2] = r[0] + m.row[i]; r[3] = r[2] + step; }
  else for (int c = 0; c < 4; c++) { int64_t at = k.at[c][i]; r[c] = at < 0 ? outside : v + at * step; }
}

// WHOLE: these NV vectors are all of a packed row, so that neighbours in x lie at a distance known to the compiler.
template <class A, class T, bool FRAMED, int NV, bool WHOLE>
SEMIDETR_NOINLINE void gather_channels(const Task<A>& t, const Query<A>& qs, const T* v, int64_t step, const T* zeros, A* out) {
  constexpr int N = Lanes<A>::n, NA = NV >= 4 ? 2 : 4;
  if (WHOLE) step = NV * N;
  Vec<A> acc[NA][NV] = {};
  for (int k = 0; k < t.blocks; k++) {
    const Block<A>& block = qs.block[k];
    int n = t.n - k * PB < PB ? t.n - k * PB : PB;
    for (int i = 0; i < n; i++) {
      const T* r[4];
      taps<A, const T, FRAMED>(t.maps[k], block, i, v, step, zeros, r);
      for (int c = 0; c < 4; c++) {
        A w = block.wt[c][i];
        for (int j = 0; j < NV; j++) acc[c % NA][j] += w * load<A>(r[c] + j * N);
      }
    }
  }
  for (int j = 0; j < NV; j++) store(out + j * N, NA == 2 ? acc[0][j] + acc[1][j] : (acc[0][j] + acc[1][j]) + (acc[NA - 2][j] + acc[NA - 1][j]));
}

template <class A, class T, bool FRAMED> SEMIDETR_INLINE void gather(const Task<A>& t, const Query<A>& qs, const T* v, int64_t step, const T* zeros, A* out) {
  constexpr int N = Lanes<A>::n;
  int64_t c = 0, D = t.Dp;
  if (FRAMED && D == 4 * N) return gather_channels<A, T, FRAMED, 4, FRAMED>(t, qs, v, step, zeros, out);
  if (FRAMED && D == 2 * N) return gather_channels<A, T, FRAMED, 2, FRAMED>(t, qs, v, step, zeros, out);
  for (; c + 4 * N <= D; c += 4 * N) gather_channels<A, T, FRAMED, 4, false>(t, qs, v + c, step, zeros, out + c);
  for (; c + 2 * N <= D; c += 2 * N) gather_channels<A, T, FRAMED, 2, false>(t, qs, v + c, step, zeros, out + c);
  if (c < D) gather_channels<A, T, FRAMED, 1, false>(t, qs, v + c, step, zeros, out + c);
}

// Adds weight * grad to the gradient's rows, and leaves in block.d the dot products of grad with the value's rows.
template <class A, class T, bool FRAMED, int NV, bool ADD, bool WHOLE>
SEMIDETR_NOINLINE void scatter_channels(const Task<A>& t, Query<A>& qs, const T* v, int64_t step, const T* zeros, A* g, int64_t gstep, A* trash, const A* grad) {
  constexpr int N = Lanes<A>::n, G = N >= 4 ? N / 4 : 1;                   // points whose dot products fill one vector
  if (WHOLE) step = NV * N;
  const int64_t apart = FRAMED ? (const char*)g - (const char*)v : 0;      // packed: both maps lie in one workspace, row for row
  Vec<A> go[NV];
  for (int j = 0; j < NV; j++) go[j] = load<A>(grad + j * N);
  for (int k = 0; k < t.blocks; k++) {
    Block<A>& block = qs.block[k];
    int n = t.n - k * PB < PB ? t.n - k * PB : PB;
    for (int i = 0; i < n; i += G) {
      Vec<A> x[4 * G];
      for (int u = 0; u < G; u++) {
        const T* r[4]; A* s[4];
        taps<A, const T, FRAMED>(t.maps[k], block, i + u, v, step, zeros, r);
        if (FRAMED) for (int c = 0; c < 4; c++) s[c] = (A*)((char*)r[c] + apart);
        else taps<A, A, FRAMED>(t.maps[k], block, i + u, g, gstep, trash, s);
        for (int c = 0; c < 4; c++) {
          Vec<A> dot = go[0] * load<A>(r[c]);
          for (int j = 1; j < NV; j++) dot += go[j] * load<A>(r[c] + j * N);
          x[c * G + u] = dot;
          A w = block.wt[c][i + u];
          for (int j = 0; j < NV; j++) store(s[c] + j * N, load<A>(s[c] + j * N) + w * go[j]);
        }
      }
      A y[4 * G];
#if SEMIDETR_VW > 1
      if (N >= 4) { Tree<A, N>::sum(x); store(y, x[0]); }
      else for (int c = 0; c < 4; c++) { y[c] = x[c][0]; for (int j = 1; j < N; j++) y[c] += x[c][j]; }
#else
      for (int c = 0; c < 4; c++) y[c] = x[c];
#endif
      for (int c = 0; c < 4; c++) for (int u = 0; u < G; u++) block.d[c][i + u] = (ADD ? block.d[c][i + u] : A(0)) + y[c * G + u];
    }
  }
}

template <class A, class T, bool FRAMED>
SEMIDETR_INLINE void scatter(const Task<A>& t, Query<A>& qs, const T* v, int64_t step, const T* zeros, A* g, int64_t gstep, A* trash, const A* grad) {
  constexpr int N = Lanes<A>::n;
  int64_t c = 0, D = t.Dp;
  if (FRAMED && D == 4 * N) return scatter_channels<A, T, FRAMED, 4, false, FRAMED>(t, qs, v, step, zeros, g, gstep, trash, grad);
  if (FRAMED && D == 2 * N) return scatter_channels<A, T, FRAMED, 2, false, FRAMED>(t, qs, v, step, zeros, g, gstep, trash, grad);
#define SEMIDETR_PART(NV, ADD) scatter_channels<A, T, FRAMED, NV, ADD, false>(t, qs, v + c, step, zeros, g + c, gstep, trash, grad + c); c += NV * N
  if (D >= 4 * N) { SEMIDETR_PART(4, false); while (c + 4 * N <= D) { SEMIDETR_PART(4, true); } }
  else if (D >= 2 * N) { SEMIDETR_PART(2, false); }
  else { SEMIDETR_PART(1, false); }
  while (c < D) { SEMIDETR_PART(1, true); }
#undef SEMIDETR_PART
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

// The same for rows of whole cache lines in a result that nobody reads before the caches have lost it: lines that are written
// past the caches are not read from memory first, and push nothing out.
template <class A> SEMIDETR_INLINE void stream_row(const A* src, int64_t D, A* dst) {
  for (int64_t c = 0; c < D; c += Lanes<A>::n) stream(dst + c, load<A>(src + c));
}
SEMIDETR_INLINE void stream_row(const float* src, int64_t D, uint16_t* dst) {
  alignas(64) uint16_t line[kLine / 2];
  for (int64_t c = 0; c < D; c += kLine / 2) {
    write_row(src + c, kLine / 2, line);
    stream_row((const float*)line, kLine / 4, (float*)(dst + c));
  }
}
template <class A, class T> SEMIDETR_INLINE void give_row(bool stream, const A* src, int64_t D, T* dst) { if (stream) stream_row(src, D, dst); else write_row(src, D, dst); }
SEMIDETR_INLINE bool streams(const Problem& p, const void* row, int64_t bytes) { return kStreams && p.stream && ((uintptr_t)row | uintptr_t(bytes)) % kLine == 0; }
template <class T> SEMIDETR_INLINE bool streams_value(const Problem& p) { return streams(p, p.grad_value, p.D * int64_t(sizeof(T))); }

template <class T> SEMIDETR_INLINE void ahead(const T* p, int64_t n) { for (int64_t i = 0; i < n * int64_t(sizeof(T)); i += kLine) SEMIDETR_PREFETCH((const char*)p + i); }

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
        if (mask && mask[y * w + x]) clear(dst, Dp); else { copy_row(v, p.D, Dp, dst); ahead(v + kPixelsAhead * step, p.D); }
      clear(dst, Dp); dst += Dp;
    }
    clear(dst, (w + 1) * Dp); dst += (w + 1) * Dp;                         // row h
  }
}

// Writes the gradient out and leaves zeros for the next task.
template <class A, class T> void unpack(const Task<A>& t, A* src) {
  const Problem& p = t.p;
  int64_t step = p.M * p.D, Dp = t.Dp;
  const bool stream = streams_value<T>(p);
  for (int l = t.l0; l < t.l1; l++) {
    T* g = (T*)p.grad_value + ((t.b * p.S + p.start[l]) * p.M + t.m) * p.D;
    const uint8_t* mask = p.mask ? p.mask + t.b * p.S + p.start[l] : nullptr;
    int64_t w = p.w[l], h = p.h[l];
    clear(src, (w + 2) * Dp); src += (w + 2) * Dp;
    for (int64_t y = 0; y < h; y++) {
      for (int64_t x = 0; x < w; x++, src += Dp, g += step) {
        if (mask && mask[y * w + x]) clear(src, Dp);
        give_row(stream, src, p.D, g);
        clear(src, Dp);
      }
      clear(src, Dp); src += Dp;
    }
    clear(src, (w + 1) * Dp); src += (w + 1) * Dp;
  }
}

template <class A> int64_t packed_size(const Problem& p, int l0, int l1) {
  int64_t n = 0;
  for (int l = l0; l < l1; l++) n += framed_rows(p, l);
  return (n * padded_channels<A>(p) + 15) / 16 * 16;
}

// Packing costs about as much per pixel as a few taps; rows shorter than a vector can only be read from a packed map.
template <class A> SEMIDETR_INLINE bool framed(const Problem& p, bool backward) {
  return p.D % Lanes<A>::n || p.Q * p.L * p.P * 4 > (backward ? 2 : 4) * p.S;
}

// ---- tasks --------------------------------------------------------------------------------------------------------------
// Prefetches the inputs and the places of the results of the query that is `kAhead` further: its rows lie M apart from this one's.
template <class A> SEMIDETR_INLINE void prefetch(const Task<A>& t, int64_t q, const char* grad, int64_t size) {
  const Problem& p = t.p;
  int64_t head = (t.b * p.Q + q + kAhead) * p.M + t.m, at = head * p.L * p.P + t.first;
  int64_t r = p.ref_dim ? (p.raw == kBFloat16 ? 2 : int64_t(sizeof(A))) : int64_t(sizeof(A));
  const char* xy = (const char*)(p.ref_dim ? p.off : p.loc) + at * 2 * r;
  for (int64_t i = 0; i < t.n * 2 * r; i += kLine) SEMIDETR_PREFETCH(xy + i);
  const char* a = (const char*)(p.ref_dim ? p.logit : p.weight) + at * r;
  for (int64_t i = 0; i < t.n * r; i += kLine) SEMIDETR_PREFETCH(a + i);
  if (!grad) { for (int64_t i = 0; i < p.D * size; i += kLine) SEMIDETR_PREFETCH_WRITE((const char*)p.out + head * p.D * size + i); return; }
  for (int64_t i = 0; i < p.D * size; i += kLine) SEMIDETR_PREFETCH(grad + head * p.D * size + i);
  if (kStreams && p.stream) return;
  const char *gxy = (const char*)p.grad_loc + at * 2 * r, *ga = (const char*)p.grad_weight + at * r;
  for (int64_t i = 0; i < t.n * 2 * r; i += kLine) SEMIDETR_PREFETCH_WRITE(gxy + i);
  for (int64_t i = 0; i < t.n * r; i += kLine) SEMIDETR_PREFETCH_WRITE(ga + i);
}


SEMIDETR_INLINE int64_t row_size(int64_t Dp) { return (Dp + 15) / 16 * 16; }

template <class A> struct Workspace {                                      // one thread's memory
  A *zeros, *trash, *line, *value, *grad;
  Workspace(const Problem& p, void* scratch, int64_t packed_value) {
    int64_t r = row_size(padded_channels<A>(p));
    zeros = (A*)scratch; trash = zeros + r; line = trash + r; value = line + r; grad = value + packed_value;
    clear(zeros, 3 * r);
  }
};

template <class A, class T, class V, bool FRAMED>                          // T: of the tensors, V: of the rows that are read
void forward_task(Task<A>& t, int64_t q0, int64_t q1, const V* value, int64_t step, const V* zeros, A* line) {
  const Problem& p = t.p;
  bool direct = sizeof(T) == sizeof(A) && p.D == t.Dp;
  for (int64_t q = q0; q < q1; q += kBatch) {
    int n = q1 - q < kBatch ? int(q1 - q) : kBatch;
    for (int u = 0; u < n; u++) prefetch(t, q + u, nullptr, int64_t(sizeof(T)));
    weights(t, q, n);
    for (int u = 0; u < n; u++) points<A, FRAMED, false>(t, t.query[u], q + u);
    for (int u = 0; u < n; u++) {
      T* out = (T*)p.out + ((t.b * p.Q + q + u) * p.M + t.m) * p.D;
      if (direct) { gather<A, V, FRAMED>(t, t.query[u], value, step, zeros, (A*)out); continue; }
      gather<A, V, FRAMED>(t, t.query[u], value, step, zeros, line);
      write_row(line, p.D, out);
    }
  }
}

template <class A, class T> void forward(const Problem& p, int64_t begin, int64_t end, void* scratch) {
  bool packed = framed<A>(p, false);
  Task<A> t{p, 0, 0, 0, int(p.L), 0, 0, 0, padded_channels<A>(p), {}, {}};
  if (packed) describe<A, true>(t); else describe<A, false>(t);
  Workspace<A> ws(p, scratch, packed ? packed_size<A>(p, 0, int(p.L)) : 0);
  int64_t held = -1;
  for (int64_t i = begin; i < end; i++) {
    int64_t bm = i / p.chunks, c = i % p.chunks, q0 = p.Q * c / p.chunks, q1 = p.Q * (c + 1) / p.chunks;
    t.b = bm / p.M; t.m = bm % p.M;
    if (packed) {
      if (held != bm) pack<A, T>(t, ws.value);
      held = bm;
      forward_task<A, T, A, true>(t, q0, q1, ws.value, t.Dp, ws.zeros, ws.line);
    } else
      forward_task<A, T, T, false>(t, q0, q1, (const T*)p.value + (t.b * p.S * p.M + t.m) * p.D, p.M * p.D, (const T*)ws.zeros, ws.line);
  }
}

// The gradients of one query's points, from the four dot products of each.
template <class A, class R> SEMIDETR_NOINLINE void write_points(const Task<A>& t, Query<A>& qs, int64_t q) {
  const Problem& p = t.p;
  int64_t N = p.L * p.P, head = ((t.b * p.Q + q) * p.M + t.m) * N;
  const bool fused = p.ref_dim > 0, boxes = p.ref_dim == 4;
  for (int k = 0; k < t.blocks; k++) {
    Block<A>& b = qs.block[k];
    int first = t.first + k * PB, n = t.n - k * PB < PB ? t.n - k * PB : PB;
    alignas(64) A xy[2 * PB], ga[PB];
    for (int j = 0; j < PB; j += Lanes<A>::n) {
      Vec<A> fx = load(b.fx + j), fy = load(b.fy + j);
      Vec<A> d0 = load(b.d[0] + j), d2 = load(b.d[2] + j), right = load(b.d[1] + j) - d0, right2 = load(b.d[3] + j) - d2;
      Vec<A> top = fx * right + d0, low = fx * right2 + d2, gx = load(b.ax + j) * (fy * (right2 - right) + right), gy = load(b.ay + j) * (low - top);
      store(ga + j, fy * (low - top) + top);
      if (p.part_ref) { store(b.gx + j, gx); store(b.gy + j, gy); }
      if (!fused) { gx *= load(t.maps[k].W + j); gy *= load(t.maps[k].H + j); }
      else if (boxes) { gx *= load(b.sx + j); gy *= load(b.sy + j); }
      zip(gx, gy, xy + 2 * j);
    }
    R* gxy = (R*)p.grad_loc + 2 * (head + first);
    if (n == PB) give_row(streams(p, gxy, 2 * PB * sizeof(R)), xy, 2 * PB, gxy);
    else for (int i = 0; i < 2 * n; i++) put(gxy + i, xy[i]);
    if (!fused) {
      R* out = (R*)p.grad_weight + head + first;
      if (n == PB) give_row(streams(p, out, PB * sizeof(R)), ga, PB, out);
      else for (int i = 0; i < n; i++) put(out + i, ga[i]);
    } else if (p.by_level) for (int i = 0; i < n; i++) ((A*)p.part_weight)[head + first + i] = ga[i];
    else for (int i = 0; i < PB; i++) qs.grad[k * PB + i] = ga[i];
  }
  if (fused && !p.by_level) {
    softmax_grad(qs.prob, qs.grad, int(N), qs.grad);
    R* out = (R*)p.grad_weight + head;
    give_row(streams(p, out, N * sizeof(R)), qs.grad, N, out);
  }
  if (p.part_ref) {
    A half = A(.5) / A(p.P);
    for (int l = t.l0, i = 0; l < t.l1; l++) {
      A g[4] = {};
      for (int k = 0; k < p.P; k++, i++) {
        const Block<A>& b = qs.block[i / PB]; const Maps<A>& m = t.maps[i / PB]; int j = i % PB;
        A gx = b.gx[j] * m.W[j], gy = b.gy[j] * m.H[j];
        g[0] += gx; g[1] += gy; g[2] += gx * (b.ox[j] * half); g[3] += gy * (b.oy[j] * half);
      }
      A* out = (A*)p.part_ref + (((t.b * p.M + t.m) * p.Q + q) * p.L + l) * p.ref_dim;
      for (int c = 0; c < p.ref_dim; c++) out[c] = g[c];
    }
  }
}

template <class A, class T, class V, bool FRAMED>
void backward_task(Task<A>& t, const V* value, int64_t step, const V* zeros, A* grad, int64_t gstep, A* trash, A* line) {
  const Problem& p = t.p;
  bool direct = sizeof(T) == sizeof(A) && p.D == t.Dp;
  for (int64_t q = 0; q < p.Q; q += kBatch) {
    int n = p.Q - q < kBatch ? int(p.Q - q) : kBatch;
    for (int u = 0; u < n; u++) prefetch(t, q + u, (const char*)p.grad_out, int64_t(sizeof(T)));
    weights(t, q, n);
    for (int u = 0; u < n; u++) points<A, FRAMED, true>(t, t.query[u], q + u);
    for (int u = 0; u < n; u++) {
      const T* go = (const T*)p.grad_out + ((t.b * p.Q + q + u) * p.M + t.m) * p.D;
      if (!direct) copy_row(go, p.D, t.Dp, line);
      scatter<A, V, FRAMED>(t, t.query[u], value, step, zeros, grad, gstep, trash, direct ? (const A*)go : line);
    }
    for (int u = 0; u < n; u++)
      if (p.ref_dim && p.raw == kBFloat16) write_points<A, half_of<A>>(t, t.query[u], q + u); else write_points<A, A>(t, t.query[u], q + u);
  }
}

template <class A, class T> void backward(const Problem& p, int64_t begin, int64_t end, void* scratch) {
  bool packed = framed<A>(p, true);
  constexpr bool direct = sizeof(T) == sizeof(A);                          // an unpacked float gradient is added to in place
  Task<A> t{p, 0, 0, 0, int(p.L), 0, 0, 0, padded_channels<A>(p), {}, {}};
  Workspace<A> ws(p, scratch, packed ? packed_size<A>(p, 0, int(p.L)) : 0);
  int parts = p.by_level ? int(p.L) : 1, shown = -1;
  if (packed) clear(ws.grad, packed_size<A>(p, 0, int(p.L)));
  for (int64_t i = begin; i < end; i++) {
    int64_t bm = i / parts; int l = int(i % parts);
    t.b = bm / p.M; t.m = bm % p.M;
    if (l != shown) {
      if (p.by_level) { t.l0 = l; t.l1 = l + 1; }
      if (packed) describe<A, true>(t); else describe<A, false>(t);
      shown = l;
    }
    if (packed) {
      pack<A, T>(t, ws.value);
      backward_task<A, T, A, true>(t, ws.value, t.Dp, ws.zeros, ws.grad, t.Dp, ws.trash, ws.line);
      unpack<A, T>(t, ws.grad);
    } else {
      int64_t at = (t.b * p.S * p.M + t.m) * p.D, step = p.M * p.D;
      int64_t s0 = p.start[t.l0], s1 = t.l1 < p.L ? p.start[t.l1] : p.S;
      if (direct)
        backward_task<A, T, T, false>(t, (const T*)p.value + at, step, (const T*)ws.zeros, (A*)p.grad_value + at, step, ws.trash, ws.line);
      else {
        clear(ws.grad, (s1 - s0) * p.D);
        backward_task<A, T, T, false>(t, (const T*)p.value + at, step, (const T*)ws.zeros, ws.grad - s0 * p.D, p.D, ws.trash, ws.line);
        const bool stream = streams_value<T>(p);
        for (int64_t s = s0; s < s1; s++) give_row(stream, ws.grad + (s - s0) * p.D, p.D, (T*)p.grad_value + at + s * step);
      }
    }
  }
}

template <class A, class R> void finish(const Problem& p, int64_t begin, int64_t end) {
  int64_t N = p.L * p.P, K = p.L * p.ref_dim;
  Query<A> qs;
  for (int64_t bq = begin; bq < end; bq++) {
    if (p.by_level) for (int64_t m = 0; m < p.M; m++) {
      int64_t head = (bq * p.M + m) * N;
      softmax((const R*)p.logit + head, int(N), qs.prob);
      for (int64_t i = 0; i < N; i++) qs.grad[i] = ((const A*)p.part_weight)[head + i];
      for (int64_t i = N; i < (N + PB - 1) / PB * PB; i++) qs.grad[i] = 0;
      softmax_grad(qs.prob, qs.grad, int(N), qs.grad);
      for (int64_t i = 0; i < N; i++) put((R*)p.grad_weight + head + i, qs.grad[i]);
    }
    if (p.part_ref) {
      int64_t b = bq / p.Q, q = bq % p.Q;
      A* out = (A*)p.grad_ref + bq * K;
      clear(out, K);
      for (int64_t m = 0; m < p.M; m++) {
        const A* part = (const A*)p.part_ref + ((b * p.M + m) * p.Q + q) * K;
        for (int64_t i = 0; i < K; i++) out[i] += part[i];
      }
    }
  }
}

// ---- entry --------------------------------------------------------------------------------------------------------------
template <class A> size_t scratch_size(const Problem& p, bool backward) {
  int64_t n = 3 * row_size(padded_channels<A>(p));
  bool pk = framed<A>(p, backward);
  if (pk) n += packed_size<A>(p, 0, int(p.L)) * (backward ? 2 : 1);
  else if (backward && p.type == kBFloat16) n += p.S * p.D;
  return size_t(n) * sizeof(A);
}
size_t scratch_any(const Problem& p, bool backward) { return p.type == kDouble ? scratch_size<double>(p, backward) : scratch_size<float>(p, backward); }
bool needs_zero_any(const Problem& p) { return p.type == kDouble ? !framed<double>(p, true) : p.type == kFloat && !framed<float>(p, true); }
void forward_any(const Problem& p, int64_t begin, int64_t end, void* scratch) {
  if (p.type == kDouble) forward<double, double>(p, begin, end, scratch);
  else if (p.type == kFloat) forward<float, float>(p, begin, end, scratch);
  else forward<float, uint16_t>(p, begin, end, scratch);
}
void backward_any(const Problem& p, int64_t begin, int64_t end, void* scratch) {
  if (p.type == kDouble) backward<double, double>(p, begin, end, scratch);
  else if (p.type == kFloat) backward<float, float>(p, begin, end, scratch);
  else backward<float, uint16_t>(p, begin, end, scratch);
  settle();
}
void finish_any(const Problem& p, int64_t begin, int64_t end) {
  if (p.type == kDouble) finish<double, double>(p, begin, end);
  else if (p.raw == kBFloat16) finish<float, uint16_t>(p, begin, end);
  else finish<float, float>(p, begin, end);
}

}  // namespace
}  // namespace SEMIDETR_ISA

#define SEMIDETR_NAME2(a) #a
#define SEMIDETR_NAME(a) SEMIDETR_NAME2(a)
#define SEMIDETR_JOIN2(a, b) a##b
#define SEMIDETR_JOIN(a, b) SEMIDETR_JOIN2(a, b)
const Kernels& SEMIDETR_JOIN(kernels_, SEMIDETR_ISA)() {
  using namespace SEMIDETR_ISA;
  static const Kernels k = {SEMIDETR_NAME(SEMIDETR_ISA), needs_zero_any, scratch_any, forward_any, backward_any, finish_any};
  return k;
}

}  // namespace semidetr
